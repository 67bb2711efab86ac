//! The tuning file: thresholds between algorithms that were measured on one kind of machine, as text.
//!
//! ```text
//! unisono tuning 1
//! machine AMD EPYC, 2 processors
//! ranks=2 all_reduce_one_shot_to=16384 all_reduce_direct_from=16384 broadcast_direct_from=never all_gather_direct_from=8192 …
//! checksum 5f0c1d2e3a4b5968
//! ```
//!
//! A line for each world size; lines that begin with `#` are for people. Sizes are bytes per rank; `never` stands where
//! direct never paid, `always` where one-shot always did. The checksum is the beginning of the SHA-256 of all lines
//! above it. Ranks compare it when they meet. What is not understood is an error with its line, never left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use crate::call::Kind;
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
}

impl Tuning {
    /// Thresholds by world size, measured on `machine` (one line that names its kind).
    pub fn new(machine: &str, worlds: BTreeMap<usize, Thresholds>) -> Self {
        Self { machine: machine.split_whitespace().collect::<Vec<_>>().join(" "), worlds }
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
            } else if line.starts_with("ranks=") {
                let (ranks, thresholds) = world(line).map_err(|expected| wrong(&expected, line))?;
                if worlds.insert(ranks, thresholds).is_some() {
                    return Err(wrong("one line for each number of ranks", line));
                }
            } else if index > 0 && !line.starts_with('#') {
                return Err(wrong("a line that begins with machine, ranks= or #", line));
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
        Ok(Self { machine: machine.ok_or_else(|| lacks("a line with the machine"))?, worlds })
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
        let checksum = checksum(&text);
        text + &format!("checksum {checksum}\n")
    }

    /// Refuses a file that was measured on another kind of machine than `here`.
    ///
    /// # Errors
    /// [`Error::ForeignTuning`].
    pub fn check_machine(&self, here: &str) -> Result<()> {
        let here = here.split_whitespace().collect::<Vec<_>>().join(" ");
        if self.machine == here {
            return Ok(());
        }
        Err(Error::ForeignTuning { here, there: self.machine.clone() })
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

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(unisono tuning 1\n)?(ranks=|machine |checksum |#)?\\PC*\n?\\PC*") {
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
