//! A look at the GPU ten times a second, whatever the operating thread does: what kernels report ends all ranks' waits, a
//! device whose context is lost is told of, who asks for its last calls gets them, and what only this process sees of a wait is told to the
//! other ranks.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use unisono_core::call::{CallHeader, Kind};
use unisono_cuda::{Device, Stream};

use super::args::Report;
use super::recorder::Copier;
use super::seats::Seat;
use crate::cause::Cause;
use crate::control::Control;
use crate::error::Error;

const INTERVAL: Duration = Duration::from_millis(100);
/// While a copy is under way, which takes some microseconds.
const COPYING: Duration = Duration::from_millis(1);
/// How long the last copy, after a failure, may take.
const LAST_COPY: Duration = Duration::from_secs(2);

/// Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    has_ended: Arc<(Mutex<bool>, Condvar)>,
    seat: Seat,
}

impl Watch {
    pub(super) fn start(device: Device, seat: Seat, mut copier: Copier) -> Self {
        let (watched_seat, control) = (seat.clone(), seat.control.clone());
        let has_ended = Arc::new((Mutex::new(false), Condvar::new()));
        let (watched, ordinal) = (has_ended.clone(), device.ordinal());
        let look = move || {
            // Idle for ever; asking it tells how the context is.
            let probe = side_stream(&device).and_then(|stream| stream.relax_capture().map(|()| stream)).ok();
            let (ended, change) = &*watched;
            let mut is_over = ended.lock().unwrap_or_else(PoisonError::into_inner);
            let probe = probe.as_deref();
            let copies = probe.filter(|_| control.about().is_recording && seat.records.is_some());
            if copies.is_some() && !*is_over {
                Copier::open(seat.page());
            }
            let mut failed_at = None;
            while !*is_over {
                let pause = if copier.is_busy() { COPYING } else { INTERVAL };
                is_over = change.wait_timeout(is_over, pause).unwrap_or_else(PoisonError::into_inner).0;
                if *is_over {
                    return;
                }
                if control.abort().raised().is_some() {
                    // The first cause, and what was done last, is all that there is to tell.
                    copier.begin_last();
                    failed_at = failed_at.or_else(|| Some(Instant::now()));
                } else if let Some(cause) = trouble(&seat, || probe?.is_idle().err()) {
                    control.fail(&cause);
                }
                seat.tell_waiting();
                let has_more = copies.is_some_and(|stream| copier.look(stream, seat.page()));
                if failed_at.is_some_and(|moment| !has_more || moment.elapsed() > LAST_COPY) {
                    return Copier::close(seat.page());
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("unisono-gpu".to_owned()).spawn(look) {
            tracing::warn!("nobody looks at cuda:{ordinal} between calls: {error}");
        }
        Self { has_ended, seat: watched_seat }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A forked child answers for nobody, and has no thread that would give the lock back.
        if self.seat.control.check_process().is_err() {
            return;
        }
        let (ended, change) = &*self.has_ended;
        *ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        change.notify_all();
        Copier::close(self.seat.page());
    }
}

/// The stream of a device for what runs beside the calls of all communicators of this process: a device has few queues, and streams
/// that share one wait for each other.
pub(super) fn side_stream(device: &Device) -> unisono_cuda::Result<Arc<Stream>> {
    static STREAMS: Mutex<Vec<Arc<Stream>>> = Mutex::new(Vec::new());
    let mut streams = STREAMS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(stream) = streams.iter().find(|stream| stream.device() == device) {
        return Ok(stream.clone());
    }
    let stream = Arc::new(Stream::new(device)?);
    streams.push(stream.clone());
    Ok(stream)
}

/// What our GPU has to tell: a report of its kernels, or that its context is lost, if that is the driver's error.
pub(super) fn trouble(seat: &Seat, error: impl FnOnce() -> Option<unisono_cuda::Error>) -> Option<Cause> {
    match Report::read(seat.page()) {
        Some(report) => Some(cause_of(report, seat)),
        None => lost_context(&error()?, &seat.control),
    }
}

/// That our context is lost, if `error` says so: nothing works in it any more.
pub(crate) fn lost_context(error: &unisono_cuda::Error, control: &Control) -> Option<Cause> {
    let rank = control.member().0 as u32;
    error.is_fatal().then(|| Cause::Aborted { rank, reason: format!("it lost its CUDA context: {error}") })
}

/// A report of our kernels, as all ranks tell it.
pub(crate) fn cause_of(report: Report, seat: &Seat) -> Cause {
    let (control, rank) = (&seat.control, seat.rank());
    let describe = |header: Option<CallHeader>, epoch: u32, rank: usize| match header {
        Some(header) => header.describe(u64::from(epoch), rank as u32),
        None => format!("call #{epoch} of an unknown kind on rank {rank}"),
    };
    match report {
        Report::Mismatch { peer, epoch, mine, theirs, is_grid } => {
            let note = if is_grid { " with another grid" } else { "" };
            Cause::Mismatch {
                left: describe(mine, epoch, rank),
                right: describe(theirs, epoch, seat.rank_of(peer.min(seat.all - 1))) + note,
            }
        }
        Report::TimedOut { peer, work, waited_ms } => Cause::TimedOut {
            rank: rank as u32,
            call: format!("{} on {}", work.describe(peer, seat.all), seat.place()),
            waited_ms,
            missing: match peer < seat.all {
                true => vec![seat.name(peer)],
                // A message of any rank.
                false => {
                    (0..seat.all).filter(|peer| *peer != seat.number).map(|peer| seat.name(peer)).collect()
                }
            },
        },
        Report::OtherMessage { peer, expected, got } => Cause::Mismatch {
            left: format!("{} from {peer} on rank {rank} ({})", expected.name("recv"), expected),
            right: format!("{} to {rank} on rank {peer} ({})", got.name("send"), got),
        },
        Report::Counts { peer, epoch, needed, room, is_input } => {
            let peer = seat.rank_of(peer.min(seat.all - 1));
            let (from, to) = if is_input { (rank, peer) } else { (peer, rank) };
            let during = format!("{} #{epoch}", Kind::AllToAllCounted.name());
            Cause::Counts { during, from: from as u32, to: to as u32, needed, room, is_input }
        }
        Report::Concurrent => {
            Cause::Aborted { rank: rank as u32, reason: Error::ConcurrentUse { rank }.to_string() }
        }
        Report::Aborted if let Some(cause) = control.cause() => cause,
        Report::Aborted | Report::Unreadable => Cause::Damaged {
            rank: rank as u32,
            who: control.name(rank).to_owned(),
            word: format!("the report of {}", seat.place()),
        },
    }
}
