//! The settings of a buffer, how they are checked, and how ranks compare them.

use std::time::Duration;

use unisono_core::DType;
use unisono_core::ep::{
    ArenaLayout, ArenaShape, DeviceLayout, HIDDEN_STEP, MAX_RANKS, MAX_TOP_K, Placement, cast, is_summed,
};

use crate::error::{Error, Result};

/// What all ranks say alike when they make a [`Buffer`](super::Buffer).
///
/// ```
/// use unisono::ep::Settings;
/// let settings = Settings { capacity: 64, top_k: 8, ..Settings::new(1024, 32) };
/// assert!(settings.bytes(8)? > 64 * 1024 * 2);
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Elements of a token: a multiple of 8.
    pub hidden: usize,
    /// Experts of all ranks.
    pub experts: usize,
    /// The rank of each expert; `None`: equal blocks, which needs a number of experts that the ranks divide. Experts of a rank are numbered
    /// there in ascending order.
    pub placement: Option<Vec<usize>>,
    /// The most tokens of a rank in a low-latency call. In throughput mode, which takes any number, about as many are on their way at once.
    /// 128 by default.
    pub capacity: usize,
    /// The most experts of a token, 1 to 32. 32 by default.
    pub top_k: usize,
    /// The widest element that travels: bf16 (the default), f16 or f32. f8e4m3 fits into all.
    pub dtype: DType,
    /// Whether there is memory for low-latency calls: for `capacity` tokens of every rank, twice.
    pub low_latency: bool,
    /// Whether a dead or silent rank is left out ([`Buffer::masked`](super::Buffer::masked)) instead of failing the communicator.
    pub masking: bool,
    /// How long a rank that lives may be silent in a call; ten times as long in the first one. 10 s by default. With masking on GPUs the wait
    /// at the end of a round has as long again, because who came later than others waits longer for a silent rank than they do.
    pub deadline: Duration,
    /// On GPUs: bytes of memory for outputs that peers write, of each rank; half as many more are for what finds no room there. What is
    /// beyond is refused. `None`: for the rows of one dispatch in which every rank sends 4,096 tokens (or its capacity) to all ranks, 64 MiB
    /// at least. The host takes memory as it comes.
    pub pool_bytes: Option<usize>,
    /// On GPUs: the multiprocessors that a call takes at most, if it does not ask for another number. 12 by default, at least 2.
    pub multiprocessors: u32,
}

impl Settings {
    /// The defaults, for tokens of `hidden` elements and so many `experts`.
    pub const fn new(hidden: usize, experts: usize) -> Self {
        Self {
            hidden,
            experts,
            placement: None,
            capacity: 128,
            top_k: MAX_TOP_K,
            dtype: DType::BF16,
            low_latency: false,
            masking: false,
            deadline: Duration::from_secs(10),
            pool_bytes: None,
            multiprocessors: 12,
        }
    }

    /// Bytes of shared memory that each of `world_size` ranks needs for such a buffer.
    ///
    /// # Errors
    /// [`Error::Argument`] if they do not fit together or into a world of that size.
    pub fn bytes(&self, world_size: usize) -> Result<usize> {
        let (layout, _) = self.check("size hint", 0, world_size)?;
        Ok(layout.total_bytes())
    }

    /// Bytes of memory that each of `world_size` ranks needs on its GPU for such a buffer.
    ///
    /// # Errors
    /// As [`Settings::bytes`].
    pub fn device_bytes(&self, world_size: usize) -> Result<usize> {
        let (_, placement) = self.check("size hint", 0, world_size)?;
        Ok(self.device_layout(("size hint", 0), &placement)?.total_bytes())
    }

    /// Where everything lies on GPUs, for settings that were checked.
    pub(super) fn device_layout(
        &self,
        (call, rank): (&'static str, usize),
        placement: &Placement,
    ) -> Result<DeviceLayout> {
        const LEAST: usize = 64 << 20;
        const TOKENS: usize = 4096;
        let shape = self.shape(placement.world_size());
        let local = (0..shape.world_size).map(|rank| placement.local_experts(rank)).max().unwrap_or(0);
        let rows = local.saturating_mul(shape.world_size * self.capacity);
        if self.low_latency && i32::try_from(rows).is_err() {
            let expected = "below 2³¹ rows of a rank (its experts · ranks · capacity)".to_owned();
            return Err(Error::Argument { call, rank, what: "capacity", expected, got: rows.to_string() });
        }
        let row = shape.hidden * shape.element_bytes + cast::blocks(shape.hidden) * 4 + self.top_k * 12 + 4;
        let all = (shape.world_size * self.capacity.max(TOKENS)).saturating_mul(row);
        let pool_bytes = self.pool_bytes.unwrap_or(all.max(LEAST));
        DeviceLayout::new(&shape, local, pool_bytes).map_err(|error| argument(call, rank, "settings", error))
    }

    pub(super) const fn shape(&self, world_size: usize) -> ArenaShape {
        ArenaShape {
            world_size,
            experts: self.experts,
            hidden: self.hidden,
            element_bytes: self.dtype.size(),
            capacity: self.capacity,
            top_k: self.top_k,
            low_latency: self.low_latency,
        }
    }

    pub(super) fn check(
        &self,
        call: &'static str,
        rank: usize,
        world_size: usize,
    ) -> Result<(ArenaLayout, Placement)> {
        let refuse =
            |what, expected: String, got: String| Err(Error::Argument { call, rank, what, expected, got });
        if !(1..=MAX_RANKS).contains(&world_size) {
            return refuse("world size", format!("1 to {MAX_RANKS}"), world_size.to_string());
        }
        let Self { hidden, capacity, top_k, .. } = *self;
        if hidden == 0 || !hidden.is_multiple_of(HIDDEN_STEP) || hidden > 1 << 20 {
            return refuse("hidden", format!("a multiple of {HIDDEN_STEP}, at most 2²⁰"), hidden.to_string());
        }
        if !(1..=MAX_TOP_K).contains(&top_k) {
            return refuse("top_k", format!("1 to {MAX_TOP_K}"), top_k.to_string());
        }
        if capacity == 0 || capacity > 1 << 24 {
            return refuse("capacity", "1 to 2²⁴".to_owned(), capacity.to_string());
        }
        if !is_summed(self.dtype) {
            return refuse("dtype", "bf16, f16 or f32".to_owned(), self.dtype.to_string());
        }
        if self.deadline.is_zero() {
            return refuse("deadline", "more than nothing".to_owned(), format!("{:?}", self.deadline));
        }
        let placement = match &self.placement {
            None => Placement::even(self.experts, world_size),
            Some(table) if table.len() == self.experts => Placement::table(table, world_size),
            Some(table) => {
                return refuse("placement", format!("{} experts", self.experts), table.len().to_string());
            }
        };
        if self.multiprocessors < 2 {
            return refuse("multiprocessors", "at least 2".to_owned(), self.multiprocessors.to_string());
        }
        let shape = self.shape(world_size);
        let placement = placement.map_err(|error| argument(call, rank, "placement", error))?;
        let layout = ArenaLayout::new(&shape).map_err(|error| argument(call, rank, "settings", error))?;
        Ok((layout, placement))
    }

    /// What ranks compare, each with its name. `device` is what their GPUs are, 0 without.
    pub(super) fn words(&self, placement: &Placement, device: u64) -> [(&'static str, u64); 11] {
        [
            ("hidden", self.hidden as u64),
            ("experts", self.experts as u64),
            ("capacity", self.capacity as u64),
            ("top_k", self.top_k as u64),
            ("dtype", u64::from(self.dtype.code())),
            ("low_latency", u64::from(self.low_latency)),
            ("masking", u64::from(self.masking)),
            ("deadline", u64::try_from(self.deadline.as_nanos()).unwrap_or(u64::MAX)),
            ("placement", placement.fingerprint()),
            ("pool_bytes", self.pool_bytes.map_or(u64::MAX, |bytes| bytes as u64)),
            ("device", device),
        ]
    }
}

/// A value of [`Settings::words`], as people read it.
pub(super) fn value(name: &str, word: u64) -> String {
    match name {
        "dtype" => DType::from_code(word as u8).map_or_else(|| word.to_string(), |dtype| dtype.to_string()),
        "deadline" => format!("{:?}", Duration::from_nanos(word)),
        "low_latency" | "masking" => (word == 1).to_string(),
        "placement" => format!("{word:016x}"),
        "pool_bytes" if word == u64::MAX => "as many as are usual".to_owned(),
        "device" if word == 0 => "the host".to_owned(),
        "device" => format!("a GPU of capability {}.{}", word >> 8, word & 0xff),
        _ => word.to_string(),
    }
}

/// An argument that the pure logic refused.
pub(super) fn argument(
    call: &'static str,
    rank: usize,
    what: &'static str,
    error: unisono_core::Error,
) -> Error {
    match error {
        unisono_core::Error::Malformed { expected, got, .. } => {
            Error::Argument { call, rank, what, expected, got }
        }
        unisono_core::Error::TooLarge { got, cap, .. } => Error::Argument {
            call,
            rank,
            what,
            expected: format!("at most {cap} bytes of memory"),
            got: got.to_string(),
        },
        other => other.into(),
    }
}

/// The first setting and rank that differ from what most ranks say (of as many, the lowest of them), if any does: name, rank, what it says, what
/// most say.
pub(super) fn difference(
    names: &[&'static str],
    all: &[Vec<u64>],
) -> Option<(&'static str, usize, u64, u64)> {
    names.iter().enumerate().find_map(|(at, name)| {
        let votes = |value: u64| all.iter().filter(|words| words[at] == value).count();
        let usual = all.iter().rev().map(|words| words[at]).max_by_key(|value| votes(*value))?;
        let rank = all.iter().position(|words| words[at] != usual)?;
        Some((*name, rank, all[rank][at], usual))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_that_differs_is_found_by_majority() {
        let all = |values: &[u64]| values.iter().map(|value| vec![7, *value]).collect::<Vec<_>>();
        let find = |values: &[u64]| difference(&["a", "b"], &all(values));
        assert_eq!(find(&[1, 1, 1]), None);
        assert_eq!(find(&[1, 2, 2]), Some(("b", 0, 1, 2)));
        assert_eq!(find(&[2, 2, 1, 2]), Some(("b", 2, 1, 2)));
        assert_eq!(find(&[1, 2]), Some(("b", 1, 2, 1)));
    }

    #[test]
    fn settings_that_fit_nothing_are_refused() {
        let base = Settings::new(64, 8);
        let complaint = |settings: Settings| match settings.bytes(4) {
            Err(Error::Argument { what, expected, got, .. }) => format!("{what}: {expected}, {got}"),
            other => panic!("{other:?}"),
        };
        let cases = [
            (Settings { hidden: 12, ..base.clone() }, "hidden: a multiple of 8, at most 2²⁰, 12"),
            (Settings { hidden: 0, ..base.clone() }, "hidden: a multiple of 8, at most 2²⁰, 0"),
            (Settings { top_k: 33, ..base.clone() }, "top_k: 1 to 32, 33"),
            (Settings { capacity: 0, ..base.clone() }, "capacity: 1 to 2²⁴, 0"),
            (Settings { dtype: DType::I32, ..base.clone() }, "dtype: bf16, f16 or f32, i32"),
            (
                Settings { experts: 7, ..base.clone() },
                "placement: a multiple of 4 ranks (or a table that says where each is), 7",
            ),
            (Settings { placement: Some(vec![0; 3]), ..base.clone() }, "placement: 8 experts, 3"),
            (
                Settings { placement: Some(vec![4; 8]), ..base.clone() },
                "placement: ranks below 4, 4 for expert 0",
            ),
            (Settings { deadline: Duration::ZERO, ..base.clone() }, "deadline: more than nothing, 0ns"),
        ];
        for (settings, expected) in cases {
            assert_eq!(complaint(settings), expected);
        }
        assert!(matches!(base.bytes(65), Err(Error::Argument { what: "world size", .. })));
        assert!(base.bytes(4).unwrap() < Settings { low_latency: true, ..base }.bytes(4).unwrap());
    }
}
