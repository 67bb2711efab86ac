//! Why a call takes the algorithm that it takes, as data and as sentences.

use std::fmt;

use unisono_core::call::Kind;
#[cfg(any(feature = "cuda", test))]
use unisono_core::device::select::Rules as GpuRules;
use unisono_core::device::table::BUILT_IN_FROM;
use unisono_core::device::{Form, Link, Table, Wish};
use unisono_core::layout::INLINE_BYTES;
use unisono_core::select::{
    self, Algorithm, DIRECT_FORMS, Decision, NotDirect, Question, Reason, Thresholds,
};
use unisono_core::settings::format_size;
use unisono_core::topology::Host;

use crate::tuning::{AskedBy, Origin, Selection};

/// What is said of buffers outside of windows, where nothing more is known.
pub(crate) const NOT_ALL: &str = "not all buffers lie in windows";

/// What was chosen for one call, and why. Its `Display` is a sentence:
///
/// ```
/// # use unisono::{Communicator, Kind, ReduceOp};
/// let ranks = Communicator::threads(2)?;
/// let choice = ranks[0].observer().choice(Kind::AllReduce { op: ReduceOp::Sum }, 1 << 20, false);
/// assert_eq!(
///     choice.to_string(),
///     "all_reduce of 1 MiB per rank among 2 ranks takes two-shot, because it is above 16 KiB, up to which one-shot is \
///      faster (default); not direct, because not all buffers lie in windows"
/// );
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct Choice {
    /// The operation.
    pub kind: Kind,
    /// Bytes per rank; of all parts together, where they have sizes of their own.
    pub bytes: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// What was chosen and why.
    pub decision: Decision,
    /// Who asked for an algorithm, if somebody did.
    pub asked_by: Option<AskedBy>,
    /// Where the sizes come from at which the choice changes.
    pub origin: Origin,
    /// What lies in no window, where that matters.
    outside: &'static str,
}

impl Choice {
    /// The choice for a call whose buffers lie in windows, or say what does not.
    pub(crate) fn new(
        selection: &Selection,
        world_size: usize,
        (kind, bytes): (Kind, usize),
        windows: Result<(), &'static str>,
    ) -> Self {
        let question = Question { kind, bytes, in_windows: windows.is_ok() };
        let outside = windows.err().unwrap_or_default();
        Self {
            kind,
            bytes,
            world_size,
            decision: select::decide(&question, &selection.rules),
            asked_by: selection.rules.forced.map(|_| selection.asked_by),
            origin: selection.origin.clone(),
            outside,
        }
    }

    /// The name of what runs: that of the algorithm; `inline` if it is one-shot with the data in the call slot; `channel` for
    /// messages, `flags` for a barrier.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Barrier => "flags",
            kind if kind.is_message() => "channel",
            _ if self.is_inline() => "inline",
            _ => self.decision.algorithm.name(),
        }
    }

    /// Whether the data travels in the call slot.
    fn is_inline(&self) -> bool {
        self.decision.algorithm == Algorithm::OneShot
            && select::is_inline(self.kind, self.bytes, self.world_size)
    }

    /// `because …`, without what was not taken.
    fn reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let asked_by = self.asked_by.unwrap_or(AskedBy::Setting);
        match self.decision.reason {
            Reason::Forced => write!(f, "because {asked_by} asks for it"),
            Reason::UpTo(usize::MAX) => {
                write!(f, "because it is faster at every size ({})", self.origin)
            }
            Reason::UpTo(size) => {
                write!(f, "because it is faster up to {} ({})", format_size(size as u64), self.origin)
            }
            Reason::Above(size) => write!(
                f,
                "because it is above {}, up to which one-shot is faster ({})",
                format_size(size as u64),
                self.origin
            ),
            Reason::Windows(size) => write!(
                f,
                "because all buffers lie in windows and it is at least {} ({})",
                format_size(size as u64),
                self.origin
            ),
            _ => f.write_str("its only form with buffers where they are"),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, ranks) = (self.kind.name(), self.world_size);
        match self.kind {
            Kind::Barrier => return write!(f, "barrier among {ranks} ranks moves flags only"),
            kind if kind.is_message() => {
                return write!(f, "{name} goes through the channel between the two ranks");
            }
            _ => {}
        }
        let size = format_size(self.bytes as u64);
        let size = match self.kind {
            // Only sender and receiver know the size of a part.
            Kind::AllToAllV | Kind::AllToAllCounted => String::new(),
            kind if kind.is_uneven() => format!(" of {size} in all"),
            _ => format!(" of {size} per rank"),
        };
        write!(f, "{name}{size} among {ranks} ranks takes {}, ", self.decision.algorithm)?;
        self.reason(f)?;
        if self.is_inline() {
            write!(f, "; inline, because {INLINE_BYTES} bytes fit into the call slot")?;
        }
        if let (Some(asked), Some(by)) = (self.decision.unserved, self.asked_by) {
            let why = match asked {
                Algorithm::Direct if self.decision.not_direct.is_some() => self.outside,
                _ => "the operation has no such form",
            };
            return write!(f, "; not {asked}, for which {by} asks, because {why}");
        }
        match self.decision.not_direct {
            Some(NotDirect::Below(usize::MAX)) => {
                write!(f, "; not direct, which is slower at every size ({})", self.origin)
            }
            Some(NotDirect::Below(size)) => {
                write!(f, "; not direct, which is faster from {} on", format_size(size as u64))
            }
            Some(NotDirect::NoWindows) => write!(f, "; not direct, because {}", self.outside),
            _ => Ok(()),
        }
    }
}

/// How a world is connected, how it chooses algorithms, and what its latest call took. Its `Display` is a few lines.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct Explanation {
    /// The hosts and their ranks.
    pub hosts: Vec<Host>,
    /// An algorithm that was asked for, and by whom.
    pub forced: Option<(Algorithm, AskedBy)>,
    /// The sizes at which the choice changes otherwise.
    pub thresholds: Thresholds,
    /// Where they come from.
    pub origin: Origin,
    /// How collectives on GPUs work, if this communicator has some.
    pub gpus: Option<OnGpus>,
    /// The latest collective of this rank, as `all_reduce #812 on rank 2 (bf16, 4096, sum)`, and its choice.
    pub latest: Option<(String, Choice)>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for host in &self.hosts {
            writeln!(f, "{}: ranks {:?}, connected by shared memory", host.name, host.ranks)?;
        }
        match self.forced {
            Some((algorithm, by)) => {
                writeln!(
                    f,
                    "algorithm: {algorithm} where it can serve, because {by} asks for it; otherwise"
                )?;
            }
            None => writeln!(f, "algorithm: by size per rank and windows")?,
        }
        let direct = |from: usize| match from {
            usize::MAX => "never direct".to_owned(),
            from => format!("in windows direct from {}", format_size(from as u64)),
        };
        let thresholds = &self.thresholds;
        let staged = match thresholds.all_reduce_one_shot_to {
            usize::MAX => "one-shot".to_owned(),
            size => format!("one-shot up to {}, then two-shot", format_size(size as u64)),
        };
        writeln!(f, "  all_reduce: {staged}; {}", direct(thresholds.direct_from[0]))?;
        let mut others: Vec<(usize, Vec<&str>)> = Vec::new();
        for (kind, from) in DIRECT_FORMS.into_iter().zip(thresholds.direct_from).skip(1) {
            match others.iter_mut().find(|(size, _)| *size == from) {
                Some((_, names)) => names.push(kind.name()),
                None => others.push((from, vec![kind.name()])),
            }
        }
        for (from, names) in others {
            writeln!(f, "  {}: one-shot; {}", names.join(", "), direct(from))?;
        }
        writeln!(f, "  parts of any size, several buffers of a rank: one-shot")?;
        writeln!(f, "sizes from: {}", self.origin)?;
        if let Some(gpus) = &self.gpus {
            write!(f, "{gpus}")?;
        }
        if let Some((call, choice)) = &self.latest {
            writeln!(f, "latest: {call}: {choice}")?;
        }
        Ok(())
    }
}

/// How collectives on GPUs choose their forms, and what these take of a device. Its `Display` is a few lines.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct OnGpus {
    /// How the GPUs reach each other.
    pub link: Link,
    /// The most blocks of a kernel that move data, unless more are asked for; one more exchanges headers.
    pub blocks: u32,
    /// The most multiprocessors that they fill while they wait for other ranks.
    pub multiprocessors: u32,
    /// A form that was asked for, and taken where it can serve.
    pub forced: Option<Wish>,
    /// The sizes at which the choice changes otherwise, and grids.
    pub table: Table,
    /// Where they come from.
    pub origin: Origin,
    is_narrow: bool,
    have_lines: bool,
    /// Whether copy engines serve calls that nobody asked it for, where the table says so.
    has_engines: bool,
}

impl OnGpus {
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn new(rules: &GpuRules, origin: Origin) -> Self {
        Self {
            link: rules.link,
            blocks: rules.most_blocks,
            multiprocessors: rules.multiprocessors(),
            forced: rules.forced,
            table: rules.table,
            origin,
            is_narrow: rules.is_narrow(),
            have_lines: rules.have_lines() && rules.crowd == 1,
            has_engines: GpuRules { forced: None, ..*rules }.lanes().is_some(),
        }
    }

    /// The origin of the table, as a phrase: `default (measured on …)`.
    pub fn table_from(&self) -> String {
        match &self.origin {
            Origin::TuningFile(_) => self.origin.to_string(),
            default => format!("{default} (measured on {BUILT_IN_FROM})"),
        }
    }
}

impl fmt::Display for OnGpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "GPUs: connected through {}; kernels wait in at most {} blocks, on {} multiprocessors",
            self.link.name(),
            self.blocks,
            self.multiprocessors
        )?;
        if let Some(wish) = self.forced {
            writeln!(f, "form: {} where it can serve, because it was asked for; otherwise", wish.form)?;
        }
        // Sizes up to which packets go are the last ones that do, or one below where something else begins.
        let from = |size: usize| match size {
            size if size.is_multiple_of(1024) => format!("from {}", format_size(size as u64)),
            size => format!("above {}", format_size(size as u64 - 1)),
        };
        let lines_up_to = |size: usize| match size {
            usize::MAX => "as long as lines have room".to_owned(),
            size => format!("up to {}", format_size(size as u64)),
        };
        for kind in DIRECT_FORMS {
            let row = self.table.row(kind);
            let up_to = |size: usize| match size {
                usize::MAX => "as long as packets have room".to_owned(),
                size => format!("up to {}", format_size(size as u64)),
            };
            write!(f, "  {}: one-shot {}", kind.name(), up_to(row.one_shot_to))?;
            if Form::TwoShot.serves(kind) && row.two_shot_to > row.one_shot_to {
                write!(f, ", two-shot {}", up_to(row.two_shot_to))?;
            }
            let one_to = row.one_shot_lines_to;
            let lines_to =
                if Form::TwoShotLines.serves(kind) { one_to.max(row.two_shot_lines_to) } else { one_to };
            if self.have_lines && row.lines_from <= lines_to {
                write!(f, ", in lines {}", from(row.lines_from))?;
                if row.lines_from <= one_to {
                    write!(f, ", one-shot {}", lines_up_to(one_to))?;
                }
                if lines_to > one_to {
                    write!(f, ", two-shot {}", lines_up_to(lines_to))?;
                }
            }
            let ring_from = if self.is_narrow { row.narrow_ring_from } else { row.ring_from };
            match ring_from {
                usize::MAX => write!(f, ", then bulk")?,
                size => write!(f, ", then bulk, ring {}", from(size))?,
            }
            if self.has_engines && Form::Engine.serves(kind) && row.engine_from != usize::MAX {
                write!(f, ", copy engines {}", from(row.engine_from))?;
            }
            match row.direct_from {
                usize::MAX => writeln!(f)?,
                0 => writeln!(f, "; in windows direct")?,
                size => writeln!(f, "; in windows direct {}", from(size))?,
            }
        }
        writeln!(f, "forms from: {}", self.table_from())
    }
}

#[cfg(test)]
mod tests {
    use unisono_core::ReduceOp;
    use unisono_core::settings::Settings;

    use super::*;

    fn selection(forced: Option<Algorithm>) -> Selection {
        let mut selection = Selection::new(&Settings::default(), None, AskedBy::Setting, 2);
        selection.rules.forced = forced;
        selection
    }

    fn sentence(
        selection: &Selection,
        kind: Kind,
        bytes: usize,
        windows: Result<(), &'static str>,
    ) -> String {
        Choice::new(selection, 2, (kind, bytes), windows).to_string()
    }

    const SUM: Kind = Kind::AllReduce { op: ReduceOp::Sum };
    const BOTH: Result<(), &str> = Ok(());
    const NONE: Result<(), &str> = Err(NOT_ALL);

    #[test]
    fn each_choice_is_a_sentence() {
        let auto = selection(None);
        let says = |kind, bytes, windows, expected: &str| {
            assert_eq!(sentence(&auto, kind, bytes, windows), expected);
        };
        says(
            SUM,
            8,
            NONE,
            "all_reduce of 8 B per rank among 2 ranks takes one-shot, because it is faster up to 16 KiB (default); \
             inline, because 48 bytes fit into the call slot; not direct, because not all buffers lie in windows",
        );
        says(
            SUM,
            1 << 20,
            Err("the output lies in no window"),
            "all_reduce of 1 MiB per rank among 2 ranks takes two-shot, because it is above 16 KiB, up to which one-shot \
             is faster (default); not direct, because the output lies in no window",
        );
        says(
            SUM,
            1 << 20,
            BOTH,
            "all_reduce of 1 MiB per rank among 2 ranks takes direct, because all buffers lie in windows and it is at \
             least 16 KiB (default)",
        );
        says(
            Kind::AllGather,
            2048,
            BOTH,
            "all_gather of 2 KiB per rank among 2 ranks takes one-shot, its only form with buffers where they are; not \
             direct, which is faster from 4 KiB on",
        );
        says(
            Kind::AllToAll,
            4096,
            BOTH,
            "all_to_all of 4 KiB per rank among 2 ranks takes direct, because all buffers lie in windows and it is at \
             least 4 KiB (default)",
        );
        let only = "among 2 ranks takes one-shot, its only form with buffers where they are";
        says(Kind::AllGatherV, 4096, NONE, &format!("all_gather_v of 4 KiB in all {only}"));
        says(Kind::AllToAllV, 0, NONE, &format!("all_to_all_v {only}"));
        says(Kind::Barrier, 0, NONE, "barrier among 2 ranks moves flags only");
        says(Kind::Send { to: 1, tag: 0 }, 8, NONE, "send goes through the channel between the two ranks");
    }

    #[test]
    fn what_was_asked_for_is_said_and_what_could_not_be_served() {
        let direct = selection(Some(Algorithm::Direct));
        assert_eq!(
            sentence(&direct, SUM, 64, BOTH),
            "all_reduce of 64 B per rank among 2 ranks takes direct, because UNISONO_ALGORITHM asks for it"
        );
        assert_eq!(
            sentence(&direct, Kind::AllGather, 4096, Err("the input lies in no window")),
            "all_gather of 4 KiB per rank among 2 ranks takes one-shot, its only form with buffers where they are; not \
             direct, for which UNISONO_ALGORITHM asks, because the input lies in no window"
        );
        let mut two = selection(Some(Algorithm::TwoShot));
        two.asked_by = AskedBy::Builder;
        assert_eq!(
            sentence(&two, Kind::Broadcast { root: 0 }, 4096, NONE),
            "broadcast of 4 KiB per rank among 2 ranks takes one-shot, its only form with buffers where they are; not \
             two-shot, for which Builder::algorithm asks, because the operation has no such form"
        );
    }

    #[test]
    fn what_gpus_do_is_told_with_what_it_takes_of_them() {
        let rules = GpuRules {
            ranks: 4,
            link: Link::Device,
            crowd: 1,
            order: unisono_core::settings::Order::Fixed,
            bulk_copies: true,
            most_blocks: 130,
            engines: false,
            forced: None,
            table: Table::built_in(4),
        };
        let default = OnGpus::new(&rules, Origin::Default);
        let lines: Vec<String> = default.to_string().lines().map(str::to_owned).collect();
        assert_eq!(
            lines[0],
            "GPUs: connected through device memory; kernels wait in at most 130 blocks, on 66 multiprocessors"
        );
        assert_eq!(
            lines[1],
            "  all_reduce: one-shot up to 256 KiB, two-shot up to 2 MiB, in lines above 64 KiB, one-shot up to 288 KiB, \
             two-shot up to 8 MiB, then bulk, ring from 16 MiB"
        );
        assert_eq!(
            lines[8],
            "  all_to_all: one-shot up to 1 MiB, in lines above 96 KiB, one-shot up to 2368 KiB, then bulk"
        );
        assert_eq!(lines[9], "forms from: default (measured on 2, 4 and 8 × NVIDIA H200)");
        let mut copied = GpuRules { engines: true, ..rules };
        copied.table.row_mut(Kind::AllGather).engine_from = 64 << 20;
        let told = OnGpus::new(&copied, Origin::Default).to_string();
        assert_eq!(told.matches(", copy engines from 64 MiB").count(), 1, "{told}");
        let mut few = GpuRules { most_blocks: 24, forced: "ring:8".parse().ok(), ..rules };
        let row = few.table.row_mut(SUM);
        (row.one_shot_to, row.two_shot_to, row.direct_from) = (usize::MAX, 4095, 0);
        row.lines_from = usize::MAX;
        let tuned = OnGpus::new(&few, Origin::TuningFile("/etc/u.tune".to_owned())).to_string();
        let lines: Vec<&str> = tuned.lines().collect();
        assert!(lines[0].ends_with("at most 24 blocks, on 25 multiprocessors"), "{tuned}");
        assert_eq!(lines[1], "form: ring where it can serve, because it was asked for; otherwise");
        assert_eq!(
            lines[2],
            "  all_reduce: one-shot as long as packets have room, then bulk; in windows direct"
        );
        assert_eq!(lines[10], "forms from: tuning file /etc/u.tune");
    }

    #[test]
    fn a_tuning_file_is_named() {
        let mut tuned = selection(None);
        tuned.origin = Origin::TuningFile("/etc/u.tune".to_owned());
        tuned.rules.thresholds.all_reduce_one_shot_to = usize::MAX;
        tuned.rules.thresholds.direct_from[0] = usize::MAX;
        assert_eq!(
            sentence(&tuned, SUM, 1 << 20, BOTH),
            "all_reduce of 1 MiB per rank among 2 ranks takes one-shot, because it is faster at every size (tuning file \
             /etc/u.tune); not direct, which is slower at every size (tuning file /etc/u.tune)"
        );
    }
}
