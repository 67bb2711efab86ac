//! Where to change from one algorithm to another, from times that are noisy.
//!
//! A border stands at a measured size (from there on the second algorithm), before all of them or behind. What it loses
//! is the sum over all sizes of the logarithm of its time over the better one's. The border that loses least is taken,
//! unless the default loses hardly more: noise must not move it.

use serde::Serialize;

/// Both times at one size; sizes ascend.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Point {
    pub(super) bytes: usize,
    /// Of the algorithm for small messages.
    pub(super) small_us: f64,
    /// Of the one for large messages.
    pub(super) large_us: f64,
}

/// What a change of the border must gain, over all sizes together, as a part of the time at one size; and at each size on average.
const WORTH_A_CHANGE: (f64, f64) = (0.05, 0.01);

/// From which size on the second algorithm is taken: 0 for always, `usize::MAX` for never.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub(super) struct Border {
    pub(super) chosen: usize,
    pub(super) default: usize,
    /// The most that the chosen border gains over the default, at the size where it does, in per cent of the time.
    pub(super) gain_percent: f64,
    pub(super) gain_bytes: usize,
}

/// The border for these times.
pub(super) fn best(points: &[Point], default: usize) -> Border {
    let candidates =
        [0].into_iter().chain(points.iter().skip(1).map(|point| point.bytes)).chain([usize::MAX]);
    let least = candidates.map(|border| (loss(points, border), border)).min_by(|a, b| a.0.total_cmp(&b.0));
    let (least, border) = least.unwrap_or((0.0, default));
    let worth = WORTH_A_CHANGE.0.max(WORTH_A_CHANGE.1 * points.len() as f64);
    let chosen = if loss(points, default) - least > worth { border } else { default };
    let gain = |point: &Point| {
        let (before, after) = (time(point, default), time(point, chosen));
        ((before - after) / before * 100.0, point.bytes)
    };
    let gains = points.iter().map(gain).filter(|(percent, _)| *percent > 0.0);
    let (gain_percent, gain_bytes) = gains.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((0.0, 0));
    Border { chosen, default, gain_percent, gain_bytes }
}

/// The time at one size with this border.
fn time(point: &Point, border: usize) -> f64 {
    if point.bytes >= border { point.large_us } else { point.small_us }
}

fn loss(points: &[Point], border: usize) -> f64 {
    points.iter().map(|point| (time(point, border) / point.small_us.min(point.large_us)).ln()).sum()
}

impl Border {
    /// Why it is so, for people.
    pub(super) fn why(&self) -> String {
        if self.chosen == self.default {
            return "the default is as good".to_owned();
        }
        let size = unisono::settings::format_size(self.gain_bytes as u64);
        format!("{:.0} % less time at {size}", self.gain_percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times in µs at 1, 2, 4, 8, … KiB.
    fn points(times: &[(f64, f64)]) -> Vec<Point> {
        let point = |(at, (small_us, large_us)): (usize, &(f64, f64))| Point {
            bytes: 1024 << at,
            small_us: *small_us,
            large_us: *large_us,
        };
        times.iter().enumerate().map(point).collect()
    }

    #[test]
    fn the_border_stands_where_the_other_becomes_faster() {
        let found = best(&points(&[(1.0, 2.0), (2.0, 2.5), (4.0, 3.0), (8.0, 4.0)]), 1 << 20);
        assert_eq!((found.chosen, found.gain_bytes, found.gain_percent), (4096, 8192, 50.0));
        assert_eq!(found.why(), "50 % less time at 8 KiB");
    }

    #[test]
    fn one_noisy_size_does_not_move_it() {
        let noisy = points(&[(1.0, 2.0), (2.0, 1.9), (2.0, 3.0), (8.0, 4.0), (16.0, 6.0)]);
        assert_eq!(best(&noisy, 1 << 20).chosen, 8192);
    }

    #[test]
    fn what_never_or_always_pays_is_said_so() {
        assert_eq!(best(&points(&[(1.0, 2.0), (1.0, 3.0)]), 2048).chosen, usize::MAX);
        assert_eq!(best(&points(&[(2.0, 1.0), (3.0, 1.0)]), 2048).chosen, 0);
    }

    #[test]
    fn the_default_stays_where_it_is_as_good() {
        let close = points(&[(1.0, 2.0), (2.0, 2.02), (4.0, 3.0)]);
        let found = best(&close, 2048);
        assert_eq!((found.chosen, found.why().as_str()), (2048, "the default is as good"));
        assert_eq!(best(&[], 4096).chosen, 4096);
    }
}
