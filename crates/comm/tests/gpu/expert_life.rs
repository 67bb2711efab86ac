//! What surrounds the data of expert parallelism on GPUs: graphs, the pool of outputs, what is refused, calls that differ, ranks that do not come.

use std::time::Duration;

use unisono::cuda::Stream as CudaStream;
use unisono::ep::reference::{Placement, Routing};
use unisono::ep::{Buffer, Combine, Dispatch, Input, Settings};
use unisono::half::bf16;
use unisono::{Buf, Communicator, DType, Error, Operations, Stream};

use crate::expert_tools::{Both, Tools, bytes, le, run, run_failing, same, same_or_none, uploaded};

/// A small buffer, exchanged.
fn exchanged(gpu: &Communicator, settings: Settings) -> Buffer {
    let mut buffer = Buffer::new(gpu, settings).unwrap();
    buffer.exchange(gpu).unwrap();
    buffer
}

/// `count` tokens of 64 elements, all with the value `value`.
fn tokens_of(tools: &Tools, count: usize, value: f32) -> Both {
    Both::new(tools, DType::BF16, &bf16::from_f32(value).to_le_bytes().repeat(count * 64))
}

#[test]
fn graphs_dispatch_and_combine_as_often_as_they_are_launched() {
    run(
        2,
        |builder| builder,
        |gpu, host, tools| {
            let (rank, stream) = (gpu.rank(), &tools.stream);
            let mut buffer = exchanged(gpu, Settings::new(64, 4));
            // Token t goes to expert t mod 4, and every third one to expert 3 as well.
            let count = 50;
            let selections: Vec<i64> =
                (0..count).flat_map(|t: i64| [t % 4, if t % 3 == 0 { 3 } else { -1 }]).collect();
            let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&selections, i64::to_le_bytes));
            let x = tokens_of(tools, count as usize, 1.0 + rank as f32);
            let call = |buffer: &mut Buffer| {
                let call = Dispatch::new(x.on_device()).top_k(topk_idx, 2).worst_tokens(120).on(stream);
                let sent = buffer.dispatch(&call).unwrap();
                let combined = buffer.combine(&Combine::new(&sent.x, &sent.handle).on(stream)).unwrap();
                (sent, combined)
            };
            // Without a number of rows the host would have to wait.
            host.barrier().unwrap();
            let (eager, _) = call(&mut buffer);
            tools.raw.synchronize().unwrap();
            host.barrier().unwrap();
            tools.raw.begin_capture().unwrap();
            let refused = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 2).on(stream));
            assert!(matches!(refused, Err(Error::Argument { what: "worst_tokens", .. })), "{refused:?}");
            let (sent, combined) = call(&mut buffer);
            let graph = tools.raw.end_capture().unwrap();
            for round in 0..10 {
                graph.launch(&tools.raw).unwrap();
                if round % 3 == 0 {
                    let (again, _) = call(&mut buffer);
                    same(
                        &again.handle.rank_prefix(),
                        &eager.handle.rank_prefix(),
                        None,
                        stream,
                        "eager between",
                    );
                }
                same(
                    &sent.handle.source_tokens(),
                    &eager.handle.source_tokens(),
                    None,
                    stream,
                    "source tokens",
                );
                same_or_none(sent.topk_idx.as_ref(), eager.topk_idx.as_ref(), None, stream, "indices");
                let got = bytes(&combined.x, stream);
                for token in 0..count as usize {
                    let ranks = if token % 3 == 0 && token % 4 < 2 { 2.0 } else { 1.0 };
                    let expected = bf16::from_f32(ranks * (1.0 + rank as f32)).to_le_bytes();
                    assert_eq!(
                        got[token * 128..][..2],
                        expected,
                        "token {token} of rank {rank} in round {round}"
                    );
                }
            }
            buffer.check().unwrap();
            host.barrier().unwrap();
            drop((eager, sent, combined, graph));
            buffer.close(gpu).unwrap();
            host.barrier().unwrap();
        },
    );
}

#[test]
fn outputs_of_different_calls_never_alias_and_go_back_in_the_order_of_streams() {
    run(
        2,
        |builder| builder,
        |gpu, host, tools| {
            let (rank, stream) = (gpu.rank(), &tools.stream);
            let second = Stream::from(CudaStream::new(&tools.device).unwrap());
            // Room for four outputs.
            let settings = Settings { pool_bytes: Some(64 << 10), ..Settings::new(64, 2) };
            let mut buffer = exchanged(gpu, settings);
            let count = 64;
            let (_memory, topk_idx) =
                uploaded::<i64>(tools, &le(&vec![1 - rank as i64; count], i64::to_le_bytes));
            let inputs: Vec<Both> =
                (0..12).map(|at| tokens_of(tools, count, at as f32 + 20.0 * rank as f32)).collect();
            host.barrier().unwrap();
            let mut held = Vec::new();
            for (at, x) in inputs.iter().enumerate() {
                let stream = if at % 2 == 0 { stream } else { &second };
                let sent =
                    buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1).on(stream)).unwrap();
                assert_eq!(sent.tokens_per_expert, [count]);
                held.push((at, sent));
                // Some are kept beyond what the pool has room for, others go back at once.
                if at % 4 == 3 {
                    held.retain(|(at, _)| at % 4 != 3);
                }
            }
            for (at, sent) in &held {
                let value = bf16::from_f32(*at as f32 + 20.0 * (1 - rank) as f32).to_le_bytes();
                let stream = if at % 2 == 0 { stream } else { &second };
                assert!(
                    bytes(&sent.x, stream).as_chunks().0.iter().all(|x| *x == value),
                    "call {at} on rank {rank}"
                );
            }
            let text = buffer.explain();
            assert!(text.contains("through staging, because the pool was full"), "{text}");
            buffer.check().unwrap();
            host.barrier().unwrap();
            drop(held);
            buffer.close(gpu).unwrap();
            host.barrier().unwrap();
        },
    );
}

#[test]
fn what_does_not_fit_is_refused_and_the_buffer_works_on() {
    run(
        2,
        |builder| builder,
        |gpu, host, tools| {
            let (rank, stream) = (gpu.rank(), &tools.stream);
            let mut buffer = exchanged(gpu, Settings { pool_bytes: Some(32 << 10), ..Settings::new(64, 4) });
            assert!(matches!(buffer.exchange(gpu), Err(Error::BufferState { .. })));
            let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 3, 9, 2], i64::to_le_bytes));
            let (_many, of_many) =
                uploaded::<i64>(tools, &le(&vec![2 - 2 * rank as i64; 1000], i64::to_le_bytes));
            let (x, many) = (tokens_of(tools, 4, 1.0), tokens_of(tools, 1000, 1.0));
            host.barrier().unwrap();
            // Refused before anything is sent.
            let on_host = buffer.dispatch(&Dispatch::new(x.on_host()).top_k(&[0, 1, 2, 3], 1).on(stream));
            assert!(matches!(on_host, Err(Error::Place { .. })), "{on_host:?}");
            let no_stream = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1));
            assert!(matches!(no_stream, Err(Error::Place { .. })), "{no_stream:?}");
            assert!(matches!(buffer.layout(topk_idx, 1), Err(Error::Place { .. })));
            // An index that is no expert's selects nothing, and is told.
            let told = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1).on(stream));
            let text = told.unwrap_err().to_string();
            assert!(text.contains("below 4 experts, got 9 for token 2"), "{text}");
            // More rows than there is room for: told later, as nobody waits for their number.
            let few = Dispatch::new(x.on_device()).top_k(topk_idx, 1).worst_tokens(1).on(stream);
            let sent = buffer.dispatch(&few).unwrap();
            tools.raw.synchronize().unwrap();
            let text = buffer.check().unwrap_err().to_string();
            assert!(text.contains("worst_tokens") && text.contains("as many as came"), "{text}");
            assert_eq!(sent.x.shape(), [1, 64]);
            let _ = buffer.check();
            // Rows for which neither the pool nor the staging has room.
            let large = buffer.dispatch(&Dispatch::new(many.on_device()).top_k(of_many, 1).on(stream));
            let text = large.unwrap_err().to_string();
            assert!(text.contains("pool_bytes") && text.contains("room for"), "{text}");
            // Everybody refused the same, and goes on.
            let sent = buffer
                .dispatch(&Dispatch::new(x.on_device()).top_k(first_four(of_many), 1).on(stream))
                .unwrap();
            assert_eq!(sent.x.shape(), [4, 64]);
            buffer.check().unwrap();
            host.barrier().unwrap();
            drop(sent);
            buffer.close(gpu).unwrap();
            host.barrier().unwrap();
        },
    );
}

/// The first four elements.
fn first_four(all: Buf<'static, i64>) -> Buf<'static, i64> {
    let raw = all.raw();
    let unisono::Place::Cuda { ordinal } = raw.place else { unreachable!("{raw:?}") };
    // SAFETY: a part of what is valid.
    unsafe { Buf::cuda(raw.ptr, 4, ordinal) }
}

#[test]
fn calls_that_differ_and_ranks_that_do_not_come_are_named() {
    run_failing(2, |gpu, host, tools| {
        let (rank, stream) = (gpu.rank(), &tools.stream);
        let mut buffer = exchanged(gpu, Settings::new(64, 4));
        let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 3, 1, 2], i64::to_le_bytes));
        let x = tokens_of(tools, 4, 1.0);
        host.barrier().unwrap();
        // One gives two experts for each of two tokens.
        let top_k = 1 + rank;
        let part = if rank == 0 { x.on_device() } else { tokens_part(&x) };
        let error = buffer.dispatch(&Dispatch::new(part).top_k(topk_idx, top_k).on(stream)).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Mismatch { .. }) && text.contains("top-1") && text.contains("top-2"),
            "{text}"
        );
        assert!(!buffer.is_available());
        host.barrier().unwrap();
    });
    run_failing(2, |gpu, host, tools| {
        let (rank, stream) = (gpu.rank(), &tools.stream);
        let deadline = Duration::from_millis(30);
        let mut buffer = exchanged(gpu, Settings { deadline, ..Settings::new(64, 4) });
        let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 3, 1, 2], i64::to_le_bytes));
        let x = tokens_of(tools, 4, 1.0);
        host.barrier().unwrap();
        if rank == 0 {
            let error =
                buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1).on(stream)).unwrap_err();
            let Error::Timeout { rank: 0, call, missing, .. } = &error else { panic!("{error}") };
            assert!(
                call.contains("dispatch") && missing.len() == 1 && missing[0].contains("rank 1"),
                "{error}"
            );
            // The context is whole.
            tools.raw.synchronize().unwrap();
        }
        host.barrier().unwrap();
    });
}

/// The first half of the tokens.
fn tokens_part(x: &Both) -> Input<'static> {
    // SAFETY: a part of what is valid.
    unsafe { Buf::<bf16>::cuda(x.device.address(), x.count / 2, x.device.device().ordinal()) }.into()
}

/// It comes to the very call before which somebody said so.
#[test]
fn a_rank_that_is_masked_is_left_out_though_it_comes() {
    run_failing(3, |gpu, host, tools| {
        let (rank, stream) = (gpu.rank(), &tools.stream);
        let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 1, 2], i64::to_le_bytes));
        let x = tokens_of(tools, 1, 1.0 + rank as f32);
        let settings = Settings { deadline: Duration::from_secs(20), masking: true, ..Settings::new(64, 3) };
        let mut buffer = exchanged(gpu, settings);
        for turn in 0..6 {
            let (lost, asker) = (turn % 3, (turn + 1 + turn / 3) % 3);
            let call = |buffer: &mut Buffer| {
                let call = Dispatch::new(x.on_device()).top_k(topk_idx, 3).on(stream);
                buffer.dispatch(&call)
            };
            // Everybody takes part at first; sometimes it has taken part in nothing before.
            if turn % 2 == 0 {
                assert_eq!(call(&mut buffer).unwrap().x.shape(), [3, 64]);
            }
            host.barrier().unwrap();
            if rank == asker {
                buffer.mask_rank(lost).unwrap();
                assert_eq!(buffer.masked(), [lost]);
            }
            host.barrier().unwrap();
            let answer = call(&mut buffer);
            if rank == lost {
                assert!(
                    matches!(answer, Err(Error::GivenUp { rank: r, .. }) if r == rank),
                    "turn {turn}: {answer:?}"
                );
            } else {
                let sent = answer.unwrap();
                let expected: Vec<u8> = (0..3)
                    .filter(|source| *source != lost)
                    .flat_map(|source| bf16::from_f32(1.0 + source as f32).to_le_bytes().repeat(64))
                    .collect();
                assert_eq!(bytes(&sent.x, stream), expected, "turn {turn} on rank {rank}");
                assert_eq!(buffer.masked(), [lost], "turn {turn} on rank {rank}");
                buffer.check().unwrap();
            }
            host.barrier().unwrap();
            let renewed = buffer.renew(gpu).unwrap();
            std::mem::replace(&mut buffer, renewed).close(gpu).unwrap();
        }
        host.barrier().unwrap();
    });
}

#[test]
fn a_silent_rank_is_left_out_and_the_others_complete_the_call() {
    run_failing(3, |gpu, host, tools| {
        let (rank, stream) = (gpu.rank(), &tools.stream);
        let deadline = Duration::from_secs(2);
        let mut buffer = exchanged(gpu, Settings { deadline, masking: true, ..Settings::new(64, 3) });
        let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 1, 2, 0, 1, 2], i64::to_le_bytes));
        let x = tokens_of(tools, 2, 1.0 + rank as f32);
        host.barrier().unwrap();
        // Rank 2 takes part in the first call only. The others do without it from the second on.
        for turn in 0..3 {
            if rank == 2 && turn > 0 {
                break;
            }
            // Rank 1 has waited for the silent one for long enough before this one has, and waits for this one.
            if rank == 0 && turn == 1 {
                std::thread::sleep(deadline / 4);
            }
            let sent = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 3).on(stream)).unwrap();
            let came: &[f32] =
                if turn == 0 { &[1.0, 1.0, 2.0, 2.0, 3.0, 3.0] } else { &[1.0, 1.0, 2.0, 2.0] };
            let got = bytes(&sent.x, stream);
            let firsts: Vec<f32> =
                got.chunks(128).map(|row| bf16::from_le_bytes([row[0], row[1]]).to_f32()).collect();
            assert_eq!(firsts, came, "turn {turn} on rank {rank}");
            let combined = buffer.combine(&Combine::new(&sent.x, &sent.handle).on(stream)).unwrap();
            let times = if turn == 0 { 3.0 } else { 2.0 };
            let expected = bf16::from_f32(times * (1.0 + rank as f32)).to_le_bytes();
            assert!(
                bytes(&combined.x, stream).as_chunks().0.iter().all(|x| *x == expected),
                "turn {turn} on {rank}"
            );
            buffer.check().unwrap();
            let masked = if turn == 0 { Vec::new() } else { vec![2] };
            assert_eq!(buffer.masked(), masked);
        }
        host.barrier().unwrap();
        if rank == 2 {
            let late = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 3).on(stream));
            assert!(matches!(late, Err(Error::GivenUp { rank: 2, .. })), "{late:?}");
        }
        host.barrier().unwrap();
        // All take it in again, and it takes part as in the first call.
        let mut renewed = buffer.renew(gpu).unwrap();
        assert!(renewed.masked().is_empty());
        buffer.close(gpu).unwrap();
        let sent = renewed.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 3).on(stream)).unwrap();
        assert_eq!(sent.x.shape(), [6, 64]);
        let combined = renewed.combine(&Combine::new(&sent.x, &sent.handle).on(stream)).unwrap();
        let expected = bf16::from_f32(3.0 * (1.0 + rank as f32)).to_le_bytes();
        assert!(bytes(&combined.x, stream).as_chunks().0.iter().all(|x| *x == expected), "renewed on {rank}");
        renewed.check().unwrap();
        host.barrier().unwrap();
    });
}

#[test]
fn rounds_that_wrap_clear_the_memory_and_go_on() {
    for epoch in [0x7fff_fffa, 0xffff_fffa] {
        for masking in [false, true] {
            run(
                2,
                |builder| builder.first_epoch(epoch),
                |gpu, host, tools| {
                    let (rank, stream) = (gpu.rank(), &tools.stream);
                    let mut buffer = exchanged(gpu, Settings { masking, ..Settings::new(64, 2) });
                    let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 1, 0], i64::to_le_bytes));
                    let x = tokens_of(tools, 3, 1.0 + rank as f32);
                    host.barrier().unwrap();
                    // Three rounds each.
                    for turn in 0..4 {
                        let call = Dispatch::new(x.on_device()).top_k(topk_idx, 1).on(stream);
                        let sent = buffer.dispatch(&call).unwrap_or_else(|error| panic!("{turn}: {error}"));
                        assert_eq!(sent.tokens_per_expert, [4 - 2 * rank]);
                        let combined =
                            buffer.combine(&Combine::new(&sent.x, &sent.handle).on(stream)).unwrap();
                        let expected = bf16::from_f32(1.0 + rank as f32).to_le_bytes();
                        let got = bytes(&combined.x, stream);
                        assert!(
                            got.as_chunks().0.iter().all(|x| *x == expected),
                            "turn {turn} on rank {rank}"
                        );
                    }
                    buffer.check().unwrap();
                    host.barrier().unwrap();
                    buffer.close(gpu).unwrap();
                    host.barrier().unwrap();
                },
            );
        }
    }
}

#[test]
fn layouts_count_more_experts_than_a_block_has_room_for() {
    run(
        1,
        |builder| builder,
        |gpu, host, tools| {
            let (experts, top_k, tokens) = (9_000, 32, 3_000);
            let selections: Vec<i64> = (0..tokens * top_k)
                .map(|at| if at % 11 == 0 { -1 } else { (at * 7919 % experts) as i64 })
                .collect();
            let placement = Placement::even(experts, 1).unwrap();
            let expected = Routing::of(&selections, top_k, &placement).unwrap();
            let mut buffer = exchanged(gpu, Settings::new(8, experts));
            let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&selections, i64::to_le_bytes));
            let layout = buffer.layout_on(topk_idx, top_k, &tools.stream).unwrap();
            let counts = layout.tokens_per_expert().to_host(&tools.stream).unwrap();
            let counts: Vec<u32> =
                counts.as_slice::<i32>().unwrap().iter().map(|count| *count as u32).collect();
            assert_eq!(counts, expected.tokens_per_expert);
            buffer.check().unwrap();
            host.barrier().unwrap();
            drop(layout);
            buffer.close(gpu).unwrap();
        },
    );
}
