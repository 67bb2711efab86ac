//! The tuning file: thresholds between algorithms that were measured on one kind of machine, as text.
//!
//! ```text
//! unisono tuning 1
//! machine AMD EPYC, 2 processors
//! ranks=2 all_reduce_one_shot_to=16384 all_reduce_direct_from=16384 broadcast_direct_from=never all_gather_direct_from=8192 …
//! devices NVIDIA H200
//! gpus=4 all_reduce one_shot_to=262144 two_shot_to=2097152 …
//! checksum 5f0c1d2e3a4b5968
//! ```
//!
//! A line for each world size on the host, then those for GPUs of one kind ([`crate::device::table`]); lines that begin with `#` are
//! for people. Sizes are bytes per rank; `never` stands where direct never paid, `always` where one-shot always did. The checksum is the beginning of the SHA-256 of all lines
//! above it. Ranks compare it when they meet. What is not understood is an error with its line, never left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use crate::call::Kind;
use crate::device::Table;
use crate::device::table::Tables;
use crate::error::{Error, Result};
use crate::select::{DIRECT_FORMS, Thresholds};

/// The first line: what the file is, and the version of its format.
const FIRST_LINE: &str = "unisono tuning 1";
/// The most bytes that a tuning file may have.
pub const MAX_TUNING_BYTES: usize = 64 * 1024;
/// The largest world size with a line.
const MAX_RANKS: usize = 1024;

/// The name of the first threshold; the others are named by [`direct_from`].
const ONE_SHOT_TO: &str = "all_reduce_one_shot_to";

fn direct_from(kind: Kind) -> String {
    format!("{}_direct_from", kind.name())
}

/// What a tuning file says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tuning {
    machine: String,
    worlds: BTreeMap<usize, Thresholds>,
    gpus: Option<OnGpus>,
}

/// What was measured on GPUs.
#[derive(Clone, PartialEq, Eq, Debug)]
struct OnGpus {
    /// The name of the devices.
    devices: String,
    /// By world size.
    tables: BTreeMap<usize, Table>,
}

impl Tuning {
    /// Thresholds by world size, measured on `machine` (one line that names its kind).
    pub fn new(machine: &str, worlds: BTreeMap<usize, Thresholds>) -> Self {
        Self { machine: on_one_line(machine), worlds, gpus: None }
    }

    /// The same with tables for GPUs by world size, measured on devices of this name.
    pub fn with_gpus(self, devices: &str, tables: BTreeMap<usize, Table>) -> Self {
        Self { gpus: Some(OnGpus { devices: on_one_line(devices), tables }), ..self }
    }

    /// Reads a tuning file.
    ///
    /// # Errors
    /// [`Error::Tuning`] with the line that is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > MAX_TUNING_BYTES {
            let (got, cap) = (text.len() as u64, MAX_TUNING_BYTES as u64);
            return Err(Error::TooLarge { what: "tuning file", got, cap });
        }
        let (mut machine, mut worlds, mut checked) = (None, BTreeMap::new(), false);
        let (mut devices, mut tables) = (None, Tables::default());
        let mut above = 0;
        for (index, whole) in text.split_inclusive('\n').enumerate() {
            let line = whole.strip_suffix('\n').unwrap_or(whole);
            let wrong = |expected: &str, got: &str| Error::Tuning {
                line: index + 1,
                expected: expected.to_owned(),
                got: format!("`{}`", got.chars().take(80).collect::<String>()),
            };
            if index == 0 && line != FIRST_LINE {
                return Err(wrong(&format!("`{FIRST_LINE}`"), line));
            } else if checked {
                return Err(wrong("nothing after the checksum", line));
            } else if let Some(got) = line.strip_prefix("checksum ") {
                let expected = checksum(&text[..above]);
                if got != expected {
                    let wanted = format!("the checksum {expected} (was the file changed?)");
                    return Err(wrong(&wanted, got));
                }
                checked = true;
            } else if let Some(name) = line.strip_prefix("machine ") {
                machine = Some(name.to_owned());
            } else if let Some(name) = line.strip_prefix("devices ") {
                devices = Some(name.to_owned());
            } else if line.starts_with("gpus=") {
                if devices.is_none() {
                    return Err(wrong("a line with the devices above those of gpus=", line));
                }
                tables.add(line).map_err(|expected| wrong(&expected, line))?;
            } else if line.starts_with("ranks=") {
                let (ranks, thresholds) = world(line).map_err(|expected| wrong(&expected, line))?;
                if worlds.insert(ranks, thresholds).is_some() {
                    return Err(wrong("one line for each number of ranks", line));
                }
            } else if index > 0 && !line.starts_with('#') {
                return Err(wrong("a line that begins with machine, ranks=, devices, gpus= or #", line));
            }
            above += whole.len();
        }
        let lacks = |expected: &str| Error::Tuning {
            line: text.lines().count() + 1,
            expected: expected.to_owned(),
            got: "the end of the file".to_owned(),
        };
        if !checked {
            return Err(lacks("a checksum"));
        }
        let machine = machine.ok_or_else(|| lacks("a line with the machine"))?;
        let tables = tables.finish().map_err(|expected| lacks(&expected))?;
        Ok(Self { machine, worlds, gpus: devices.map(|devices| OnGpus { devices, tables }) })
    }

    /// The file, as [`Tuning::parse`] reads it; `notes` are for people and stand below the first line.
    pub fn to_text(&self, notes: &[String]) -> String {
        let mut text = format!("{FIRST_LINE}\n");
        for note in notes.iter().flat_map(|note| note.lines()) {
            let _ = writeln!(text, "# {note}");
        }
        let _ = writeln!(text, "machine {}", self.machine);
        for (ranks, thresholds) in &self.worlds {
            let _ = write!(text, "ranks={ranks}");
            let mut add = |name: &str, value: usize, word: &str| {
                let value = if value == usize::MAX { word.to_owned() } else { value.to_string() };
                let _ = write!(text, " {name}={value}");
            };
            add(ONE_SHOT_TO, thresholds.all_reduce_one_shot_to, "always");
            for (kind, value) in DIRECT_FORMS.into_iter().zip(thresholds.direct_from) {
                add(&direct_from(kind), value, "never");
            }
            text.push('\n');
        }
        if let Some(OnGpus { devices, tables }) = &self.gpus {
            let _ = writeln!(text, "devices {devices}");
            tables.iter().for_each(|(ranks, table)| text += &table.to_text(*ranks));
        }
        let checksum = checksum(&text);
        text + &format!("checksum {checksum}\n")
    }

    /// Refuses a file that was measured on another kind of machine than `here`.
    ///
    /// # Errors
    /// [`Error::ForeignTuning`].
    pub fn check_machine(&self, here: &str) -> Result<()> {
        same(here, &self.machine)
    }

    /// Refuses a file whose tables for GPUs were measured on devices of another name than `here`.
    ///
    /// # Errors
    /// [`Error::ForeignTuning`].
    pub fn check_devices(&self, here: &str) -> Result<()> {
        self.gpus.as_ref().map_or(Ok(()), |gpus| same(here, &gpus.devices))
    }

    /// What was measured with so many ranks on GPUs, if that was.
    pub fn table(&self, ranks: usize) -> Option<&Table> {
        self.gpus.as_ref()?.tables.get(&ranks)
    }

    /// The name of the devices on which tables for GPUs were measured, and the sizes of their worlds.
    pub fn on_gpus(&self) -> Option<(&str, Vec<usize>)> {
        self.gpus.as_ref().map(|gpus| (gpus.devices.as_str(), gpus.tables.keys().copied().collect()))
    }

    /// What was measured with this many ranks, if that was.
    pub fn thresholds(&self, world_size: usize) -> Option<Thresholds> {
        self.worlds.get(&world_size).copied()
    }

    /// Thresholds by world size.
    pub const fn worlds(&self) -> &BTreeMap<usize, Thresholds> {
        &self.worlds
    }

    /// 16 hex digits that are equal for files with the same thresholds and machine, whatever their notes.
    pub fn identity(&self) -> String {
        checksum(&self.to_text(&[]))
    }
}

fn on_one_line(name: &str) -> String {
    name.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn same(here: &str, there: &str) -> Result<()> {
    let here = on_one_line(here);
    if here == there { Ok(()) } else { Err(Error::ForeignTuning { here, there: there.to_owned() }) }
}

/// Reads `ranks=2 all_reduce_one_shot_to=…`; otherwise what was expected.
fn world(line: &str) -> Result<(usize, Thresholds), String> {
    let mut words = line.split(' ');
    let mut value = |name: &str, word: &str| {
        let text = words.next().and_then(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let number =
            |text: &str| text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
        let number = text.and_then(|text| if text == word { Some(usize::MAX) } else { number(text) });
        number.ok_or_else(|| format!("{name}= with a number of bytes or `{word}`"))
    };
    let ranks = value("ranks", "").ok().filter(|ranks| (1..=MAX_RANKS).contains(ranks));
    let ranks = ranks.ok_or_else(|| format!("ranks= with a number from 1 to {MAX_RANKS}"))?;
    let all_reduce_one_shot_to = value(ONE_SHOT_TO, "always")?;
    let mut thresholds = Thresholds { all_reduce_one_shot_to, ..Thresholds::for_world(ranks) };
    for (kind, from) in DIRECT_FORMS.into_iter().zip(&mut thresholds.direct_from) {
        *from = value(&direct_from(kind), "never")?;
    }
    match words.next() {
        Some(_) => Err("nothing after the last size".to_owned()),
        None => Ok((ranks, thresholds)),
    }
}

fn checksum(text: &str) -> String {
    Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuning() -> Tuning {
        let odd = Thresholds {
            all_reduce_one_shot_to: usize::MAX,
            direct_from: [4096, usize::MAX, 0, 512, 1, 2, 3, usize::MAX],
        };
        let worlds = [(2, Thresholds::for_world(2)), (4, odd)];
        Tuning::new("AMD  EPYC, 2 processors", BTreeMap::from(worlds))
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let text = tuning().to_text(&["made by a test".to_owned(), "two\nlines".to_owned()]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..5],
            [FIRST_LINE, "# made by a test", "# two", "# lines", "machine AMD EPYC, 2 processors"]
        );
        assert_eq!(
            lines[6],
            "ranks=4 all_reduce_one_shot_to=always all_reduce_direct_from=4096 broadcast_direct_from=never \
             all_gather_direct_from=0 reduce_direct_from=512 reduce_scatter_direct_from=1 gather_direct_from=2 \
             scatter_direct_from=3 all_to_all_direct_from=never"
        );
        let read = Tuning::parse(&text).unwrap();
        assert_eq!(read, tuning());
        assert_eq!(read.identity(), tuning().identity());
        assert_eq!(read.thresholds(2), Some(Thresholds::for_world(2)));
        assert_eq!(read.thresholds(3), None);
    }

    #[test]
    fn every_kind_of_damage_is_named_with_its_line() {
        let good = tuning().to_text(&[]);
        let error = |text: &str| Tuning::parse(text).unwrap_err().to_string();
        assert_eq!(
            error("unisono tuning 2\n"),
            "line 1: expected `unisono tuning 1`, got `unisono tuning 2`"
        );
        assert_eq!(error(FIRST_LINE), "line 2: expected a checksum, got the end of the file");
        assert_eq!(error(""), "line 1: expected a checksum, got the end of the file");
        let changed = good.replace("16384", "16385");
        assert!(error(&changed).starts_with("line 5: expected the checksum "), "{}", error(&changed));
        let unread = good.replace("always", "soon");
        assert!(
            error(&unread)
                .starts_with("line 4: expected all_reduce_one_shot_to= with a number of bytes or `always`"),
            "{}",
            error(&unread)
        );
        assert!(
            error(&good.replace("ranks=4", "ranks=+4"))
                .starts_with("line 4: expected ranks= with a number from")
        );
        assert!(error(&good.replace("ranks=4", "ranks=2")).starts_with("line 4: expected one line for each"));
        assert!(
            error(&good.replace("machine", "engine")).starts_with("line 2: expected a line that begins with")
        );
        assert!(
            error(&(good + "more\n")).starts_with("line 6: expected nothing after the checksum, got `more`")
        );
        assert!(matches!(Tuning::parse(&"#".repeat(MAX_TUNING_BYTES + 1)), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn a_file_of_another_machine_is_refused() {
        assert_eq!(tuning().check_machine("AMD EPYC,  2 processors"), Ok(()));
        assert_eq!(
            tuning().check_machine("Xeon, 8 processors").unwrap_err().to_string(),
            "it was measured on AMD EPYC, 2 processors; this machine is Xeon, 8 processors"
        );
    }

    #[test]
    fn tables_of_gpus_are_read_counted_and_checked_with_the_rest() {
        let mut changed = Table::built_in(4);
        changed.row_mut(Kind::AllGather).ring_from = usize::MAX;
        changed.row_mut(Kind::AllToAll).bulk_blocks = 33;
        let tables = BTreeMap::from([(2, Table::built_in(2)), (4, changed)]);
        let both = tuning().with_gpus("NVIDIA  H200", tables.clone());
        let text = both.to_text(&["a note".to_owned()]);
        assert_eq!(text.lines().count(), 5 + 1 + 16 + 1);
        let read = Tuning::parse(&text).unwrap();
        assert_eq!(read, both);
        assert_eq!((read.table(4), read.table(3)), (Some(&changed), None));
        assert_eq!(read.on_gpus(), Some(("NVIDIA H200", vec![2, 4])));
        assert_eq!((tuning().on_gpus(), tuning().table(4)), (None, None));
        // What ranks compare knows of them.
        let other = tuning().with_gpus("NVIDIA H200", BTreeMap::from([(2, Table::built_in(2))]));
        assert_ne!(both.identity(), tuning().identity());
        assert_ne!(both.identity(), other.identity());
        assert_eq!(both.check_devices("NVIDIA H200"), Ok(()));
        assert_eq!(tuning().check_devices("any"), Ok(()));
        assert_eq!(
            both.check_devices("NVIDIA B200").unwrap_err().to_string(),
            "it was measured on NVIDIA H200; this machine is NVIDIA B200"
        );
        let error =
            |from: &str, to: &str| Tuning::parse(&text.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(
            error("devices NVIDIA H200\n", "").starts_with("line 6: expected a line with the devices above"),
            "{}",
            error("devices NVIDIA H200\n", "")
        );
        let wrong = error("gpus=2 reduce one_shot_to", "gpus=2 reduce one_shot");
        assert!(
            wrong.starts_with(
                "line 10: expected one_shot_to= with a number of bytes or `never`, got `gpus=2 "
            ),
            "{wrong}"
        );
        // A file that was written without a line, and so has a checksum that fits.
        let lacks: String = text
            .lines()
            .filter(|line| !line.starts_with("gpus=4 gather") && !line.starts_with("checksum"))
            .map(|line| format!("{line}\n"))
            .collect();
        let lacks = format!("{lacks}checksum {}\n", checksum(&lacks));
        assert_eq!(
            Tuning::parse(&lacks).unwrap_err().to_string(),
            "line 23: expected a line gpus=4 gather, got the end of the file"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(unisono tuning 1\n)?(ranks=|machine |devices |gpus=|checksum |#)?\\PC*\n?\\PC*") {
            let _ = Tuning::parse(&text);
        }

        #[test]
        fn any_changed_byte_is_noticed(at in 0usize..200, byte in b' '..b'~') {
            let good = tuning().to_text(&[]);
            let mut bytes = good.clone().into_bytes();
            let at = at % bytes.len();
            prop_assume!(bytes[at] != byte);
            bytes[at] = byte;
            prop_assert!(Tuning::parse(&String::from_utf8(bytes).unwrap()).is_err());
        }
    }
}
