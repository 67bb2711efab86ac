//! What the kernels of a buffer are given, as it lies in memory. The other side is `kernels/expert_parallel.cuh` and `.cu`.

use unisono_core::device::layout::MAX_RANKS;

use crate::gpu::args::Args;

/// What every kernel that meets others is given.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct BufferArgs {
    /// Arenas are the memories of the buffer, and the state is its own.
    pub(crate) call: Args,
    /// Host memory: ranks that are lost, by bits.
    pub(crate) suspects: u64,
    /// Host memory: a word for each rank that kernels left out.
    pub(crate) masked: u64,
    /// After which a silent rank is left out.
    pub(crate) deadline_ns: u64,
    /// Bytes of each memory.
    pub(crate) memory_bytes: u64,
    pub(crate) is_masking: u32,
    pub(crate) counts_stride: u32,
}

/// The layout of one rank's tokens. `places` and what follows are outputs.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct LayoutArgs {
    pub(super) selections: u64,
    pub(super) experts: u64,
    pub(super) places: u64,
    pub(super) is_in_rank: u64,
    pub(super) portion_counts: u64,
    pub(super) portion_selections: u64,
    pub(super) rank_counts: u64,
    pub(super) expert_counts: u64,
    pub(super) finished: u64,
    pub(super) complaint: u64,
    pub(super) tokens: u32,
    pub(super) top_k: u32,
    pub(super) number: u32,
    pub(super) portion: u32,
}

/// The exchange of counts. `prefix` and what follows are outputs.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct CountsArgs {
    pub(super) buffer: BufferArgs,
    pub(super) portion_counts: u64,
    pub(super) rank_counts: u64,
    pub(super) expert_counts: u64,
    pub(super) order: u64,
    pub(super) begins: u64,
    pub(super) prefix: u64,
    pub(super) bases: u64,
    pub(super) starts: u64,
    pub(super) selections: u64,
    /// Host memory, or 0.
    pub(super) told: u64,
    pub(super) ticket: u64,
    pub(super) portions: u32,
    pub(super) reserved: u32,
}

/// Where the tokens of a rank went.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct WaysArgs {
    pub(super) places: u64,
    pub(super) bases: u64,
    pub(super) portion: u32,
    pub(super) tokens: u32,
}

/// A dispatch of rows.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct DispatchArgs {
    pub(super) buffer: BufferArgs,
    pub(super) ways: WaysArgs,
    pub(super) x: u64,
    pub(super) scales: u64,
    pub(super) selections: u64,
    pub(super) weights: u64,
    pub(super) experts: u64,
    pub(super) starts: u64,
    pub(super) overflow: u64,
    pub(super) scale_strides: [u64; 2],
    pub(super) scale_count: u32,
    pub(super) top_k: u32,
    pub(super) row_bytes: u32,
    pub(super) piece_bytes: u32,
    pub(super) is_cached: u32,
    pub(super) number: u32,
}

/// A combine of rows.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct CombineArgs {
    pub(super) buffer: BufferArgs,
    pub(super) ways: WaysArgs,
    pub(super) out: u64,
    pub(super) weights_out: u64,
    pub(super) bias: [u64; 2],
    pub(super) row_bytes: u32,
    pub(super) top_k: u32,
    pub(super) pieces: u32,
    pub(super) reserved: u32,
}

/// The sum of the parts of each row, on one rank.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct AddArgs {
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) rows: u64,
    pub(super) row_bytes: u32,
    pub(super) parts: u32,
}

/// A rank that is to be left out.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct MaskArgs {
    pub(super) buffer: BufferArgs,
    pub(super) rank_to_mask: u64,
}

/// Bytes of what low-latency calls count in memory of the device: calls sent and received, when each rank was heard, and who is left out.
pub(super) const PROGRESS_BYTES: usize = 16 + 8 * MAX_RANKS + 8;

/// A low-latency call, or one half of it. The other side is `kernels/low_latency.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct LowLatencyArgs {
    pub(super) buffer: BufferArgs,
    pub(super) progress: u64,
    pub(super) credits_at: u64,
    pub(super) halves: [u64; 2],
    pub(super) counts_at: u64,
    pub(super) choices_at: u64,
    pub(super) pieces_told_at: u64,
    pub(super) scales_at: u64,
    pub(super) rows_at: u64,
    pub(super) x: u64,
    pub(super) selections: u64,
    pub(super) weights: u64,
    /// Of each expert its rank and number.
    pub(super) placement: u64,
    pub(super) out: u64,
    pub(super) out_scales: u64,
    pub(super) counts: u64,
    pub(super) ranges: u64,
    pub(super) source_tokens: u64,
    pub(super) slots: u64,
    pub(super) waited: u64,
    pub(super) tokens: u32,
    pub(super) top_k: u32,
    pub(super) hidden: u32,
    pub(super) experts: u32,
    /// Experts of each rank, in equal blocks; 0: as the table says.
    pub(super) per_rank: u32,
    pub(super) capacity: u32,
    pub(super) most_top_k: u32,
    pub(super) most_experts: u32,
    pub(super) pieces: u32,
    pub(super) row_scales: u32,
    pub(super) row_stride: u32,
    /// 1: sends, 2: receives.
    pub(super) phases: u32,
    /// 0: none, else one more than the kind of scales.
    pub(super) cast: u32,
    pub(super) reserved: u32,
    pub(super) experts_of: [u32; MAX_RANKS],
}
