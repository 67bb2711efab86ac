//! Why the GPUs of a job do not go on: the sentences of the paragraph that are about calls on them.
//!
//! What the kernels recorded tells which call each GPU is in, and which ones have not begun it. Where a rank's recorder could not
//! be read, what its kernel says of a wait that lasts is told instead.

use std::time::Duration;

use super::gpu::{GpuCall, GpuView, GpuWait, Reading};
use super::gpu_message::GpuWork;
use super::label::Presence;
use super::snapshot::{Process, RankView, SeatView, Snapshot};
use super::why::RECENT;
use super::words::{Said, ranks_phrase, rough};

/// A call that goes on for so long is worth a word.
const LONG: Duration = Duration::from_millis(500);

/// How GPUs are called.
struct Names<'n> {
    /// At the beginning of a sentence.
    all: &'n dyn Fn(&[usize]) -> String,
    /// One that another one waits for.
    other: &'n dyn Fn(usize) -> String,
}

/// The sentences, and whether any GPU waits.
pub(super) fn gpus(snapshot: &Snapshot) -> (Vec<String>, bool) {
    let all = |ranks: &[usize]| match ranks {
        [rank] => format!("The GPU of rank {rank}"),
        ranks => format!("The GPUs of {}", ranks_phrase(ranks)),
    };
    let names = Names { all: &all, other: &|rank| format!("that of rank {rank}") };
    let (mut sentences, mut does_wait) = said(snapshot, &names);
    // Devices of ranks that have several are in calls of their own: the same is said of them.
    let (devices, places) = devices(snapshot);
    if !places.is_empty() {
        let all = |seats: &[usize]| {
            let places: Vec<&str> = seats.iter().map(|seat| places[*seat].as_str()).collect();
            match &*places {
                [others @ .., last] if !others.is_empty() => {
                    format!("Devices {} and {last}", others.join(", "))
                }
                places => format!("Device {}", places.concat()),
            }
        };
        let (more, do_wait) = said(&devices, &Names { all: &all, other: &|seat| places[seat].clone() });
        sentences.extend(more);
        does_wait |= do_wait;
    }
    (sentences, does_wait)
}

/// The devices of ranks that have several, as if each were a rank, and how they are called: `cuda:1 of rank 0`.
fn devices(snapshot: &Snapshot) -> (Snapshot, Vec<String>) {
    let all = snapshot.ranks.iter().flat_map(|rank| rank.devices.iter().map(move |device| (rank, device)));
    let mut all: Vec<_> = all.collect();
    all.sort_by_key(|(_, device)| device.seat);
    let place = |seat: usize| all.iter().position(|(_, device)| device.seat == seat);
    let as_rank = |(at, (rank, device)): (usize, &(&RankView, &SeatView))| RankView {
        rank: at,
        // One that is not there waits for nobody that has a name.
        gpu_waits: device.waits.and_then(|wait| Some(GpuWait { peer: place(wait.peer)?, ..wait })),
        gpu: device.gpu.clone(),
        records: Vec::new(),
        devices: Vec::new(),
        ..(*rank).clone()
    };
    let ranks = all.iter().enumerate().map(as_rank).collect();
    let places = all.iter().map(|(rank, device)| format!("cuda:{} of rank {}", device.ordinal, rank.rank));
    let places = places.collect();
    let Snapshot { job, host, failure, .. } = snapshot;
    let (job, host, failure) = (job.clone(), host.clone(), failure.clone());
    (Snapshot { job, host, failure, ranks, generation: snapshot.generation, age: snapshot.age }, places)
}

/// The same of the GPUs that these are called by, each by its rank.
fn said(snapshot: &Snapshot, names: &Names<'_>) -> (Vec<String>, bool) {
    let mut groups = Groups::default();
    let front = front(snapshot);
    match front {
        _ if snapshot.failure.is_some() => ended(snapshot, &mut groups),
        Some(front) => around(snapshot, front, &mut groups),
        None => busy(snapshot, &mut groups),
    }
    let mut sentences = groups.sentences(names);
    let before = sentences.len();
    for rank in snapshot.ranks.iter().filter(|rank| lives(rank)) {
        match rank.gpu_waits.map(|wait| (wait.work, wait.peer)) {
            Some((GpuWork::Call(call), peer)) if latest(rank).is_none() => {
                sentences.push(format!(
                    "{} waits in its call #{call} for {}, which has not made it.",
                    (names.all)(&[rank.rank]),
                    (names.other)(peer)
                ));
            }
            None | Some((GpuWork::Call(_), _)) => {}
            Some((work, peer)) => sentences.push(message(snapshot, rank, work, peer)),
        }
    }
    let does_wait = front.is_some() || sentences.len() > before;
    (sentences, does_wait)
}

/// What is said of a GPU that waits in a message to `peer`, or from it.
fn message(snapshot: &Snapshot, rank: &RankView, work: GpuWork, peer: usize) -> String {
    let is_sent = matches!(work, GpuWork::Send(_));
    let known = |rank: &RankView, peer, is_sent| rank.gpu.as_ref()?.message(peer, is_sent).copied();
    let ours = known(rank, peer, is_sent);
    let since = ours.map_or_else(String::new, |ours| format!(" for {}", rough(ours.begun)));
    let work = work.describe(peer, snapshot.ranks.len());
    let what = ours.map_or_else(String::new, |ours| format!(" of {}", ours.header));
    let waits = format!("The GPU of rank {} has waited in {work}{what}{since}", rank.rank);
    let Some(other) = snapshot.ranks.get(peer) else {
        return format!("{waits}; no rank's next message to it has that tag.");
    };
    let done = if is_sent { "received" } else { "sent" };
    match (ours, known(other, rank.rank, !is_sent)) {
        (_, None) if other.gpu.as_ref().is_some_and(|gpu| gpu.reading != Reading::Earlier) => {
            format!("{waits}; rank {peer} has {done} none.")
        }
        (Some(ours), Some(theirs)) if (ours.number.wrapping_sub(theirs.number) as i32) > 0 => format!(
            "{waits}, which is their message {}; rank {peer} has {done} {}, the last one ({}) {} ago.",
            ours.number,
            theirs.number,
            theirs.header,
            rough(theirs.ended.unwrap_or(theirs.begun))
        ),
        (_, Some(_)) => format!("{waits}; rank {peer} has begun its side."),
        (_, None) => format!("{waits}."),
    }
}

fn lives(rank: &RankView) -> bool {
    rank.process != Process::Ended && rank.presence == Presence::Here
}

fn latest(rank: &RankView) -> Option<&GpuCall> {
    rank.gpu.as_ref().and_then(GpuView::latest)
}

/// The latest call that a GPU has been in for long; of several that differ, the one that most are in.
fn front(snapshot: &Snapshot) -> Option<&GpuCall> {
    let waiting = || {
        let calls = snapshot.ranks.iter().filter(|rank| lives(rank)).filter_map(latest);
        calls.filter(|call| call.is_open() && call.begun >= LONG)
    };
    let votes = |candidate: &GpuCall| waiting().filter(|call| call.is_same_call(candidate)).count();
    waiting().reduce(|best, call| match best.behind(call) {
        1.. => call,
        0 if votes(call) > votes(best) => call,
        _ => best,
    })
}

/// Where everybody stands, seen from the call that GPUs are in.
fn around(snapshot: &Snapshot, front: &GpuCall, groups: &mut Groups) {
    let same =
        |rank: &RankView| latest(rank).filter(|call| call.is_open() && call.is_same_call(front)).copied();
    let inside: Vec<GpuCall> = snapshot.ranks.iter().filter_map(same).collect();
    let since = rough(inside.iter().map(|call| call.begun).max().unwrap_or_default());
    for rank in &snapshot.ranks {
        if let Some(call) = same(rank) {
            let met = if call.met.is_some() { ", which all ranks have begun" } else { "" };
            groups.add(rank.rank, &format!("{{has|have}} been in {front} for {since}{met}"));
        }
    }
    for rank in snapshot.ranks.iter().filter(|rank| same(rank).is_none()) {
        let said = match (&rank.gpu, latest(rank)) {
            (None, _) => continue,
            (Some(view), None) if view.reading != Reading::Earlier => {
                format!("{{has|have}} not begun it, nor any call before{}", host(view, front))
            }
            // What is said of its process says why.
            (Some(_), None) if rank.process != Process::Running => continue,
            (Some(_), None) => "{was|were} not read: {its process|their processes} did not answer".to_owned(),
            (Some(view), Some(call)) => elsewhere(call, front, view),
        };
        groups.add(rank.rank, &said);
    }
}

/// What is said of a GPU whose latest call is not the one that others are in.
fn elsewhere(call: &GpuCall, front: &GpuCall, view: &GpuView) -> String {
    let since = rough(call.begun);
    match (call.behind(front), call.ended) {
        (0, _) if call.header != front.header => format!(
            "{{has|have}} called {call} instead, {since} ago; all ranks must make the same calls in the same order"
        ),
        (1.., None) => format!("{{has|have}} not begun it: {{it has|they have}} been in {call} for {since}"),
        (1.., Some(ended)) => {
            format!(
                "{{has|have}} not begun it: {{its|their}} last call was {call}, done {} ago{}",
                rough(ended),
                host(view, front)
            )
        }
        (_, Some(ended)) => format!("{{has|have}} done {{its|their}} part of it, {} ago", rough(ended)),
        (_, None) => format!("{{is|are}} beyond it, in {call}"),
    }
}

/// Whether the host of a GPU that has not begun `front` has made it.
fn host(view: &GpuView, front: &GpuCall) -> &'static str {
    match view.has_made(front.number) {
        Some(false) => "; {its process has|their processes have} not called it",
        Some(true) => {
            "; {its process has|their processes have} called it, and {it waits|they wait} in {a stream|streams} behind other work"
        }
        None => "",
    }
}

/// What GPUs were in when the communicator failed: their kernels have left it since, or soon will.
fn ended(snapshot: &Snapshot, groups: &mut Groups) {
    for rank in &snapshot.ranks {
        if let Some(call) = latest(rank).filter(|call| call.is_open()) {
            let since = rough(call.begun);
            groups.add(rank.rank, &format!("{{was|were}} in {call}, begun {since} ago, when it failed"));
        }
    }
}

/// GPUs that make calls while nobody waits.
fn busy(snapshot: &Snapshot, groups: &mut Groups) {
    for rank in snapshot.ranks.iter().filter(|rank| lives(rank)) {
        if let Some(call) = latest(rank).filter(|call| call.begun < RECENT) {
            groups.add(rank.rank, &format!("{{makes|make}} calls: the latest {{was|were}} {}", call.call()));
        }
    }
}

/// Ranks of whose GPUs the same is said.
#[derive(Default)]
struct Groups(Vec<(Vec<usize>, Said)>);

impl Groups {
    fn add(&mut self, rank: usize, said: &str) {
        let said = Said::new(said);
        match self.0.iter_mut().find(|(_, known)| *known == said) {
            Some((ranks, _)) => ranks.push(rank),
            None => self.0.push((vec![rank], said)),
        }
    }

    fn sentences(&self, names: &Names<'_>) -> Vec<String> {
        let sentence = |(ranks, said): &(Vec<usize>, Said)| {
            format!("{} {}.", (names.all)(ranks), if ranks.len() == 1 { &said.one } else { &said.many })
        };
        self.0.iter().map(sentence).collect()
    }
}

#[cfg(test)]
#[path = "why_gpu_tests.rs"]
mod tests;
