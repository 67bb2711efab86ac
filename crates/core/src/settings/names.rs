//! Which `UNISONO_*` names nobody knows, and which known one was probably meant.

use super::SETTINGS;

/// The names that start with `UNISONO_` but are no setting, in the order given, each with the nearest known name if
/// one is near enough to be meant. Those that start with `UNISONO_TEST_` are for our own tests. The caller warns.
///
/// ```
/// # use unisono_core::settings::unknown_names;
/// let unknown = unknown_names(["HOME", "UNISONO_LOG", "UNISONO_TIMOUT"].into_iter());
/// assert_eq!(unknown, [("UNISONO_TIMOUT".to_owned(), Some("UNISONO_TIMEOUT"))]);
/// ```
pub fn unknown_names<'n>(names: impl Iterator<Item = &'n str>) -> Vec<(String, Option<&'static str>)> {
    names
        .filter(|name| name.starts_with("UNISONO_") && !name.starts_with("UNISONO_TEST_"))
        .filter(|name| super::find(name).is_none())
        .map(|name| (name.to_owned(), nearest(name)))
        .collect()
}

/// The known name with the fewest edits, if that is at most a third of the part after the prefix.
fn nearest(name: &str) -> Option<&'static str> {
    let own_part = name.len() - "UNISONO_".len();
    let limit = (own_part / 3).max(1);
    // Names of absurd length are near to nothing, and not worth the quadratic comparison.
    if own_part > 64 {
        return None;
    }
    SETTINGS
        .iter()
        .map(|row| (edits(name, row.name), row.name))
        .min_by_key(|(edits, _)| *edits)
        .filter(|(edits, _)| *edits <= limit)
        .map(|(_, name)| name)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
fn edits(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut before_last = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before_last[j - 2] + 1);
            }
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_is_answered_with_the_name_that_was_meant() {
        let pairs = [
            ("UNISONO_TIMOUT", Some("UNISONO_TIMEOUT")),
            ("UNISONO_ODRER", Some("UNISONO_ORDER")),
            ("UNISONO_INTERFACES", Some("UNISONO_INTERFACE")),
            ("UNISONO_ALGO_RITHM", Some("UNISONO_ALGORITHM")),
            ("UNISONO_COLOUR", None),
            ("UNISONO_", None),
        ];
        for (name, expected) in pairs {
            assert_eq!(unknown_names([name].into_iter()), [(name.to_owned(), expected)]);
        }
    }

    #[test]
    fn known_and_foreign_names_are_not_reported() {
        let known = SETTINGS.iter().map(|row| row.name);
        assert_eq!(
            unknown_names(known.chain(["PATH", "NCCL_DEBUG", "unisono_log", "UNISONO_TEST_SCALE"])),
            []
        );
    }

    #[test]
    fn edits_count_insertions_deletions_replacements_and_swaps() {
        for (a, b, expected) in [
            ("", "abc", 3),
            ("abc", "abc", 0),
            ("abc", "acb", 1),
            ("abc", "axc", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(edits(a, b), expected, "{a} to {b}");
            assert_eq!(edits(b, a), expected, "{b} to {a}");
        }
    }
}
