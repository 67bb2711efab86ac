//! The words of sentences: lists of ranks, times, and what fits one rank or several.

use std::time::Duration;

/// `rank 3`, `ranks 0, 1 and 3`, `ranks 0–6 and 9`.
pub fn ranks_phrase(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *rank => *last = *rank,
            _ => runs.push((*rank, *rank)),
        }
    }
    let texts = runs.into_iter().flat_map(|(first, last)| match last - first {
        0 => vec![first.to_string()],
        1 => vec![first.to_string(), last.to_string()],
        _ => vec![format!("{first}–{last}")],
    });
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, and(texts))
}

/// `30 ms`, `0.4 s`, `12 s`, `3 min`, `2 h`.
pub fn time_phrase(time: Duration) -> String {
    let milliseconds = time.as_millis();
    match milliseconds {
        0 => "less than 1 ms".to_owned(),
        1..100 => format!("{milliseconds} ms"),
        100..2_950 => {
            let tenths = (milliseconds + 50) / 100;
            match tenths % 10 {
                0 => format!("{} s", tenths / 10),
                tenth => format!("{}.{tenth} s", tenths / 10),
            }
        }
        2_950..120_000 => format!("{} s", (milliseconds + 500) / 1000),
        120_000..7_200_000 => format!("{} min", milliseconds / 60_000),
        _ => format!("{} h", milliseconds / 3_600_000),
    }
}

/// As [`time_phrase`], but so that ranks of which the same happened at about the same time share a sentence.
pub(super) fn rough(time: Duration) -> String {
    if time < Duration::from_millis(100) { "less than 0.1 s".to_owned() } else { time_phrase(time) }
}

/// What is said: with words that fit one rank, and with words that fit several.
#[derive(PartialEq)]
pub(super) struct Said {
    pub(super) one: String,
    pub(super) many: String,
}

impl Said {
    /// `has|have` takes the first of a pair for one rank, the second for several.
    pub(super) fn new(text: &str) -> Self {
        let side = |pick: usize| {
            let pieces = text.split('{').enumerate().map(|(at, piece)| match (at, piece.split_once('}')) {
                (0, _) | (_, None) => piece.to_owned(),
                (_, Some((pair, rest))) => format!("{}{rest}", pair.split('|').nth(pick).unwrap_or(pair)),
            });
            pieces.collect()
        };
        Self { one: side(0), many: side(1) }
    }
}

/// `a, b and c`.
pub(super) fn and(items: impl Iterator<Item = String>) -> String {
    let mut items: Vec<String> = items.collect();
    match items.pop() {
        None => String::new(),
        Some(last) if items.is_empty() => last,
        Some(last) => format!("{} and {last}", items.join(", ")),
    }
}

pub(super) fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
