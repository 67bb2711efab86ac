//! What can be wrong with words, numbers and bytes. Each variant says what was expected and what came.

use crate::dtype::DType;

/// Result of the functions of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that the pure logic can refuse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name in a setting or argument is not one of ours.
    #[error("`{got}` is not a known {kind}")]
    UnknownName {
        /// What was looked up, for example `dtype`.
        kind: &'static str,
        /// The name that came.
        got: String,
    },
    /// A rank outside its world, or an empty world.
    #[error(
        "rank {rank} cannot be in a world of {world_size}: ranks go from 0 to world size − 1, and a world has 1 to {max} ranks"
    )]
    Member {
        /// The rank that came.
        rank: u64,
        /// The world size that came.
        world_size: u64,
        /// The largest world.
        max: u64,
    },
    /// This dtype has no such reduction.
    #[error("{op} is not defined for {dtype}; {dtype} has: {supported}")]
    Unsupported {
        /// The reduction asked for.
        op: &'static str,
        /// The data type.
        dtype: DType,
        /// The reductions it has, as a list.
        supported: String,
    },
    /// The buffers of a reduction do not fit together; nothing was written.
    #[error("{op} of {dtype}: {what} should be {expected}, got {got}")]
    Reduction {
        /// The reduction asked for.
        op: &'static str,
        /// The data type.
        dtype: DType,
        /// What does not fit, for example `the length of input 1 in bytes`.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: u64,
    },
    /// The bytes are no unique id.
    #[error("this is no unisono unique id: {what} should be {expected}, got {got}")]
    UniqueId {
        /// The field that is wrong.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is (never a part of the secret).
        got: String,
    },
    /// Bytes that do not decode.
    #[error("malformed {what}: expected {expected}, got {got}")]
    Malformed {
        /// What was being decoded.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A length or count above its cap; nothing was allocated for it.
    #[error("{what} of {got} is above the cap of {cap}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        got: u64,
        /// The largest allowed.
        cap: u64,
    },
    /// The peer does not know the job's secret, or what came was not what it sent.
    #[error("authentication failed: {reason}. All ranks need the secret of the same job.")]
    Auth {
        /// Which check failed.
        reason: &'static str,
    },
    /// A frame that was altered, repeated, dropped or reordered on its way.
    #[error(
        "frame {sequence} was altered, repeated or reordered on its way (its authentication tag does not match)"
    )]
    Tampered {
        /// The number of the frame that was expected.
        sequence: u64,
    },
    /// A peer speaks another version of the protocol.
    #[error("protocol version {got} met version {expected}: all ranks must use the same unisono release")]
    Version {
        /// Our version.
        expected: u32,
        /// The peer's version.
        got: u32,
    },
    /// Two hellos do not fit into one world.
    #[error("{what} differs: {left} says {left_value}, {right} says {right_value}")]
    Disagreement {
        /// What differs, for example `world size`.
        what: &'static str,
        /// One side, for example `rank 0 (host a, pid 12)`.
        left: String,
        /// Its value.
        left_value: String,
        /// The other side.
        right: String,
        /// Its value.
        right_value: String,
    },
    /// Two processes claim one rank.
    #[error("two processes claim rank {rank}: {first} and {second}")]
    DuplicateRank {
        /// The rank.
        rank: u32,
        /// Who came first.
        first: String,
        /// Who was refused.
        second: String,
    },
    /// A setting has a value that cannot be read.
    #[error("{name}={value} cannot be read: expected {expected}")]
    Setting {
        /// Name of the setting.
        name: String,
        /// Its value.
        value: String,
        /// What it should look like.
        expected: &'static str,
    },
    /// A tuning file that cannot be read.
    #[error("line {line}: expected {expected}, got {got}")]
    Tuning {
        /// The line, from 1.
        line: usize,
        /// What should be there.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A tuning file of another kind of machine.
    #[error("it was measured on {there}; this machine is {here}")]
    ForeignTuning {
        /// This machine.
        here: String,
        /// The machine of the file.
        there: String,
    },
}

#[cfg(test)]
mod sentences;
