//! The flight recorder: what each rank did last, in a form that another process can read from the memory alone.
//!
//! Each rank keeps its last [`RECORDS`](crate::layout::RECORDS) calls in the shared memory of its communicator. Whoever can
//! read that memory, while the job hangs or after a rank died, takes a [`Snapshot`] of it, and [`why`] says in plain English who
//! waits for whom.
//!
//! ```text
//! record, 8 words    number │ kind, dtype, op, algorithm, root or peer │ count │ call's number, or tag │
//!                    windows, parts or second peer │ begun │ ended │ waits on
//! ```
//! The number is written last and cleared first, so a reader never takes half of one record and half of another. Times
//! are ticks of [`TickSource`], turned into times before the snapshot by a [`Clock`] that the reader measured.
//!
//! Contents are untrusted: whatever the words are, decoding gives records that make sense, or none, and never panics.

mod gpu;
mod gpu_message;
mod label;
mod record;
mod snapshot;
mod standing;
mod why;
mod why_gpu;
mod words;

pub use gpu::{GpuCall, GpuView, GpuWait, Moment, Reading, has_made};
pub use gpu_message::{GpuMessage, GpuWork, MessageHeader};
pub use label::{DeviceLabel, JobLabel, Presence, RankLabel, TickSource};
pub use record::{Clock, ENDED, End, Record, WAITS, Waits, WaitsOn};
pub use snapshot::{Clocks, Failure, Process, RankView, SeatView, Snapshot};
pub use standing::Standing;
pub use why::why;
pub use words::{ranks_phrase, time_phrase};
