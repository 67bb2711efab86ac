//! The list of operations, once, for every way to submit them.

use unisono_core::{Element, ReduceOp, Reducible};

use crate::buffer::{Buf, BufMut};
use crate::call::{Call, Kind};
use crate::error::Result;

/// What ranks can do together. All ranks of a communicator must make the same calls in the same order, with the same
/// element type, count, reduction and root; ranks that differ get [`crate::Error::Mismatch`], which names both calls.
///
/// Implemented by [`crate::Communicator`] (blocks until complete) and [`crate::OnStream`] (in the order of a stream).
/// Counts may be anything from 0; buffers need no alignment beyond that of their type.
pub trait Operations<'b> {
    /// What a submitted operation gives back: `()` where it is complete on return.
    type Done;

    /// Submits an operation.
    ///
    /// # Errors
    /// See the methods below; those of the buffers are reported before anything is sent or written.
    fn submit(&self, call: Call<'b>) -> Result<Self::Done>;

    /// Replaces `x` on every rank by the reduction of the `x` of all ranks, element by element. Equal counts.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations, ReduceOp};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let mut x = [rank.rank() as f32 + 1.0, 10.0];
    /// rank.all_reduce(&mut x, ReduceOp::Sum)?;
    /// assert_eq!(x, [3.0, 20.0]);
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::Error::Core`] if the dtype has no such reduction; those of a failed communicator.
    fn all_reduce<T: Reducible>(&self, x: impl Into<BufMut<'b, T>>, op: ReduceOp) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllReduce { op }, &[x.into().raw()]))
    }

    /// Writes the reduction of all ranks' `src` to `dst` on every rank. Both have the same count; they may be the same
    /// memory, but must not overlap otherwise.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the counts differ, else as [`Operations::all_reduce`].
    fn all_reduce_into<T: Reducible>(
        &self,
        src: impl Into<Buf<'b, T>>,
        dst: impl Into<BufMut<'b, T>>,
        op: ReduceOp,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllReduce { op }, &[src.into().raw(), dst.into().raw()]))
    }

    /// Replaces `x` on every rank by the `x` of `root`. Equal counts.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if `root` is no rank; those of a failed communicator.
    fn broadcast<T: Element>(&self, x: impl Into<BufMut<'b, T>>, root: usize) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Broadcast { root: clamp(root) }, &[x.into().raw()]))
    }

    /// Writes `src` of `root` to `dst` on every rank, the root's own included. Equal counts; `src` is read on the root
    /// only.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if `root` is no rank or the counts differ; those of a failed communicator.
    fn broadcast_into<T: Element>(
        &self,
        src: impl Into<Buf<'b, T>>,
        dst: impl Into<BufMut<'b, T>>,
        root: usize,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Broadcast { root: clamp(root) }, &[src.into().raw(), dst.into().raw()]))
    }

    /// Gathers the parts of all ranks in rank order: `all` has `count × world size` elements on every rank, and mine
    /// already lies at `rank × count`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the ranks do not divide the count; those of a failed communicator.
    fn all_gather<T: Element>(&self, all: impl Into<BufMut<'b, T>>) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllGather, &[all.into().raw()]))
    }

    /// Gathers `mine` of all ranks into `all`, in rank order, on every rank. `all` has `mine.count × world size`
    /// elements; `mine` may lie at its own place in `all`, but must not overlap it otherwise.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the counts do not fit; those of a failed communicator.
    fn all_gather_into<T: Element>(
        &self,
        mine: impl Into<Buf<'b, T>>,
        all: impl Into<BufMut<'b, T>>,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllGather, &[mine.into().raw(), all.into().raw()]))
    }

    /// Replaces `x` of `root` by the reduction of the `x` of all ranks; the other ranks' `x` stays as it is. Equal counts.
    ///
    /// # Errors
    /// As [`Operations::all_reduce`], and [`crate::Error::Argument`] if `root` is no rank.
    fn reduce<T: Reducible>(
        &self,
        x: impl Into<BufMut<'b, T>>,
        op: ReduceOp,
        root: usize,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Reduce { op, root: clamp(root) }, &[x.into().raw()]))
    }

    /// Writes the reduction of all ranks' `src` to `dst` of `root`. Equal counts; on the other ranks `dst` is not touched
    /// and may be empty.
    ///
    /// # Errors
    /// As [`Operations::reduce`].
    fn reduce_into<T: Reducible>(
        &self,
        src: impl Into<Buf<'b, T>>,
        dst: impl Into<BufMut<'b, T>>,
        op: ReduceOp,
        root: usize,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Reduce { op, root: clamp(root) }, &[src.into().raw(), dst.into().raw()]))
    }

    /// Reduces `all`, which has `count × world size` elements on every rank, and leaves each rank its part of the result, at
    /// `rank × count`. What the rest of `all` holds afterwards is what it held before.
    ///
    /// # Errors
    /// As [`Operations::all_reduce`], and [`crate::Error::Argument`] if the ranks do not divide the count.
    fn reduce_scatter<T: Reducible>(
        &self,
        all: impl Into<BufMut<'b, T>>,
        op: ReduceOp,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::ReduceScatter { op }, &[all.into().raw()]))
    }

    /// Writes this rank's part of the reduction of all ranks' `all` to `mine`. `all` has `mine.count × world size` elements;
    /// `mine` may lie at its own place in `all`, but must not overlap it otherwise.
    ///
    /// # Errors
    /// As [`Operations::all_reduce`], and [`crate::Error::Argument`] if the counts do not fit.
    fn reduce_scatter_into<T: Reducible>(
        &self,
        all: impl Into<Buf<'b, T>>,
        mine: impl Into<BufMut<'b, T>>,
        op: ReduceOp,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::ReduceScatter { op }, &[all.into().raw(), mine.into().raw()]))
    }

    /// Gathers `mine` of all ranks into `all` of `root`, in rank order. There `all` has `mine.count × world size` elements;
    /// on the other ranks it is not touched and may be empty.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if `root` is no rank or the counts do not fit; those of a failed communicator.
    fn gather<T: Element>(
        &self,
        mine: impl Into<Buf<'b, T>>,
        all: impl Into<BufMut<'b, T>>,
        root: usize,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Gather { root: clamp(root) }, &[mine.into().raw(), all.into().raw()]))
    }

    /// Hands every rank its part of `all` of `root`, in rank order. There `all` has `mine.count × world size` elements; on the
    /// other ranks it is not read and may be empty.
    ///
    /// # Errors
    /// As [`Operations::gather`].
    fn scatter<T: Element>(
        &self,
        all: impl Into<Buf<'b, T>>,
        mine: impl Into<BufMut<'b, T>>,
        root: usize,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Scatter { root: clamp(root) }, &[all.into().raw(), mine.into().raw()]))
    }

    /// Replaces part r of `x` by what rank r has as our part, for all ranks r: `x` has `count × world size` elements on every
    /// rank.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the ranks do not divide the count; those of a failed communicator.
    fn all_to_all<T: Element>(&self, x: impl Into<BufMut<'b, T>>) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllToAll, &[x.into().raw()]))
    }

    /// Writes what rank r has as our part of its `src` to part r of `dst`, for all ranks r. Both have `count × world size`
    /// elements; they may be the same memory, but must not overlap otherwise.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let src = [10 * rank.rank() as u32, 10 * rank.rank() as u32 + 1];
    /// let mut dst = [0; 2];
    /// rank.all_to_all_into(&src, &mut dst)?;
    /// assert_eq!(dst, [rank.rank() as u32, rank.rank() as u32 + 10]);
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Operations::all_to_all`].
    fn all_to_all_into<T: Element>(
        &self,
        src: impl Into<Buf<'b, T>>,
        dst: impl Into<BufMut<'b, T>>,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllToAll, &[src.into().raw(), dst.into().raw()]))
    }

    /// Sends `src` to rank `to`, which receives it with the same type, count and `tag`. Messages of one pair of ranks keep
    /// their order for each tag. Complete, for the sender, when `src` may be used again: a message that fits into the
    /// channel (16 to 64 KiB) does not wait for its receiver.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if `to` is not another rank; [`crate::Error::Mismatch`], on both ranks, if the receiver
    /// expects another type or count; those of a failed communicator.
    fn send<T: Element>(&self, src: impl Into<Buf<'b, T>>, to: usize, tag: u32) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Send { to: clamp(to), tag }, &[src.into().raw()]))
    }

    /// Receives the next message with `tag` that rank `from` sends to us. Messages with other tags wait for their turn.
    ///
    /// # Errors
    /// As [`Operations::send`].
    fn recv<T: Element>(&self, dst: impl Into<BufMut<'b, T>>, from: usize, tag: u32) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Recv { from: clamp(from), tag }, &[dst.into().raw()]))
    }

    /// Sends `src` to rank `to` and receives `dst` from rank `from`, both at once: ranks that exchange messages of any size
    /// do not wait for each other in a circle.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let other = 1 - rank.rank();
    /// let mut theirs = [0; 3];
    /// rank.send_recv(&[rank.rank() as i64; 3], other, &mut theirs, other, 7)?;
    /// assert_eq!(theirs, [other as i64; 3]);
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Operations::send`].
    fn send_recv<T: Element>(
        &self,
        src: impl Into<Buf<'b, T>>,
        to: usize,
        dst: impl Into<BufMut<'b, T>>,
        from: usize,
        tag: u32,
    ) -> Result<Self::Done> {
        let kind = Kind::SendRecv { to: clamp(to), from: clamp(from), tag };
        self.submit(Call::new(kind, &[src.into().raw(), dst.into().raw()]))
    }

    /// Returns when every rank has entered it.
    ///
    /// # Errors
    /// Those of a failed communicator.
    fn barrier(&self) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Barrier, &[]))
    }
}

/// A root as it is told to peers; one beyond the wire's range stays out of range.
fn clamp(root: usize) -> u32 {
    u32::try_from(root).unwrap_or(u32::MAX)
}
