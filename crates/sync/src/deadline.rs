//! A point in time after which nobody waits any more.

use std::time::{Duration, Instant};

/// When a wait ends. Monotonic; [`Deadline::NEVER`] never comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// No deadline. For waits that another clock bounds.
    pub const NEVER: Self = Self(None);

    /// `timeout` from now; [`Deadline::NEVER`] if that is beyond what the clock can say.
    pub fn after(timeout: Duration) -> Self {
        Self(Instant::now().checked_add(timeout))
    }

    /// What is left; zero once it has passed, `None` if it never comes.
    pub fn remaining(self) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// What is left, but at most `cap`: the length of one bounded sleep.
    pub fn remaining_up_to(self, cap: Duration) -> Duration {
        self.remaining().map_or(cap, |left| left.min(cap))
    }

    /// True once it has passed.
    pub fn is_over(self) -> bool {
        self.0.is_some_and(|at| Instant::now() >= at)
    }

    /// The earlier of the two.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        match (self.0, other.0) {
            (Some(a), Some(b)) => Self(Some(a.min(b))),
            (a, b) => Self(a.or(b)),
        }
    }
}
