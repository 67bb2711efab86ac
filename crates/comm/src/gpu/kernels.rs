//! The kernels: their sources, and those of them that are loaded.
//!
//! One source is compiled for each world size, link, and (dtype, reduction), and once more for what only moves bytes. What a
//! process has loaded into a device serves all its communicators there.
//!
//! Over 500 lines because every kind of kernel is named, compiled and loaded in one way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use unisono_core::call::Kind;
use unisono_core::device::{ArenaLayout, Form, Link};
use unisono_core::{DType, ReduceOp};
use unisono_cuda::{Architecture, Cache, Compiler, Device, Function, Launching, Module, Result, Source};

use super::all_to_all_v::AllToAllFunctions;
use super::args::{Args, Counted, FusedArgs, Messages, StepArgs, UnevenArgs};
use super::copy_engines::EngineFunctions;

const ALL_TO_ALL_V: &str = include_str!("../../kernels/all_to_all_v.cu");
const MESSAGES: &str = include_str!("../../kernels/messages.cu");
const COLLECTIVES: &str = include_str!("../../kernels/collectives.cu");
const HEADERS: [(&str, &str); 19] = [
    ("ptx.cuh", include_str!("../../kernels/ptx.cuh")),
    ("element.cuh", include_str!("../../kernels/element.cuh")),
    ("call.cuh", include_str!("../../kernels/call.cuh")),
    ("buffers.cuh", include_str!("../../kernels/buffers.cuh")),
    ("flow.cuh", include_str!("../../kernels/flow.cuh")),
    ("flags.cuh", include_str!("../../kernels/flags.cuh")),
    ("units.cuh", include_str!("../../kernels/units.cuh")),
    ("one_shot.cuh", include_str!("../../kernels/one_shot.cuh")),
    ("two_shot.cuh", include_str!("../../kernels/two_shot.cuh")),
    ("pipeline.cuh", include_str!("../../kernels/pipeline.cuh")),
    ("copies.cuh", include_str!("../../kernels/copies.cuh")),
    ("bulk.cuh", include_str!("../../kernels/bulk.cuh")),
    ("direct.cuh", include_str!("../../kernels/direct.cuh")),
    ("ring.cuh", include_str!("../../kernels/ring.cuh")),
    ("engine.cuh", include_str!("../../kernels/engine.cuh")),
    ("fused.cuh", include_str!("../../kernels/fused.cuh")),
    ("quantised.cuh", include_str!("../../kernels/quantised.cuh")),
    ("messages.cuh", include_str!("../../kernels/messages.cuh")),
    ("all_to_all_v.cuh", include_str!("../../kernels/all_to_all_v.cuh")),
];

/// What a set of kernels is compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Purpose {
    /// Moving the same bytes to all: broadcast, all-gather, barrier.
    Copies,
    /// Moving parts: gather, scatter, all-to-all, all-gather of parts of any size.
    Parts,
    /// All-reduce of this dtype and reduction (by its code).
    Reduce(DType, u8),
    /// Reduce and reduce-scatter, of parts of any size too, of this dtype and reduction.
    ReduceParts(DType, u8),
    /// All-reduce of rows of this dtype, f16 or bf16, with residual and norm.
    Fused(DType),
    /// Quantised all-reduce of this dtype, f16, bf16 or f32.
    Quantised(DType),
    /// Messages from rank to rank, and parts of any size that only two ranks know of.
    Messages,
    /// All-to-alls of parts of any size in place, or with counts in memory of the device.
    AllToAllV,
}

impl Purpose {
    /// The all-reduce of elements of `dtype` by `op`.
    pub const fn reduce(dtype: DType, op: ReduceOp) -> Self {
        Self::Reduce(dtype, op.code())
    }

    /// Reduce and reduce-scatter of elements of `dtype` by `op`.
    pub const fn reduce_parts(dtype: DType, op: ReduceOp) -> Self {
        Self::ReduceParts(dtype, op.code())
    }

    /// What every communicator on a GPU loads when it is made: copies, parts, messages, all-to-alls, and sums of f32, f16 and bf16.
    pub const USUAL: [Self; 10] = [
        Self::Copies,
        Self::Parts,
        Self::Messages,
        Self::AllToAllV,
        Self::reduce(DType::F32, ReduceOp::Sum),
        Self::reduce(DType::F16, ReduceOp::Sum),
        Self::reduce(DType::BF16, ReduceOp::Sum),
        Self::reduce_parts(DType::F32, ReduceOp::Sum),
        Self::reduce_parts(DType::F16, ReduceOp::Sum),
        Self::reduce_parts(DType::BF16, ReduceOp::Sum),
    ];

    /// Every purpose that there is.
    pub fn all() -> Vec<Self> {
        let pairs = DType::ALL.into_iter().flat_map(|dtype| ReduceOp::ALL.map(|op| (dtype, op)));
        let pairs = pairs.filter(|(dtype, op)| unisono_core::reduce_op::check(*dtype, *op).is_ok());
        let reductions =
            pairs.flat_map(|(dtype, op)| [Self::reduce(dtype, op), Self::reduce_parts(dtype, op)]);
        let fused = DType::ALL.into_iter().filter(|dtype| unisono_core::fused::is_normed(*dtype));
        let fused = fused.map(Self::Fused);
        let quantised = DType::ALL.into_iter().filter(|dtype| unisono_core::quantised::is_quantised(*dtype));
        let fused = fused.chain(quantised.map(Self::Quantised));
        let moved = [Self::Copies, Self::Parts, Self::Messages, Self::AllToAllV];
        moved.into_iter().chain(fused).chain(reductions).collect()
    }

    /// That of a call.
    pub(crate) fn of(kind: Kind, dtype: DType) -> Self {
        match (kind, kind.op()) {
            (Kind::AllReduce { .. }, Some(op)) => Self::reduce(dtype, op),
            (Kind::AllReduceRmsNorm { .. }, _) => Self::Fused(dtype),
            (Kind::AllReduceQuantised, _) => Self::Quantised(dtype),
            (_, Some(op)) => Self::reduce_parts(dtype, op),
            (Kind::Gather { .. } | Kind::Scatter { .. } | Kind::AllToAll | Kind::AllGatherV, None) => {
                Self::Parts
            }
            _ => Self::Copies,
        }
    }

    /// As kernels know it.
    const fn code(self) -> u8 {
        match self {
            Self::Copies => 0,
            Self::Reduce(..) => 1,
            Self::Parts => 2,
            Self::ReduceParts(..) => 3,
            Self::Fused(_) => 8,
            Self::Quantised(_) => 9,
            Self::Messages => 4,
            Self::AllToAllV => 5,
        }
    }
}

impl std::fmt::Display for Purpose {
    /// `copies`, `parts`, `messages`, `all-to-all`, `f32 sum`, `f32 sum, parts`, `bf16 rows` or `bf16 quantised`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Copies => f.pad("copies"),
            Self::Parts => f.pad("parts"),
            Self::Fused(dtype) => f.pad(&format!("{dtype} rows")),
            Self::Quantised(dtype) => f.pad(&format!("{dtype} quantised")),
            Self::Messages => f.pad("messages"),
            Self::AllToAllV => f.pad("all-to-all"),
            Self::Reduce(dtype, op) | Self::ReduceParts(dtype, op) => {
                let op = ReduceOp::from_code(*op, 0.0).map_or("unknown", ReduceOp::name);
                let parts = if matches!(self, Self::ReduceParts(..)) { ", parts" } else { "" };
                f.pad(&format!("{dtype} {op}{parts}"))
            }
        }
    }
}

/// The source of the kernels for `purpose` in worlds of this layout.
pub fn source(layout: &ArenaLayout, purpose: Purpose) -> Source {
    let mut headers: Vec<_> = HEADERS.iter().map(|(name, text)| (*name, (*text).to_owned())).collect();
    headers.push(("layout.cuh", layout.definitions()));
    let mut definitions = vec![("PURPOSE", purpose.code().to_string())];
    if let Purpose::Reduce(dtype, op) | Purpose::ReduceParts(dtype, op) = purpose {
        definitions.push(("CALL_DTYPE", format!("DType({})", dtype.code())));
        definitions.push(("CALL_OP", format!("Op({op})")));
    }
    if let Purpose::Fused(dtype) | Purpose::Quantised(dtype) = purpose {
        definitions.push(("CALL_DTYPE", format!("DType({})", dtype.code())));
    }
    if let Purpose::Fused(_) = purpose {
        definitions.push(("FUSED_ARGS_BYTES", size_of::<FusedArgs>().to_string()));
    }
    // Both sides see the same structures, or nothing compiles.
    definitions.push(("ARGS_BYTES", size_of::<Args>().to_string()));
    definitions.push(("UNEVEN_ARGS_BYTES", size_of::<UnevenArgs>().to_string()));
    definitions.push(("STEP_ARGS_BYTES", size_of::<StepArgs>().to_string()));
    definitions.push(("MESSAGES_BYTES", size_of::<Messages>().to_string()));
    if purpose == Purpose::AllToAllV {
        definitions.push(("COUNTED_BYTES", size_of::<Counted>().to_string()));
    }
    let (name, text) = match purpose {
        Purpose::Messages => ("messages.cu", MESSAGES),
        Purpose::AllToAllV => ("all_to_all_v.cu", ALL_TO_ALL_V),
        _ => ("collectives.cu", COLLECTIVES),
    };
    Source { name, text, headers, definitions }
}

/// What tells these kernels from those of another version: SHA-256 over names and texts of all files, as hexadecimal digits.
pub fn sources_hash() -> String {
    let mut hash = Sha256::new();
    let kernels =
        [("collectives.cu", COLLECTIVES), ("messages.cu", MESSAGES), ("all_to_all_v.cu", ALL_TO_ALL_V)];
    for (name, text) in kernels.iter().chain(&HEADERS) {
        for part in [name, text] {
            // With their lengths, so that nothing can move from one to the next.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The architecture that kernels for `device` are compiled for.
pub fn architecture(device: &Device) -> Architecture {
    let (major, minor) = device.facts().capability;
    Architecture { major, minor }
}

/// Whether kernels for `device` let its copies run on their own, over this link; then there are also those of forms in lines.
pub(crate) fn has_bulk_copies(device: &Device, link: Link) -> bool {
    link == Link::Device && device.facts().capability >= (9, 0)
}

/// Shared memory that each block of the forms with tiles gets.
pub(crate) fn room_bytes(device: &Device, link: Link) -> u32 {
    /// More takes no part in hiding latency.
    const MOST: u32 = 200 << 10;
    /// For what kernels declare.
    const REST: u32 = 2 << 10;
    match has_bulk_copies(device, link) {
        true => device.facts().shared_bytes.saturating_sub(REST).min(MOST),
        false => 0,
    }
}

/// Loaded kernels of one purpose.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// By operation and form.
    functions: [[Option<Function>; Form::ALL.len()]; OPERATIONS],
    rows: Option<RowFunctions>,
    /// Those of calls by copy engines behind the first.
    pub(super) engine: Option<EngineFunctions>,
    barrier: Option<Function>,
    clock: Option<Function>,
    messages: Option<OfMessages>,
    all_to_all_v: Option<AllToAllFunctions>,
}

/// The kernels of messages.
#[derive(Debug)]
pub(crate) struct OfMessages {
    /// For any size, and for small ones: those of a group, and those that are the parts of a collective.
    kernels: [[Function; 2]; 2],
    /// Looks for one from any rank.
    pub(crate) find: Function,
}

impl OfMessages {
    fn load(module: &Module, room_bytes: u32) -> Result<Self> {
        let function = |name| module.function(name);
        let kernels = [
            [function("messages")?, function("messages_of_all")?],
            [function("small_messages")?, function("small_messages_of_all")?],
        ];
        kernels[0].iter().try_for_each(|kernel| kernel.allow_shared(room_bytes))?;
        Ok(Self { kernels, find: function("find_message")? })
    }

    /// That of this form: of any size, or one-shot.
    pub(crate) fn of(&self, form: Form, is_collective: bool) -> &Function {
        &self.kernels[usize::from(form == Form::OneShot)][usize::from(is_collective)]
    }
}

/// The kernels of rows.
#[derive(Debug)]
pub(crate) struct RowFunctions {
    /// The all-reduce and all that follows.
    pub(crate) one_shot: Function,
    /// The same in two hops.
    pub(crate) two_shot: Function,
    /// What follows, alone.
    pub(crate) behind: Function,
}

/// The operations with kernels of several forms beside the collectives of equal parts.
const OF_OTHER_PARTS: [Kind; 3] =
    [Kind::AllGatherV, Kind::ReduceScatterV { op: ReduceOp::Sum }, Kind::AllReduceQuantised];

/// How many operations have kernels of several forms.
const OPERATIONS: usize = Kind::EQUAL_PARTS.len() + OF_OTHER_PARTS.len();

/// Where an operation stands among those.
#[inline]
const fn index(kind: Kind) -> Option<usize> {
    let other = match kind {
        Kind::AllGatherV => 0,
        Kind::ReduceScatterV { .. } => 1,
        Kind::AllReduceQuantised => 2,
        _ => return kind.equal_parts_index(),
    };
    Some(Kind::EQUAL_PARTS.len() + other)
}

/// Whether the input has a part for each rank, and the output one of each: of one size, or of any.
#[inline]
pub(crate) const fn parts(kind: Kind) -> (bool, bool) {
    let is_in = matches!(
        kind,
        Kind::ReduceScatter { .. } | Kind::ReduceScatterV { .. } | Kind::Scatter { .. } | Kind::AllToAll
    );
    let is_out = matches!(kind, Kind::AllGather | Kind::AllGatherV | Kind::Gather { .. } | Kind::AllToAll);
    (is_in, is_out)
}

/// Whether calls of this kind run on GPUs.
#[inline]
pub(crate) const fn has_kernels(kind: Kind) -> bool {
    matches!(kind, Kind::Barrier | Kind::AllReduceRmsNorm { .. } | Kind::AllToAllCounted)
        || index(kind).is_some()
        || super::messages::is_of_messages(kind)
}

impl Loaded {
    fn load(
        device: &Device,
        (layout, launching): (&ArenaLayout, Launching),
        purpose: Purpose,
    ) -> Result<Self> {
        let cubin = Cache::of_user().cubin(&source(layout, purpose), architecture(device), Compiler::find)?;
        let module = Module::load_for(device, &cubin, launching)?;
        let mut functions: [[Option<Function>; Form::ALL.len()]; OPERATIONS] = Default::default();
        let dtype = DType::U8;
        for (kind, functions) in Kind::EQUAL_PARTS.iter().chain(&OF_OTHER_PARTS).zip(&mut functions) {
            if Purpose::of(*kind, dtype).code() != purpose.code() {
                continue;
            }
            let have_lines = has_bulk_copies(device, layout.link());
            let is_there = |form: &Form| form.serves(*kind) && (have_lines || !form.is_lines());
            for form in Form::ALL.into_iter().filter(is_there) {
                let symbol = match form {
                    // The first of all calls by copy engines.
                    Form::Engine => "engine_begin".to_owned(),
                    _ => format!("{}_{}", kind.name(), form.name().replace('-', "_")),
                };
                let function = module.function(&symbol)?;
                if matches!(form, Form::Bulk | Form::Ring) {
                    function.allow_shared(room_bytes(device, layout.link()))?;
                }
                functions[form as usize] = Some(function);
            }
        }
        let only = |name| match purpose {
            Purpose::Copies => module.function(name).map(Some),
            _ => Ok(None),
        };
        let (barrier, clock) = (only("barrier")?, only("tell_time")?);
        let rows = match purpose {
            Purpose::Fused(_) => Some(RowFunctions {
                one_shot: module.function("rows_one_shot_of_all")?,
                two_shot: module.function("rows_two_shot_of_all")?,
                behind: module.function("rows_behind_all")?,
            }),
            _ => None,
        };
        let engine = (purpose == Purpose::Copies).then(|| EngineFunctions::load(&module)).transpose()?;
        let messages = match purpose {
            Purpose::Messages => Some(OfMessages::load(&module, room_bytes(device, layout.link()))?),
            _ => None,
        };
        let all_to_all_v = (purpose == Purpose::AllToAllV)
            .then(|| AllToAllFunctions::load(&module, room_bytes(device, layout.link())))
            .transpose()?;
        Ok(Self { functions, rows, engine, barrier, clock, messages, all_to_all_v })
    }

    /// The kernel of a call that moves data.
    #[inline]
    pub(crate) fn function(&self, kind: Kind, form: Form) -> Option<&Function> {
        self.functions[index(kind)?][form as usize].as_ref()
    }

    /// The kernels of rows.
    pub(crate) const fn rows(&self) -> Option<&RowFunctions> {
        self.rows.as_ref()
    }

    /// The kernel that only exchanges headers.
    pub(crate) const fn barrier(&self) -> Option<&Function> {
        self.barrier.as_ref()
    }

    /// The kernel that tells what time it is there.
    pub(crate) const fn clock(&self) -> Option<&Function> {
        self.clock.as_ref()
    }
}

type Key = (u32, usize, Link, Launching, Purpose);

/// The kernels of one communicator.
#[derive(Debug)]
pub(crate) struct Kernels {
    device: Device,
    layout: ArenaLayout,
    launching: Launching,
    ranks: usize,
    loaded: HashMap<Purpose, Arc<Loaded>>,
    copies: Arc<Loaded>,
    messages: Arc<Loaded>,
}

impl Kernels {
    /// Loads what is needed at once, on several threads: compiling takes seconds where nothing is cached.
    pub(crate) fn new(
        device: &Device,
        (layout, launching): (ArenaLayout, Launching),
        ranks: usize,
        purposes: &[Purpose],
    ) -> Result<Self> {
        let mut all: Vec<Purpose> = vec![Purpose::Copies, Purpose::Messages];
        all.extend(purposes.iter().filter(|purpose| !matches!(purpose, Purpose::Copies | Purpose::Messages)));
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(all.len());
        let load = |worker: usize| {
            let share = all.iter().skip(worker).step_by(workers);
            share
                .map(|purpose| Ok((*purpose, loaded(device, (layout, launching), ranks, *purpose)?)))
                .collect::<Result<_>>()
        };
        let shares: Vec<Result<Vec<_>>> = std::thread::scope(|scope| {
            let load = &load;
            let threads: Vec<_> = (0..workers).map(|worker| scope.spawn(move || load(worker))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
            };
            threads.into_iter().map(join).collect()
        });
        let mut loaded = HashMap::new();
        for share in shares {
            loaded.extend(share?);
        }
        let [copies, messages] = [Purpose::Copies, Purpose::Messages].map(|purpose| loaded[&purpose].clone());
        Ok(Self { device: device.clone(), layout, launching, ranks, loaded, copies, messages })
    }

    /// The kernels for a call, if they are loaded.
    #[inline]
    pub(crate) fn find(&self, kind: Kind, dtype: DType) -> Option<&Loaded> {
        match Purpose::of(kind, dtype) {
            Purpose::Copies => Some(&self.copies),
            purpose => self.loaded.get(&purpose).map(|loaded| &**loaded),
        }
    }

    /// Takes the kernels for a call that this process has loaded into the device before, if it has.
    pub(crate) fn adopt(&mut self, kind: Kind, dtype: DType) -> bool {
        let purpose = Purpose::of(kind, dtype);
        let key = (self.device.ordinal(), self.ranks, self.layout.link(), self.launching, purpose);
        match loaded_before(&key) {
            Some(loaded) => self.loaded.insert(purpose, loaded).is_none(),
            None => false,
        }
    }

    /// Loads the kernels for a call.
    pub(crate) fn load(&mut self, kind: Kind, dtype: DType) -> Result<()> {
        let purpose = Purpose::of(kind, dtype);
        let loaded = self.load_into(&self.device, purpose)?;
        self.loaded.insert(purpose, loaded);
        Ok(())
    }

    /// Loads kernels as ours are into another device of this process, or into ours.
    pub(crate) fn load_into(&self, device: &Device, purpose: Purpose) -> Result<Arc<Loaded>> {
        loaded(device, (self.layout, self.launching), self.ranks, purpose)
    }

    /// Those of messages.
    pub(crate) fn messages(&self) -> &OfMessages {
        let Some(of) = &self.messages.messages else { unreachable!("loaded for messages") };
        of
    }

    /// Those of all-to-alls in place, or with counts in memory of the device.
    pub(crate) fn all_to_all_v(&self) -> &AllToAllFunctions {
        let of = self.loaded.get(&Purpose::AllToAllV).and_then(|loaded| loaded.all_to_all_v.as_ref());
        let Some(of) = of else { unreachable!("every world of ranks loads what is usual") };
        of
    }

    /// Those that move bytes.
    pub(crate) fn copies(&self) -> &Loaded {
        &self.copies
    }
}

/// What this process has loaded.
static LOADED: Mutex<Option<HashMap<Key, Arc<Loaded>>>> = Mutex::new(None);

fn loaded_before(key: &Key) -> Option<Arc<Loaded>> {
    LOADED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().get(key).cloned()
}

/// What this process has loaded into `device`, loaded now if it must be.
fn loaded(
    device: &Device,
    (layout, launching): (ArenaLayout, Launching),
    ranks: usize,
    purpose: Purpose,
) -> Result<Arc<Loaded>> {
    let key = (device.ordinal(), ranks, layout.link(), launching, purpose);
    if let Some(loaded) = loaded_before(&key) {
        return Ok(loaded);
    }
    // Not under the lock: others compile meanwhile. Who was first stands.
    let fresh = Arc::new(Loaded::load(device, (&layout, launching), purpose)?);
    let mut all = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(all.get_or_insert_default().entry(key).or_insert(fresh).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_the_sources_is_the_same_whenever_it_is_taken() {
        let hash = sources_hash();
        assert_eq!(hash, sources_hash());
        assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{hash}");
    }

    #[test]
    fn every_pair_of_the_table_has_kernels_of_its_own() {
        let all = Purpose::all();
        assert_eq!(all.len(), 4 + 2 + 3 + 2 * 113, "{}", all.len());
        assert_eq!(
            Purpose::USUAL.map(|purpose| purpose.to_string()).join(", "),
            "copies, parts, messages, all-to-all, f32 sum, f16 sum, bf16 sum, f32 sum, parts, f16 sum, parts, bf16 sum, parts"
        );
        let layout = ArenaLayout::new(4, Link::Device);
        let bf16 = source(&layout, Purpose::reduce(DType::BF16, ReduceOp::Sum));
        assert!(bf16.definitions.contains(&("CALL_DTYPE", "DType(10)".to_owned())));
        assert!(
            bf16.headers
                .iter()
                .any(|(name, text)| *name == "layout.cuh" && text.contains("#define RANKS 4\n"))
        );
    }
}
