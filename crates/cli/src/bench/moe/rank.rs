//! One rank of `bench moe`: runs every operation, verifies every element, times single calls.
//!
//! Experts give back what they get. So a combine without weights is the token times the ranks that it went to, and every rank can tell
//! what is right.

use std::time::Instant;

use unisono::ep::reference::{RowSum, cast::uncast_row};
use unisono::ep::{
    Buffer, CachedDispatch, Combine, Dispatch, Input, LowLatencyCombine, LowLatencyDispatch,
    LowLatencyDispatched, RowScales, ScaleKind, Settings, Tensor, Tokens as Sent,
};
use unisono::half::{bf16, f16};
use unisono::{Communicator, DType, Operations, ReduceOp, f8e4m3};

use super::tokens::{Tokens, wrong};
use super::{Moe, OnMoe};
use crate::bench::record::Line;
use crate::bench::workload::Workload;

type Result<T, E = unisono::Error> = std::result::Result<T, E>;

/// The most tokens that are staged at once.
const CAPACITY: usize = 512;
/// The most tokens that are measured in low-latency mode: its blocks have room for all tokens of all ranks for each expert.
const LOW_LATENCY: usize = 128;

pub(super) const fn has_low_latency(tokens: usize) -> bool {
    tokens <= LOW_LATENCY
}

impl Moe {
    pub(super) fn settings(&self, tokens: usize, dtype: DType) -> Settings {
        Settings {
            capacity: tokens.clamp(1, CAPACITY),
            top_k: self.top_k,
            dtype,
            low_latency: has_low_latency(tokens),
            multiprocessors: self.multiprocessors,
            ..Settings::new(self.hidden, self.experts)
        }
    }
}

/// Runs the workload as the rank that the environment says; rank 0 writes lines to standard output.
pub(crate) fn run(workload: &Workload) -> Result<(), String> {
    let measured = Communicator::from_env().and_then(|communicator| {
        Line::Ready { sizes: workload.moe.lines() as u64 }.tell(communicator.rank());
        for tokens in &workload.moe.tokens {
            Rank::new(workload, &communicator, *tokens)?.measure_all()?;
        }
        communicator.destroy()
    });
    measured.map_err(|error| error.to_string())
}

pub(super) struct Rank<'a> {
    pub(super) workload: &'a Workload,
    pub(super) communicator: &'a Communicator,
    pub(super) tokens: Tokens,
    pub(super) buffer: Buffer,
    /// Of every rank.
    pub(super) selections: Vec<Vec<i64>>,
    pub(super) x: Vec<u8>,
}

/// Elements of the dtype that is measured.
enum Elements {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Elements {
    fn new(dtype: DType, bytes: &[u8]) -> Self {
        match dtype {
            DType::F32 => Self::F32(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()),
            DType::F16 => Self::F16(bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x)).collect()),
            _ => Self::Bf16(bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x)).collect()),
        }
    }

    fn input(&self) -> Input<'_> {
        match self {
            Self::Bf16(x) => x.into(),
            Self::F16(x) => x.into(),
            Self::F32(x) => x.into(),
        }
    }
}

/// The bytes of a tensor.
pub(super) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(match tensor.dtype() {
        DType::F32 => tensor.as_slice::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => tensor.as_slice::<f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F8E4M3 => tensor.as_slice::<f8e4m3>()?.iter().map(|x| x.0).collect(),
        _ => tensor.as_slice::<bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// What a low-latency dispatch brought, on the host.
pub(super) struct LowLatencyRows {
    pub(super) x: Tensor,
    pub(super) scales: Option<Tensor>,
    pub(super) counts: Tensor,
}

/// What one operation moved.
pub(super) struct Moved {
    /// Rows that came here, and that left for other ranks.
    pub(super) rows: (usize, usize),
    /// Bytes of one, as they are counted and as they travel.
    pub(super) row_bytes: (usize, usize),
    pub(super) wrong: u64,
}

impl<'a> Rank<'a> {
    fn new(workload: &'a Workload, communicator: &'a Communicator, count: usize) -> Result<Self> {
        Self::with(workload, communicator, (count, workload.moe.settings(count, workload.dtype)))
    }

    pub(super) fn with(
        workload: &'a Workload,
        communicator: &'a Communicator,
        (count, settings): (usize, Settings),
    ) -> Result<Self> {
        let tokens = Tokens::new(&workload.moe, count, workload.dtype);
        let mut buffer = Buffer::new(communicator, settings)?;
        buffer.exchange(communicator)?;
        let selections = (0..communicator.world_size()).map(|rank| tokens.selections(rank)).collect();
        let x = tokens.rows(communicator.rank());
        Ok(Self { workload, communicator, tokens, buffer, selections, x })
    }

    fn measure_all(mut self) -> Result<()> {
        self.throughput()?;
        if has_low_latency(self.tokens.count) {
            self.low_latency()?;
        }
        self.buffer.close(self.communicator)
    }

    fn throughput(&mut self) -> Result<()> {
        let (rank, ranks, dtype) =
            (self.communicator.rank(), self.communicator.world_size(), self.tokens.dtype);
        let (top_k, mine) = (self.tokens.top_k, self.selections[rank].clone());
        let x = Elements::new(dtype, &self.x);
        let sent = self.buffer.dispatch(&Dispatch::new(x.input()).top_k(&mine, top_k))?;
        let origins = self.origins(rank);
        let expected: Vec<u8> = origins.iter().flat_map(|(s, t)| self.tokens.row(*s, *t)).collect();
        let row = self.tokens.hidden * dtype.size();
        let left = (0..ranks).filter(|to| *to != rank).map(|to| self.goes(rank, to)).sum();
        // Beside its row a token takes its indices.
        let moved = |wrong| Moved { rows: (origins.len(), left), row_bytes: (row, row + top_k * 8), wrong };
        let of_rows = moved(wrong(&bytes(&sent.x)?, &expected, dtype.size()));
        self.measure("dispatch", &of_rows, |buffer| {
            buffer.dispatch(&Dispatch::new(x.input()).top_k(&mine, top_k)).map(drop)
        })?;
        self.dispatch_fp8(&mine, &origins, left)?;
        let (again, _) = self.buffer.dispatch_cached(&CachedDispatch::new(x.input(), &sent.handle))?;
        let cached = moved(wrong(&bytes(&again)?, &expected, dtype.size()));
        let cached = Moved { row_bytes: (row, row), ..cached };
        self.measure("dispatch_cached", &cached, |buffer| {
            buffer.dispatch_cached(&CachedDispatch::new(x.input(), &sent.handle)).map(drop)
        })?;
        let combined = self.buffer.combine(&Combine::new(&sent.x, &sent.handle))?;
        let expected = self.sums();
        // What came goes back: as many rows leave as came from others.
        let back = origins.iter().filter(|(source, _)| *source != rank).count();
        let rows = (origins.len(), back);
        let wrong = wrong(&bytes(&combined.x)?, &expected, dtype.size());
        let of_combine = Moved { rows, row_bytes: (row, row), wrong };
        self.measure("combine", &of_combine, |buffer| {
            buffer.combine(&Combine::new(&sent.x, &sent.handle)).map(drop)
        })
    }

    /// What a combine without weights gives.
    pub(super) fn sums(&self) -> Vec<u8> {
        let (rank, ranks, dtype) =
            (self.communicator.rank(), self.communicator.world_size(), self.tokens.dtype);
        let row = self.tokens.hidden * dtype.size();
        let mut expected = vec![0; self.x.len()];
        let mut sum = RowSum::new(self.tokens.hidden);
        for (token, target) in expected.chunks_mut(row).enumerate() {
            sum.clear();
            let times = (0..ranks).filter(|to| self.goes_to(rank, token, *to)).count();
            (0..times).for_each(|_| sum.add(dtype, &self.x[token * row..][..row]));
            sum.write(dtype, target);
        }
        expected
    }

    /// Our tokens in 8 bits, and their scales.
    pub(super) fn in_fp8(&self) -> (Vec<u8>, Vec<f32>) {
        let row = self.tokens.hidden * self.tokens.dtype.size();
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for token in self.x.chunks(row) {
            let (of_token, its_scales) = self.tokens.cast(token);
            codes.extend(of_token);
            scales.extend(its_scales);
        }
        (codes, scales)
    }

    /// What comes of rows in 8 bits: codes, and scales as bytes.
    pub(super) fn expected_fp8(&self, origins: &[(usize, usize)]) -> (Vec<u8>, Vec<u8>) {
        let (mut expected, mut expected_scales) = (Vec::new(), Vec::new());
        for (source, token) in origins {
            let (codes, scales) = self.tokens.cast(&self.tokens.row(*source, *token));
            expected.extend(codes);
            expected_scales.extend(scales.into_iter().flat_map(f32::to_le_bytes));
        }
        (expected, expected_scales)
    }

    /// Rows that are 8 bits already, with scales.
    fn dispatch_fp8(&mut self, mine: &[i64], origins: &[(usize, usize)], left: usize) -> Result<()> {
        let (hidden, top_k) = (self.tokens.hidden, self.tokens.top_k);
        let (codes, scales) = self.in_fp8();
        let codes: Vec<f8e4m3> = codes.into_iter().map(f8e4m3).collect();
        let per_token = hidden.div_ceil(128);
        let call =
            || Dispatch::new(Sent::scaled(&codes, RowScales::rows(&scales, per_token))).top_k(mine, top_k);
        let sent = self.buffer.dispatch(&call())?;
        let (expected, expected_scales) = self.expected_fp8(origins);
        let got_scales = sent.scales.as_ref().map(bytes).transpose()?.unwrap_or_default();
        let wrong = wrong(&bytes(&sent.x)?, &expected, 1) + wrong(&got_scales, &expected_scales, 4);
        let bytes = hidden + per_token * 4;
        let moved = Moved { rows: (origins.len(), left), row_bytes: (bytes, bytes + top_k * 8), wrong };
        self.measure("dispatch_fp8", &moved, |buffer| buffer.dispatch(&call()).map(drop))
    }

    fn low_latency(&mut self) -> Result<()> {
        let (rank, dtype) = (self.communicator.rank(), self.tokens.dtype);
        let (top_k, mine) = (self.tokens.top_k, self.selections[rank].clone());
        let x = Elements::new(dtype, &self.x);
        let call = || LowLatencyDispatch::new(x.input(), &mine, top_k).cast(ScaleKind::F32);
        let sent = self.buffer.low_latency_dispatch(&call())?;
        let LowLatencyDispatched { x: rows, scales, counts, handle, .. } = sent;
        let block = rows.shape()[1];
        let moved = self.moved_in_low_latency(&LowLatencyRows { x: rows, scales, counts })?;
        self.measure("low_latency_dispatch_fp8", &moved, |buffer| {
            buffer.low_latency_dispatch(&call()).map(drop)
        })?;
        let results = self.given_back(block);
        let (results, weights) = (Elements::new(dtype, &results), self.tokens.weights());
        let call = || LowLatencyCombine::new(results.input(), &mine, &weights, &handle);
        let combined = self.buffer.low_latency_combine(&call())?;
        let moved = self.summed_in_low_latency(&combined.x, &weights)?;
        self.measure("low_latency_combine", &moved, |buffer| buffer.low_latency_combine(&call()).map(drop))
    }

    /// What a low-latency dispatch moved, of tensors on the host.
    pub(super) fn moved_in_low_latency(&self, sent: &LowLatencyRows) -> Result<Moved> {
        let (rank, ranks) = (self.communicator.rank(), self.communicator.world_size());
        let (rows, wrong) = self.check_blocks(sent)?;
        let row = self.tokens.hidden + self.tokens.hidden.div_ceil(128) * 4;
        let left = (0..ranks).filter(|to| *to != rank).map(|to| self.goes(rank, to)).sum();
        Ok(Moved { rows: (rows, left), row_bytes: (row + 16, row + self.tokens.top_k * 8), wrong })
    }

    /// Results in blocks of `block` rows: each expert gives back the token of a row.
    pub(super) fn given_back(&self, block: usize) -> Vec<u8> {
        let row = self.tokens.hidden * self.tokens.dtype.size();
        let blocks = self.block_origins();
        let mut results = vec![0; blocks.len() * block * row];
        for (expert, origins) in blocks.into_iter().enumerate() {
            for (at, (source, token)) in origins.into_iter().enumerate() {
                results[(expert * block + at) * row..][..row]
                    .copy_from_slice(&self.tokens.row(source, token));
            }
        }
        results
    }

    /// What a low-latency combine moved, which gave `combined` on the host.
    pub(super) fn summed_in_low_latency(&self, combined: &Tensor, weights: &[f32]) -> Result<Moved> {
        let (rank, ranks, dtype) =
            (self.communicator.rank(), self.communicator.world_size(), self.tokens.dtype);
        let row = self.tokens.hidden * dtype.size();
        let back = (0..ranks).filter(|from| *from != rank).map(|from| self.goes(from, rank)).sum();
        let wrong = wrong(&bytes(combined)?, &self.weighted(weights), dtype.size());
        Ok(Moved { rows: (self.tokens.count * self.tokens.top_k, back), row_bytes: (row, row), wrong })
    }

    /// What comes of our tokens when each expert gives back what it got.
    fn weighted(&self, weights: &[f32]) -> Vec<u8> {
        let (rank, ranks, dtype) =
            (self.communicator.rank(), self.communicator.world_size(), self.tokens.dtype);
        let (top_k, row) = (self.tokens.top_k, self.tokens.hidden * dtype.size());
        let mut expected = vec![0; self.x.len()];
        let (mut part, mut sum) = (RowSum::new(self.tokens.hidden), RowSum::new(self.tokens.hidden));
        let mut rounded = vec![0; row];
        for (token, target) in expected.chunks_mut(row).enumerate() {
            sum.clear();
            for to in (0..ranks).filter(|to| self.goes_to(rank, token, *to)) {
                part.clear();
                let selected = self.selections[rank].iter().zip(weights).skip(token * top_k).take(top_k);
                for (_, weight) in selected.filter(|(expert, _)| self.tokens.owner(**expert, ranks) == to) {
                    part.add_weighted(dtype, &self.x[token * row..][..row], *weight);
                }
                part.write(dtype, &mut rounded);
                sum.add(dtype, &rounded);
            }
            sum.write(dtype, target);
        }
        expected
    }

    /// Rows that came, and wrong elements of them.
    fn check_blocks(&self, sent: &LowLatencyRows) -> Result<(usize, u64)> {
        let (hidden, block) = (self.tokens.hidden, sent.x.shape()[1]);
        let (got, mut rows, mut wrong_elements) = (bytes(&sent.x)?, 0, 0);
        let counts = sent.counts.as_slice::<i32>()?;
        let scales = match &sent.scales {
            Some(scales) => scales.as_slice::<f32>()?,
            None => &[],
        };
        let columns = hidden.div_ceil(128);
        let mut values = vec![0.0; hidden];
        for (expert, origins) in self.block_origins().into_iter().enumerate() {
            wrong_elements += (counts[expert] as usize).abs_diff(origins.len()) as u64;
            rows += origins.len();
            for (at, (source, token)) in origins.into_iter().enumerate() {
                let (codes, expected) = self.tokens.cast(&self.tokens.row(source, token));
                let got = &got[(expert * block + at) * hidden..][..hidden];
                wrong_elements += wrong(got, &codes, 1);
                let place = |column: usize| scales[(expert * columns + column) * block + at];
                let got: Vec<f32> = (0..columns).map(place).collect();
                wrong_elements += u64::from(got != expected);
                uncast_row(&codes, &got, &mut values);
                wrong_elements += values.iter().filter(|value| !value.is_finite()).count() as u64;
            }
        }
        Ok((rows, wrong_elements))
    }

    /// The (source, token) of each row of each of our experts.
    fn block_origins(&self) -> Vec<Vec<(usize, usize)>> {
        let experts = self.buffer.local_experts();
        let mut origins = vec![Vec::new(); experts.len()];
        let first = experts.first().copied().unwrap_or(0) as i64;
        for (source, selections) in self.selections.iter().enumerate() {
            for (at, expert) in selections.iter().enumerate() {
                if let Some(rows) =
                    usize::try_from(expert - first).ok().and_then(|local| origins.get_mut(local))
                {
                    rows.push((source, at / self.tokens.top_k));
                }
            }
        }
        origins
    }

    /// The (source, token) of each row that comes to `rank`.
    pub(super) fn origins(&self, rank: usize) -> Vec<(usize, usize)> {
        let all = |source| (0..self.tokens.count).map(move |token| (source, token));
        let ranks = 0..self.communicator.world_size();
        ranks.flat_map(all).filter(|(source, token)| self.goes_to(*source, *token, rank)).collect()
    }

    /// Tokens of `from` that go to rank `to`.
    pub(super) fn goes(&self, from: usize, to: usize) -> usize {
        (0..self.tokens.count).filter(|token| self.goes_to(from, *token, to)).count()
    }

    fn goes_to(&self, source: usize, token: usize, to: usize) -> bool {
        let row = &self.selections[source][token * self.tokens.top_k..][..self.tokens.top_k];
        row.iter().any(|expert| self.tokens.owner(*expert, self.communicator.world_size()) == to)
    }

    /// Times `call`, and tells the parent.
    fn measure(
        &mut self,
        operation: &str,
        moved: &Moved,
        mut call: impl FnMut(&mut Buffer) -> Result<()>,
    ) -> Result<()> {
        let communicator = self.communicator;
        let mut timed = |communicator: &Communicator| -> Result<f64> {
            communicator.barrier()?;
            let start = Instant::now();
            call(&mut self.buffer)?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        let mut slowest = [timed(communicator)?];
        communicator.all_reduce(&mut slowest, ReduceOp::Max)?;
        let rounds = self.workload.time_per_size.as_secs_f64() * 1e6 / slowest[0].max(0.1);
        let mut times = vec![0f64; (rounds as usize).clamp(self.workload.least_batches, 20_000)];
        for time in &mut times {
            *time = timed(communicator)?;
        }
        self.tell(operation, moved, &mut times, None)
    }

    /// Tells the parent of calls that took so long here, in microseconds.
    pub(super) fn tell(
        &self,
        operation: &str,
        moved: &Moved,
        times: &mut [f64],
        multiprocessors: Option<u32>,
    ) -> Result<()> {
        let communicator = self.communicator;
        communicator.all_reduce(&mut *times, ReduceOp::Max)?;
        times.sort_by(f64::total_cmp);
        let wire = moved.rows.1 * moved.row_bytes.1;
        let mut sums = [moved.rows.0 as f64, wire as f64, moved.wrong as f64];
        communicator.all_reduce(&mut sums, ReduceOp::Sum)?;
        let ranks = communicator.world_size() as f64;
        let (rows, wire_bytes) = (sums[0] / ranks, sums[1] / ranks);
        let p50_us = times[times.len() / 2];
        let moe = &self.workload.moe;
        let measured = OnMoe {
            operation: operation.to_owned(),
            tokens: self.tokens.count as u64,
            hidden: moe.hidden as u64,
            top_k: moe.top_k as u64,
            experts: moe.experts as u64,
            distribution: moe.distribution(),
            rows,
            wire_bytes,
            calls: times.len() as u64,
            p50_us,
            p99_us: times[times.len() * 99 / 100],
            min_us: times[0],
            gbps: rows * moved.row_bytes.0 as f64 / p50_us / 1e3,
            multiprocessors,
            wrong: sums[2] as u64,
        };
        Line::Moe(measured).tell(communicator.rank());
        Ok(())
    }
}
