//! How a communicator chooses algorithms, and from where it knows: argument > builder > `UNISONO_*` > tuning file >
//! default. The file is read once, when a communicator is made, and must be of this kind of machine.

use std::fmt;
use std::io::Read as _;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use unisono_core::device::Table;
use unisono_core::select::Rules;
use unisono_core::settings::{AlgorithmChoice, Settings};

use crate::error::{Error, Result};

/// Forms and grids of collectives on GPUs, and the tables that they are chosen by.
pub use unisono_core::device;
pub use unisono_core::select::{DIRECT_FORMS, Thresholds};
pub use unisono_core::tuning::{MAX_TUNING_BYTES, Tuning};

/// The kind of this machine, as tuning files name it: the processor and how many there are.
pub fn machine() -> String {
    let processors = unisono_node::identity::processors();
    format!("{}, {processors} processors", unisono_node::identity::processor_model())
}

/// Reads the tuning file at `path` and checks that it was measured on a machine like this one.
///
/// # Errors
/// [`Error::TuneFile`].
pub fn load(path: &str) -> Result<Tuning> {
    let wrong = |message: String| Error::TuneFile { path: path.to_owned(), message };
    let mut text = String::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(MAX_TUNING_BYTES as u64 + 1).read_to_string(&mut text));
    read.map_err(|error| wrong(error.to_string()))?;
    let tuning = Tuning::parse(&text).map_err(|error| wrong(error.to_string()))?;
    tuning.check_machine(&machine()).map_err(|error| wrong(error.to_string()))?;
    Ok(tuning)
}

/// Who asked for an algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AskedBy {
    /// `UNISONO_ALGORITHM`.
    Setting,
    /// [`Builder::algorithm`](crate::Builder::algorithm).
    Builder,
}

impl fmt::Display for AskedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Setting => "UNISONO_ALGORITHM",
            Self::Builder => "Builder::algorithm",
        })
    }
}

/// Where the thresholds of a communicator come from.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Origin {
    /// Built in.
    Default,
    /// The tuning file at this path.
    TuningFile(String),
    /// Built in, because the tuning file at this path has no line for this number of ranks.
    NotInFile(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::TuningFile(path) => write!(f, "tuning file {path}"),
            Self::NotInFile(path) => write!(f, "default; {path} has nothing for so many ranks"),
        }
    }
}

/// The rules of one communicator, and from where they come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Selection {
    pub(crate) rules: Rules,
    pub(crate) asked_by: AskedBy,
    pub(crate) origin: Origin,
    /// The tuning file and its path, for worlds of other sizes.
    tuning: Option<(Arc<Tuning>, String)>,
}

impl Selection {
    /// What `settings` and the tuning file that they name say for `world_size` ranks.
    pub(crate) fn new(
        settings: &Settings,
        tuning: Option<Tuning>,
        asked_by: AskedBy,
        world_size: usize,
    ) -> Self {
        let path = settings.tune_file.clone().unwrap_or_default();
        let tuning = tuning.map(|tuning| (Arc::new(tuning), path));
        let rules =
            Rules { forced: forced(settings.algorithm), thresholds: Thresholds::for_world(world_size) };
        Self { rules, asked_by, origin: Origin::Default, tuning }.of_world(world_size)
    }

    /// The same for another number of ranks.
    pub(crate) fn of_world(&self, world_size: usize) -> Self {
        let tuned = self.tuning.as_ref().map(|(tuning, path)| (tuning.thresholds(world_size), path.clone()));
        let (thresholds, origin) = match tuned {
            None => (None, Origin::Default),
            Some((None, path)) => (None, Origin::NotInFile(path)),
            Some((tuned, path)) => (tuned, Origin::TuningFile(path)),
        };
        let thresholds = thresholds.unwrap_or_else(|| Thresholds::for_world(world_size));
        Self { rules: Rules { thresholds, ..self.rules }, origin, ..self.clone() }
    }

    /// Where forms change on GPUs among `world_size` ranks, and where that comes from.
    #[cfg(feature = "cuda")]
    pub(crate) fn table(&self, world_size: usize) -> (Table, Origin) {
        let built_in = || Table::built_in(world_size);
        match &self.tuning {
            None => (built_in(), Origin::Default),
            Some((tuning, path)) => match tuning.table(world_size) {
                Some(table) => (*table, Origin::TuningFile(path.clone())),
                None => (built_in(), Origin::NotInFile(path.clone())),
            },
        }
    }

    /// Refuses a tuning file whose tables for GPUs were measured on others than `device`.
    #[cfg(feature = "cuda")]
    pub(crate) fn check_device(&self, device: &unisono_cuda::Device) -> Result<()> {
        let Some((tuning, path)) = &self.tuning else { return Ok(()) };
        tuning
            .check_devices(&device.facts().name)
            .map_err(|error| Error::TuneFile { path: path.clone(), message: error.to_string() })
    }
}

const fn forced(choice: AlgorithmChoice) -> Option<crate::Algorithm> {
    match choice {
        AlgorithmChoice::Auto => None,
        AlgorithmChoice::OneShot => Some(crate::Algorithm::OneShot),
        AlgorithmChoice::TwoShot => Some(crate::Algorithm::TwoShot),
        AlgorithmChoice::Direct => Some(crate::Algorithm::Direct),
    }
}

/// The tuning file that `settings` name, read.
pub(crate) fn of_settings(settings: &Settings) -> Result<Option<Tuning>> {
    settings.tune_file.as_deref().map(load).transpose()
}
