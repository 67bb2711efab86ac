//! An all-to-all whose counts lie in memory of the operation: nobody but the sender has to know them before.

use unisono_core::Element;

use crate::buffer::{Buf, BufMut};
use crate::call::{Call, Kind};

/// A type of counts in memory: [`u32`] and [`u64`].
pub trait Count: Element {}

impl Count for u32 {}
impl Count for u64 {}

/// An all-to-all of parts of any size, of which each rank knows what it sends, and learns what it received. Submitted by
/// [`Operations::all_to_all_counted`](crate::Operations::all_to_all_counted).
///
/// Counts are read, and told, in the order of the stream: a kernel may write `send_counts` right before the call and read `recv_counts`
/// right behind it, no host waits for them, and a graph that captured the call moves what they say each time that it is launched.
///
/// All lists have an element for each rank, and all sizes are counted in elements of `T`. All buffers lie in the same kind of memory: of
/// the host, or of the stream's GPU, in windows or not; on a GPU each lies on a multiple of the size of its elements. Outputs overlap
/// nothing else. Ranks may have inputs, outputs and types of counts of their own; `T` is the same on all.
#[derive(Debug)]
pub struct AllToAllCounted<'b, T, C> {
    /// What is sent. Whatever its parts leave out stays here.
    pub input: Buf<'b, T>,
    /// Elements for each rank.
    pub send_counts: Buf<'b, C>,
    /// Where in `input` the part for each rank begins. `None`: parts follow each other in rank order.
    pub send_offsets: Option<Buf<'b, C>>,
    /// What is received: a multiple of the world size, of which each rank may fill an equal share. What comes from rank r lies at r × share;
    /// what is behind it in its share is not touched.
    pub output: BufMut<'b, T>,
    /// Gets the elements that came from each rank. Where a call fails on a GPU after it began, a count is 0 or has room in its share.
    pub recv_counts: BufMut<'b, C>,
}

impl<'b, T: Element, C: Count> AllToAllCounted<'b, T, C> {
    pub(crate) fn into_call(self) -> Call<'b> {
        let buffers = [self.input.raw(), self.output.raw(), self.send_counts.raw(), self.recv_counts.raw()];
        Call::new(Kind::AllToAllCounted, buffers.into_iter().chain(self.send_offsets.map(|list| list.raw())))
    }
}
