//! What the shared memory says of itself: which job, and who its ranks are.

use crate::device::layout::RECORDER_BYTES;
use crate::error::{Error, Result};
use crate::layout::{ControlLayout, Field, IDENTITY_WORDS, JOB_WORDS, LAYOUT_VERSION, PAGE};

/// First word of a control memory: `unisonoC` in the order of its bytes.
const MAGIC: u64 = u64::from_le_bytes(*b"unisonoC");
/// Words before the names: magic, version, ranks, generation, created.
const JOB_NAME_AT: usize = 5;
const JOB_NAME_WORDS: usize = 33;
const HOST_NAME_AT: usize = JOB_NAME_AT + JOB_NAME_WORDS;

/// What job a control memory belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JobLabel {
    /// Number of ranks.
    pub ranks: usize,
    /// Which start of the job.
    pub generation: u32,
    /// When the memory was made, in ticks of rank 0's source.
    pub created: u64,
    /// The job's name.
    pub job: String,
    /// The host's name.
    pub host: String,
}

impl JobLabel {
    /// The words; the first one, which makes the others valid, is to be written last. Names that are too long are cut.
    pub fn to_words(&self) -> [u64; JOB_WORDS] {
        let mut words = [0; JOB_WORDS];
        words[..JOB_NAME_AT].copy_from_slice(&[
            MAGIC,
            LAYOUT_VERSION,
            self.ranks as u64,
            u64::from(self.generation),
            self.created,
        ]);
        write_name(&self.job, &mut words[JOB_NAME_AT..HOST_NAME_AT]);
        write_name(&self.host, &mut words[HOST_NAME_AT..]);
        words
    }

    /// Whether these words are a label, be it of another version.
    pub fn is_one(words: &[u64]) -> bool {
        words.first() == Some(&MAGIC)
    }

    /// Reads a label.
    ///
    /// # Errors
    /// [`Error::Malformed`]: it is no control memory, or one of another version of this library.
    pub fn from_words(words: &[u64]) -> Result<Self> {
        let wrong = |expected: &str, got: String| Error::Malformed {
            what: "control memory",
            expected: expected.to_owned(),
            got,
        };
        let Some(words) = words.first_chunk::<JOB_WORDS>() else {
            return Err(wrong(&format!("{JOB_WORDS} words"), words.len().to_string()));
        };
        if words[0] != MAGIC {
            return Err(wrong("one that a communicator made", format!("first word {:#x}", words[0])));
        }
        if words[1] != LAYOUT_VERSION {
            return Err(wrong(&format!("layout version {LAYOUT_VERSION}"), words[1].to_string()));
        }
        let ranks = usize::try_from(words[2]).unwrap_or(usize::MAX);
        if ranks == 0 || ControlLayout::check(ranks).is_err() {
            return Err(wrong("a possible number of ranks", words[2].to_string()));
        }
        Ok(Self {
            ranks,
            generation: words[3] as u32,
            created: words[4],
            job: read_name(&words[JOB_NAME_AT..HOST_NAME_AT]),
            host: read_name(&words[HOST_NAME_AT..]),
        })
    }
}

/// First word of the memory of a device: `unisonoD` in the order of its bytes.
const DEVICE_MAGIC: u64 = u64::from_le_bytes(*b"unisonoD");
/// Words before the label of the job: magic, rank, seat, ordinal, source of ticks.
const DEVICE_JOB_AT: usize = 5;

/// Whose memory it is in which one of several devices of a rank reports: a page with these words, one that its kernels write, and its
/// flight recorder as it was when it was last asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceLabel {
    /// The job, as the control memory of its communicator tells it.
    pub job: JobLabel,
    /// The rank that has the device.
    pub rank: usize,
    /// Its number among the devices of all ranks, rank after rank.
    pub seat: usize,
    /// Its number in the process of the rank.
    pub ordinal: u32,
    /// Where the rank takes its ticks from.
    pub ticks: TickSource,
}

impl DeviceLabel {
    /// Where the label lies.
    pub const FIELD: Field = Field { offset: 0, bytes: (DEVICE_JOB_AT + JOB_WORDS) * 8 };
    /// The page that kernels write.
    pub const REPORT: Field = Field { offset: PAGE, bytes: PAGE };
    /// The flight recorder.
    pub const RECORDS: Field = Field { offset: 2 * PAGE, bytes: RECORDER_BYTES.next_multiple_of(PAGE) };

    /// The words; the first one, which makes the others valid, is to be written last.
    pub fn to_words(&self) -> Vec<u64> {
        let ticks = u64::from(self.ticks == TickSource::Clock);
        let own = [DEVICE_MAGIC, self.rank as u64, self.seat as u64, u64::from(self.ordinal), ticks];
        own.into_iter().chain(self.job.to_words()).collect()
    }

    /// Reads a label; `None` if it is none of this version.
    pub fn from_words(words: &[u64]) -> Option<Self> {
        let (&[magic, rank, seat, ordinal, ticks], job) = words.split_first_chunk()?;
        let job = JobLabel::from_words(job).ok().filter(|_| magic == DEVICE_MAGIC)?;
        let rank = usize::try_from(rank).ok().filter(|rank| *rank < job.ranks)?;
        Some(Self {
            job,
            rank,
            seat: usize::try_from(seat).ok()?,
            ordinal: u32::try_from(ordinal).ok()?,
            ticks: if ticks == 1 { TickSource::Clock } else { TickSource::Counter },
        })
    }
}

/// Whether a rank takes part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Presence {
    /// It has not mapped the memory yet.
    Absent = 0,
    /// It takes part.
    Here = 1,
    /// It ended the communicator together with the others.
    Destroyed = 2,
    /// It dropped its communicator.
    Dropped = 3,
}

/// Where a rank takes its ticks from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TickSource {
    /// The processor's time stamp counter.
    Counter,
    /// Nanoseconds of the monotonic clock.
    Clock,
}

/// Who a rank is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RankLabel {
    /// Whether it takes part.
    pub presence: Presence,
    /// Its process.
    pub pid: u32,
    /// When its process started, as the system tells it: with the pid, it names one process for ever.
    pub started: u64,
    /// Its source of ticks.
    pub ticks: TickSource,
    /// Whether it records its calls.
    pub is_recording: bool,
}

impl RankLabel {
    /// Index of the word that holds the presence, which changes and is to be written last.
    pub const PRESENCE: usize = 0;

    /// The words.
    pub fn to_words(self) -> [u64; IDENTITY_WORDS] {
        let mut words = [0; IDENTITY_WORDS];
        let source = u64::from(self.ticks == TickSource::Clock);
        words[..5].copy_from_slice(&[
            self.presence as u64,
            u64::from(self.pid),
            self.started,
            source,
            u64::from(self.is_recording),
        ]);
        words
    }

    /// Reads a label; what makes no sense is an absent rank.
    pub fn from_words(words: &[u64]) -> Self {
        let word = |at: usize| words.get(at).copied().unwrap_or(0);
        let presence = match word(Self::PRESENCE) {
            1 => Presence::Here,
            2 => Presence::Destroyed,
            3 => Presence::Dropped,
            _ => Presence::Absent,
        };
        Self {
            presence,
            pid: word(1) as u32,
            started: word(2),
            ticks: if word(3) == 1 { TickSource::Clock } else { TickSource::Counter },
            is_recording: word(4) == 1,
        }
    }
}

/// Length in bytes, then the bytes.
fn write_name(name: &str, words: &mut [u64]) {
    let room = (words.len() - 1) * 8;
    let cut = (0..=room.min(name.len())).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    words[0] = cut as u64;
    for (word, chunk) in words[1..].iter_mut().zip(name.as_bytes()[..cut].chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_le_bytes(bytes);
    }
}

/// The name, made safe to print: it goes to terminals.
fn read_name(words: &[u64]) -> String {
    let bytes: Vec<u8> = words[1..].iter().flat_map(|word| word.to_le_bytes()).collect();
    let length = usize::try_from(words[0]).unwrap_or(0).min(bytes.len());
    let printable = |letter: char| if letter.is_control() { '?' } else { letter };
    String::from_utf8_lossy(&bytes[..length]).chars().map(printable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(job: &str) -> JobLabel {
        JobLabel { ranks: 4, generation: 2, created: 77, job: job.into(), host: "gpu07".into() }
    }

    #[test]
    fn labels_round_trip_and_long_names_are_cut_at_a_letter() {
        assert_eq!(JobLabel::from_words(&label("run-1").to_words()), Ok(label("run-1")));
        let long = "ä".repeat(200);
        let read = JobLabel::from_words(&label(&long).to_words()).unwrap();
        assert_eq!(read.job, "ä".repeat(128));
        let rank = RankLabel {
            presence: Presence::Dropped,
            pid: 4121,
            started: 99,
            ticks: TickSource::Clock,
            is_recording: true,
        };
        assert_eq!(RankLabel::from_words(&rank.to_words()), rank);
        assert_eq!(RankLabel::from_words(&[]).presence, Presence::Absent);
    }

    #[test]
    fn what_is_no_control_memory_of_this_version_is_refused_with_the_reason() {
        let refused = |at: usize, value: u64| {
            let mut words = label("x").to_words();
            words[at] = value;
            JobLabel::from_words(&words).unwrap_err().to_string()
        };
        assert_eq!(
            refused(0, 5),
            "malformed control memory: expected one that a communicator made, got first word 0x5"
        );
        assert_eq!(refused(1, 9), "malformed control memory: expected layout version 4, got 9");
        assert_eq!(refused(2, 0), "malformed control memory: expected a possible number of ranks, got 0");
        assert!(refused(2, u64::MAX).ends_with("got 18446744073709551615"));
        assert!(JobLabel::from_words(&[MAGIC]).is_err());
    }

    #[test]
    fn labels_of_devices_round_trip_and_are_none_of_a_job() {
        let device =
            DeviceLabel { job: label("run-1"), rank: 3, seat: 5, ordinal: 1, ticks: TickSource::Clock };
        let words = device.to_words();
        assert_eq!(DeviceLabel::from_words(&words), Some(device));
        assert!(words.len() * 8 == DeviceLabel::FIELD.bytes && words.len() * 8 <= PAGE);
        assert!(!JobLabel::is_one(&words[ControlLayout::new(1).job().offset / 8..]));
        for (at, value) in [(0, 5), (1, 4), (6, 9)] {
            let mut words = words.clone();
            words[at] = value;
            assert_eq!(DeviceLabel::from_words(&words), None);
        }
        assert_eq!(DeviceLabel::from_words(&label("run-1").to_words()), None);
    }

    #[test]
    fn names_from_a_stranger_do_not_reach_the_terminal_as_commands() {
        let read = JobLabel::from_words(&label("a\x1b[2Jb").to_words()).unwrap();
        assert_eq!(read.job, "a?[2Jb");
        let mut words = label("x").to_words();
        words[JOB_NAME_AT] = u64::MAX;
        assert!(JobLabel::from_words(&words).unwrap().job.len() < 300);
    }
}
