//! Expert parallelism as pure functions: which rank has which expert ([`Placement`]), where tokens go ([`Routing`]), how a row is cast
//! to 8 bits ([`cast`]), in which order rows are summed ([`RowSum`]), and where all of it lies in shared memory ([`ArenaLayout`]) and in memory
//! of GPUs ([`DeviceLayout`]).
//!
//! The CPU backend runs these, and kernels are tested against them, bit for bit.

mod arena;
pub mod cast;
mod device;
mod low_latency;
mod placement;
mod routing;
mod rows;

pub use arena::{ArenaLayout, ArenaShape, CALL_WORDS, CALLS, DataFields, WeightFields};
pub use device::{DEVICE_LINE, DeviceLayout, MOST_LOCAL_EXPERTS};
pub use low_latency::{LowLatencyLayout, PIECE};
pub use placement::Placement;
pub use routing::{Routing, send_slots, source_prefix};
pub use rows::{RowSum, is_summed};

/// The most ranks of a world: a token's destinations are the bits of one word.
pub const MAX_RANKS: usize = 64;
/// The most experts of a token.
pub const MAX_TOP_K: usize = 32;
/// A row has a multiple of so many elements.
pub const HIDDEN_STEP: usize = 8;
/// The most tokens of a rank in one call: indices are 32 bits wide, also of the rows of all ranks together.
pub const MAX_TOKENS: usize = (1 << 31) / MAX_RANKS - 1;
