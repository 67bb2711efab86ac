//! Headers as words and back, fingerprints and chains, and how calls are described.

use super::*;

fn sample() -> Vec<CallHeader> {
    let mut all = vec![CallHeader::bare(Kind::Barrier), CallHeader::bare(Kind::Destroy)];
    for dtype in DType::ALL {
        for count in [0, 1, 4096] {
            for kind in [
                Kind::AllReduce { op: ReduceOp::Sum },
                Kind::AllReduce { op: ReduceOp::Max },
                Kind::Broadcast { root: 0 },
                Kind::Broadcast { root: 3 },
                Kind::AllGather,
                Kind::Reduce { op: ReduceOp::Max, root: 3 },
                Kind::Reduce { op: ReduceOp::Sum, root: 3 },
                Kind::ReduceScatter { op: ReduceOp::Sum },
                Kind::Gather { root: 0 },
                Kind::Scatter { root: 0 },
                Kind::AllToAll,
                Kind::AllGatherV,
                Kind::ReduceScatterV { op: ReduceOp::Sum },
                Kind::GatherV { root: 1 },
                Kind::ScatterV { root: 1 },
                Kind::AllToAllV,
                Kind::AllToAllCounted,
                Kind::AllReduceQuantised,
                Kind::AllReduceMulti { op: ReduceOp::Prod },
                Kind::BroadcastMulti { root: 1, buffer: 0 },
                Kind::BroadcastMulti { root: 1, buffer: 2 },
                Kind::AllReduceRmsNorm {
                    hidden: 8,
                    epsilon: 1e-5,
                    output: NormOutput::Same,
                    is_in_place: false,
                },
                Kind::AllReduceRmsNorm {
                    hidden: 16,
                    epsilon: 1e-5,
                    output: NormOutput::Same,
                    is_in_place: false,
                },
                Kind::AllReduceRmsNorm {
                    hidden: 8,
                    epsilon: 1e-6,
                    output: NormOutput::Same,
                    is_in_place: false,
                },
                Kind::AllReduceRmsNorm {
                    hidden: 8,
                    epsilon: 1e-5,
                    output: NormOutput::Fp8,
                    is_in_place: false,
                },
                Kind::AllReduceRmsNorm {
                    hidden: 8,
                    epsilon: 1e-5,
                    output: NormOutput::Fp8PerToken,
                    is_in_place: true,
                },
            ] {
                for (source_window, target_window) in [(0, 0), (1, 1), (1, 2), (0, 2)] {
                    all.push(CallHeader {
                        kind,
                        dtype: Some(dtype),
                        count,
                        parts: 0,
                        source_window,
                        target_window,
                    });
                }
            }
        }
    }
    all
}

#[test]
fn headers_round_trip_and_differ_in_their_fingerprints() {
    let mut seen = std::collections::HashMap::new();
    for header in sample() {
        let words = header.to_words();
        assert_eq!(CallHeader::from_words(&words), Some(header));
        assert_eq!(seen.insert(CallHeader::fingerprint(&words), header), None, "{header:?}");
    }
}

#[test]
fn the_scalar_is_told_but_not_compared() {
    let of = |scalar| CallHeader {
        kind: Kind::AllReduce { op: ReduceOp::PreMulSum(scalar) },
        dtype: Some(DType::F32),
        count: 3,
        parts: 0,
        source_window: 0,
        target_window: 0,
    };
    let (left, right) = (of(1.5).to_words(), of(-2.0).to_words());
    assert_eq!(CallHeader::fingerprint(&left), CallHeader::fingerprint(&right));
    assert_eq!(CallHeader::from_words(&right), Some(of(-2.0)));
}

#[test]
fn the_chain_remembers_every_call_and_its_place() {
    let prints: Vec<u64> =
        sample().iter().map(|header| CallHeader::fingerprint(&header.to_words())).collect();
    let chain = |order: &[u64]| order.iter().fold(0, |chain, print| CallHeader::chain(chain, *print));
    assert_ne!(chain(&[prints[0], prints[5], prints[9]]), chain(&[prints[0], prints[9], prints[5]]));
    assert_ne!(chain(&[prints[1], prints[5]]), chain(&[prints[2], prints[5]]));
}

#[test]
fn words_from_nowhere_are_no_call() {
    assert_eq!(CallHeader::from_words(&[0; 8]), None);
    assert_eq!(CallHeader::from_words(&[u64::MAX; 8]), None);
}

#[test]
fn a_call_is_described_in_the_words_of_its_caller() {
    let header = CallHeader {
        kind: Kind::AllReduce { op: ReduceOp::Sum },
        dtype: Some(DType::BF16),
        count: 4096,
        parts: 0,
        source_window: 0,
        target_window: 0,
    };
    assert_eq!(header.describe(812, 2), "all_reduce #812 on rank 2 (bf16, 4096, sum)");
    let header =
        CallHeader { kind: Kind::Broadcast { root: 0 }, target_window: 4, source_window: 4, ..header };
    assert_eq!(header.describe(812, 0), "broadcast #812 on rank 0 (bf16, 4096, root 0, window 4)");
    assert_eq!(CallHeader::bare(Kind::Barrier).describe(1, 1), "barrier #1 on rank 1");
    let uneven = |counts: &[usize]| CallHeader {
        kind: Kind::AllGatherV,
        count: 5,
        parts: parts_hash(counts),
        target_window: 0,
        source_window: 0,
        ..header
    };
    let (left, right) = (uneven(&[2, 3]), uneven(&[3, 2]));
    assert_ne!(left.describe(1, 0), right.describe(1, 0));
    assert!(left.describe(1, 0).starts_with("all_gather_v #1 on rank 0 (bf16, 5 in parts #"));
    let kind = Kind::BroadcastMulti { root: 3, buffer: 1 };
    let header = CallHeader { kind, target_window: 0, source_window: 0, ..header };
    assert_eq!(header.describe(2, 0), "broadcast_multi #2 on rank 0 (bf16, 4096, root 3, its buffer 1)");
}
