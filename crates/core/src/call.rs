//! A call as it is told to peers: what every rank must agree on, packed into eight words, and its fingerprint.
//!
//! Ranks publish the header of every call. Peers compare a 64-bit *chain*, the fingerprint of all calls so far, which
//! costs one comparison; only when it differs do they read both headers to name the two calls.

use std::fmt;

use crate::dtype::DType;
use crate::fused::NormOutput;
use crate::reduce_op::ReduceOp;

/// Words in a header.
pub const HEADER_WORDS: usize = 8;

/// What a collective does, with what only this kind has.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// Nothing is moved; nobody leaves before all have entered.
    Barrier,
    /// Every rank gets the reduction of all inputs.
    AllReduce {
        /// How elements are combined.
        op: ReduceOp,
    },
    /// Every rank gets the root's buffer.
    Broadcast {
        /// The rank that has the data.
        root: u32,
    },
    /// Every rank gets the inputs of all, in rank order.
    AllGather,
    /// The root gets the reduction of all inputs.
    Reduce {
        /// How elements are combined.
        op: ReduceOp,
        /// The rank that gets the result.
        root: u32,
    },
    /// Every rank gets its part of the reduction of all inputs.
    ReduceScatter {
        /// How elements are combined.
        op: ReduceOp,
    },
    /// The root gets the inputs of all, in rank order.
    Gather {
        /// The rank that gets them.
        root: u32,
    },
    /// Every rank gets its part of the root's input.
    Scatter {
        /// The rank that has the data.
        root: u32,
    },
    /// Every rank gets its part of every rank's input, in rank order.
    AllToAll,
    /// As [`Kind::AllGather`], with parts of any size.
    AllGatherV,
    /// As [`Kind::ReduceScatter`], with parts of any size.
    ReduceScatterV {
        /// How elements are combined.
        op: ReduceOp,
    },
    /// As [`Kind::Gather`], with parts of any size.
    GatherV {
        /// The rank that gets them.
        root: u32,
    },
    /// As [`Kind::Scatter`], with parts of any size.
    ScatterV {
        /// The rank that has the data.
        root: u32,
    },
    /// As [`Kind::AllToAll`], with parts of any size, each known to the two ranks that it concerns.
    AllToAllV,
    /// As [`Kind::AllToAllV`], with sizes that lie in memory of the operation: each is known to the sender alone.
    AllToAllCounted,
    /// As [`Kind::AllReduce`], of several buffers of each rank.
    AllReduceMulti {
        /// How elements are combined.
        op: ReduceOp,
    },
    /// As [`Kind::Broadcast`], to several buffers of each rank.
    BroadcastMulti {
        /// The rank that has the data.
        root: u32,
        /// Which of its buffers has it.
        buffer: u32,
    },
    /// As [`Kind::AllReduce`] by sum, of rows, to which the residual is added and which are then normalised.
    AllReduceRmsNorm {
        /// Elements of a row.
        hidden: u32,
        /// Added to the mean of squares.
        epsilon: f32,
        /// What the normalised rows are written as.
        output: NormOutput,
        /// Whether the new residual replaces the old one.
        is_in_place: bool,
    },
    /// As [`Kind::AllReduce`] by sum, of elements that travel with 8 bits each.
    AllReduceQuantised,
    /// A message to another rank. Not a collective: it has no epoch.
    Send {
        /// The rank that gets it.
        to: u32,
        /// What the receiver asks for.
        tag: u32,
    },
    /// A message from another rank.
    Recv {
        /// The rank that sends it.
        from: u32,
        /// What the sender called it.
        tag: u32,
    },
    /// A message to one rank and one from another, both under way at once.
    SendRecv {
        /// The rank that gets ours.
        to: u32,
        /// The rank that sends us one.
        from: u32,
        /// The tag of both.
        tag: u32,
    },
    /// The collective end of a communicator.
    Destroy,
    /// Collective creation of a window.
    Window,
    /// Collective end of a window.
    CloseWindow,
    /// Collective creation of communicators of some of the ranks.
    Split,
    /// Collective creation of another communicator of the same ranks.
    Duplicate,
    /// Collective change of a window into one-sided memory.
    Symmetric,
    /// Collective registration of memory that somebody else allocated; it counts bytes.
    Register,
}

impl Kind {
    /// The collectives of equal parts; their reduction and their root do not matter.
    pub const EQUAL_PARTS: [Self; 8] = [
        Self::AllReduce { op: ReduceOp::Sum },
        Self::Broadcast { root: 0 },
        Self::AllGather,
        Self::Reduce { op: ReduceOp::Sum, root: 0 },
        Self::ReduceScatter { op: ReduceOp::Sum },
        Self::Gather { root: 0 },
        Self::Scatter { root: 0 },
        Self::AllToAll,
    ];

    /// Where an operation stands in [`EQUAL_PARTS`](Self::EQUAL_PARTS); `None` if it is none of them.
    #[inline]
    pub const fn equal_parts_index(self) -> Option<usize> {
        Some(match self {
            Self::AllReduce { .. } => 0,
            Self::Broadcast { .. } => 1,
            Self::AllGather => 2,
            Self::Reduce { .. } => 3,
            Self::ReduceScatter { .. } => 4,
            Self::Gather { .. } => 5,
            Self::Scatter { .. } => 6,
            Self::AllToAll => 7,
            _ => return None,
        })
    }

    /// The field's name of the operation.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Barrier => "barrier",
            Self::AllReduce { .. } => "all_reduce",
            Self::Broadcast { .. } => "broadcast",
            Self::AllGather => "all_gather",
            Self::Reduce { .. } => "reduce",
            Self::ReduceScatter { .. } => "reduce_scatter",
            Self::Gather { .. } => "gather",
            Self::Scatter { .. } => "scatter",
            Self::AllToAll => "all_to_all",
            Self::AllGatherV => "all_gather_v",
            Self::ReduceScatterV { .. } => "reduce_scatter_v",
            Self::GatherV { .. } => "gather_v",
            Self::ScatterV { .. } => "scatter_v",
            Self::AllToAllV => "all_to_all_v",
            Self::AllToAllCounted => "all_to_all_counted",
            Self::AllReduceMulti { .. } => "all_reduce_multi",
            Self::BroadcastMulti { .. } => "broadcast_multi",
            Self::AllReduceRmsNorm { .. } => "all_reduce_rms_norm",
            Self::AllReduceQuantised => "all_reduce_quantised",
            Self::Send { .. } => "send",
            Self::Recv { .. } => "recv",
            Self::SendRecv { .. } => "send_recv",
            Self::Destroy => "destroy",
            Self::Window => "window",
            Self::CloseWindow => "close window",
            Self::Split => "split",
            Self::Duplicate => "duplicate",
            Self::Symmetric => "into_symmetric",
            Self::Register => "register",
        }
    }

    #[inline]
    pub(crate) const fn code(&self) -> u8 {
        match self {
            Self::Barrier => 1,
            Self::AllReduce { .. } => 2,
            Self::Broadcast { .. } => 3,
            Self::AllGather => 4,
            Self::Destroy => 5,
            Self::Window => 6,
            Self::CloseWindow => 7,
            Self::Symmetric => 23,
            Self::Register => 29,
            Self::Reduce { .. } => 8,
            Self::ReduceScatter { .. } => 9,
            Self::Gather { .. } => 10,
            Self::Scatter { .. } => 11,
            Self::AllToAll => 12,
            Self::Send { .. } => 13,
            Self::Recv { .. } => 14,
            Self::SendRecv { .. } => 15,
            Self::AllGatherV => 16,
            Self::ReduceScatterV { .. } => 17,
            Self::GatherV { .. } => 18,
            Self::ScatterV { .. } => 19,
            Self::AllToAllV => 20,
            Self::Split => 30,
            Self::Duplicate => 31,
            Self::AllReduceMulti { .. } => 21,
            Self::BroadcastMulti { .. } => 22,
            Self::AllReduceRmsNorm { .. } => 40,
            Self::AllReduceQuantised => 41,
            Self::AllToAllCounted => 42,
        }
    }

    /// Whether it is a message from rank to rank: no collective, it has no epoch.
    #[inline]
    pub const fn is_message(&self) -> bool {
        matches!(self, Self::Send { .. } | Self::Recv { .. } | Self::SendRecv { .. })
    }

    /// Whether its parts may have sizes of their own.
    #[inline]
    pub const fn is_uneven(&self) -> bool {
        matches!(
            self,
            Self::AllGatherV
                | Self::ReduceScatterV { .. }
                | Self::GatherV { .. }
                | Self::ScatterV { .. }
                | Self::AllToAllV
                | Self::AllToAllCounted
        )
    }

    /// Whether it works on several buffers of each rank.
    #[inline]
    pub const fn is_multi(&self) -> bool {
        matches!(self, Self::AllReduceMulti { .. } | Self::BroadcastMulti { .. })
    }

    /// Whether every rank has an input, and whether every rank has an output. In which window a buffer lies is compared only
    /// then: of what only the root has, the others cannot tell.
    #[inline]
    pub const fn sides_everywhere(&self) -> (bool, bool) {
        match self {
            Self::Reduce { .. } | Self::Gather { .. } => (true, false),
            Self::Scatter { .. } => (false, true),
            _ => (true, true),
        }
    }

    /// The reduction, where there is one.
    #[inline]
    pub const fn op(&self) -> Option<ReduceOp> {
        match self {
            Self::AllReduce { op }
            | Self::AllReduceMulti { op }
            | Self::Reduce { op, .. }
            | Self::ReduceScatter { op }
            | Self::ReduceScatterV { op } => Some(*op),
            _ => None,
        }
    }

    /// The root, where there is one.
    #[inline]
    pub const fn root(&self) -> Option<u32> {
        match self {
            Self::Broadcast { root }
            | Self::BroadcastMulti { root, .. }
            | Self::Reduce { root, .. }
            | Self::Gather { root }
            | Self::GatherV { root }
            | Self::Scatter { root }
            | Self::ScatterV { root } => Some(*root),
            _ => None,
        }
    }
}

/// Everything that must be equal on all ranks for one call.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CallHeader {
    /// The operation.
    pub kind: Kind,
    /// Element type; `None` where nothing is moved.
    pub dtype: Option<DType>,
    /// Elements per rank, as the operation counts them; of all parts together, where those are of any size.
    pub count: u64,
    /// A hash of the sizes of parts, or the number of buffers of each rank; 0 where neither exists.
    pub parts: u64,
    /// The window that holds the input, 0 if none.
    pub source_window: u64,
    /// The window that holds the output, 0 if none.
    pub target_window: u64,
}

impl CallHeader {
    /// A call that moves nothing.
    pub const fn bare(kind: Kind) -> Self {
        Self { kind, dtype: None, count: 0, parts: 0, source_window: 0, target_window: 0 }
    }

    /// Whether peers may read or write the buffers where they lie: those that every rank has are in windows.
    #[inline]
    pub const fn is_in_windows(&self) -> bool {
        // In place, parts would be overwritten that peers have yet to read. Ids are equal on all ranks, places are not.
        let is_safe = !matches!(self.kind, Kind::AllToAll) || self.source_window != self.target_window;
        let (source, target) = self.kind.sides_everywhere();
        is_safe && (self.source_window != 0 || !source) && (self.target_window != 0 || !target)
    }

    /// The words that are published. Word 5 is the rank's own scalar (of a pre-multiplied sum): told, not compared.
    #[inline]
    pub fn to_words(&self) -> [u64; HEADER_WORDS] {
        let op = self.kind.op().map_or(0, ReduceOp::code);
        let scalar = self.kind.op().and_then(ReduceOp::scalar).unwrap_or(0.0);
        let root = self.kind.root().unwrap_or(0);
        let dtype = self.dtype.map_or(0, |dtype| dtype.code() + 1);
        let mut first =
            u64::from(self.kind.code()) | u64::from(dtype) << 8 | u64::from(op) << 16 | u64::from(root) << 32;
        let parts = match self.kind {
            Kind::BroadcastMulti { buffer, .. } => u64::from(buffer) + 1,
            Kind::AllReduceRmsNorm { hidden, epsilon, output, is_in_place } => {
                let how = output.code() | u8::from(is_in_place) << 7;
                first |= u64::from(how) << 16 | u64::from(epsilon.to_bits()) << 32;
                u64::from(hidden)
            }
            _ => self.parts,
        };
        [first, self.count, self.source_window, self.target_window, parts, scalar.to_bits(), 0, 0]
    }

    /// The fingerprint of what must agree.
    #[inline]
    pub fn fingerprint(words: &[u64; HEADER_WORDS]) -> u64 {
        let mut hash = words[0].wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ words[1];
        hash = mix(hash);
        if words[2] | words[3] | words[4] != 0 {
            hash = mix(hash ^ words[2]);
            hash = mix(hash ^ words[3].rotate_left(32));
            hash = mix(hash ^ words[4].rotate_left(16));
        }
        hash
    }

    /// The chain after this call: equal on two ranks if, and up to a chance of 2⁻⁶⁴ only if, all their calls so far were.
    #[inline]
    pub fn chain(before: u64, fingerprint: u64) -> u64 {
        mix(before.rotate_left(7) ^ fingerprint)
    }

    /// Reads words that a peer published; `None` if they are no call of ours.
    pub fn from_words(words: &[u64; HEADER_WORDS]) -> Option<Self> {
        let [kind, dtype, op, ..] = words[0].to_le_bytes();
        let root = (words[0] >> 32) as u32;
        let scalar = f64::from_bits(words[5]);
        let kind = match kind {
            1 => Kind::Barrier,
            2 => Kind::AllReduce { op: ReduceOp::from_code(op, scalar)? },
            8 => Kind::Reduce { op: ReduceOp::from_code(op, scalar)?, root },
            9 => Kind::ReduceScatter { op: ReduceOp::from_code(op, scalar)? },
            10 => Kind::Gather { root },
            11 => Kind::Scatter { root },
            12 => Kind::AllToAll,
            16 => Kind::AllGatherV,
            17 => Kind::ReduceScatterV { op: ReduceOp::from_code(op, scalar)? },
            18 => Kind::GatherV { root },
            19 => Kind::ScatterV { root },
            20 => Kind::AllToAllV,
            21 => Kind::AllReduceMulti { op: ReduceOp::from_code(op, scalar)? },
            22 => Kind::BroadcastMulti { root, buffer: u32::try_from(words[4].checked_sub(1)?).ok()? },
            40 => {
                let epsilon = f32::from_bits(root);
                Kind::AllReduceRmsNorm {
                    hidden: u32::try_from(words[4]).ok()?,
                    epsilon: if epsilon.is_finite() { epsilon } else { return None },
                    output: NormOutput::from_code(op & 0x7f)?,
                    is_in_place: op & 0x80 != 0,
                }
            }
            41 => Kind::AllReduceQuantised,
            42 => Kind::AllToAllCounted,
            3 => Kind::Broadcast { root },
            4 => Kind::AllGather,
            5 => Kind::Destroy,
            6 => Kind::Window,
            7 => Kind::CloseWindow,
            30 => Kind::Split,
            31 => Kind::Duplicate,
            23 => Kind::Symmetric,
            29 => Kind::Register,
            _ => return None,
        };
        let dtype = match dtype {
            0 => None,
            code => Some(DType::from_code(code - 1)?),
        };
        let is_own = matches!(kind, Kind::BroadcastMulti { .. } | Kind::AllReduceRmsNorm { .. });
        let parts = if is_own { 0 } else { words[4] };
        Some(Self { kind, dtype, count: words[1], parts, source_window: words[2], target_window: words[3] })
    }

    /// `all_reduce #812 on rank 2 (bf16, 4096, sum)`.
    pub fn describe(&self, number: u64, rank: u32) -> String {
        let arguments = self.to_string();
        let name = self.kind.name();
        if arguments.is_empty() {
            format!("{name} #{number} on rank {rank}")
        } else {
            format!("{name} #{number} on rank {rank} ({arguments})")
        }
    }
}

/// The arguments alone: `bf16, 4096, sum`.
impl fmt::Display for CallHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(dtype) = self.dtype else { return Ok(()) };
        write!(f, "{dtype}, {}", self.count)?;
        if let Some(op) = self.kind.op() {
            write!(f, ", {}", op.name())?;
        }
        if let Some(root) = self.kind.root() {
            write!(f, ", root {root}")?;
        }
        match self.kind {
            Kind::AllReduceMulti { .. } if self.parts == 1 => write!(f, ", 1 buffer")?,
            Kind::AllReduceMulti { .. } => write!(f, ", {} buffers", self.parts)?,
            Kind::BroadcastMulti { buffer, .. } => write!(f, ", its buffer {buffer}")?,
            Kind::AllReduceRmsNorm { hidden, epsilon, output, is_in_place } => {
                write!(f, ", rows of {hidden}, epsilon {epsilon:e}")?;
                match output {
                    NormOutput::Same => {}
                    NormOutput::Fp8 => write!(f, ", to f8e4m3")?,
                    NormOutput::Fp8PerToken => write!(f, ", to f8e4m3 by token")?,
                }
                if is_in_place {
                    write!(f, ", in place")?;
                }
            }
            Kind::Window if self.parts == 1 => write!(f, ", on GPUs")?,
            Kind::Window if self.parts != 0 => write!(f, ", pinned")?,
            // Sizes that differ show in this, even where their sum does not.
            _ if self.parts != 0 => write!(f, " in parts #{:06x}", self.parts & 0xff_ffff)?,
            _ => {}
        }
        match (self.source_window, self.target_window) {
            (0, 0) => Ok(()),
            (source, target) if source == target => write!(f, ", window {target}"),
            (source, 0) => write!(f, ", from window {source}"),
            (0, target) => write!(f, ", into window {target}"),
            (source, target) => write!(f, ", windows {source} to {target}"),
        }
    }
}

/// The hash of the sizes of parts, in rank order; never 0.
pub fn parts_hash(counts: &[usize]) -> u64 {
    counts.iter().fold(counts.len() as u64, |hash, count| mix(hash.rotate_left(7) ^ *count as u64)).max(1)
}

/// A cheap full-avalanche mix (multiply, fold, multiply).
#[inline]
fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let value = (value ^ value >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    value ^ value >> 32
}

#[cfg(test)]
mod tests;
