//! The one wait of the house: spin, then yield, then sleep on a futex, always under an abort word and a deadline.
//!
//! Spinning is for a peer that runs on another core and is about to answer; yielding for one that shares our core;
//! sleeping for one that is late. The publisher wakes sleepers only when it sees some ([`Sleepers`]). It looks
//! without a fence, so a wake-up can in theory be missed; a sleep therefore never lasts longer than [`MAX_SLEEP`],
//! which also bounds how late an abort or the deadline is noticed.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::cell::Cell;
use std::time::{Duration, Instant};

use rustix::thread::futex;

use crate::atomics::Word;

/// The longest single sleep.
pub const MAX_SLEEP: Duration = Duration::from_millis(5);
/// How often a spinning waiter looks at the abort word.
const SPINS_PER_CHECK: u32 = 32;
/// How many waits go between two that spin as long as they may.
const PROBE_EVERY: u32 = 32;
/// How many yields go between two looks at the clock.
const YIELDS_PER_CLOCK: u32 = 16;

/// How long to wait, and in which manner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WaitPolicy {
    /// The most polls before the first yield; 0 when ranks outnumber cores.
    pub spins: u32,
    /// How long to yield before the first sleep.
    pub yield_for: Duration,
    /// How long to wait in all, from the first yield on; `None` waits until aborted.
    pub patience: Option<Duration>,
    /// After this long the warning function is called, once.
    pub warn_after: Option<Duration>,
}

/// Why a wait ended without what it waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Stopped {
    /// The abort word was set.
    #[error("aborted")]
    Aborted,
    /// Patience ran out.
    #[error("not ready after {waited:?}")]
    TimedOut {
        /// How long it waited.
        waited: Duration,
    },
}

/// The count of those who sleep on words of one publisher. It lies beside the words, in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Sleepers<'m>(&'m AtomicU32);

impl<'m> Sleepers<'m> {
    /// The count that lies in `word`.
    pub const fn new(word: &'m AtomicU32) -> Self {
        Self(word)
    }

    /// Wakes whoever sleeps on `word`, which the caller has just moved. Costs one load when nobody sleeps.
    #[inline(always)]
    pub fn wake(self, word: &AtomicU64) {
        if self.0.load(Ordering::Relaxed) != 0 {
            wake_word(word);
        }
    }
}

#[cold]
fn wake_word(word: &AtomicU64) {
    // An error here can only mean that the kernel has no futex, and then nobody sleeps on one either.
    let _ = futex::wake(low_half(word), futex::Flags::empty(), i32::MAX as u32);
}

/// The low 32 bits of `word`, which change whenever a count moves: what the kernel compares.
fn low_half(word: &AtomicU64) -> &AtomicU32 {
    let at = core::ptr::from_ref(word).cast::<AtomicU32>();
    let low = if cfg!(target_endian = "little") { at } else { at.wrapping_add(1) };
    // SAFETY: both halves of an 8-byte aligned atomic are 4-byte aligned and live as long as the word. Only the kernel
    // reads through this reference (futex compares it); our own accesses are all 64 bits wide.
    unsafe { &*low }
}

/// The word that ends every wait: 0, or 1 + the member that failed first. Any member may set it, once.
#[derive(Clone, Copy, Debug)]
pub struct AbortWord<'m>(&'m AtomicU32);

impl<'m> AbortWord<'m> {
    /// The abort word that lies in `word`.
    pub const fn new(word: &'m AtomicU32) -> Self {
        Self(word)
    }

    /// Sets the word for `member`; false if somebody was first. What the caller wrote before is visible to who sees it.
    pub fn raise(self, member: u32) -> bool {
        // SYNC: cause of the abort (release) — the record of `member`.
        Word::compare_exchange(self.0, 0, member.wrapping_add(1)).is_ok()
    }

    /// The member that failed first, if any did.
    #[inline(always)]
    pub fn raised(self) -> Option<u32> {
        // SYNC: cause of the abort (acquire) — the record of the member that is named.
        self.0.load(Ordering::Acquire).checked_sub(1)
    }
}

/// What a wait watches besides its condition.
#[derive(Clone, Copy, Debug)]
pub struct Watch<'m> {
    /// Set: give up.
    pub abort: AbortWord<'m>,
    /// The word that moves when the condition may have become true.
    pub word: &'m AtomicU64,
    /// The publisher's count of sleepers.
    pub sleepers: Sleepers<'m>,
    /// What this waiter learned about spinning.
    pub budget: &'m SpinBudget,
}

/// How many polls a waiter spends before it yields: all that the policy allows while that succeeds, halved each time it
/// does not, all again every 32 waits. So a peer on another core is found by spinning, and one on our own
/// core costs little of it.
#[derive(Debug, Default)]
pub struct SpinBudget {
    polls: Cell<u32>,
    waits: Cell<u32>,
    slow: Cell<u32>,
}

impl SpinBudget {
    /// Starts with all that `policy` allows.
    pub const fn new(policy: &WaitPolicy) -> Self {
        Self { polls: Cell::new(policy.spins), waits: Cell::new(0), slow: Cell::new(0) }
    }

    /// How many waits outlasted their spin, modulo 2³²: who sees the same number twice has at most spun in between.
    #[inline(always)]
    pub const fn slow_waits(&self) -> u32 {
        self.slow.get()
    }

    fn next(&self, policy: &WaitPolicy) -> u32 {
        let waits = self.waits.get().wrapping_add(1);
        self.waits.set(waits);
        let polls = if waits.is_multiple_of(PROBE_EVERY) { policy.spins } else { self.polls.get() };
        polls.max(SPINS_PER_CHECK).min(policy.spins)
    }
}

/// Waits until `ready`, which must become true only by a change of `watch.word`.
///
/// `warn` is called once, when `policy.warn_after` has passed. Returns at once if `ready` already holds, even after an
/// abort; otherwise an abort is noticed within [`MAX_SLEEP`].
#[inline(always)]
pub fn wait(
    policy: &WaitPolicy,
    watch: Watch<'_>,
    ready: impl Fn() -> bool,
    warn: impl FnOnce(),
) -> Result<(), Stopped> {
    if ready() {
        return Ok(());
    }
    let budget = watch.budget.next(policy);
    let mut spins = 0;
    while spins < budget {
        for _ in 0..SPINS_PER_CHECK {
            core::hint::spin_loop();
            if ready() {
                watch.budget.polls.set(policy.spins);
                return Ok(());
            }
        }
        spins += SPINS_PER_CHECK;
        if watch.abort.raised().is_some() {
            return stopped_unless(&ready);
        }
    }
    watch.budget.polls.set(watch.budget.polls.get() / 2);
    watch.budget.slow.set(watch.budget.slow.get().wrapping_add(1));
    wait_slowly(policy, watch, &ready, warn)
}

#[cold]
#[inline(never)]
fn wait_slowly(
    policy: &WaitPolicy,
    watch: Watch<'_>,
    ready: &dyn Fn() -> bool,
    warn: impl FnOnce(),
) -> Result<(), Stopped> {
    let start = Instant::now();
    let mut warn = Some(warn);
    let mut turn = 0u32;
    let mut asleep = false;
    loop {
        let seen = watch.word.load(Ordering::Acquire) as u32;
        if ready() {
            return Ok(());
        }
        if watch.abort.raised().is_some() {
            return stopped_unless(ready);
        }
        if asleep || turn.is_multiple_of(YIELDS_PER_CLOCK) {
            let waited = start.elapsed();
            if policy.patience.is_some_and(|patience| waited >= patience) {
                return Err(Stopped::TimedOut { waited });
            }
            if policy.warn_after.is_some_and(|after| waited >= after)
                && let Some(warn) = warn.take()
            {
                warn();
            }
            asleep = waited >= policy.yield_for;
        }
        turn = turn.wrapping_add(1);
        if asleep {
            sleep_on(watch, seen);
        } else {
            std::thread::yield_now();
        }
    }
}

/// After an abort: what the peer announced before it counts all the same.
#[cold]
fn stopped_unless(ready: &dyn Fn() -> bool) -> Result<(), Stopped> {
    if ready() { Ok(()) } else { Err(Stopped::Aborted) }
}

fn sleep_on(watch: Watch<'_>, seen: u32) {
    let timeout = futex::Timespec { tv_sec: 0, tv_nsec: MAX_SLEEP.as_nanos() as _ };
    watch.sleepers.0.fetch_add(1, Ordering::SeqCst);
    // Woken, timed out, interrupted or moved meanwhile: the loop above looks again in any case.
    let _ = futex::wait(low_half(watch.word), futex::Flags::empty(), seen, Some(&timeout));
    watch.sleepers.0.fetch_sub(1, Ordering::SeqCst);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const POLICY: WaitPolicy =
        WaitPolicy { spins: 64, yield_for: Duration::from_micros(100), patience: None, warn_after: None };

    #[derive(Default)]
    struct Words {
        abort: AtomicU32,
        word: AtomicU64,
        sleepers: AtomicU32,
    }

    impl Words {
        fn watch<'m>(&'m self, budget: &'m SpinBudget) -> Watch<'m> {
            Watch {
                budget,
                abort: AbortWord::new(&self.abort),
                word: &self.word,
                sleepers: Sleepers::new(&self.sleepers),
            }
        }
    }

    #[test]
    fn a_sleeper_is_woken_by_the_publisher() {
        let words = Arc::new(Words::default());
        let publisher = words.clone();
        let thread = thread::spawn(move || {
            while publisher.sleepers.load(Ordering::Acquire) == 0 {
                thread::yield_now();
            }
            publisher.word.store(7, Ordering::Release);
            Sleepers::new(&publisher.sleepers).wake(&publisher.word);
        });
        let budget = SpinBudget::new(&POLICY);
        wait(&POLICY, words.watch(&budget), || words.word.load(Ordering::Acquire) == 7, || {}).unwrap();
        thread.join().unwrap();
        assert_eq!(words.sleepers.load(Ordering::Acquire), 0);
    }

    #[test]
    fn spinning_that_does_not_pay_is_given_up_but_tried_again() {
        let policy = WaitPolicy { spins: 1024, patience: Some(Duration::ZERO), ..POLICY };
        let (words, budget) = (Words::default(), SpinBudget::new(&policy));
        let polls = |until: u32| {
            let polled = Cell::new(0);
            let ready = || polled.replace(polled.get() + 1) >= until;
            let _ = wait(&policy, words.watch(&budget), ready, || {});
            polled.get()
        };
        assert!(polls(u32::MAX) > 1024);
        let reduced: Vec<u32> = (2..PROBE_EVERY).map(|_| polls(u32::MAX)).collect();
        assert!(reduced[0] < 600 && reduced[reduced.len() - 1] < 64, "{reduced:?}");
        assert!(polls(500) > 500, "a probe that succeeds");
        assert_eq!(budget.polls.get(), 1024);
    }

    #[test]
    fn patience_ends_a_wait_after_one_warning() {
        let words = Words::default();
        let policy = WaitPolicy {
            patience: Some(Duration::from_millis(500)),
            warn_after: Some(Duration::from_millis(1)),
            ..POLICY
        };
        let warned = Cell::new(0);
        let budget = SpinBudget::new(&policy);
        let stopped =
            wait(&policy, words.watch(&budget), || false, || warned.set(warned.get() + 1)).unwrap_err();
        assert!(matches!(stopped, Stopped::TimedOut { waited } if waited >= Duration::from_millis(500)));
        assert_eq!(warned.get(), 1);
    }

    #[test]
    fn an_abort_ends_a_wait_but_not_one_that_is_already_satisfied() {
        let words = Words::default();
        let budget = SpinBudget::new(&POLICY);
        let abort = words.watch(&budget).abort;
        assert!(abort.raised().is_none() && abort.raise(4) && !abort.raise(2));
        assert_eq!(abort.raised(), Some(4));
        assert_eq!(wait(&POLICY, words.watch(&budget), || false, || {}), Err(Stopped::Aborted));
        assert_eq!(wait(&POLICY, words.watch(&budget), || true, || {}), Ok(()));
    }
}
