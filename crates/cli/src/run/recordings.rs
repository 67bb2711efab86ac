//! The recordings of the ranks, held by `run` so that they are still there when the ranks are gone.
//!
//! Nobody tells when ranks make a communicator, so the descriptors of our ranks and of what they started are looked through:
//! soon after the start, then ever more rarely, and when something went wrong. What all ranks have ended in good order
//! is let go.

use std::time::Duration;

use serde::Serialize;
use unisono::recorder::{self, End, GpuCall, GpuView, Presence, Record, Recording, Snapshot, ranks_phrase};

use crate::look::state::Call;

const FIRST_LOOK: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What a rank did last.
#[derive(Debug, Serialize)]
pub(super) struct LastCall {
    #[serde(flatten)]
    pub(super) call: Call,
    /// The ranks that it waited for.
    pub(super) waits_for: Vec<usize>,
}

/// The recordings of a job.
#[derive(Debug)]
pub(super) struct Recordings {
    job: String,
    kept: Vec<Recording>,
    next_look: Duration,
    pause: Duration,
}

impl Recordings {
    pub(super) fn new(job: &str) -> Self {
        Self { job: job.to_owned(), kept: Vec::new(), next_look: FIRST_LOOK, pause: FIRST_LOOK }
    }

    /// When to look next.
    pub(super) const fn next_look(&self) -> Duration {
        self.next_look
    }

    /// Looks if it is time to.
    pub(super) fn look_in_time(&mut self, now: Duration, pids: impl Iterator<Item = u32>) {
        if now >= self.next_look {
            self.look(pids);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.next_look = now + self.pause;
        }
    }

    /// Looks through the processes that `pids` are or started.
    pub(super) fn look(&mut self, pids: impl Iterator<Item = u32>) {
        let family: Vec<u32> = pids.flat_map(recorder::family).collect();
        let found = match recorder::find(Some(&family)) {
            Ok(found) => found,
            Err(error) => return tracing::debug!("the ranks cannot be looked at: {error}"),
        };
        let is_held = |recording: &Recording, held: &[Recording]| {
            held.iter().any(|other| other.identity() == recording.identity())
        };
        self.kept.retain(|kept| is_held(kept, &found.recordings) || !has_ended_well(kept));
        for recording in found.recordings {
            if recording.job() == self.job && !is_held(&recording, &self.kept) {
                tracing::debug!(ranks = recording.world_size(), "holding the recording of a communicator");
                self.kept.push(recording);
            }
        }
    }

    /// Why the job does not go on: a paragraph for each communicator that is not over.
    pub(super) fn why(&self) -> Vec<String> {
        let snapshots = self.snapshots();
        snapshots.iter().filter(|snapshot| snapshot.is_live()).map(recorder::why).collect()
    }

    /// What each of the ranks did last, over all communicators.
    pub(super) fn last_calls(&self, ranks: usize) -> Vec<Option<LastCall>> {
        let snapshots = self.snapshots();
        let latest = |rank| latest(&snapshots, rank);
        let call = |(snapshot, last): (&Snapshot, Last<'_>), rank| LastCall {
            call: match last {
                Last::Host(record) => Call::new(record, snapshot.ranks.len()),
                Last::Gpu(call) => Call::on_gpu(call),
            },
            waits_for: snapshot.waits_for(rank),
        };
        (0..ranks).map(|rank| latest(rank).map(|found| call(found, rank))).collect()
    }

    /// `last calls: rank 2 was in barrier #3; ranks 0 and 1 failed in barrier #3.` Nothing if nothing is known.
    pub(super) fn sentence(&self, ranks: usize) -> Option<String> {
        let snapshots = self.snapshots();
        let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
        for rank in 0..ranks {
            let said = match latest(&snapshots, rank) {
                None => "made no call".to_owned(),
                Some((_, Last::Host(record))) => match record.end {
                    End::Open => format!("was in {record}"),
                    End::AtOnce | End::Done(_) => format!("had done {record}"),
                    End::Failed(_) => format!("failed in {record}"),
                },
                Some((_, Last::Gpu(call))) if call.is_open() => format!("was in {call} on its GPU"),
                Some((_, Last::Gpu(call))) => format!("had done {call} on its GPU"),
            };
            match groups.iter_mut().find(|(known, _)| *known == said) {
                Some((_, members)) => members.push(rank),
                None => groups.push((said, vec![rank])),
            }
        }
        if snapshots.is_empty() {
            return None;
        }
        let parts: Vec<String> = groups
            .into_iter()
            .map(|(said, ranks)| {
                let said = if ranks.len() > 1 { said.replacen("was in", "were in", 1) } else { said };
                format!("{} {said}", ranks_phrase(&ranks))
            })
            .collect();
        Some(format!("last calls: {}.", parts.join("; ")))
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        self.kept.iter().filter_map(|recording| recording.snapshot().ok()).collect()
    }
}

fn has_ended_well(recording: &Recording) -> bool {
    let snapshot = recording.glance();
    snapshot.is_ok_and(|snapshot| snapshot.ranks.iter().all(|rank| rank.presence == Presence::Destroyed))
}

/// A call on the host or on a GPU.
#[derive(Clone, Copy)]
enum Last<'s> {
    Host(&'s Record),
    Gpu(&'s GpuCall),
}

impl Last<'_> {
    /// When it was done or, if it was not, begun. On GPUs also calls that the host waits for nowhere go on: they are of now.
    fn ago(self) -> Duration {
        match self {
            Self::Host(record) => record.ended().unwrap_or(record.begun).min(record.begun),
            Self::Gpu(call) => call.ended.unwrap_or_default(),
        }
    }
}

/// The latest call of `rank` in any communicator, those that all ranks have ended in good order left out.
fn latest(snapshots: &[Snapshot], rank: usize) -> Option<(&Snapshot, Last<'_>)> {
    let calls = snapshots.iter().filter_map(|snapshot| Some((snapshot, snapshot.ranks.get(rank)?)));
    let calls = calls.flat_map(|(snapshot, rank)| {
        let host = rank.standing().record().map(Last::Host);
        let gpu = rank.gpu.as_ref().and_then(GpuView::latest).map(Last::Gpu);
        host.into_iter().chain(gpu).map(move |last| (snapshot, last))
    });
    calls.min_by_key(|(_, last)| last.ago())
}
