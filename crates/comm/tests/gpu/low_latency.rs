//! Low-latency calls on GPUs against the naive reference of the host's tests: whole and in halves, overlapping, in graphs with several
//! buffers alive, without a rank that is masked, and with selections that cannot be.

use std::time::Duration;

use unisono::cuda::DeviceBuffer;
use unisono::ep::{
    Buffer, LowLatencyCombine, LowLatencyDispatch, LowLatencyDispatched, LowLatencyHandle, Settings,
};
use unisono::half::bf16;
use unisono::{Buf, Communicator, Error, Operations, Stream};

use crate::ep::case::{Case, settings};
use crate::ep::low_latency::{Seen, cast, check_combined, check_dispatched, is_quantised, results, tokens};
use crate::expert_tools::{Both, Tools, Uploaded, run, uploaded};
use crate::numbers::{self, Random};
use crate::world::on_threads;

/// What a rank puts into a case, on its device.
struct Given {
    x: Both,
    selections: Uploaded<i64>,
    weights: Uploaded<f32>,
    results: Both,
}

fn selections_of(case: &Case, rank: usize) -> Vec<u8> {
    case.selections(rank).iter().flat_map(|selection| selection.to_le_bytes()).collect()
}

fn weights_of(case: &Case, rank: usize) -> Vec<u8> {
    case.weights(rank).iter().flat_map(|weight| weight.to_le_bytes()).collect()
}

impl Given {
    fn new(tools: &Tools, case: &Case, rank: usize) -> Self {
        Self {
            x: Both::new(tools, case.dtype, &tokens(case, rank)),
            selections: uploaded(tools, &selections_of(case, rank)),
            weights: uploaded(tools, &weights_of(case, rank)),
            results: Both::new(tools, case.dtype, &results(case, rank)),
        }
    }

    /// The same for a case of the same shape, in the same memory.
    fn replace(&mut self, case: &Case, rank: usize) {
        self.x.device.write(0, &tokens(case, rank)).unwrap();
        self.selections.0.write(0, &selections_of(case, rank)).unwrap();
        self.weights.0.write(0, &weights_of(case, rank)).unwrap();
        self.results.device.write(0, &results(case, rank)).unwrap();
    }

    fn dispatch<'b>(&'b self, case: &Case, stream: &'b Stream) -> LowLatencyDispatch<'b> {
        let call = LowLatencyDispatch::new(self.x.on_device(), self.selections.1, case.top_k).on(stream);
        match cast(case) {
            Some(kind) => call.cast(kind),
            None => call,
        }
    }

    fn combine<'b>(
        &'b self,
        case: &Case,
        handle: &'b LowLatencyHandle,
        stream: &'b Stream,
    ) -> LowLatencyCombine<'b> {
        let (selections, weights) = (self.selections.1, self.weights.1);
        let call = LowLatencyCombine::new(self.results.on_device(), selections, weights, handle).on(stream);
        if is_quantised(case) { call.quantised() } else { call }
    }
}

/// What came, once `stream` is through.
fn seen(dispatched: &LowLatencyDispatched, stream: &Stream) -> Seen {
    let host = |tensor: &unisono::ep::Tensor| tensor.to_host(stream).unwrap();
    Seen {
        x: host(&dispatched.x),
        scales: dispatched.scales.as_ref().map(host),
        counts: host(&dispatched.counts),
        source_tokens: host(&dispatched.handle.source_tokens()),
        ranges: host(&dispatched.handle.layout_range()),
        waited: host(&dispatched.waited),
    }
}

fn of_low_latency(with: (Settings, Vec<usize>)) -> (Settings, Vec<usize>) {
    (Settings { low_latency: true, pool_bytes: Some(1 << 20), ..with.0 }, with.1)
}

fn exchanged(communicator: &Communicator, settings: &Settings) -> Buffer {
    let mut buffer = Buffer::new(communicator, settings.clone()).unwrap();
    buffer.exchange(communicator).unwrap();
    buffer
}

/// One behind the other, each call whole. Memory is taken and freed where no kernel of any rank waits: that may wait for all of them.
fn whole(buffer: &mut Buffer, tools: &Tools, host: &Communicator, case: &Case) {
    let rank = host.rank();
    let given = Given::new(tools, case, rank);
    host.barrier().unwrap();
    whole_of(buffer, tools, case, (&given, rank));
    host.barrier().unwrap();
}

fn whole_of(buffer: &mut Buffer, tools: &Tools, case: &Case, (given, rank): (&Given, usize)) {
    let stream = &tools.stream;
    let got = buffer.low_latency_dispatch(&given.dispatch(case, stream)).unwrap();
    check_dispatched(case, rank, &seen(&got, stream), false);
    let in_place = case.random(6).once_in(2);
    let sums = if in_place {
        let target = buffer.combine_buffer_on(case.dtype, stream).unwrap().raw();
        let bytes = target.count * case.dtype.size();
        // SAFETY: both are as long, and live until the stream was waited for.
        unsafe { tools.raw.copy(target.ptr, given.results.device.address(), bytes) }.unwrap();
        let (selections, weights) = (given.selections.1, given.weights.1);
        let call = LowLatencyCombine::of_buffer(selections, weights, &got.handle).on(stream);
        let call = if is_quantised(case) { call.quantised() } else { call };
        buffer.low_latency_combine(&call).unwrap()
    } else {
        buffer.low_latency_combine(&given.combine(case, &got.handle, stream)).unwrap()
    };
    check_combined(case, rank, &sums.x.to_host(stream).unwrap());
    assert_eq!(sums.waited.to_host(stream).unwrap().shape(), [case.ranks()]);
    buffer.check().unwrap();
}

/// Two at once, in halves: while one is on its way, the other is worked on.
fn overlapping(buffer: &mut Buffer, tools: &Tools, host: &Communicator, [a, b]: [&Case; 2]) {
    let (rank, stream) = (host.rank(), &tools.stream);
    let given = [a, b].map(|case| Given::new(tools, case, rank));
    host.barrier().unwrap();
    let sent_a = buffer.low_latency_dispatch_send(&given[0].dispatch(a, stream)).unwrap();
    let sent_b = buffer.low_latency_dispatch_send(&given[1].dispatch(b, stream)).unwrap();
    let of_a = buffer.receive_dispatch(sent_a).unwrap();
    let sent_a = buffer.low_latency_combine_send(&given[0].combine(a, &of_a.handle, stream)).unwrap();
    let of_b = buffer.receive_dispatch(sent_b).unwrap();
    let sent_b = buffer.low_latency_combine_send(&given[1].combine(b, &of_b.handle, stream)).unwrap();
    let sums_a = buffer.receive_combine(sent_a).unwrap();
    let sums_b = buffer.receive_combine(sent_b).unwrap();
    for (case, got, sums) in [(a, of_a, sums_a), (b, of_b, sums_b)] {
        check_dispatched(case, rank, &seen(&got, stream), false);
        check_combined(case, rank, &sums.x.to_host(stream).unwrap());
    }
    buffer.check().unwrap();
    host.barrier().unwrap();
}

fn random_cases(ranks: usize, buffers: u64, cases: u64) {
    let seed = numbers::seed();
    println!("{ranks} ranks, seed {seed}");
    run(
        ranks,
        |builder| builder,
        |gpu, host, tools| {
            for number in 0..buffers {
                let with = of_low_latency(settings(seed, number, ranks));
                let mut buffer = exchanged(gpu, &with.0);
                for at in 0..cases {
                    let draw =
                        |more| Case::draw(seed, (number << 8 | at << 1) + more, ranks, &with).low_latency();
                    if at % 2 == 0 {
                        whole(&mut buffer, tools, host, &draw(0));
                    } else {
                        overlapping(&mut buffer, tools, host, [&draw(0), &draw(1)]);
                    }
                }
                assert!(buffer.masked().is_empty() && buffer.is_available());
                buffer.close(gpu).unwrap();
            }
        },
    );
}

#[test]
fn random_low_latency_calls_of_one_rank_have_the_bits_of_the_host() {
    random_cases(1, 4, 6);
}

#[test]
fn random_low_latency_calls_of_two_ranks_have_the_bits_of_the_host() {
    random_cases(2, 8, 6);
}

#[test]
fn random_low_latency_calls_of_three_ranks_have_the_bits_of_the_host() {
    random_cases(3, 6, 6);
}

#[test]
fn random_low_latency_calls_of_eight_ranks_have_the_bits_of_the_host() {
    random_cases(8, 3, 6);
}

/// Large enough to fill the links: a row has several pieces, an expert many rows.
#[test]
fn a_large_low_latency_call_has_the_bits_of_the_host() {
    let seed = numbers::seed();
    run(
        2,
        |builder| builder,
        |gpu, host, tools| {
            let owners: Vec<usize> = (0..32).map(|expert| expert / 16).collect();
            let settings = Settings { capacity: 128, top_k: 8, ..Settings::new(7168, 32) };
            let with = of_low_latency((settings, owners));
            let mut buffer = exchanged(gpu, &with.0);
            for number in 0..3 {
                let mut case = Case::draw(seed, 1000 + number, 2, &with);
                case.tokens = vec![128, if number == 1 { 0 } else { 127 }];
                whole(&mut buffer, tools, host, &case.low_latency());
            }
            buffer.close(gpu).unwrap();
        },
    );
}

/// A dispatch and a combine in a graph, and what they give in each launch.
struct Captured {
    given: Given,
    got: LowLatencyDispatched,
    sums: unisono::ep::LowLatencyCombined,
}

#[test]
fn graphs_with_two_capacities_go_on_where_calls_before_them_ended() {
    let seed = numbers::seed();
    println!("seed {seed}");
    for ranks in [1, 2, 4] {
        run(
            ranks,
            |builder| builder,
            |gpu, host, tools| {
                let (rank, stream) = (gpu.rank(), &tools.stream);
                let mut random = Random::of(&[seed, 55]);
                let with = [9, 40].map(|capacity| {
                    let experts = 6 * ranks;
                    let owners: Vec<usize> = (0..experts).map(|expert| expert / 6).collect();
                    let hidden = 8 * random.count(200);
                    let settings = Settings { capacity, top_k: 5, ..Settings::new(hidden, experts) };
                    of_low_latency((settings, owners))
                });
                let cases: Vec<Case> = (0..2)
                    .map(|at| Case::draw(seed, 70 + at, ranks, &with[at as usize]).low_latency())
                    .collect();
                let mut buffers: Vec<Buffer> = with.iter().map(|with| exchanged(gpu, &with.0)).collect();
                // One call each, so that nothing is new to the capture.
                for (buffer, case) in buffers.iter_mut().zip(&cases) {
                    whole(buffer, tools, host, case);
                }
                let given: Vec<Given> = cases.iter().map(|case| Given::new(tools, case, rank)).collect();
                host.barrier().unwrap();
                tools.raw.begin_capture().unwrap();
                let mut captured: Vec<Captured> = Vec::new();
                for ((buffer, case), given) in buffers.iter_mut().zip(&cases).zip(given) {
                    // In halves, if that is what the seed says.
                    let (got, sums) = if case.random(9).once_in(2) {
                        let sent = buffer.low_latency_dispatch_send(&given.dispatch(case, stream)).unwrap();
                        let got = buffer.receive_dispatch(sent).unwrap();
                        let sent = buffer
                            .low_latency_combine_send(&given.combine(case, &got.handle, stream))
                            .unwrap();
                        (got, buffer.receive_combine(sent).unwrap())
                    } else {
                        let got = buffer.low_latency_dispatch(&given.dispatch(case, stream)).unwrap();
                        let sums =
                            buffer.low_latency_combine(&given.combine(case, &got.handle, stream)).unwrap();
                        (got, sums)
                    };
                    captured.push(Captured { given, got, sums });
                }
                let graph = tools.raw.end_capture().unwrap();
                for launch in 0..6 {
                    let again: Vec<Case> =
                        cases.iter().map(|case| case.again(case.number + 100 * (launch + 1))).collect();
                    for (captured, case) in captured.iter_mut().zip(&again) {
                        captured.given.replace(case, rank);
                    }
                    graph.launch(&tools.raw).unwrap();
                    for (captured, case) in captured.iter().zip(&again) {
                        check_dispatched(case, rank, &seen(&captured.got, stream), false);
                        check_combined(case, rank, &captured.sums.x.to_host(stream).unwrap());
                    }
                    // Between two launches calls go on as ever.
                    if launch % 2 == 0 {
                        let at = (launch / 2 % 2) as usize;
                        whole(&mut buffers[at], tools, host, &again[at]);
                    }
                }
                host.barrier().unwrap();
                drop((graph, captured));
                for buffer in buffers {
                    buffer.close(gpu).unwrap();
                }
            },
        );
    }
}

#[test]
fn calls_go_on_without_a_rank_that_was_masked() {
    let seed = numbers::seed();
    println!("seed {seed}");
    for ranks in [2, 3, 5] {
        run(
            ranks,
            |builder| builder,
            |gpu, host, tools| {
                let rank = gpu.rank();
                for number in 0..3 {
                    let mut with = of_low_latency(settings(seed, 200 + number, ranks));
                    with.0.masking = true;
                    let mut buffer = exchanged(gpu, &with.0);
                    let draw = |at| Case::draw(seed, (200 + number) << 8 | at, ranks, &with).low_latency();
                    whole(&mut buffer, tools, host, &draw(0));
                    // It makes no call from now on, or goes on as if nothing were. One rank says so, and all know.
                    let lost = (number as usize + 1) % ranks;
                    let cases = [1, 2, 3].map(draw);
                    let given = cases.each_ref().map(|case| {
                        let results = results(&case.without(lost), rank);
                        Given {
                            results: Both::new(tools, case.dtype, &results),
                            ..Given::new(tools, case, rank)
                        }
                    });
                    host.barrier().unwrap();
                    if rank == (lost + 1) % ranks {
                        buffer.mask_rank(lost).unwrap();
                        assert_eq!(buffer.masked(), [lost]);
                    }
                    host.barrier().unwrap();
                    if rank == lost && number > 0 {
                        let [(case, given), ..] = [0, 1, 2].map(|at| (&cases[at], &given[at]));
                        let _sent = buffer.low_latency_dispatch(&given.dispatch(case, &tools.stream));
                        tools.raw.synchronize().unwrap();
                        let refused = buffer.check();
                        assert!(
                            matches!(refused, Err(Error::GivenUp { rank: r, .. }) if r == rank),
                            "{refused:?}"
                        );
                    } else if rank != lost {
                        for (case, given) in cases.iter().zip(&given) {
                            whole_without(&mut buffer, tools, case, (given, rank, lost));
                        }
                        assert_eq!(buffer.masked(), [lost]);
                    }
                    host.barrier().unwrap();
                    drop(given);
                    buffer.close(gpu).unwrap();
                }
            },
        );
    }
}

/// As `whole`, where `lost` takes no part: its experts are still selected.
fn whole_without(
    buffer: &mut Buffer,
    tools: &Tools,
    case: &Case,
    (given, rank, lost): (&Given, usize, usize),
) {
    let (left, stream) = (case.without(lost), &tools.stream);
    let got = buffer.low_latency_dispatch(&given.dispatch(case, stream)).unwrap();
    check_dispatched(&left, rank, &seen(&got, stream), false);
    let sums = buffer.low_latency_combine(&given.combine(case, &got.handle, stream)).unwrap();
    check_combined(&left, rank, &sums.x.to_host(stream).unwrap());
}

/// What a world of two ranks answers when rank 1 dispatches this way, and rank 0 as it should.
fn answers(other: impl Fn(&mut Buffer, &DeviceBuffer, u32, &Stream) + Sync) -> Vec<String> {
    let texts = std::sync::Mutex::new(vec![String::new(); 2]);
    let tools = |_: usize, ordinal: u32| {
        let device = unisono::cuda::Device::new(ordinal).unwrap();
        let raw = unisono::cuda::Stream::new(&device).unwrap();
        let mut memory = DeviceBuffer::new(&device, 4096).unwrap();
        let mut bytes = vec![0; 4096];
        // Two tokens of 64 elements, and selections behind them: 1 and 2, then 3 twice.
        for (at, selection) in [1i64, 2, 3, 3].into_iter().enumerate() {
            bytes[1024 + at * 8..][..8].copy_from_slice(&selection.to_le_bytes());
        }
        memory.write(0, &bytes).unwrap();
        (memory, Stream::from(raw))
    };
    on_threads(
        2,
        |builder| builder.timeout(Some(Duration::from_secs(20))),
        tools,
        |gpu, (memory, stream)| {
            let settings = Settings { capacity: 4, top_k: 4, low_latency: true, ..Settings::new(64, 4) };
            let mut buffer = exchanged(&gpu, &settings);
            let (at, ordinal) = (memory.address(), memory.device().ordinal());
            if gpu.rank() == 1 {
                other(&mut buffer, memory, ordinal, stream);
            } else {
                // SAFETY: the memory lives until the stream was waited for.
                let (x, selections) =
                    unsafe { (Buf::<bf16>::cuda(at, 64, ordinal), Buf::cuda(at + 1024, 2, ordinal)) };
                let call = LowLatencyDispatch::new(x, selections, 2).on(stream);
                // It may know already.
                let _ = buffer.low_latency_dispatch(&call);
            }
            let _ = unisono::cuda::Stream::synchronize(stream.as_cuda().unwrap());
            let error = loop {
                match buffer.check() {
                    Ok(()) => std::thread::sleep(Duration::from_millis(1)),
                    Err(error) => break error.to_string(),
                }
            };
            texts.lock().unwrap()[gpu.rank()] = error;
        },
    );
    texts.into_inner().unwrap()
}

#[test]
fn ranks_that_make_other_calls_are_told_both() {
    let texts = answers(|buffer, memory, ordinal, stream| {
        let at = memory.address();
        // SAFETY: the memory lives until the stream was waited for.
        let (x, selections) =
            unsafe { (Buf::<bf16>::cuda(at, 64, ordinal), Buf::cuda(at + 1024, 1, ordinal)) };
        let _ = buffer.low_latency_dispatch(&LowLatencyDispatch::new(x, selections, 1).on(stream));
    });
    if texts[0].is_empty() {
        return;
    }
    assert!(texts.iter().all(|text| text.contains("low_latency_dispatch")), "{texts:?}");
    assert!(texts.iter().all(|text| text.contains("top-1") && text.contains("top-2")), "{texts:?}");
}

#[test]
fn an_expert_that_is_selected_twice_fails_the_call_and_names_the_rank() {
    let texts = answers(|buffer, memory, ordinal, stream| {
        let at = memory.address();
        // SAFETY: the memory lives until the stream was waited for.
        let (x, selections) =
            unsafe { (Buf::<bf16>::cuda(at, 128, ordinal), Buf::cuda(at + 1024, 4, ordinal)) };
        let _ = buffer.low_latency_dispatch(&LowLatencyDispatch::new(x, selections, 2).on(stream));
    });
    if texts[0].is_empty() {
        return;
    }
    assert!(
        texts.iter().all(|text| text.contains("token 1 selects 3") && text.contains("rank 1")),
        "{texts:?}"
    );
}
