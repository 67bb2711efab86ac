//! Asking ranks for what their GPUs did: a word in the shared memory is the question, another one says that it was answered.
//!
//! Each rank that works on a GPU has a thread that looks at the question ten times a second, whatever the rank does, and has a
//! copy engine bring the recorder into the shared memory. So the answer needs neither the operating thread nor a free
//! multiprocessor, and comes after a tenth of a second; from a process that is stopped it does not come.

use std::time::{Duration, Instant};

use unisono_core::device::layout::{RECORDER_SERVES, REPORT_ANSWER, REPORT_RECORDER, REPORT_REQUEST};

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// From one look at the answer to the next.
const PAUSE: Duration = Duration::from_millis(2);

/// The page in which a rank's GPU reports, wherever it is read.
pub(crate) trait Page {
    /// The word at this place, if it can be read.
    fn load(&self, word: usize) -> Option<u64>;
    /// Writes the word; whether that went well.
    fn store(&self, word: usize, value: u64) -> bool;
}

/// Asks all of these ranks at once, and tells which of them answered.
pub(crate) fn ask(pages: &[impl Page]) -> Vec<bool> {
    ask_for(pages, PATIENCE)
}

fn ask_for<P: Page>(pages: &[P], patience: Duration) -> Vec<bool> {
    let serves = |page: &P| page.load(REPORT_RECORDER) == Some(RECORDER_SERVES);
    let request = |page: &P| {
        // Who asks at the same time writes the same: one answer is for both.
        let request = page.load(REPORT_REQUEST).filter(|_| serves(page))?.wrapping_add(1);
        page.store(REPORT_REQUEST, request).then_some(request)
    };
    let requests: Vec<Option<u64>> = pages.iter().map(request).collect();
    let asked = || pages.iter().zip(&requests);
    let has_answered = |(page, request): (&P, &Option<u64>)| {
        let answer = request.and_then(|request| Some(page.load(REPORT_ANSWER)?.wrapping_sub(request)));
        answer.is_some_and(|ahead| ahead.cast_signed() >= 0)
    };
    let start = Instant::now();
    while start.elapsed() < patience
        && asked().any(|one| one.1.is_some() && serves(one.0) && !has_answered(one))
    {
        std::thread::sleep(PAUSE);
    }
    asked().map(has_answered).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use unisono_core::device::layout::RECORDER_KEPT;

    use super::*;

    /// A rank that answers the request of this number at the `after`-th look at its answer.
    struct Rank {
        words: RefCell<HashMap<usize, u64>>,
        after: RefCell<u32>,
        is_writable: bool,
    }

    impl Rank {
        fn new(state: u64, request: u64, after: u32) -> Self {
            let words = [(REPORT_RECORDER, state), (REPORT_REQUEST, request), (REPORT_ANSWER, request)];
            Self { words: RefCell::new(words.into()), after: RefCell::new(after), is_writable: true }
        }
    }

    impl Page for Rank {
        fn load(&self, word: usize) -> Option<u64> {
            let mut words = self.words.borrow_mut();
            let mut after = self.after.borrow_mut();
            if word == REPORT_ANSWER && *after > 0 {
                *after -= 1;
                if *after == 0 {
                    let request = words[&REPORT_REQUEST];
                    words.insert(REPORT_ANSWER, request);
                }
            }
            words.get(&word).copied()
        }

        fn store(&self, word: usize, value: u64) -> bool {
            self.words.borrow_mut().insert(word, value);
            self.is_writable
        }
    }

    #[test]
    fn those_that_answer_are_told_from_those_that_do_not_or_cannot_be_asked() {
        let ranks = [
            Rank::new(RECORDER_SERVES, 7, 1),
            Rank::new(RECORDER_SERVES, u64::MAX, 3),
            Rank::new(RECORDER_SERVES, 7, 0),
            Rank::new(RECORDER_KEPT, 7, 1),
            Rank::new(0, 0, 1),
            Rank { is_writable: false, ..Rank::new(RECORDER_SERVES, 7, 1) },
        ];
        let start = Instant::now();
        let answered = ask_for(&ranks, Duration::from_millis(50));
        assert_eq!(answered, [true, true, false, false, false, false]);
        assert!(start.elapsed() >= Duration::from_millis(50));
        // Where nobody can be waited for, nobody is.
        let start = Instant::now();
        assert_eq!(ask_for(&ranks[3..], Duration::from_secs(9)), [false; 3]);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
