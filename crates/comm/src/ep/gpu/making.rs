//! How the GPU's side of a buffer is made: each rank makes what is its own, then all share memory.

use std::sync::Arc;

use unisono_core::device::{ArenaLayout, Link};
use unisono_core::ep::Placement;
use unisono_cuda::{Device, DeviceBuffer, Event, RegisteredHost};
use unisono_node::SharedMemory;
use unisono_sync::SpinBudget;

use super::args::BufferArgs;
use super::core::Core;
use super::kernels::{self, STATE_BYTES};
use super::low_latency::{LowLatency, Places};
use super::pool::Pool;
use super::report::{ABORT, MASKED, SUSPECTS, TOLD_AT};
use super::watch::Watch;
use super::{OnGpu, Shape, Tables, Taken};
use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::gpu::args::Args;
use crate::gpu::attach::all_or_none;
use crate::gpu::budget::Budget;
use crate::symmetric::Symmetric;

impl OnGpu {
    /// Makes it on all ranks. Collective: all have it, or none.
    pub(in crate::ep) fn make(communicator: &Communicator, shape: &Shape<'_>) -> Result<Self> {
        let (rank, ranks) = (communicator.rank(), communicator.world_size());
        let least = |ours| communicator.least_of_all(ours, communicator.patience);
        let ours = all_or_none(Ours::make(communicator, shape), rank, drop, &least)??;
        let words = shape.layout.total_bytes().div_ceil(8);
        let memory =
            communicator.window::<u64>(words, crate::Memory::Device)?.into_symmetric(communicator)?;
        let begun = Self::begin_behind(communicator, &memory);
        all_or_none(begun, rank, drop, &least)??;
        let Some(memories) = memory.kept() else { unreachable!("it lies on devices") };
        let mut call = Args {
            state: ours.state.address(),
            abort: match shape.masking {
                true => ours.page.address() + ABORT.offset as u64,
                false => ours.control_pages.address(),
            },
            report: ours.page.address(),
            rank: rank as u32,
            ..Args::default()
        };
        for peer in 0..ranks {
            call.arenas[peer] = memory.address(peer)?;
        }
        let args = BufferArgs {
            call,
            suspects: ours.page.address() + SUSPECTS.offset as u64,
            masked: ours.page.address() + MASKED.offset as u64,
            deadline_ns: 0,
            memory_bytes: shape.layout.total_bytes() as u64,
            is_masking: u32::from(shape.masking),
            counts_stride: shape.layout.counts_stride as u32,
        };
        let (buffer, at) = ours.tables;
        let list = |at: usize| buffer.address() + at as u64;
        let tables = Tables {
            experts: list(at[0]),
            order: list(at[1]),
            begins: list(at[2]),
            local_experts: shape.placement.local_experts(rank),
            number: shape.placement.experts(),
        };
        let control = communicator.control.clone();
        let neighbours = communicator.neighbours.clone();
        let watch = Watch::start(&control, neighbours, ours.page_memory.clone(), shape.masking);
        let blocks = Budget::take(&ours.device, None);
        let crowd = shape.crowd.max(1) as u32;
        // Two on each multiprocessor.
        let wide = 2 * (blocks.spare() / crowd).max(1);
        let low_latency = ours.low_latency.zip(shape.layout.low_latency_layout).map(|(functions, layout)| {
            let places = Places {
                shape: &shape.arena,
                placement: shape.placement,
                layout: &layout,
                offset: shape.layout.low_latency.offset,
                state: ours.state.address(),
                experts: tables.experts,
            };
            LowLatency::new(functions, (wide, crowd == 1), &places)
        });
        let multiprocessors = ours.device.facts().multiprocessors.max(4);
        let room = (multiprocessors / 2 / crowd).max(2);
        let policy = communicator.engine().policy();
        let core = Core {
            pool: Pool::new(memory.address(rank)?, shape.layout.pool),
            device: ours.device,
            state: ours.state,
            _tables: buffer,
            page: ours.page,
            page_memory: ours.page_memory,
            kernels: ours.kernels,
            _memories: memories,
            _control_pages: ours.control_pages,
            control,
        };
        Ok(Self {
            core: Arc::new(core),
            memory: Some(memory),
            layout: shape.layout,
            args,
            rank,
            world_size: ranks,
            tables,
            order: ours.order,
            latest: 0,
            kept_by: None,
            ticket: 0,
            low_latency,
            blocks: room.min(blocks.blocks() + 1).max(2),
            multiprocessors: shape.multiprocessors,
            masking: shape.masking,
            deadline: shape.deadline,
            has_met: false,
            has_sent: false,
            policy,
            budget: SpinBudget::new(&policy),
            taken: Taken::default(),
            failed: None,
            is_quiet: false,
            _blocks: blocks,
            _watch: watch,
        })
    }

    /// Where the first epochs of the communicator are not those of zeroed memory.
    fn begin_behind(communicator: &Communicator, memory: &Symmetric<u64>) -> Result<()> {
        let (rank, epoch) = (communicator.rank(), first_epoch(communicator));
        if epoch == 0 {
            return Ok(());
        }
        let front = ArenaLayout::new(communicator.world_size(), Link::Device);
        let flags = vec![u64::from(epoch) << 32; front.flags().bytes / 8];
        memory.write(rank, front.flags().offset / 8, &flags)?;
        memory.write(rank, front.scratch().offset / 8, &[u64::from(epoch) << 1])
    }
}

/// What is made before ranks share anything.
struct Ours {
    device: Device,
    kernels: Arc<kernels::Loaded>,
    low_latency: Option<Arc<kernels::LowLatencyFunctions>>,
    state: DeviceBuffer,
    tables: (DeviceBuffer, [usize; 3]),
    page: Arc<RegisteredHost>,
    page_memory: Arc<SharedMemory>,
    control_pages: Arc<RegisteredHost>,
    order: Event,
}

impl Ours {
    fn make(communicator: &Communicator, shape: &Shape<'_>) -> Result<Self> {
        let rank = communicator.rank();
        let failed = |error| Error::Cuda { rank, error };
        let (device, control_pages) = match &communicator.gpu {
            Some(gpu) => {
                let gpu = gpu.borrow();
                (gpu.device().clone(), gpu.control_pages())
            }
            None => return Err(crate::gpu::without_gpu(rank)),
        };
        let Some(control_pages) = control_pages else { return Err(crate::gpu::without_gpu(rank)) };
        let ranks = communicator.world_size();
        let kernels = kernels::loaded(&device, ranks).map_err(failed)?;
        let low_latency = shape.arena.low_latency.then(|| kernels::loaded_low_latency(&device, ranks));
        let low_latency = low_latency.transpose().map_err(failed)?;
        let mut state = DeviceBuffer::new(&device, STATE_BYTES).map_err(failed)?;
        let mut words = vec![0; STATE_BYTES];
        words[..4].copy_from_slice(&first_epoch(communicator).to_le_bytes());
        state.write(0, &words).map_err(failed)?;
        let page_bytes = TOLD_AT + (2 + shape.placement.local_experts(rank)) * 8;
        let page_memory = Arc::new(SharedMemory::create(page_bytes.next_multiple_of(4096))?);
        // SAFETY: `Core` keeps the memory mapped for longer than the registration.
        let page = unsafe { RegisteredHost::shared(&device, page_memory.as_ptr(), page_memory.bytes()) }
            .map_err(failed)?;
        let tables = tables(&device, shape.placement).map_err(failed)?;
        let order = Event::new(&device, false).map_err(failed)?;
        Ok(Self { device, kernels, low_latency, state, tables, page, page_memory, control_pages, order })
    }
}

/// Behind which the first epoch is: that of the communicator, which only tests choose.
fn first_epoch(communicator: &Communicator) -> u32 {
    communicator.origin.as_ref().map_or(0, |origin| origin.epoch())
}

/// The experts as kernels look them up, and where the three lists begin.
fn tables(device: &Device, placement: &Placement) -> unisono_cuda::Result<(DeviceBuffer, [usize; 3])> {
    let (number, ranks) = (placement.experts(), placement.world_size());
    let find = |expert: usize| placement.find(expert as i64).unwrap_or((0, 0));
    let mut words: Vec<u32> =
        (0..number).map(find).map(|(rank, local)| (rank as u32) << 24 | local as u32).collect();
    words.extend((0..ranks).flat_map(|rank| placement.experts_of(rank)).map(|expert| expert as u32));
    let mut begin = 0;
    for rank in 0..=ranks {
        words.push(begin);
        begin += if rank < ranks { placement.local_experts(rank) as u32 } else { 0 };
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut tables = DeviceBuffer::new(device, bytes.len())?;
    tables.write(0, &bytes)?;
    Ok((tables, [0, number * 4, number * 8]))
}
