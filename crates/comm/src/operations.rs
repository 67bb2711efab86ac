//! The list of operations, once, for every way to submit them.
//!
//! Over 500 lines because each operation is documented, with an example, where it stands in that list.

use unisono_core::{Element, ReduceOp, Reducible};

use crate::buffer::{Buf, BufMut};
use crate::call::{Call, Counts, Kind};
use crate::counted::{AllToAllCounted, Count};
use crate::error::Result;
use crate::fused::{AllReduceRmsNorm, HalfFloat, Quantisable};

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
        self.submit(Call::new(Kind::AllReduce { op }, [x.into().raw()]))
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
        self.submit(Call::new(Kind::AllReduce { op }, [src.into().raw(), dst.into().raw()]))
    }

    /// Replaces `x` on every rank by the `x` of `root`. Equal counts.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if `root` is no rank; those of a failed communicator.
    fn broadcast<T: Element>(&self, x: impl Into<BufMut<'b, T>>, root: usize) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Broadcast { root: clamp(root) }, [x.into().raw()]))
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
        self.submit(Call::new(Kind::Broadcast { root: clamp(root) }, [src.into().raw(), dst.into().raw()]))
    }

    /// Gathers the parts of all ranks in rank order: `all` has `count × world size` elements on every rank, and mine
    /// already lies at `rank × count`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the ranks do not divide the count; those of a failed communicator.
    fn all_gather<T: Element>(&self, all: impl Into<BufMut<'b, T>>) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllGather, [all.into().raw()]))
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
        self.submit(Call::new(Kind::AllGather, [mine.into().raw(), all.into().raw()]))
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
        self.submit(Call::new(Kind::Reduce { op, root: clamp(root) }, [x.into().raw()]))
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
        self.submit(Call::new(Kind::Reduce { op, root: clamp(root) }, [src.into().raw(), dst.into().raw()]))
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
        self.submit(Call::new(Kind::ReduceScatter { op }, [all.into().raw()]))
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
        self.submit(Call::new(Kind::ReduceScatter { op }, [all.into().raw(), mine.into().raw()]))
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
        self.submit(Call::new(Kind::Gather { root: clamp(root) }, [mine.into().raw(), all.into().raw()]))
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
        self.submit(Call::new(Kind::Scatter { root: clamp(root) }, [all.into().raw(), mine.into().raw()]))
    }

    /// Replaces part r of `x` by what rank r has as our part, for all ranks r: `x` has `count × world size` elements on every
    /// rank.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the ranks do not divide the count; those of a failed communicator.
    fn all_to_all<T: Element>(&self, x: impl Into<BufMut<'b, T>>) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllToAll, [x.into().raw()]))
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
        self.submit(Call::new(Kind::AllToAll, [src.into().raw(), dst.into().raw()]))
    }

    /// As [`Operations::all_gather_into`], with parts of any size: `counts` tells the elements of every rank's part and where it
    /// lies in `all`. All ranks pass the same counts; offsets are each rank's own. `mine` has `counts[rank]` elements.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let mine = vec![rank.rank() as u16; [1, 3][rank.rank()]];
    /// let mut all = [9; 4];
    /// rank.all_gather_v(&mine, &mut all, &[1, 3])?;
    /// assert_eq!(all, [0, 1, 1, 1]);
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if counts and buffers do not fit or parts overlap; [`crate::Error::Mismatch`] if the ranks pass
    /// other counts; those of a failed communicator.
    fn all_gather_v<T: Element>(
        &self,
        mine: impl Into<Buf<'b, T>>,
        all: impl Into<BufMut<'b, T>>,
        counts: impl Into<Counts<'b>>,
    ) -> Result<Self::Done> {
        let call = Call::new(Kind::AllGatherV, [mine.into().raw(), all.into().raw()]);
        self.submit(call.with_counts(&[counts.into()]))
    }

    /// As [`Operations::reduce_scatter_into`], with parts of any size: rank r gets part r of the reduction of all ranks' `all`.
    /// All ranks pass the same counts; `mine` has `counts[rank]` elements.
    ///
    /// # Errors
    /// As [`Operations::all_gather_v`] and [`Operations::all_reduce`].
    fn reduce_scatter_v<T: Reducible>(
        &self,
        all: impl Into<Buf<'b, T>>,
        mine: impl Into<BufMut<'b, T>>,
        counts: impl Into<Counts<'b>>,
        op: ReduceOp,
    ) -> Result<Self::Done> {
        let call = Call::new(Kind::ReduceScatterV { op }, [all.into().raw(), mine.into().raw()]);
        self.submit(call.with_counts(&[counts.into()]))
    }

    /// As [`Operations::gather`], with parts of any size. All ranks pass the same counts; `mine` has `counts[rank]` elements.
    ///
    /// # Errors
    /// As [`Operations::all_gather_v`], and [`crate::Error::Argument`] if `root` is no rank.
    fn gather_v<T: Element>(
        &self,
        mine: impl Into<Buf<'b, T>>,
        all: impl Into<BufMut<'b, T>>,
        counts: impl Into<Counts<'b>>,
        root: usize,
    ) -> Result<Self::Done> {
        let call = Call::new(Kind::GatherV { root: clamp(root) }, [mine.into().raw(), all.into().raw()]);
        self.submit(call.with_counts(&[counts.into()]))
    }

    /// As [`Operations::scatter`], with parts of any size. All ranks pass the same counts; `mine` has `counts[rank]` elements.
    ///
    /// # Errors
    /// As [`Operations::gather_v`].
    fn scatter_v<T: Element>(
        &self,
        all: impl Into<Buf<'b, T>>,
        mine: impl Into<BufMut<'b, T>>,
        counts: impl Into<Counts<'b>>,
        root: usize,
    ) -> Result<Self::Done> {
        let call = Call::new(Kind::ScatterV { root: clamp(root) }, [all.into().raw(), mine.into().raw()]);
        self.submit(call.with_counts(&[counts.into()]))
    }

    /// As [`Operations::all_to_all_into`], with parts of any size: `out` tells what of `src` goes to each rank, `into` what comes
    /// from each and where it lies in `dst`. What rank a sends to b must be what b expects of a; only these two need to know.
    /// `src` and `dst` may be the same memory if `out` and `into` are equal.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// // Rank 0 keeps one number and sends two; rank 1 sends one and keeps none.
    /// let (out, into) = [([1, 2], [1, 1]), ([1, 0], [2, 0])][rank.rank()];
    /// let src: Vec<u32> = (0..).take(out[0] + out[1]).map(|i| 10 * rank.rank() as u32 + i).collect();
    /// let mut dst = [0; 2];
    /// rank.all_to_all_v(&src, &out, &mut dst, &into)?;
    /// assert_eq!(dst, [[0, 10], [1, 2]][rank.rank()]);
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if counts and buffers do not fit or parts overlap; [`crate::Error::Mismatch`], naming both ranks,
    /// if one expects what the other does not send; those of a failed communicator.
    fn all_to_all_v<T: Element>(
        &self,
        src: impl Into<Buf<'b, T>>,
        out: impl Into<Counts<'b>>,
        dst: impl Into<BufMut<'b, T>>,
        into: impl Into<Counts<'b>>,
    ) -> Result<Self::Done> {
        let call = Call::new(Kind::AllToAllV, [src.into().raw(), dst.into().raw()]);
        self.submit(call.with_counts(&[out.into(), into.into()]))
    }

    /// As [`Operations::all_to_all_v`], with counts in memory of the operation, that of its GPU if it has one: see [`AllToAllCounted`].
    /// Each rank knows what it sends, and is told what it received.
    ///
    /// ```
    /// # use unisono::{AllToAllCounted, Communicator, Operations};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// // Rank 0 keeps one number and sends two; rank 1 sends one and keeps none. Each has room for three from each.
    /// let send_counts = [[1u32, 2], [1, 0]][rank.rank()];
    /// let input: Vec<i64> = (0..3).map(|i| 10 * rank.rank() as i64 + i).collect();
    /// let (mut output, mut recv_counts) = ([-1; 6], [0; 2]);
    /// rank.all_to_all_counted(AllToAllCounted {
    ///     input: (&input).into(),
    ///     send_counts: (&send_counts).into(),
    ///     send_offsets: None,
    ///     output: (&mut output).into(),
    ///     recv_counts: (&mut recv_counts).into(),
    /// })?;
    /// assert_eq!(recv_counts, [[1, 1], [2, 0]][rank.rank()]);
    /// assert_eq!(output, [[0, -1, -1, 10, -1, -1], [1, 2, -1, -1, -1, -1]][rank.rank()]);
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if buffers do not fit or overlap, and on the host if a part lies outside of the input;
    /// [`crate::Error::Counts`], naming both ranks, if a part is more than the receiver has room for, and on a GPU, as told by
    /// [`Communicator::check`](crate::Communicator::check), if it lies outside of the input: then nothing was written there, and the
    /// communicator has failed on all ranks; [`crate::Error::Mismatch`] if the ranks differ; those of a failed communicator.
    fn all_to_all_counted<T: Element, C: Count>(
        &self,
        call: AllToAllCounted<'b, T, C>,
    ) -> Result<Self::Done> {
        self.submit(call.into_call())
    }

    /// Sums rows over all ranks, adds the residual, and normalises: see [`AllReduceRmsNorm`], which names the buffers, and what is
    /// computed with which rounding. Equal shapes, epsilon and kind of output; every rank adds its own residual and has its own
    /// weights, and where these are equal all ranks have the same bits.
    ///
    /// ```
    /// # use unisono::{AllReduceRmsNorm, Communicator, Normalised, Operations, half::bf16};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let hidden = 8;
    /// let input = vec![bf16::from_f32(1.5); 3 * hidden]; // of three tokens
    /// let mut residual = vec![bf16::ONE; 3 * hidden];
    /// let mut output = vec![bf16::ZERO; 3 * hidden];
    /// rank.all_reduce_rms_norm(AllReduceRmsNorm {
    ///     input: (&input).into(),
    ///     residual: None, // lies in `residual_out`
    ///     residual_out: (&mut residual).into(),
    ///     weight: (&vec![bf16::from_f32(3.0); hidden]).into(),
    ///     epsilon: 0.0,
    ///     output: Normalised::Same((&mut output).into()),
    /// })?;
    /// assert_eq!((residual[0].to_f32(), output[23].to_f32()), (4.0, 3.0));
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if shapes do not fit or buffers overlap; [`crate::Error::Mismatch`] if the ranks differ; on a GPU
    /// [`crate::Error::NotPrepared`] under capture, unless `Builder::prepare_rms_norm` loaded the kernels or an earlier call did.
    fn all_reduce_rms_norm<T: HalfFloat>(&self, call: AllReduceRmsNorm<'b, T>) -> Result<Self::Done> {
        self.submit(call.into_call())
    }

    /// Replaces `x` on every rank by the sum of the `x` of all ranks, of which 8 bits for each element travel: f8e4m3, with an f32 scale
    /// for each 128 elements from the first one on. Half the bytes of 16-bit types, a quarter of f32. Equal counts.
    ///
    /// Of each group scale = max(largest |x| / 448, 2⁻¹²⁶), and elements are x / scale rounded to nearest even; they are summed in f32 in
    /// the order of ranks. The sum is quantised in the same way, and then rounded to `T`. So each addend, and the sum once more, is off by
    /// up to 1/16 of itself, and by up to a 458,752nd of the largest in its group where it is small. Infinities and NaN become NaN and
    /// change no other element. All ranks get the same bits, on the CPU and on GPUs and for every size.
    ///
    /// On the host it saves nothing. On GPUs it goes in packets, whatever the size: several kernels where these have no room for all
    /// (8 ranks: from 2,287,616 elements on).
    ///
    /// ```
    /// # use unisono::{Communicator, Operations};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let mut x = [448.0f32, 17.0];
    /// rank.all_reduce_quantised(&mut x)?;
    /// assert_eq!(x, [896.0, 32.0]); // 17 travels as 16
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::Error::Mismatch`] if the ranks differ; on a GPU [`crate::Error::NotPrepared`] under capture, unless
    /// `Builder::prepare_quantised` loaded the kernels or an earlier call did; those of a failed communicator.
    fn all_reduce_quantised<T: Quantisable>(&self, x: impl Into<BufMut<'b, T>>) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllReduceQuantised, [x.into().raw()]))
    }

    /// As [`Operations::all_reduce_quantised`], from `src` to `dst`. Both have the same count; they may be the same memory, but must not
    /// overlap otherwise.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the counts differ, else as [`Operations::all_reduce_quantised`].
    fn all_reduce_quantised_into<T: Quantisable>(
        &self,
        src: impl Into<Buf<'b, T>>,
        dst: impl Into<BufMut<'b, T>>,
    ) -> Result<Self::Done> {
        self.submit(Call::new(Kind::AllReduceQuantised, [src.into().raw(), dst.into().raw()]))
    }

    /// Replaces each of this rank's buffers, as many on every rank and all of one count, by the reduction of all buffers of all
    /// ranks: by rank, and then by their order here. An average divides by the number of buffers.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if there is no buffer, there are more than 1,024, or their counts differ;
    /// [`crate::Error::Mismatch`] if the ranks have other numbers of them; as [`Operations::all_reduce`].
    fn all_reduce_multi<T: Reducible>(&self, local: Vec<BufMut<'b, T>>, op: ReduceOp) -> Result<Self::Done> {
        let buffers: Vec<_> = local.into_iter().map(|buffer| buffer.raw()).collect();
        self.submit(Call::new(Kind::AllReduceMulti { op }, buffers))
    }

    /// Writes buffer `root_buffer` of rank `root` to every buffer of every rank. All have one count; the ranks may have different
    /// numbers of buffers, at least one.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if `root` is no rank, it has no such buffer, or counts differ; those of a failed communicator.
    fn broadcast_multi<T: Element>(
        &self,
        local: Vec<BufMut<'b, T>>,
        root: usize,
        root_buffer: usize,
    ) -> Result<Self::Done> {
        let buffers: Vec<_> = local.into_iter().map(|buffer| buffer.raw()).collect();
        let kind = Kind::BroadcastMulti { root: clamp(root), buffer: clamp(root_buffer) };
        self.submit(Call::new(kind, buffers))
    }

    /// Sends `src` to rank `to`, which receives it with the same type, count and `tag`. Messages of one pair of ranks keep
    /// their order for each tag. Complete, for the sender, when `src` may be used again: a message that fits into the
    /// channel (16 to 64 KiB) does not wait for its receiver.
    ///
    /// On the stream of a GPU the messages of one pair of ranks are received in the order in which they were sent, whatever their tags: a
    /// tag that is not the next one is a [`crate::Error::Mismatch`]. A message waits in the stream until its receiver takes it, if it is
    /// larger than 1 MiB and does not fit into the receiver's scratch (4 to 8 MiB for each sender). Messages that cross belong into a
    /// [`group()`](crate::group()) or a [`Operations::send_recv`], which carry them out at once.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if `to` is not another rank; [`crate::Error::Mismatch`], on both ranks, if the receiver
    /// expects another type or count; those of a failed communicator.
    fn send<T: Element>(&self, src: impl Into<Buf<'b, T>>, to: usize, tag: u32) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Send { to: clamp(to), tag }, [src.into().raw()]))
    }

    /// Receives the next message with `tag` that rank `from` sends to us. Messages with other tags wait for their turn.
    ///
    /// # Errors
    /// As [`Operations::send`].
    fn recv<T: Element>(&self, dst: impl Into<BufMut<'b, T>>, from: usize, tag: u32) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Recv { from: clamp(from), tag }, [dst.into().raw()]))
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
        self.submit(Call::new(kind, [src.into().raw(), dst.into().raw()]))
    }

    /// Returns when every rank has entered it.
    ///
    /// # Errors
    /// Those of a failed communicator.
    fn barrier(&self) -> Result<Self::Done> {
        self.submit(Call::new(Kind::Barrier, []))
    }
}

/// A root as it is told to peers; one beyond the wire's range stays out of range.
fn clamp(root: usize) -> u32 {
    u32::try_from(root).unwrap_or(u32::MAX)
}
