//! The kernels of expert parallelism: their sources, and those of them that are loaded. They are compiled for each number of ranks, apart from
//! those of collectives.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use unisono_core::DType;
use unisono_core::device::{ArenaLayout, Link};
use unisono_core::ep::LowLatencyLayout;
use unisono_cuda::{Cache, Compiler, Device, Function, Module, Result, Source};

use super::args::{
    AddArgs, BufferArgs, CombineArgs, CountsArgs, DispatchArgs, LayoutArgs, LowLatencyArgs, MaskArgs,
    PROGRESS_BYTES,
};
use crate::ep::words::Operation;
use crate::gpu::args::UnevenArgs;
use crate::gpu::kernels::{architecture, room_bytes};

const THROUGHPUT: (&str, &str) = ("expert_parallel.cu", include_str!("../../../kernels/expert_parallel.cu"));
const LOW_LATENCY: (&str, &str) = ("low_latency.cu", include_str!("../../../kernels/low_latency.cu"));
/// Those of low-latency calls alone.
const LOW_LATENCY_HEADERS: [(&str, &str); 9] = [
    ("buffers.cuh", include_str!("../../../kernels/buffers.cuh")),
    ("flow.cuh", include_str!("../../../kernels/flow.cuh")),
    ("units.cuh", include_str!("../../../kernels/units.cuh")),
    ("one_shot.cuh", include_str!("../../../kernels/one_shot.cuh")),
    ("two_shot.cuh", include_str!("../../../kernels/two_shot.cuh")),
    ("quantised.cuh", include_str!("../../../kernels/quantised.cuh")),
    ("low_latency.cuh", include_str!("../../../kernels/low_latency.cuh")),
    ("low_latency_dispatch.cuh", include_str!("../../../kernels/low_latency_dispatch.cuh")),
    ("low_latency_combine.cuh", include_str!("../../../kernels/low_latency_combine.cuh")),
];
const HEADERS: [(&str, &str); 5] = [
    ("ptx.cuh", include_str!("../../../kernels/ptx.cuh")),
    ("element.cuh", include_str!("../../../kernels/element.cuh")),
    ("call.cuh", include_str!("../../../kernels/call.cuh")),
    ("flags.cuh", include_str!("../../../kernels/flags.cuh")),
    ("expert_parallel.cuh", include_str!("../../../kernels/expert_parallel.cuh")),
];

/// Where the words of a buffer begin behind those that every communicator has on its device; then those of the layout.
const BUFFER_STATE_AT: usize = 128;
pub(super) const LAYOUT_FINISHED_AT: usize = 512;
/// And what low-latency calls count.
pub(super) const PROGRESS_AT: usize = 1024;
/// Bytes of these words.
pub(super) const STATE_BYTES: usize = 4096;
pub(super) const LAYOUT_THREADS: u32 = 512;
pub(super) const COUNTS_THREADS: u32 = 512;
pub(super) const DISPATCH_THREADS: u32 = 1024;
/// Two blocks share a multiprocessor, with 80 registers for each thread.
pub(super) const LOW_LATENCY_THREADS: u32 = 384;

/// A warp holds a vector of each rank.
pub(super) const fn combine_threads(ranks: usize) -> u32 {
    if ranks <= 8 { 768 } else { 384 }
}

/// Vectors of a lane that are under way at once in a combine.
pub(super) const fn combined_together(ranks: usize) -> usize {
    match ranks {
        0..=2 => 4,
        3..=4 => 2,
        _ => 1,
    }
}

/// The sources for worlds of `ranks` GPUs that reach each other.
pub fn sources(ranks: usize) -> Vec<Source> {
    vec![throughput(ranks), low_latency(ranks)]
}

fn throughput(ranks: usize) -> Source {
    let (name, text) = THROUGHPUT;
    Source { name, text, headers: headers(ranks), definitions: definitions(ranks) }
}

fn low_latency(ranks: usize) -> Source {
    let (name, text) = LOW_LATENCY;
    let (mut headers, mut definitions) = (headers(ranks), definitions(ranks));
    headers.extend(LOW_LATENCY_HEADERS.iter().map(|(name, text)| (*name, (*text).to_owned())));
    let sizes = [
        ("UNEVEN_ARGS_BYTES", size_of::<UnevenArgs>()),
        ("LOW_LATENCY_BYTES", size_of::<LowLatencyArgs>()),
        ("PROGRESS_BYTES", PROGRESS_BYTES),
        ("LOW_LATENCY_THREADS", LOW_LATENCY_THREADS as usize),
    ];
    let sizes = sizes.into_iter().chain(LowLatencyLayout::definitions());
    definitions.extend(sizes.map(|(name, value)| (name, value.to_string())));
    Source { name, text, headers, definitions }
}

fn headers(ranks: usize) -> Vec<(&'static str, String)> {
    let layout = ArenaLayout::new(ranks, Link::Device);
    let texts = HEADERS.iter().map(|(name, text)| (*name, (*text).to_owned()));
    texts.chain([("layout.cuh", layout.definitions())]).collect()
}

/// Both sides see the same structures, or nothing compiles.
fn definitions(ranks: usize) -> Vec<(&'static str, String)> {
    let layout = ArenaLayout::new(ranks, Link::Device);
    let sizes = [
        ("ARGS_BYTES", size_of::<crate::gpu::args::Args>()),
        ("BUFFER_ARGS_BYTES", size_of::<BufferArgs>()),
        ("LAYOUT_ARGS_BYTES", size_of::<LayoutArgs>()),
        ("COUNTS_ARGS_BYTES", size_of::<CountsArgs>()),
        ("DISPATCH_ARGS_BYTES", size_of::<DispatchArgs>()),
        ("COMBINE_ARGS_BYTES", size_of::<CombineArgs>()),
        ("ADD_ARGS_BYTES", size_of::<AddArgs>()),
        ("MASK_ARGS_BYTES", size_of::<MaskArgs>()),
        ("BUFFER_STATE_AT", BUFFER_STATE_AT),
        ("ATTENDANCE_AT", layout.scratch().offset),
        ("COMBINE_THREADS", combine_threads(ranks) as usize),
        ("COMBINED_TOGETHER", combined_together(ranks)),
    ];
    sizes.map(|(name, value)| (name, value.to_string())).to_vec()
}

/// What tells these kernels from those of another version: SHA-256 over names and texts of all files, as hexadecimal digits.
pub fn sources_hash() -> String {
    let mut hash = Sha256::new();
    for (name, text) in HEADERS.iter().chain(&LOW_LATENCY_HEADERS).chain([&THROUGHPUT, &LOW_LATENCY]) {
        for part in [name, text] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Kernels that are loaded into a device.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) layout: Function,
    pub(super) counts: Function,
    pub(super) dispatch: Function,
    /// Of bf16, f16 and f32.
    combine: [Function; 3],
    add: [Function; 3],
    pub(super) mask: Function,
    /// Shared memory for each block that moves rows by bulk copies; 0 where there are none.
    pub(super) room_bytes: u32,
}

impl Loaded {
    fn load(device: &Device, ranks: usize) -> Result<Self> {
        let module = load(device, &throughput(ranks))?;
        // What the kernel declares itself has to fit beside it.
        let beside = device.facts().shared_bytes.saturating_sub(8 << 10);
        let room_bytes = room_bytes(device, Link::Device).min(beside);
        let dispatch = module.function("ep_dispatch")?;
        dispatch.allow_shared(room_bytes)?;
        let of = |name: &str| -> Result<[Function; 3]> {
            let function = |dtype| module.function(&format!("ep_{name}_{dtype}"));
            Ok([function("bf16")?, function("f16")?, function("f32")?])
        };
        Ok(Self {
            layout: module.function("ep_layout")?,
            counts: module.function("ep_counts")?,
            dispatch,
            combine: of("combine")?,
            add: of("add")?,
            mask: module.function("ep_mask")?,
            room_bytes,
        })
    }

    /// That combines rows of `dtype`, and that adds the parts of one.
    pub(super) fn sums(&self, dtype: DType) -> (&Function, &Function) {
        let at = index(dtype);
        (&self.combine[at], &self.add[at])
    }
}

/// Where kernels for sums of `dtype` stand among those of bf16, f16 and f32.
const fn index(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 2,
        DType::F16 => 1,
        _ => 0,
    }
}

fn load(device: &Device, source: &Source) -> Result<Module> {
    let cubin = Cache::of_user().cubin(source, architecture(device), Compiler::find)?;
    Module::load(device, &cubin)
}

/// The kernels of low-latency calls.
#[derive(Debug)]
pub(super) struct LowLatencyFunctions {
    dispatch: [Function; 3],
    combine: [Function; 3],
}

impl LowLatencyFunctions {
    fn load(device: &Device, ranks: usize) -> Result<Self> {
        let module = load(device, &low_latency(ranks))?;
        let of = |name: &str| -> Result<[Function; 3]> {
            let function = |dtype| module.function(&format!("low_latency_{name}_{dtype}"));
            Ok([function("bf16")?, function("f16")?, function("f32")?])
        };
        Ok(Self { dispatch: of("dispatch")?, combine: of("combine")? })
    }

    /// That of an operation on rows of `dtype`.
    pub(super) const fn of(&self, operation: Operation, dtype: DType) -> &Function {
        match operation {
            Operation::LowLatencyDispatch => &self.dispatch[index(dtype)],
            _ => &self.combine[index(dtype)],
        }
    }
}

/// What a process has loaded, by device and ranks.
type Known<T> = Mutex<BTreeMap<(u32, usize), Arc<T>>>;

/// What this process has loaded into `device` for worlds of `ranks`, loaded now if it must be.
pub(super) fn loaded(device: &Device, ranks: usize) -> Result<Arc<Loaded>> {
    static LOADED: Known<Loaded> = Mutex::new(BTreeMap::new());
    once(&LOADED, device, ranks, Loaded::load)
}

/// The same of low-latency calls.
pub(super) fn loaded_low_latency(device: &Device, ranks: usize) -> Result<Arc<LowLatencyFunctions>> {
    static LOADED: Known<LowLatencyFunctions> = Mutex::new(BTreeMap::new());
    once(&LOADED, device, ranks, LowLatencyFunctions::load)
}

fn once<T>(
    known: &Known<T>,
    device: &Device,
    ranks: usize,
    load: impl FnOnce(&Device, usize) -> Result<T>,
) -> Result<Arc<T>> {
    let key = (device.ordinal(), ranks);
    let known = || known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = known().get(&key) {
        return Ok(loaded.clone());
    }
    // Not under the lock: others compile meanwhile. Who was first stands.
    let fresh = Arc::new(load(device, ranks)?);
    Ok(known().entry(key).or_insert(fresh).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_fit_into_a_launch_and_have_no_gaps() {
        assert!(size_of::<DispatchArgs>() <= 4096 && size_of::<CountsArgs>() <= 4096);
        // C++ puts what a structure adds into the padding of its base.
        assert_eq!(size_of::<BufferArgs>(), size_of::<crate::gpu::args::Args>() + 4 * 8 + 8);
        assert_eq!(size_of::<DispatchArgs>(), size_of::<BufferArgs>() + 24 + 9 * 8 + 6 * 4);
        assert_eq!(size_of::<LowLatencyArgs>(), size_of::<BufferArgs>() + 20 * 8 + 14 * 4 + 16 * 4);
        assert_eq!(sources_hash().len(), 64);
    }
}
