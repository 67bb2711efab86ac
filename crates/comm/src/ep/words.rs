//! What a round belongs to, as a rank tells it to the others: the words that must be equal on all, and its own number of tokens.

use unisono_core::DType;
#[cfg(feature = "cuda")]
use unisono_core::device::layout::HEADER_WORDS;
use unisono_core::ep::CALL_WORDS;

/// The operations of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Operation {
    Dispatch = 1,
    DispatchCached = 2,
    Combine = 3,
    LowLatencyDispatch = 4,
    LowLatencyWeights = 5,
    LowLatencyCombine = 6,
}

impl Operation {
    const ALL: [Self; 6] = [
        Self::Dispatch,
        Self::DispatchCached,
        Self::Combine,
        Self::LowLatencyDispatch,
        Self::LowLatencyWeights,
        Self::LowLatencyCombine,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Dispatch => "dispatch",
            Self::DispatchCached => "dispatch_cached",
            Self::Combine => "combine",
            Self::LowLatencyDispatch => "low_latency_dispatch",
            Self::LowLatencyWeights | Self::LowLatencyCombine => "low_latency_combine",
        }
    }
}

/// The name of the operation with this number, as reports of kernels tell it.
#[cfg(feature = "cuda")]
pub(super) fn operation_name(number: u8) -> &'static str {
    Operation::ALL.into_iter().find(|known| *known as u8 == number).map_or("a call", Operation::name)
}

/// What a rank tells of its own in a round on GPUs: how many rows it has room for, and where they lie, in lines of 128 bytes from the start
/// of its memory.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct ToldWords {
    pub(super) rows: u32,
    pub(super) x: u32,
    pub(super) scales: u32,
    pub(super) indices: u32,
    pub(super) weights: u32,
    pub(super) tokens: u32,
}

/// One call, as its rounds tell it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CallWords {
    pub(super) operation: Operation,
    /// Calls of the buffer so far.
    pub(super) number: u64,
    pub(super) dtype: DType,
    /// Experts of a token; 0 where none are given.
    pub(super) top_k: usize,
    /// Scales of a row, and their type.
    pub(super) scales: (usize, DType),
    pub(super) has_weights: bool,
    /// Rows of a token that are added before they travel.
    pub(super) per_token: usize,
    /// How rows are cast, as a number; 0 if they are not.
    pub(super) cast: u8,
    /// The call whose handle is used, 0 if none.
    pub(super) handle: u64,
    /// Not compared: tokens of this rank.
    pub(super) tokens: usize,
}

impl CallWords {
    /// The word that holds the number of the round.
    pub(super) const ROUND: usize = 4;

    pub(super) const fn new(operation: Operation, number: u64, dtype: DType) -> Self {
        Self {
            operation,
            number,
            dtype,
            top_k: 0,
            scales: (0, DType::F32),
            has_weights: false,
            per_token: 1,
            cast: 0,
            handle: 0,
            tokens: 0,
        }
    }

    pub(super) fn to_words(self, round: u64) -> [u64; CALL_WORDS] {
        let first = u64::from(self.operation as u8)
            | u64::from(self.dtype.code()) << 8
            | u64::from(self.scales.1.code()) << 16
            | u64::from(self.has_weights) << 24
            | u64::from(self.cast) << 32;
        let mut words = [0; CALL_WORDS];
        let told = [first, self.number, self.handle, self.top_k as u64, round, self.scales.0 as u64];
        words[..6].copy_from_slice(&told);
        words[6] = self.per_token as u64;
        words[7] = self.tokens as u64;
        words
    }

    /// Reads what a peer wrote. Words that mean nothing do not come back the same.
    pub(super) fn from_words(words: &[u64; CALL_WORDS]) -> Self {
        let [operation, dtype, scales, has_weights, cast, ..] = words[0].to_le_bytes();
        let operation = Operation::ALL.into_iter().find(|known| *known as u8 == operation);
        Self {
            operation: operation.unwrap_or(Operation::Dispatch),
            number: words[1],
            dtype: DType::from_code(dtype).unwrap_or(DType::U8),
            top_k: words[3] as usize,
            scales: (words[5] as usize, DType::from_code(scales).unwrap_or(DType::F32)),
            has_weights: has_weights == 1,
            per_token: words[6] as usize,
            cast,
            handle: words[2],
            tokens: words[7] as usize,
        }
    }

    /// The header of a round on GPUs: five words that are compared, of which the last is the `stage` of the call, and what is told.
    #[cfg(feature = "cuda")]
    pub(super) fn to_header(self, stage: u64, told: &ToldWords) -> [u64; HEADER_WORDS] {
        let words = self.to_words(stage);
        let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        [
            words[0],
            words[2],
            words[3] | words[6] << 32,
            words[5],
            stage,
            pair(told.rows, told.x),
            pair(told.scales, told.indices),
            pair(told.weights, told.tokens),
            pair(self.number as u32, self.tokens as u32),
            0,
        ]
    }

    /// The call of a header.
    #[cfg(feature = "cuda")]
    pub(super) fn from_header(header: &[u64; HEADER_WORDS]) -> Self {
        let low = |word: u64| u64::from(word as u32);
        let mut words = [0; CALL_WORDS];
        (words[0], words[2], words[3], words[5]) = (header[0], header[1], low(header[2]), header[3]);
        (words[1], words[6], words[7]) = (low(header[8]), header[2] >> 32, header[8] >> 32);
        Self::from_words(&words)
    }

    /// Whether both are the same call.
    pub(super) fn fits(&self, other: &Self) -> bool {
        Self { tokens: other.tokens, ..*self } == *other
    }

    /// `dispatch #3 of an ep::Buffer`.
    pub(super) fn during(&self) -> String {
        format!("{} #{} of an ep::Buffer", self.operation.name(), self.number)
    }

    /// The same with its rank and all that must agree.
    pub(super) fn describe(&self, rank: usize) -> String {
        let mut what = vec![self.dtype.to_string(), format!("top-{}", self.top_k)];
        if self.scales.0 > 0 {
            what.push(format!("{} {} scales", self.scales.0, self.scales.1));
        }
        if self.has_weights {
            what.push("weights".to_owned());
        }
        if self.per_token > 1 {
            what.push(format!("{} rows per token", self.per_token));
        }
        if self.cast > 0 {
            what.push(format!("cast {}", self.cast));
        }
        if self.handle > 0 {
            what.push(format!("handle of #{}", self.handle));
        }
        format!("{} on rank {rank} ({})", self.during(), what.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_round_trip_and_are_described() {
        let mut call = CallWords::new(Operation::Combine, 7, DType::BF16);
        (call.top_k, call.has_weights, call.handle, call.tokens, call.per_token) = (8, true, 6, 99, 2);
        call.scales = (4, DType::I32);
        let words = call.to_words(12);
        assert_eq!((CallWords::from_words(&words), words[CallWords::ROUND]), (call, 12));
        assert_eq!(
            call.describe(1),
            "combine #7 of an ep::Buffer on rank 1 (bf16, top-8, 4 i32 scales, weights, 2 rows per token, handle of #6)"
        );
        assert!(call.fits(&CallWords { tokens: 1, ..call }) && !call.fits(&CallWords { top_k: 4, ..call }));
        #[cfg(feature = "cuda")]
        {
            let header = call.to_header(1, &ToldWords { rows: 9, x: 8, ..ToldWords::default() });
            assert_eq!((CallWords::from_header(&header), header[5]), (call, 8 << 32 | 9));
            // What differs between the ranks of one call is not compared.
            let other = CallWords { tokens: 3, number: 8, ..call };
            assert_eq!(other.to_header(1, &ToldWords::default())[..5], header[..5]);
            assert_eq!((operation_name(3), operation_name(0)), ("combine", "a call"));
        }
        let mut nonsense = words;
        nonsense[0] ^= 0xf0;
        assert_ne!(CallWords::from_words(&nonsense).to_words(12), nonsense);
    }
}
