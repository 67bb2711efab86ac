//! What a builder says of GPUs.

use unisono_core::device::multiprocessors::LEAST_MULTIPROCESSORS;
use unisono_core::settings::{GpuLaunch, HandleKind, PinnedWay};

use super::Builder;
use crate::communicator::Communicator;
use crate::error::{Error, Result};

impl Builder {
    /// This rank works on GPU `ordinal` of this process. All ranks have one, or none has.
    pub fn device(self, ordinal: u32) -> Self {
        self.devices(&[ordinal])
    }

    /// This rank works on several GPUs of this process, by their numbers: [`Communicator::on_each`] takes a buffer on each of them, in
    /// this order. All other operations are those of the first. Ranks may have different numbers of them, together at most 16; a
    /// GPU that is named twice counts twice. None is as if this was not called.
    ///
    /// This rank then has two sets of scratch and of kernels: those of all ranks on their first GPU, which may have fewer blocks wait than
    /// without this, and those of all GPUs.
    pub fn devices(mut self, ordinals: &[u32]) -> Self {
        self.devices = ordinals.to_vec();
        self
    }

    /// Loads the kernels that reduce `dtype` by `op` when the communicator is made, or one that comes from it. Those that are not
    /// prepared, other than sums of f32, f16 and bf16, are loaded by the first call that needs them, which cannot be captured in a
    /// graph. To load may wait for all that the device does; so prepare all that is called where ranks may begin calls of several
    /// communicators in different orders, or `Error::NotPrepared` is what they get.
    ///
    /// # Errors
    /// [`Error::Core`] if there is no such reduction.
    pub fn prepare(mut self, dtype: unisono_core::DType, op: unisono_core::ReduceOp) -> Result<Self> {
        unisono_core::reduce_op::check(dtype, op)?;
        self.extra.prepare.push(crate::gpu::kernels::Purpose::reduce(dtype, op));
        self.extra.prepare.push(crate::gpu::kernels::Purpose::reduce_parts(dtype, op));
        Ok(self)
    }

    /// Loads the kernels of [`Operations::all_reduce_rms_norm`](crate::Operations::all_reduce_rms_norm) of `T` when the communicator is
    /// made, so that its first call can be captured in a graph.
    pub fn prepare_rms_norm<T: crate::fused::HalfFloat>(mut self) -> Self {
        self.extra.prepare.push(crate::gpu::kernels::Purpose::Fused(T::DTYPE));
        self
    }

    /// The same for [`Operations::all_reduce_quantised`](crate::Operations::all_reduce_quantised) of `T`.
    pub fn prepare_quantised<T: crate::fused::Quantisable>(mut self) -> Self {
        self.extra.prepare.push(crate::gpu::kernels::Purpose::Quantised(T::DTYPE));
        self
    }

    /// Lets the GPU's epochs begin behind `epoch`: for tests of what happens when they wrap. The same on all ranks.
    #[doc(hidden)]
    pub const fn first_epoch(mut self, epoch: u32) -> Self {
        self.extra.epoch = epoch;
        self
    }

    /// Whether GPUs may reach each other's memory; without, they meet in pinned memory of the host. The same on all ranks.
    pub const fn peer_access(mut self, is_on: bool) -> Self {
        self.overrides.peer_access = Some(is_on);
        self
    }

    /// What this rank's copies of pinned windows ([`Memory::Pinned`](crate::Memory::Pinned)) are made of. Ranks may differ.
    pub const fn pinned(mut self, way: PinnedWay) -> Self {
        self.overrides.pinned = Some(way);
        self
    }

    /// The same for each rank of [`Builder::local`]: for tests of ranks that differ.
    #[doc(hidden)]
    pub fn pinned_by_rank(mut self, ways: &[PinnedWay]) -> Self {
        self.extra.pinned_ways = ways.to_vec();
        self
    }

    /// Lets rank 0 of communicators of so many ranks fail when these are made of others: for tests of what becomes of the rest.
    /// The same on all ranks.
    #[doc(hidden)]
    pub const fn refused_size(mut self, ranks: usize) -> Self {
        self.extra.refused_size = Some(ranks);
        self
    }

    /// As what this rank hands the memory of its GPU to other processes. Ranks may differ.
    pub const fn handles(mut self, kind: HandleKind) -> Self {
        self.overrides.handles = Some(kind);
        self
    }

    /// How the kernels of this rank are launched: experimental, for measuring. Ranks may differ.
    pub const fn gpu_launch(mut self, launch: GpuLaunch) -> Self {
        self.overrides.gpu_launch = Some(launch);
        self
    }

    /// The form of collectives on GPUs, where it can serve the call, and its blocks (0: as usual). The same on all ranks.
    pub const fn gpu_algorithm(self, form: unisono_core::device::Form, blocks: u32) -> Self {
        self.gpu_wish(unisono_core::device::Wish { form, blocks, tile: 0 })
    }

    /// As [`Builder::gpu_algorithm`], with the size of tiles: for tuning.
    #[doc(hidden)]
    pub const fn gpu_wish(mut self, wish: unisono_core::device::Wish) -> Self {
        self.overrides.gpu_algorithm = Some(wish);
        self
    }

    /// The most multiprocessors of this rank's GPU that kernels of the communicator fill while they wait for other ranks, from 9 on; as
    /// many as its share has if that is less. A block that moves data by bulk copies fills one, two of other blocks share one.
    /// Communicators that come from this one have the same. Ranks may differ: the least of all holds, so that every rank has the same
    /// grids. `Explanation::gpus` tells what came of it.
    pub const fn multiprocessors(mut self, most: u32) -> Self {
        self.overrides.multiprocessors = Some(most);
        self
    }

    /// What was asked for by [`Builder::multiprocessors`], if that is enough to work with.
    pub(super) fn checked_multiprocessors(&self) -> Result<Option<u32>> {
        match self.overrides.multiprocessors {
            Some(most) if most < LEAST_MULTIPROCESSORS => Err(Error::Argument {
                call: "Builder::multiprocessors",
                rank: self.rank.unwrap_or(0),
                what: "number of multiprocessors",
                expected: format!("{LEAST_MULTIPROCESSORS} or more"),
                got: most.to_string(),
            }),
            most => Ok(most),
        }
    }

    /// One communicator for each of `devices`, all in this process, with what this builder says of time-outs, order and
    /// algorithms. Rank, world size and store are not needed. See [`Communicator::local`].
    ///
    /// # Errors
    /// As [`Communicator::local`].
    pub fn local(self, devices: &[u32]) -> Result<Vec<Communicator>> {
        Communicator::local_with(devices, &self.settings()?, &self.extra)
    }

    /// The GPUs of this rank, opened before anybody waits for us.
    pub(super) fn open_devices(&self, rank: usize, world_size: usize) -> Result<Vec<unisono_cuda::Device>> {
        if !self.devices.is_empty() {
            crate::gpu::check_ranks(world_size, rank)?;
        }
        let open = |ordinal: &u32| unisono_cuda::Device::new(*ordinal);
        self.devices.iter().map(open).collect::<Result<_, _>>().map_err(|error| Error::Cuda { rank, error })
    }
}
