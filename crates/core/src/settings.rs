//! The `UNISONO_*` settings: one table that the parser, the documentation and the diagnosis are made from. Over 500 lines because every setting
//! has a row in that table.
//!
//! [`SETTINGS`] names every variable, what it means, what its values look like and what holds without it.
//! [`Settings::from_lookup`] reads them through a function, because this crate never touches the environment. Settings
//! that change an algorithm must be equal on all ranks: [`Settings::agreement_bytes`] is what their hash is taken of.

use std::time::Duration;

use crate::device::Wish;
use crate::device::multiprocessors::LEAST_MULTIPROCESSORS;
use crate::error::{Error, Result};
use crate::tuning::Tuning;

mod gpu;
mod names;
mod values;

pub use gpu::{GpuLaunch, HandleKind, PinnedWay};
pub use names::unknown_names;
pub use values::{format_size, parse_duration, parse_duration_or_never, parse_size};

/// What the values of a setting look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ValueKind {
    /// `30s`, `500ms`, `2m`, `1h`; a plain number is seconds.
    Duration,
    /// A duration, or `never` (also `off`).
    DurationOrNever,
    /// A duration, or `auto`.
    DurationOrAuto,
    /// One of these words; the second field lists them for messages.
    Choice(&'static [&'static str], &'static str),
    /// Free text; the string says what it stands for.
    Text(&'static str),
}

impl ValueKind {
    /// What a value should look like, for messages and documentation.
    pub const fn expected(self) -> &'static str {
        match self {
            Self::Duration => "a duration such as 30s, 500ms, 2m or 1h",
            Self::DurationOrNever => "a duration such as 30s, 500ms, 2m or 1h, or never",
            Self::DurationOrAuto => "a duration such as 50us or 1ms, or auto",
            Self::Choice(_, words) => words,
            Self::Text(what) => what,
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Setting {
    /// The variable, as `UNISONO_TIMEOUT`.
    pub name: &'static str,
    /// What it does, in one sentence.
    pub meaning: &'static str,
    /// What its values look like.
    pub kind: ValueKind,
    /// What holds without it, in the same notation.
    pub default: &'static str,
    /// True if it changes an algorithm, so that all ranks must have the same value.
    pub agreed: bool,
    /// True if launchers set it for their children, and people rarely do.
    pub internal: bool,
}

const ALGORITHMS: ValueKind =
    ValueKind::Choice(&["auto", "one-shot", "two-shot", "direct"], "auto, one-shot, two-shot or direct");
const ORDERS: ValueKind = ValueKind::Choice(&["fixed", "rank"], "fixed or rank");
const SWITCH: ValueKind = ValueKind::Choice(&["on", "off"], "on or off");
const REQUIREMENTS: ValueKind = ValueKind::Choice(&["none", "auth", "nvlink"], "none, auth or nvlink");
const PINNED_WAYS: ValueKind = ValueKind::Choice(&["auto", "memfd", "numa"], "auto, memfd or numa");
const HANDLES: ValueKind = ValueKind::Choice(&["auto", "descriptor", "fabric"], "auto, descriptor or fabric");
const LAUNCHES: ValueKind = ValueKind::Choice(
    &["auto", "plain", "dependent", "remote", "both"],
    "auto, plain, dependent, remote or both",
);
const FORMS: ValueKind = ValueKind::Text(
    "auto, one-shot, two-shot, bulk, direct, ring, engine, one-shot-lines or two-shot-lines, and after colons the blocks and the vectors of a tile, as in bulk:24:512",
);

const fn setting(
    name: &'static str,
    kind: ValueKind,
    default: &'static str,
    meaning: &'static str,
) -> Setting {
    Setting { name, meaning, kind, default, agreed: false, internal: false }
}

const fn agreed(row: Setting) -> Setting {
    Setting { agreed: true, ..row }
}

const fn internal(name: &'static str, what: &'static str, meaning: &'static str) -> Setting {
    Setting { internal: true, ..setting(name, ValueKind::Text(what), "", meaning) }
}

/// Every setting.
pub const SETTINGS: &[Setting] = &[
    setting(
        "UNISONO_LOG",
        ValueKind::Text("a level (error, warn, info, debug, trace) or a filter such as warn,unisono=debug"),
        "warn",
        "What is logged.",
    ),
    setting(
        "UNISONO_TIMEOUT",
        ValueKind::DurationOrNever,
        "600s",
        "Patience: how long an operation waits for a rank that lives but has not arrived.",
    ),
    setting(
        "UNISONO_INIT_TIMEOUT",
        ValueKind::Duration,
        "30s",
        "How long the ranks have to meet before those that came say who is missing.",
    ),
    setting(
        "UNISONO_LIVENESS",
        ValueKind::Duration,
        "3s",
        "After how long without an answer to its heartbeat a rank is suspected to be dead.",
    ),
    setting(
        "UNISONO_WARN_AFTER",
        ValueKind::DurationOrNever,
        "10s",
        "After how long a waiting operation logs a warning that names the ranks it waits for.",
    ),
    agreed(setting(
        "UNISONO_ALGORITHM",
        ALGORITHMS,
        "auto",
        "The algorithm of collectives where several are possible.",
    )),
    agreed(setting(
        "UNISONO_ORDER",
        ORDERS,
        "fixed",
        "The order of sums: fixed is the same in every run; rank is strictly 0 to n − 1, whatever the algorithm.",
    )),
    agreed(setting(
        "UNISONO_TUNE_FILE",
        ValueKind::Text("the path of a file that unisono tune wrote"),
        "",
        "Where algorithms change on this machine; without it, defaults that were measured on another one.",
    )),
    setting(
        "UNISONO_REQUIRE",
        REQUIREMENTS,
        "none",
        "What to refuse to run without: auth wants every peer to prove that it knows the job's secret, nvlink wants GPUs to reach each other's memory.",
    ),
    agreed(setting(
        "UNISONO_GPU_ALGORITHM",
        FORMS,
        "auto",
        "The algorithm of collectives on GPUs, where it can serve the call.",
    )),
    setting(
        "UNISONO_MULTIPROCESSORS",
        ValueKind::Text("auto, or a whole number from 9"),
        "auto",
        "The most multiprocessors of a GPU that the kernels of a communicator fill while they wait for other ranks; auto is half of them for the first communicator. The least of all ranks holds; blocks that UNISONO_GPU_ALGORITHM names stand above it.",
    ),
    agreed(setting(
        "UNISONO_PEER_ACCESS",
        SWITCH,
        "on",
        "Whether GPUs may reach each other's memory; without, they meet in pinned memory of the host.",
    )),
    setting(
        "UNISONO_PINNED",
        PINNED_WAYS,
        "auto",
        "What pinned windows are made of: memfd is shared memory that the driver registers, numa is memory of the driver on the GPU's NUMA node, auto is numa where the device offers it.",
    ),
    setting(
        "UNISONO_HANDLES",
        HANDLES,
        "auto",
        "How memory of GPUs is handed to other processes: as a descriptor or as a fabric handle; auto is a descriptor on one host.",
    ),
    setting(
        "UNISONO_GPU_LAUNCH",
        LAUNCHES,
        "auto",
        "How kernels are launched: auto brings those of few blocks onto the device while the one before still runs, plain brings none. For measuring: dependent brings all, remote lets fences not wait for what kernels of others have under way, both does both.",
    ),
    setting(
        "UNISONO_NVRTC",
        ValueKind::Text("the path of libnvrtc.so, or of its folder"),
        "",
        "Where the run-time compiler of CUDA is; without it, toolkits and Python packages are searched.",
    ),
    setting(
        "UNISONO_NCCL",
        ValueKind::Text("the path of libnccl.so.2, or of its folder"),
        "",
        "Where NCCL is, for unisono bench --against nccl; without it, the system's loader and Python packages are asked.",
    ),
    setting(
        "UNISONO_CACHE_DIR",
        ValueKind::Text("the path of a folder"),
        "",
        "Where compiled kernels are kept; without it, in the user's folder for caches.",
    ),
    setting(
        "UNISONO_STORE",
        ValueKind::Text("tcp://HOST:PORT, torch://HOST:PORT or file:///PATH"),
        "",
        "Where the ranks meet; without it the launcher decides.",
    ),
    setting(
        "UNISONO_INTERFACE",
        ValueKind::Text("the name of a network interface, such as eth0"),
        "",
        "The network interface on which rank 0 serves the store, where it does; without it, the address that names the store.",
    ),
    setting(
        "UNISONO_SPIN",
        ValueKind::DurationOrAuto,
        "auto",
        "How long a wait spins before it sleeps; auto depends on cores and ranks of the host.",
    ),
    setting(
        "UNISONO_RECORDER",
        SWITCH,
        "on",
        "Whether each rank records its last 1,024 calls in shared memory, for unisono top, dump and why.",
    ),
    internal(
        "UNISONO_SECRET_FD",
        "the number of an inherited descriptor",
        "A descriptor that holds the job's secret.",
    ),
    internal(
        "UNISONO_SECRET_FILE",
        "the path of a file of mode 0600",
        "A file that holds the job's secret: 32 bytes, or 64 hex digits.",
    ),
    internal("UNISONO_JOB", "a name", "The name of the job, the same on all ranks."),
    internal(
        "UNISONO_GENERATION",
        "a whole number from 0",
        "Which start of the job this is; ranks of an older one are refused.",
    ),
];

/// The row of `name`, or `None`.
pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|row| row.name == name)
}

/// The table as Markdown, without the internal rows.
pub fn markdown() -> String {
    let mut text = String::from("| name | values | default | meaning |\n| --- | --- | --- | --- |\n");
    for row in SETTINGS.iter().filter(|row| !row.internal) {
        let default = if row.default.is_empty() { "–".to_owned() } else { format!("`{}`", row.default) };
        let agreed = if row.agreed { " The same on all ranks." } else { "" };
        text +=
            &format!("| `{}` | {} | {default} | {}{agreed} |\n", row.name, row.kind.expected(), row.meaning);
    }
    text
}

/// Which algorithm collectives use where several are possible.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum AlgorithmChoice {
    /// The one that measures best for the call.
    #[default]
    Auto,
    /// Everything to everybody, reduced locally.
    OneShot,
    /// A shard to each owner, results back.
    TwoShot,
    /// Straight between the users' buffers.
    Direct,
}

/// The order in which a reduction adds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Order {
    /// The same in every run of the same world with the same options.
    #[default]
    Fixed,
    /// Strictly from rank 0 to the last, whatever the algorithm, device and placement.
    Rank,
}

/// What to refuse to run without.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Require {
    /// Nothing; a missing secret is one warning.
    #[default]
    None,
    /// Every peer proves that it knows the job's secret.
    Auth,
    /// GPUs reach each other's memory.
    Nvlink,
}

/// How long a wait spins before it sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Spin {
    /// Chosen from the cores of the host and the ranks on it.
    #[default]
    Auto,
    /// This long; zero sleeps at once.
    For(Duration),
}

/// All settings, read and checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The log filter.
    pub log: String,
    /// Patience with ranks that live but have not arrived; `None` is forever.
    pub timeout: Option<Duration>,
    /// How long the ranks have to meet.
    pub init_timeout: Duration,
    /// After how long without a heartbeat a rank is suspected.
    pub liveness: Duration,
    /// After how long a waiting operation warns; `None` is never.
    pub warn_after: Option<Duration>,
    /// The algorithm. Equal on all ranks.
    pub algorithm: AlgorithmChoice,
    /// The order of sums. Equal on all ranks.
    pub order: Order,
    /// The path of the tuning file. Its content is equal on all ranks.
    pub tune_file: Option<String>,
    /// What to refuse to run without.
    pub require: Require,
    /// Where the ranks meet, as written.
    pub store: Option<String>,
    /// The network interface to listen on.
    pub interface: Option<String>,
    /// How long a wait spins.
    pub spin: Spin,
    /// Whether calls are recorded.
    pub recorder: bool,
    /// The form of collectives on GPUs that was asked for, if one was. Equal on all ranks.
    pub gpu_algorithm: Option<Wish>,
    /// The most multiprocessors that kernels of a communicator fill; `None` as many as there are to share.
    pub multiprocessors: Option<u32>,
    /// Whether GPUs may reach each other's memory. Equal on all ranks.
    pub peer_access: bool,
    /// What pinned windows are made of.
    pub pinned: PinnedWay,
    /// As what memory of GPUs is handed to other processes.
    pub handles: HandleKind,
    /// How kernels are launched.
    pub gpu_launch: GpuLaunch,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            log: "warn".to_owned(),
            timeout: Some(Duration::from_secs(600)),
            init_timeout: Duration::from_secs(30),
            liveness: Duration::from_secs(3),
            warn_after: Some(Duration::from_secs(10)),
            algorithm: AlgorithmChoice::Auto,
            order: Order::Fixed,
            tune_file: None,
            require: Require::None,
            store: None,
            interface: None,
            spin: Spin::Auto,
            recorder: true,
            gpu_algorithm: None,
            multiprocessors: None,
            peer_access: true,
            pinned: PinnedWay::Auto,
            handles: HandleKind::Auto,
            gpu_launch: GpuLaunch::Auto,
        }
    }
}

impl Settings {
    /// Reads every setting through `lookup`, which gets a name and answers its value. An unset or empty variable
    /// leaves the default. The first value that cannot be read is [`Error::Setting`].
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let read = Reader { lookup };
        let default = Self::default();
        Ok(Self {
            log: read.text("UNISONO_LOG").unwrap_or(default.log),
            timeout: read.parsed("UNISONO_TIMEOUT", default.timeout, parse_duration_or_never)?,
            init_timeout: read.parsed("UNISONO_INIT_TIMEOUT", default.init_timeout, values::positive)?,
            liveness: read.parsed("UNISONO_LIVENESS", default.liveness, values::positive)?,
            warn_after: read.parsed("UNISONO_WARN_AFTER", default.warn_after, parse_duration_or_never)?,
            algorithm: read.parsed("UNISONO_ALGORITHM", default.algorithm, |word| match word {
                "auto" => Some(AlgorithmChoice::Auto),
                "one-shot" => Some(AlgorithmChoice::OneShot),
                "two-shot" => Some(AlgorithmChoice::TwoShot),
                "direct" => Some(AlgorithmChoice::Direct),
                _ => None,
            })?,
            order: read.parsed("UNISONO_ORDER", default.order, |word| match word {
                "fixed" => Some(Order::Fixed),
                "rank" => Some(Order::Rank),
                _ => None,
            })?,
            tune_file: read.text("UNISONO_TUNE_FILE"),
            require: read.parsed("UNISONO_REQUIRE", default.require, |word| match word {
                "none" => Some(Require::None),
                "auth" => Some(Require::Auth),
                "nvlink" => Some(Require::Nvlink),
                _ => None,
            })?,
            store: read.text("UNISONO_STORE"),
            interface: read.text("UNISONO_INTERFACE"),
            spin: read.parsed("UNISONO_SPIN", default.spin, |word| match word {
                "auto" => Some(Spin::Auto),
                "off" => Some(Spin::For(Duration::ZERO)),
                word => parse_duration(word).map(Spin::For),
            })?,
            recorder: read.parsed("UNISONO_RECORDER", default.recorder, switch)?,
            gpu_algorithm: read.parsed("UNISONO_GPU_ALGORITHM", None, wish)?,
            multiprocessors: read.parsed("UNISONO_MULTIPROCESSORS", None, multiprocessors)?,
            peer_access: read.parsed("UNISONO_PEER_ACCESS", default.peer_access, switch)?,
            pinned: read.parsed("UNISONO_PINNED", default.pinned, PinnedWay::from_word)?,
            handles: read.parsed("UNISONO_HANDLES", default.handles, HandleKind::from_word)?,
            gpu_launch: read.parsed("UNISONO_GPU_LAUNCH", default.gpu_launch, GpuLaunch::from_word)?,
        })
    }

    /// A stable encoding of the settings that change an algorithm, for the hello; of the tuning file that was read, its
    /// identity. Two ranks whose bytes differ must not work together.
    pub fn agreement_bytes(&self, tuning: Option<&Tuning>) -> Vec<u8> {
        let algorithm = match self.algorithm {
            AlgorithmChoice::Auto => "auto",
            AlgorithmChoice::OneShot => "one-shot",
            AlgorithmChoice::TwoShot => "two-shot",
            AlgorithmChoice::Direct => "direct",
        };
        let order = match self.order {
            Order::Fixed => "fixed",
            Order::Rank => "rank",
        };
        let tuning = tuning.map_or_else(|| "none".to_owned(), Tuning::identity);
        let gpu = self.gpu_algorithm.map_or_else(|| "auto".to_owned(), |wish| wish.to_string());
        let access = if self.peer_access { "on" } else { "off" };
        format!("algorithm={algorithm}\norder={order}\ntuning={tuning}\ngpu={gpu}\npeer_access={access}\n")
            .into_bytes()
    }
}

fn switch(word: &str) -> Option<bool> {
    match word {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

/// `auto`, or what was asked for.
fn wish(text: &str) -> Option<Option<Wish>> {
    if text == "auto" { Some(None) } else { text.parse().ok().map(Some) }
}

/// `auto`, or as many as a communicator can work with.
fn multiprocessors(text: &str) -> Option<Option<u32>> {
    if text == "auto" {
        return Some(None);
    }
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|count| is_number && *count >= LEAST_MULTIPROCESSORS).map(Some)
}

/// Reads values by name and says what was expected when one does not parse.
struct Reader<'l> {
    lookup: &'l dyn Fn(&str) -> Option<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        debug_assert!(find(name).is_some(), "{name} is not in the table");
        (self.lookup)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn parsed<T>(&self, name: &str, default: T, parse: impl FnOnce(&str) -> Option<T>) -> Result<T> {
        let Some(value) = self.text(name) else { return Ok(default) };
        parse(&value.to_ascii_lowercase()).ok_or_else(|| {
            let expected = find(name).map_or("a known setting", |row| row.kind.expected());
            Error::Setting { name: name.to_owned(), value, expected }
        })
    }
}

#[cfg(test)]
#[path = "settings/tests.rs"]
mod tests;
