//! When a job goes on and when it is ended, as a state machine without processes and clocks.
//!
//! Inputs are events (`on_exit`, `on_signal`), outputs are actions from [`Policy::poll`]; time is the span since the
//! start of the job. After the first failure the other ranks get a grace period to report and end by themselves, then
//! SIGTERM, then SIGKILL. A signal that a person sends is handed on, and the ranks may take as long as they like;
//! the second one ends them. A rank that survives even SIGKILL (stuck in the kernel) is given up.

use std::collections::VecDeque;
use std::time::Duration;

/// From SIGTERM to SIGKILL.
pub(super) const TERMINATE_WAIT: Duration = Duration::from_secs(2);
/// From SIGKILL to giving up a process that the kernel cannot end.
pub(super) const KILL_WAIT: Duration = Duration::from_secs(10);

/// What a failed rank means for the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(super) enum OnFailure {
    /// They are ended.
    Stop,
    /// They go on.
    Continue,
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Ended {
    /// By a signal.
    Signal(i32),
    /// By itself, with this code.
    Code(i32),
}

impl Ended {
    pub(super) const fn is_failure(self) -> bool {
        !matches!(self, Self::Code(0))
    }
}

/// The end of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct End {
    pub(super) how: Ended,
    /// Since the start of the job.
    pub(super) at: Duration,
    /// The strongest signal that we had sent by then to end it.
    pub(super) pressed: Option<i32>,
}

/// What the user asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) world_size: usize,
    pub(super) grace: Duration,
    pub(super) timeout: Option<Duration>,
    pub(super) on_failure: OnFailure,
}

/// What to do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Send this signal to every living rank.
    Send(i32),
    /// Tell the person.
    Announce(Note),
}

/// What to tell while the job still runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Note {
    /// This rank failed first.
    FirstFailure { rank: usize },
    /// The time is over.
    TimedOut,
    /// This signal of a person was handed on.
    Forwarded { signal: i32 },
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Running,
    Grace { until: Duration },
    Terminating { until: Duration },
    Killing { until: Duration },
    GivenUp,
}

#[derive(Debug)]
pub(super) struct Policy {
    rules: Rules,
    phase: Phase,
    ends: Vec<Option<End>>,
    first_failure: Option<usize>,
    timed_out: bool,
    /// Signals to end that came from outside.
    interrupts: u32,
    /// The first of them, if nothing had failed by then.
    interrupted_by: Option<i32>,
    actions: VecDeque<Action>,
}

impl Policy {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            phase: Phase::Running,
            ends: vec![None; rules.world_size],
            first_failure: None,
            timed_out: false,
            interrupts: 0,
            interrupted_by: None,
            actions: VecDeque::new(),
        }
    }

    /// `rank` ended. Of several that ended since the last look, tell those first that were killed by a signal: they
    /// are the likelier cause.
    pub(super) fn on_exit(&mut self, rank: usize, how: Ended, now: Duration) {
        let pressed = match self.phase {
            Phase::Running | Phase::Grace { .. } => None,
            Phase::Terminating { .. } => Some(libc::SIGTERM),
            Phase::Killing { .. } | Phase::GivenUp => Some(libc::SIGKILL),
        };
        self.ends[rank] = Some(End { how, at: now, pressed });
        if !how.is_failure() || self.first_failure.is_some() || self.timed_out {
            return;
        }
        self.first_failure = Some(rank);
        // Whoever was told to end may take its time (it writes a checkpoint), and who told it need not be told.
        if self.is_stopping() || self.interrupts > 0 {
            return;
        }
        self.actions.push_back(Action::Announce(Note::FirstFailure { rank }));
        if self.rules.on_failure == OnFailure::Stop {
            self.phase = Phase::Grace { until: now.saturating_add(self.rules.grace) };
        }
    }

    /// A signal came from outside.
    pub(super) fn on_signal(&mut self, signal: i32, now: Duration) {
        if !matches!(signal, libc::SIGINT | libc::SIGTERM | libc::SIGHUP | libc::SIGQUIT) {
            self.actions.push_back(Action::Send(signal));
            return;
        }
        self.interrupts += 1;
        if self.first_failure.is_none() && !self.timed_out {
            self.interrupted_by.get_or_insert(signal);
        }
        match (self.interrupts, self.phase) {
            (1, Phase::Running | Phase::Grace { .. }) => {
                self.actions.push_back(Action::Send(signal));
                self.actions.push_back(Action::Announce(Note::Forwarded { signal }));
            }
            (_, Phase::Running | Phase::Grace { .. }) => self.terminate(now),
            (_, Phase::Terminating { .. }) => self.kill(now),
            (_, Phase::Killing { .. } | Phase::GivenUp) => {}
        }
    }

    /// The next thing to do, or `None` until [`Policy::next_wake`] or an event.
    pub(super) fn poll(&mut self, now: Duration) -> Option<Action> {
        if !self.is_over() {
            self.advance(now);
        }
        self.actions.pop_front()
    }

    /// When `poll` has something to do even if nothing happens.
    pub(super) fn next_wake(&self) -> Option<Duration> {
        match self.phase {
            Phase::Running => self.rules.timeout,
            Phase::Grace { until } => Some(self.rules.timeout.map_or(until, |timeout| until.min(timeout))),
            Phase::Terminating { until } | Phase::Killing { until } => Some(until),
            Phase::GivenUp => None,
        }
    }

    /// True once every rank has ended or was given up.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::GivenUp) || self.ends.iter().all(Option::is_some)
    }

    /// True once ranks are being ended.
    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Terminating { .. } | Phase::Killing { .. } | Phase::GivenUp)
    }

    pub(super) fn ends(&self) -> &[Option<End>] {
        &self.ends
    }

    pub(super) const fn first_failure(&self) -> Option<usize> {
        self.first_failure
    }

    /// The signal from outside that began the end.
    pub(super) const fn interrupted_by(&self) -> Option<i32> {
        self.interrupted_by
    }

    pub(super) const fn timed_out(&self) -> bool {
        self.timed_out
    }

    pub(super) const fn rules(&self) -> &Rules {
        &self.rules
    }

    fn advance(&mut self, now: Duration) {
        let time_is_over = self.rules.timeout.is_some_and(|timeout| now >= timeout);
        match self.phase {
            Phase::Running | Phase::Grace { .. } if time_is_over => {
                self.timed_out = true;
                self.actions.push_back(Action::Announce(Note::TimedOut));
                self.terminate(now);
            }
            Phase::Grace { until } if now >= until => self.terminate(now),
            Phase::Terminating { until } if now >= until => self.kill(now),
            Phase::Killing { until } if now >= until => self.phase = Phase::GivenUp,
            _ => {}
        }
    }

    fn terminate(&mut self, now: Duration) {
        self.phase = Phase::Terminating { until: now.saturating_add(TERMINATE_WAIT) };
        self.actions.push_back(Action::Send(libc::SIGTERM));
        // A stopped process ends only once it goes on.
        self.actions.push_back(Action::Send(libc::SIGCONT));
    }

    fn kill(&mut self, now: Duration) {
        self.phase = Phase::Killing { until: now.saturating_add(KILL_WAIT) };
        self.actions.push_back(Action::Send(libc::SIGKILL));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;
    const GRACE: u64 = 5;

    fn policy(world_size: usize) -> Policy {
        Policy::new(Rules { world_size, grace: S(GRACE), timeout: None, on_failure: OnFailure::Stop })
    }

    fn actions(policy: &mut Policy, now: u64) -> Vec<Action> {
        std::iter::from_fn(|| policy.poll(S(now))).collect()
    }

    const END: [Action; 2] = [Action::Send(libc::SIGTERM), Action::Send(libc::SIGCONT)];
    const KILL: [Action; 1] = [Action::Send(libc::SIGKILL)];

    #[test]
    fn a_job_whose_ranks_all_succeed_is_left_alone() {
        let mut policy = policy(2);
        policy.on_exit(1, Ended::Code(0), S(1));
        assert_eq!((actions(&mut policy, 1000), policy.next_wake(), policy.is_over()), (vec![], None, false));
        policy.on_exit(0, Ended::Code(0), S(1001));
        assert!(policy.is_over() && policy.first_failure().is_none());
    }

    #[test]
    fn after_a_failure_come_grace_then_sigterm_then_sigkill_then_giving_up() {
        let mut policy = policy(3);
        policy.on_exit(2, Ended::Signal(9), S(10));
        assert_eq!(actions(&mut policy, 10), [Action::Announce(Note::FirstFailure { rank: 2 })]);
        assert_eq!(policy.next_wake(), Some(S(15)));
        assert_eq!(actions(&mut policy, 14), []);
        policy.on_exit(0, Ended::Code(1), S(14));
        assert_eq!(actions(&mut policy, 15), END);
        assert_eq!(policy.next_wake(), Some(S(17)));
        assert_eq!(actions(&mut policy, 17), KILL);
        assert_eq!(policy.next_wake(), Some(S(27)));
        assert!(!policy.is_over());
        assert_eq!(actions(&mut policy, 27), []);
        assert!(policy.is_over());
        assert_eq!(policy.first_failure(), Some(2));
        assert_eq!(policy.ends()[0], Some(End { how: Ended::Code(1), at: S(14), pressed: None }));
        assert_eq!(policy.ends()[1], None);
    }

    #[test]
    fn what_ended_a_rank_is_remembered() {
        let mut policy = policy(3);
        policy.on_exit(0, Ended::Code(7), S(0));
        assert_eq!(actions(&mut policy, 5).len(), 3);
        policy.on_exit(1, Ended::Signal(15), S(6));
        assert_eq!(actions(&mut policy, 7), KILL);
        policy.on_exit(2, Ended::Signal(9), S(7));
        let pressed: Vec<_> = policy.ends().iter().map(|end| end.unwrap().pressed).collect();
        assert_eq!(pressed, [None, Some(libc::SIGTERM), Some(libc::SIGKILL)]);
    }

    #[test]
    fn with_continue_the_survivors_go_on() {
        let rules = Rules { on_failure: OnFailure::Continue, ..*policy(2).rules() };
        let mut policy = Policy::new(rules);
        policy.on_exit(1, Ended::Code(3), S(1));
        assert_eq!(actions(&mut policy, 1), [Action::Announce(Note::FirstFailure { rank: 1 })]);
        assert_eq!((actions(&mut policy, 10_000), policy.next_wake()), (vec![], None));
        policy.on_exit(0, Ended::Code(4), S(10_000));
        assert_eq!((actions(&mut policy, 10_000), policy.first_failure()), (vec![], Some(1)));
    }

    #[test]
    fn the_timeout_ends_the_job_even_in_the_grace_period() {
        for failure in [false, true] {
            let mut policy = Policy::new(Rules { timeout: Some(S(20)), ..*policy(2).rules() });
            if failure {
                policy.on_exit(0, Ended::Code(1), S(19));
                assert_eq!(actions(&mut policy, 19).len(), 1);
            }
            assert_eq!(policy.next_wake(), Some(S(20)));
            let expected = [&[Action::Announce(Note::TimedOut)][..], &END].concat();
            assert_eq!(actions(&mut policy, 20), expected);
            policy.on_exit(1, Ended::Signal(15), S(20));
            assert_eq!((policy.timed_out(), policy.first_failure()), (true, failure.then_some(0)));
        }
    }

    #[test]
    fn signals_are_handed_on_and_the_second_to_end_ends() {
        let mut policy = policy(2);
        policy.on_signal(libc::SIGUSR1, S(1));
        assert_eq!(actions(&mut policy, 1), [Action::Send(libc::SIGUSR1)]);
        policy.on_signal(libc::SIGINT, S(2));
        let expected =
            [Action::Send(libc::SIGINT), Action::Announce(Note::Forwarded { signal: libc::SIGINT })];
        assert_eq!(actions(&mut policy, 2), expected);
        policy.on_exit(0, Ended::Signal(2), S(3));
        assert_eq!((policy.first_failure(), policy.interrupted_by()), (Some(0), Some(libc::SIGINT)));
        assert_eq!(actions(&mut policy, 10_000), [], "rank 1 may write its checkpoint");
        policy.on_signal(libc::SIGINT, S(10_000));
        assert_eq!(actions(&mut policy, 10_000), END);
        policy.on_signal(libc::SIGTERM, S(10_001));
        assert_eq!(actions(&mut policy, 10_001), KILL);
    }
}
