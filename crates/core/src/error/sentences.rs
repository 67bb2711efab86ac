//! The sentence of every error, as people read it.

use super::Error;
use crate::dtype::DType;

/// One line per example: the variant, an error of it, its sentence. A variant without a line does not compile.
macro_rules! sentences {
    ($($variant:ident: $error:expr => $sentence:expr;)*) => {
        #[test]
        fn every_error_says_what_happened_and_what_to_do() {
            $(
                let error: Error = $error;
                assert!(matches!(error, Error::$variant { .. }), "{error:?}");
                assert_eq!(error.to_string(), $sentence);
            )*
        }

        #[expect(dead_code, reason = "it is there to compile")]
        fn has_a_sentence(error: &Error) {
            match error {
                $(Error::$variant { .. } => {})*
            }
        }
    };
}

sentences! {
    UnknownName: Error::UnknownName { kind: "dtype", got: "float7".into() } => "`float7` is not a known dtype";
    Member: Error::Member { rank: 4, world_size: 4, max: 65_536 }
        => "rank 4 cannot be in a world of 4: ranks go from 0 to world size − 1, and a world has 1 to 65536 ranks";
    Unsupported: Error::Unsupported { op: "sum", dtype: DType::Bool, supported: "min, max".into() }
        => "sum is not defined for bool; bool has: min, max";
    Reduction: Error::Reduction {
        op: "sum",
        dtype: DType::F32,
        what: "the length of input 1 in bytes".into(),
        expected: "16".into(),
        got: 12,
    } => "sum of f32: the length of input 1 in bytes should be 16, got 12";
    UniqueId: Error::UniqueId { what: "version", expected: "1".into(), got: "7".into() }
        => "this is no unisono unique id: version should be 1, got 7";
    Malformed: Error::Malformed { what: "hello", expected: "64 bytes".into(), got: "12".into() }
        => "malformed hello: expected 64 bytes, got 12";
    TooLarge: Error::TooLarge { what: "frame", got: 5000, cap: 4096 } => "frame of 5000 is above the cap of 4096";
    Auth: Error::Auth { reason: "the peer does not know the secret" }
        => "authentication failed: the peer does not know the secret. All ranks need the secret of the same job.";
    Tampered: Error::Tampered { sequence: 7 }
        => "frame 7 was altered, repeated or reordered on its way (its authentication tag does not match)";
    Version: Error::Version { expected: 2, got: 1 }
        => "protocol version 1 met version 2: all ranks must use the same unisono release";
    Disagreement: Error::Disagreement {
        what: "world size",
        left: "rank 0 (host a, pid 12)".into(),
        left_value: "4".into(),
        right: "rank 1 (host b, pid 34)".into(),
        right_value: "8".into(),
    } => "world size differs: rank 0 (host a, pid 12) says 4, rank 1 (host b, pid 34) says 8";
    DuplicateRank: Error::DuplicateRank {
        rank: 1,
        first: "rank 1 (host a, pid 12)".into(),
        second: "rank 1 (host a, pid 34)".into(),
    } => "two processes claim rank 1: rank 1 (host a, pid 12) and rank 1 (host a, pid 34)";
    Setting: Error::Setting { name: "UNISONO_TIMEOUT".into(), value: "soon".into(), expected: "a duration such as 30s" }
        => "UNISONO_TIMEOUT=soon cannot be read: expected a duration such as 30s";
    Tuning: Error::Tuning { line: 3, expected: "a checksum".into(), got: "the end of the file".into() }
        => "line 3: expected a checksum, got the end of the file";
    ForeignTuning: Error::ForeignTuning { here: "Xeon, 8 processors".into(), there: "EPYC, 2 processors".into() }
        => "it was measured on EPYC, 2 processors; this machine is Xeon, 8 processors";
}
