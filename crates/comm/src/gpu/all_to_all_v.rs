//! All-to-alls of parts of any size that other kernels serve than plain messages: in place, and with counts in memory of the device. See
//! `kernels/all_to_all_v.cuh`.

use smallvec::SmallVec;
use unisono_core::DType;
use unisono_core::call;
use unisono_core::device::Form;
use unisono_cuda::{Function, Module, Result as CudaResult, Stream};

use super::Gpu;
use super::args::{Counted, HEADER_LAUNCH, Messages};
use crate::collectives::{Plan, WindowPlace};
use crate::error::Result;

/// Its kernels: for any size, and for small ones.
#[derive(Debug)]
pub(crate) struct AllToAllFunctions {
    in_place: [Function; 2],
    counted: [Function; 2],
}

impl AllToAllFunctions {
    pub(super) fn load(module: &Module, room_bytes: u32) -> CudaResult<Self> {
        let pair = |name: &str, room_bytes: u32| -> CudaResult<[Function; 2]> {
            let large = module.function(name)?;
            large.allow_shared(room_bytes)?;
            Ok([large, module.function(&format!("small_{name}"))?])
        };
        let counted = pair("counted_of_all", counted_room(room_bytes))?;
        Ok(Self { in_place: pair("in_place_of_all", room_bytes)?, counted })
    }

    /// The kernel of this form, any size or one-shot, for what goes into the place of what is sent.
    pub(super) fn in_place(&self, form: Form) -> &Function {
        &self.in_place[usize::from(form == Form::OneShot)]
    }
}

/// What is left of shared memory for tiles where each block lists its lane there, as `Messages`.
const fn counted_room(room_bytes: u32) -> u32 {
    room_bytes.saturating_sub(size_of::<Messages>() as u32)
}

impl Gpu {
    /// Puts an all-to-all with counts in memory of our device into `stream`.
    pub(super) fn launch_counted(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        self.order_after_latest(stream)?;
        let windows: SmallVec<[WindowPlace; 5]> = plan.buffers().filter_map(|(_, window)| window).collect();
        let mut is_captured = self.keep_if_captured([None; 2], stream)?;
        for window in &windows {
            is_captured |= self.keep_if_captured([Some(*window), None], stream)?;
        }
        // As our kernels call them, wherever they lie. Without offsets, that is null.
        let (rank, ranks) = (self.args.rank as usize, self.rules.ranks);
        let mut at = [0; 5];
        for (at, (ptr, window)) in at.iter_mut().zip(plan.buffers()) {
            *at = self.windows.address(rank, ptr as u64, window);
        }
        let [source, target, counts, told, offsets] = at;
        let (size, share, most_in) = (plan.dtype.size(), plan.share(), plan.count);
        let words = plan.header.to_words();
        let lanes = 2 * ranks - 1;
        let launch = self.rules.messages(lanes, most_in.max(share) * size);
        let args = &mut self.args;
        args.header[..call::HEADER_WORDS].copy_from_slice(&words);
        // Grids are each rank's own.
        args.header[HEADER_LAUNCH] = Form::Bulk as u64;
        args.bytes = (most_in.max(share) * size) as u64;
        args.root = 0;
        (args.sources[rank], args.targets[rank]) = (source, target);
        let mut counted = Counted {
            call: *args,
            counts,
            offsets,
            told,
            most_in: most_in as u64,
            most_out: share as u64,
            size: size as u32,
            blocks: launch.blocks as u16,
            dtype: plan.dtype.code(),
            kind: words[0] as u8,
            is_wide: u32::from(plan.numbers() == Some(DType::U64)),
            reserved: 0,
        };
        let function = &self.kernels.all_to_all_v().counted[usize::from(launch.form == Form::OneShot)];
        let shared_bytes = counted_room(launch.shared_bytes(self.room_bytes));
        let grid = self.grid((launch.blocks * lanes as u32 + 1, launch.threads.max(256)), shared_bytes);
        // SAFETY: the kernel takes `Counted`; what it names lives as long as this communicator, which waits for its kernels before it lets
        // go, and the buffers are valid until the stream has passed, as whoever made the call promised.
        let launched = unsafe { function.launch(stream, grid, (&raw mut counted).cast()) };
        launched.map_err(|error| self.refused(error))?;
        self.count_call(is_captured);
        // What waits for one that the host touches waits for all of them.
        let hosted = windows.into_iter().find(|window| self.windows.touched([Some(*window), None]).is_some());
        self.conclude([hosted, None], stream, is_captured)
    }
}
