//! The flight recorder of our GPU. Kernels write it into device memory; here a copy engine brings it into the shared memory when
//! somebody asks, and once when the communicator fails. The clocks of device and host are compared when it is made.

use std::time::{Duration, Instant};

use unisono_core::device::layout::{
    RECORDER_BYTES, RECORDER_KEPT, RECORDER_LOST, RECORDER_SERVES, REPORT_ANSWER, REPORT_CLOCKS,
    REPORT_RECORDER, REPORT_REQUEST,
};
use unisono_cuda::{Device, Function, Grid, Stream};
use unisono_sync::{Ticks, Word};

use super::args::Args;
use super::watch::side_stream;

/// Copies the recorder for who asks. Used by the thread that looks at the GPU; nothing here waits.
#[derive(Debug)]
pub(super) struct Copier {
    /// The words of the device with the ring behind them, and where they go to, as the driver calls both.
    from: u64,
    to: u64,
    /// The request that is being answered, and whether with the last copy.
    under_way: Option<(u64, bool)>,
    is_last: bool,
}

impl Copier {
    /// `from` and `to` are valid until the thread that looks is told to end.
    pub(super) const fn new(from: u64, to: u64) -> Self {
        Self { from, to, under_way: None, is_last: false }
    }

    /// From now on who asks is answered.
    pub(super) fn open(page: &[impl Word<u64>]) {
        page[REPORT_RECORDER].store_release(RECORDER_SERVES);
    }

    /// Copies what happened last, once the device is quiet: for whoever looks when this process is gone. Waits.
    pub(super) fn keep(&self, device: &Device, page: &[impl Word<u64>]) -> unisono_cuda::Result<()> {
        if page[REPORT_RECORDER].load_relaxed() != RECORDER_LOST {
            return Ok(());
        }
        let stream = side_stream(device)?;
        // SAFETY: both are as long as the layout says, and stay until the copy was waited for.
        unsafe { stream.copy(self.to, self.from, RECORDER_BYTES) }?;
        stream.synchronize()?;
        page[REPORT_RECORDER].store_release(RECORDER_KEPT);
        Ok(())
    }

    /// Nobody is answered any more. What was copied last stays, but it is not the last that happened.
    pub(super) fn close(page: &[impl Word<u64>]) {
        if page[REPORT_RECORDER].load_relaxed() == RECORDER_SERVES {
            page[REPORT_RECORDER].store_release(RECORDER_LOST);
        }
    }

    /// One more copy, whether anybody asks or not, and then no other.
    pub(super) const fn begin_last(&mut self) {
        self.is_last = true;
    }

    /// Whether a copy is under way, or should be.
    pub(super) const fn is_busy(&self) -> bool {
        self.under_way.is_some() || self.is_last
    }

    /// Begins a copy if one is asked for, and tells when it is there. Whether there is still something to do.
    pub(super) fn look(&mut self, stream: &Stream, page: &[impl Word<u64>]) -> bool {
        if let Some((request, is_last)) = self.under_way {
            match stream.is_idle() {
                Ok(false) => return true,
                // SYNC: what the recorder held is visible after its answer.
                Ok(true) => page[REPORT_ANSWER].store_release(request),
                Err(_) => {
                    self.under_way = None;
                    return false;
                }
            }
            self.under_way = None;
            if is_last {
                page[REPORT_RECORDER].store_release(RECORDER_KEPT);
                return false;
            }
        }
        let request = page[REPORT_REQUEST].load_acquire();
        if self.is_last || request != page[REPORT_ANSWER].load_relaxed() {
            // SAFETY: both are as long as the layout says, and stay until all work of the device was waited for after this
            // thread was told to end. Kernels write while it is read, and others read while it is written: what is torn is told.
            if unsafe { stream.copy(self.to, self.from, RECORDER_BYTES) }.is_err() {
                return false;
            }
            self.under_way = Some((request, self.is_last));
        }
        true
    }
}

/// Attempts to look at both clocks; the one that took least counts.
const ATTEMPTS: usize = 5;
/// How long the device may take to tell its time: it has more to do than that.
const SOON: Duration = Duration::from_millis(50);

/// Takes one moment on the device's clock and on ours, within some ten microseconds of each other. Where the device does not come
/// to it, times of its calls are not known.
pub(super) fn compare_clocks(
    device: &Device,
    tell_time: &Function,
    args: &mut Args,
    page: &[impl Word<u64>],
) -> unisono_cuda::Result<()> {
    let (stream, ticks) = (side_stream(device)?, Ticks::here());
    let grid = Grid { blocks: 1, threads: 1, shared_bytes: 0, is_early: false };
    let [at_device, at_host] = REPORT_CLOCKS;
    let mut best: Option<(u64, [u64; 2])> = None;
    for _ in 0..ATTEMPTS {
        let before = ticks.now();
        // SAFETY: the kernel takes `Args` and writes one word of the page, which outlives all work of the device.
        unsafe { tell_time.launch(&stream, grid, std::ptr::from_mut(args).cast()) }?;
        // The first time, the driver may have loaded it before.
        let start = Instant::now();
        while !stream.is_idle()? {
            if start.elapsed() > SOON {
                return Ok(());
            }
            std::thread::sleep(Duration::from_micros(5));
        }
        let passed = ticks.now().saturating_sub(before);
        let pair = [page[at_device].load_acquire(), before + passed / 2];
        if best.is_none_or(|(least, _)| passed < least) {
            best = Some((passed, pair));
        }
    }
    if let Some((_, [device_ns, moment])) = best {
        page[at_device].store_relaxed(device_ns);
        page[at_host].store_relaxed(moment);
    }
    Ok(())
}
