//! What is refused before anything is sent, after which the buffer still works; and ranks that make different calls.

use unisono::ep::{
    Buffer, CachedDispatch, Combine, Dispatch, LowLatencyCombine, LowLatencyDispatch, RowScales, ScaleKind,
    Settings, Tokens,
};
use unisono::half::bf16;
use unisono::{Buf, Communicator, DType, Error, Operations, Result};

use super::support::threads::on_threads;

const HIDDEN: usize = 16;

fn buffer(rank: &Communicator, low_latency: bool) -> Buffer {
    let settings = Settings { capacity: 4, top_k: 4, low_latency, ..Settings::new(HIDDEN, 4) };
    let mut buffer = Buffer::new(rank, settings).unwrap();
    buffer.exchange(rank).unwrap();
    buffer
}

/// Raw memory of a device, which no buffer of the host takes.
fn on_a_device(count: usize) -> Buf<'static, bf16> {
    // SAFETY: the call that it is given to refuses it before it is touched.
    unsafe { Buf::cuda(0x1000, count, 3) }
}

/// `what: expected, got` of a refusal.
fn complaint<T>(result: Result<T>) -> String {
    match result {
        Err(Error::Argument { what, expected, got, rank: 0 | 1, .. }) => format!("{what}: {expected}, {got}"),
        Err(Error::Place { expected, got, rank: 0 | 1, .. }) => format!("{expected}, {got}"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("accepted"),
    }
}

#[test]
fn throughput_calls_refuse_what_does_not_fit() {
    on_threads(2, |rank| {
        let mut buffer = buffer(&rank, false);
        let (x, topk, weights) = (vec![bf16::ONE; 2 * HIDDEN], [0i64, 1, 2, 3], [1f32; 4]);
        let sent = buffer.dispatch(&Dispatch::new(&x).top_k(&topk, 2)).unwrap();
        let layout = buffer.layout(&topk, 2).unwrap();
        let other = buffer.layout(&[0i64; 3], 1).unwrap();
        let scales = [1f32; 3];
        let wide = vec![1f32; HIDDEN];
        let mut no = |dispatch: &Dispatch<'_>| complaint(buffer.dispatch(dispatch));
        assert_eq!(no(&Dispatch::new(&x)), "topk_idx: indices or a layout, neither");
        assert_eq!(
            no(&Dispatch::new(&x[1..]).layout(&layout)),
            "elements of x: rows of 16, at most 33554431, 31"
        );
        assert_eq!(no(&Dispatch::new(&x).top_k(&topk, 3)), "topk_idx: 6 of i64, 4 of i64");
        assert_eq!(no(&Dispatch::new(&x).top_k(&[0i64; 10], 5)), "top_k: 1 to 4, 5");
        assert_eq!(
            no(&Dispatch::new(&x).top_k(&[0i64, 4], 1)),
            "topk_idx: −1, or below 4 experts, 4 for token 1"
        );
        assert_eq!(
            no(&Dispatch::new(&x).top_k(&topk, 2).weights(&weights[1..])),
            "topk_weights: 4 of f32, 3 of f32"
        );
        assert_eq!(
            no(&Dispatch::new(&x).layout(&layout).weights(&weights)),
            "topk_weights: none without topk_idx, some"
        );
        assert_eq!(no(&Dispatch::new(&x).layout(&other)), "layout: 2 tokens of this buffer, 3");
        assert_eq!(
            no(&Dispatch::new(&x).layout(&layout).expert_alignment(0)),
            "expert_alignment: at least 1, 0"
        );
        assert_eq!(
            no(&Dispatch::new(&wide).top_k(&[0i64], 1)),
            "dtype: bf16, f16, f32 or f8e4m3, no wider than bf16, f32"
        );
        assert_eq!(
            no(&Dispatch::new(&vec![1i16; HIDDEN]).top_k(&[0i64], 1)),
            "dtype: bf16, f16, f32 or f8e4m3, no wider than bf16, i16"
        );
        let scaled = |scales| Dispatch::new(Tokens::scaled(&x, scales)).layout(&layout);
        assert_eq!(
            no(&scaled(RowScales::rows(&scales, 2))),
            "elements of scales: more than 3, which the strides reach, 3"
        );
        assert_eq!(no(&scaled(RowScales::rows(&scales, 3))), "scales of a token: 1 to 2, 3");
        assert_eq!(no(&scaled(RowScales::rows(&x, 1))), "dtype of scales: f32 or i32, bf16");
        let far = RowScales::strided(&scales, 2, (usize::MAX, 1));
        assert!(no(&scaled(far)).ends_with("which the strides reach, 3"));
        let device = Dispatch::new(on_a_device(2 * HIDDEN)).layout(&layout);
        assert_eq!(no(&device), "host memory, cuda:3");
        let mut no = |combine: &Combine<'_>| complaint(buffer.combine(combine));
        let rows = [bf16::ONE; 4 * HIDDEN];
        let came = sent.handle.rows();
        assert_eq!(
            no(&Combine::new(&rows[..(came - 1) * HIDDEN], &sent.handle)),
            "rows: 2, as the handle has, 1"
        );
        let all = &rows[..came * HIDDEN];
        assert_eq!(no(&Combine::new(all, &sent.handle).per_token(2)), "rows: 4, as the handle has, 2");
        assert_eq!(no(&Combine::new(all, &sent.handle).per_token(0)), "per_token: at least 1, 0");
        assert_eq!(no(&Combine::new(all, &sent.handle).bias(&x[1..])), "bias: 32 of bf16, 31 of bf16");
        assert_eq!(no(&Combine::new(all, &sent.handle).weights(&[1f32])), "topk_weights: 4 of f32, 1 of f32");
        let codes = vec![unisono::f8e4m3(0); came * HIDDEN];
        assert_eq!(no(&Combine::new(&codes, &sent.handle)), "dtype: bf16, f16 or f32, f8e4m3");
        assert_eq!(
            complaint(buffer.dispatch_cached(&CachedDispatch::new(&x[..HIDDEN], &sent.handle))),
            "tokens: 2, as the handle has, 1"
        );
        assert_eq!(complaint(buffer.mask_rank(1)), "settings: masking, none");
        assert_eq!(complaint(buffer.renew(&rank)), "settings: masking, none");
        let call = LowLatencyDispatch::new(&x, &topk, 2);
        assert_eq!(complaint(buffer.low_latency_dispatch(&call)), "settings: low_latency, none");
        // More rows than there was room for, on one rank: the others have theirs.
        let mut dispatch = Dispatch::new(&x).top_k(&topk, 2);
        if rank.rank() == 0 {
            dispatch = dispatch.worst_tokens(1);
            assert_eq!(complaint(buffer.dispatch(&dispatch)), "worst_tokens: at least 2, as many as came, 1");
        } else {
            assert_eq!(buffer.dispatch(&dispatch).unwrap().handle.rows(), 2);
        }
        buffer.combine(&Combine::new(all, &sent.handle)).unwrap();
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn low_latency_calls_refuse_what_does_not_fit() {
    on_threads(2, |rank| {
        let mut buffer = buffer(&rank, true);
        let (x, topk, weights) = (vec![bf16::ONE; 2 * HIDDEN], [0i64, 1, 2, 3], [1f32; 4]);
        let mut no = |call: &LowLatencyDispatch<'_>| complaint(buffer.low_latency_dispatch_send(call));
        let five = vec![bf16::ONE; 5 * HIDDEN];
        assert_eq!(no(&LowLatencyDispatch::new(&five, &[0i64; 5], 1)), "tokens: at most 4, the capacity, 5");
        assert_eq!(
            no(&LowLatencyDispatch::new(&x, &[0i64, 1, 3, 3], 2)),
            "topk_idx: each expert at most once for a token, [3, 3] for token 1"
        );
        assert_eq!(
            no(&LowLatencyDispatch::new(&x, &topk, 2).cast(ScaleKind::Ue8m0)),
            "hidden: a multiple of 512 for UE8M0 scales, 16"
        );
        let codes = vec![unisono::f8e4m3(0); HIDDEN];
        assert_eq!(no(&LowLatencyDispatch::new(&codes, &[0i64], 1)), "dtype: bf16, f16 or f32, f8e4m3");
        assert!(
            complaint(buffer.combine_buffer(DType::F32)).starts_with("dtype: bf16, f16 or f32, no wider")
        );
        let call = LowLatencyDispatch::new(&x, &topk, 2);
        let first = buffer.low_latency_dispatch_send(&call).unwrap();
        let second = buffer.low_latency_dispatch_send(&call).unwrap();
        assert_eq!(
            complaint(buffer.low_latency_dispatch_send(&call)),
            "low-latency calls: fewer than 2 that are sent and not received, 2"
        );
        assert_eq!(
            complaint(buffer.dispatch(&Dispatch::new(&x).top_k(&topk, 2))),
            "low-latency calls: none that is sent and not received, 2"
        );
        let first = buffer.receive_dispatch(first).unwrap();
        assert_eq!(first.counts.as_slice::<i32>().unwrap(), [2, 2]);
        let second = buffer.receive_dispatch(second).unwrap();
        let handle = &second.handle;
        let mut no = |call: &LowLatencyCombine<'_>| complaint(buffer.low_latency_combine(call));
        assert_eq!(no(&LowLatencyCombine::new(&x, &topk, &weights, handle)), "x: 256 of bf16, 32 of bf16");
        assert_eq!(
            no(&LowLatencyCombine::of_buffer(&topk, &weights, handle)),
            "x: results in combine_buffer(), none; it was not asked for"
        );
        let all = vec![bf16::ONE; 256];
        assert_eq!(
            no(&LowLatencyCombine::new(&all, &topk[1..], &weights, handle)),
            "topk_idx: 4 of i64, 3 of i64"
        );
        assert_eq!(
            no(&LowLatencyCombine::new(&all, &topk, &weights[1..], handle)),
            "topk_weights: 4 of f32, 3 of f32"
        );
        let combined =
            buffer.low_latency_combine(&LowLatencyCombine::new(&all, &topk, &weights, handle)).unwrap();
        assert_eq!(combined.x.as_slice::<bf16>().unwrap(), [bf16::from_f32(2.0); 2 * HIDDEN]);
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn halves_are_received_in_the_order_in_which_they_were_sent() {
    on_threads(2, |rank| {
        let mut buffer = buffer(&rank, true);
        let (x, topk) = (vec![bf16::ONE; HIDDEN], [0i64]);
        let call = LowLatencyDispatch::new(&x, &topk, 1);
        let first = buffer.low_latency_dispatch_send(&call).unwrap();
        let second = buffer.low_latency_dispatch_send(&call).unwrap();
        assert_eq!(
            complaint(buffer.receive_dispatch(second)),
            "call: the first of this buffer that is not received, another one"
        );
        let first = buffer.receive_dispatch(first).unwrap();
        let expected = if rank.rank() == 0 { [2, 0] } else { [0, 0] };
        assert_eq!(first.counts.as_slice::<i32>().unwrap(), expected);
        rank.barrier().unwrap();
        drop(buffer);
        rank.destroy().unwrap();
    });
}

/// The sentence in which each rank is told that the calls differ.
fn mismatch(call: impl Fn(&Communicator, &mut Buffer) -> Result<()> + Send + Sync + 'static) -> Vec<String> {
    on_threads(2, move |rank| {
        let mut buffer = buffer(&rank, true);
        let error = call(&rank, &mut buffer).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        // It has failed for good.
        let x = vec![bf16::ONE; HIDDEN];
        assert_eq!(buffer.dispatch(&Dispatch::new(&x).top_k(&[0i64], 1)).unwrap_err(), error);
        assert!(!buffer.is_available());
        error.to_string()
    })
}

#[test]
fn ranks_that_make_different_calls_are_told_both() {
    let told = mismatch(|rank, buffer| {
        let x = vec![bf16::ONE; HIDDEN];
        let topk = vec![0i64; 1 + rank.rank()];
        buffer.dispatch(&Dispatch::new(&x).top_k(&topk, 1 + rank.rank())).map(drop)
    });
    for sentence in told {
        assert!(sentence.contains("dispatch #1 of an ep::Buffer on rank 0 (bf16, top-1)"), "{sentence}");
        assert!(sentence.contains("dispatch #1 of an ep::Buffer on rank 1 (bf16, top-2)"), "{sentence}");
    }
    let told = mismatch(|rank, buffer| {
        let x = vec![bf16::ONE; HIDDEN];
        if rank.rank() == 0 {
            return buffer.dispatch(&Dispatch::new(&x).top_k(&[0i64], 1)).map(drop);
        }
        buffer.low_latency_dispatch(&LowLatencyDispatch::new(&x, &[0i64], 1)).map(drop)
    });
    assert!(
        told.iter().all(|sentence| sentence.contains(" low_latency_dispatch #1")
            || sentence.starts_with("low_latency_dispatch #1")),
        "{told:?}"
    );
    // Two dispatches, and each rank takes the handle of another one.
    let told = mismatch(|rank, buffer| {
        let x = vec![bf16::ONE; HIDDEN];
        let dispatch = Dispatch::new(&x).top_k(&[0i64], 1);
        let handles = [buffer.dispatch(&dispatch)?.handle, buffer.dispatch(&dispatch)?.handle];
        buffer.dispatch_cached(&CachedDispatch::new(&x, &handles[rank.rank()])).map(drop)
    });
    assert!(
        told.iter().all(|told| told.contains("handle of #1") && told.contains("handle of #2")),
        "{told:?}"
    );
}

#[test]
fn a_combine_of_other_selections_than_were_dispatched_is_found() {
    let told = mismatch(|rank, buffer| {
        let x = vec![bf16::ONE; HIDDEN];
        let dispatched = buffer.low_latency_dispatch(&LowLatencyDispatch::new(&x, &[0i64], 1))?;
        let (results, other) = (vec![bf16::ONE; 256], [rank.rank() as i64]);
        let combine = LowLatencyCombine::new(&results, &other, &[1f32], &dispatched.handle);
        buffer.low_latency_combine(&combine).map(drop)
    });
    assert!(
        told.iter().all(|told| told.contains("where expert 1 has no row for token 0 of rank 1")),
        "{told:?}"
    );
}
