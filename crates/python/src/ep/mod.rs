//! `unisono.ep`: expert parallelism over arrays of any framework.
//!
//! A call goes as a collective does: its arrays are looked at where they lie (`inputs`), the buffer is locked and the interpreter given
//! away, and what comes back becomes arrays of the framework that asked (`outputs`), which own their memory.

mod buffer;
mod inputs;
mod low_latency;
mod outputs;
mod throughput;

pub(crate) use buffer::{Buffer, Layout};
pub(crate) use low_latency::{
    LowLatencyCombined, LowLatencyDispatched, LowLatencyHandle, SentCombine, SentDispatch,
};
pub(crate) use throughput::{Combined, Dispatched, Handle};
