//! Why a job does not go on, as a paragraph of plain English: a pure function of a snapshot.
//!
//! First who waits, and in which call; then everybody who is waited for, is stopped or is gone, with the last that is known of
//! him; then what to do. Ranks of which the same can be said share a sentence.

use std::time::Duration;

use super::label::Presence;
use super::record::{Record, WaitsOn};
use super::snapshot::{Process, RankView, Snapshot};
use super::standing::Standing;
use super::why_gpu;
use super::words::{Said, and, capital, ranks_phrase, rough};

/// The most sentences about groups of ranks: the rest is in the table.
const MAX_GROUPS: usize = 8;
/// A rank whose last call is more recent than this is busy with calls, for all that can be told.
pub(super) const RECENT: Duration = Duration::from_secs(1);

/// Who waits for whom, who is behind, stopped or dead, and what to do: a paragraph.
pub fn why(snapshot: &Snapshot) -> String {
    let mut sentences = Vec::new();
    if let Some(failure) = &snapshot.failure {
        let end = if failure.sentence.ends_with('.') { "" } else { "." };
        sentences.push(format!("This communicator has failed: {}{end}", failure.sentence));
    }
    if snapshot.ranks.iter().all(|rank| rank.presence == Presence::Destroyed) {
        sentences.push("All ranks have ended it together with destroy().".to_owned());
        return sentences.join(" ");
    }
    if snapshot.ranks.iter().all(|rank| !rank.is_recording) {
        sentences.push("No rank records its calls (UNISONO_RECORDER=off).".to_owned());
    }
    let front = front(snapshot);
    let mut groups = waiting(snapshot, front);
    let (on_gpus, do_gpus_wait) = why_gpu::gpus(snapshot);
    if groups.is_empty() && !do_gpus_wait && snapshot.failure.is_none() {
        sentences.push("No rank waits.".to_owned());
    }
    groups.extend(others(snapshot, front));
    let left_out = groups.len().saturating_sub(MAX_GROUPS);
    sentences.extend(groups.iter().take(MAX_GROUPS).map(Group::sentence));
    if left_out > 0 {
        sentences.push(format!("As much can be said of {left_out} more groups of ranks."));
    }
    sentences.extend(on_gpus);
    sentences.extend(deadlock(snapshot));
    sentences.extend(advice(snapshot));
    sentences.join(" ")
}

/// Ranks of which the same is said.
struct Group {
    ranks: Vec<usize>,
    /// Their processes, where they are worth a look.
    pids: Vec<u32>,
    said: Said,
}

impl Group {
    fn sentence(&self) -> String {
        let said = if self.ranks.len() == 1 { &self.said.one } else { &self.said.many };
        let pids = match self.pids.as_slice() {
            [] => String::new(),
            [pid] => format!(" (pid {pid})"),
            [..] if self.pids.len() > 8 => String::new(),
            pids => format!(" (pids {})", and(pids.iter().map(u32::to_string))),
        };
        capital(&format!("{}{pids} {said}.", ranks_phrase(&self.ranks)))
    }

    /// Adds a rank to the group of which the same is said, or makes one.
    fn add(groups: &mut Vec<Self>, rank: usize, pid: Option<u32>, said: Said) {
        match groups.iter_mut().find(|group| group.said == said && group.pids.is_empty() == pid.is_none()) {
            Some(group) => {
                group.ranks.push(rank);
                group.pids.extend(pid.filter(|pid| !group.pids.contains(pid)));
            }
            None => groups.push(Self { ranks: vec![rank], pids: pid.into_iter().collect(), said }),
        }
    }
}

/// The collective that most ranks wait in, of those with the highest number.
fn front(snapshot: &Snapshot) -> Option<&Record> {
    let waiting = || {
        let lives = |rank: &&RankView| rank.process != Process::Ended;
        snapshot.ranks.iter().filter(lives).filter_map(|rank| match rank.standing() {
            Standing::Waiting(record) if record.number.is_some() => Some(record),
            _ => None,
        })
    };
    let votes = |candidate: &Record| waiting().filter(|record| record.is_same_call(candidate)).count();
    // Of equals, the last one is the greatest: counted from behind, the lowest rank.
    let ranks: Vec<&Record> = waiting().collect();
    ranks.into_iter().rev().max_by_key(|record| (record.number, votes(record)))
}

fn waiting(snapshot: &Snapshot, front: Option<&Record>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut told: Vec<(&Record, usize)> = Vec::new();
    for rank in &snapshot.ranks {
        let Standing::Waiting(record) = rank.standing() else { continue };
        if rank.process == Process::Stopped || rank.process == Process::Ended {
            continue;
        }
        if let Some((_, at)) = told.iter().find(|(other, _)| other.is_same_call(record)) {
            groups[*at].ranks.push(rank.rank);
            continue;
        }
        told.push((record, groups.len()));
        let since = rough(longest(snapshot, record));
        let waited = format!("{{has|have}} waited in {record} for {since}");
        let said = match front {
            Some(front) if front.is_same_call(record) => waited,
            Some(front) if record.number == front.number => format!(
                "{{has|have}} called {record} instead and waited for {since}; all ranks must make the same calls in the same order"
            ),
            Some(front) if rank.last_begun() < front.number => {
                format!("{{has|have}} not begun it: {{it has|they have}} waited in {record} for {since}")
            }
            _ => waited,
        };
        let said = format!("{said}{}", message_detail(snapshot, rank.rank, record));
        groups.push(Group { ranks: vec![rank.rank], pids: Vec::new(), said: Said::new(&said) });
    }
    // What everybody else is compared with comes first.
    let first = |group: &Group| {
        let record = snapshot.ranks[group.ranks[0]].standing().record();
        !matches!((front, record), (Some(front), Some(record)) if front.is_same_call(record))
    };
    groups.sort_by_key(first);
    groups
}

/// How long the first rank has been in this call.
fn longest(snapshot: &Snapshot, record: &Record) -> Duration {
    let same = |rank: &RankView| match rank.standing() {
        Standing::Waiting(other) if other.is_same_call(record) => Some(other.begun),
        _ => None,
    };
    snapshot.ranks.iter().filter_map(same).max().unwrap_or(record.begun)
}

/// What the sender of the message that `rank` waits for has sent instead.
fn message_detail(snapshot: &Snapshot, rank: usize, record: &Record) -> String {
    let waits_for_message = record.waits.is_some_and(|waits| waits.on == WaitsOn::Message);
    let (Some(sender), Some(tag), true) = (record.sender(), record.tag(), waits_for_message) else {
        return String::new();
    };
    let Some(view) = snapshot.ranks.get(sender) else { return String::new() };
    let sent = view.records.iter().rfind(|sent| sent.receiver() == Some(rank));
    match sent.and_then(|sent| Some((sent, sent.tag()?))) {
        None if view.is_recording => format!("; rank {sender} has sent it nothing"),
        Some((_, other)) if other == tag => format!("; rank {sender} has sent it no other with that tag"),
        Some((sent, other)) => {
            let when = if sent.is_open() { "begun" } else { "sent" };
            let ago = rough(sent.ended().unwrap_or(sent.begun));
            format!("; what rank {sender} sent it last has tag {other}, {when} {ago} ago")
        }
        None => String::new(),
    }
}

/// Everybody who does not wait, if somebody waits for him or if that is unusual.
fn others(snapshot: &Snapshot, front: Option<&Record>) -> Vec<Group> {
    let mut groups = Vec::new();
    for rank in &snapshot.ranks {
        let is_halted = matches!(rank.process, Process::Stopped | Process::Ended);
        let standing = rank.standing();
        if matches!(standing, Standing::Waiting(_)) && !is_halted {
            continue;
        }
        let process = match (rank.process, rank.presence) {
            (Process::Stopped, _) => "{its process is|their processes are} stopped (SIGSTOP)",
            (_, Presence::Destroyed) => "{it has|they have} left with destroy()",
            (Process::Ended, _) => "{its process has|their processes have} ended",
            (_, Presence::Dropped) => "{it has|they have} dropped {its communicator|their communicators}",
            (_, Presence::Absent) => "{it has|they have} not mapped the shared memory yet",
            _ => "",
        };
        let call = call_phrase(rank, standing, front, process.is_empty());
        let said = match (call.is_empty(), process.is_empty()) {
            (false, false) => format!("{call}; {process}"),
            (false, true) => call,
            (true, false) => format!("{{is|are}} not recorded: {process}"),
            (true, true) => "{is|are} not recorded".to_owned(),
        };
        let is_blamed = is_halted
            || snapshot.ranks.iter().any(|other| waits_for(snapshot, other.rank).contains(&rank.rank));
        let pid = (is_blamed && rank.pid != 0).then_some(rank.pid);
        Group::add(&mut groups, rank.rank, pid, Said::new(&said));
    }
    groups
}

/// Where a rank stands, seen from the call that the others wait in. `is_running` if nothing follows about its process.
fn call_phrase(rank: &RankView, standing: Standing<'_>, front: Option<&Record>, is_running: bool) -> String {
    if !rank.is_recording {
        return String::new();
    }
    let has_begun = front.is_some_and(|front| rank.last_begun() >= front.number);
    match standing {
        Standing::Nowhere => match front {
            Some(_) => "{has|have} not begun it, nor any call before".to_owned(),
            None => "{has|have} not made any call yet".to_owned(),
        },
        Standing::Outside(record) => {
            let ago = record.ended().unwrap_or(record.begun);
            let last = format!("{{its|their}} last call was {record}, done {} ago", rough(ago));
            match (front, has_begun) {
                (Some(_), false) => format!("{{has|have}} not begun it: {last}"),
                (Some(_), true) => format!("{{has|have}} done {{its|their}} part of it: {last}"),
                (None, _) if ago < RECENT && is_running => {
                    let latest = format!("{{makes|make}} calls: the latest was {record}");
                    format!("{latest}, done {} ago", rough(ago))
                }
                (None, _) if is_running => {
                    format!("{{is|are}} outside of unisono, computing perhaps: {last}")
                }
                (None, _) => format!("{{is|are}} outside of unisono: {last}"),
            }
        }
        Standing::Inside(record) | Standing::Waiting(record) => {
            let since = rough(record.begun);
            match front {
                Some(front) if front.is_same_call(record) => format!("{{has|have}} begun it {since} ago"),
                Some(front) if record.number == front.number => format!(
                    "{{has|have}} called {record} instead, {since} ago; all ranks must make the same calls in the same order"
                ),
                Some(_) if !has_begun => {
                    format!("{{has|have}} not begun it: {{it has|they have}} been in {record} for {since}")
                }
                _ if rank.process == Process::Ended => format!("{{was|were}} in {record}, begun {since} ago"),
                _ => format!("{{has|have}} been in {record} for {since}"),
            }
        }
        Standing::Failed(record) => {
            let ago = rough(record.ended().unwrap_or(record.begun));
            format!("{{has|have}} failed in {record} {ago} ago")
        }
    }
}

/// As [`Snapshot::waits_for`]; whoever is dead waits no more.
fn waits_for(snapshot: &Snapshot, rank: usize) -> Vec<usize> {
    match snapshot.ranks[rank].process {
        Process::Ended => Vec::new(),
        _ => snapshot.waits_for(rank),
    }
}

/// Names a circle of ranks that wait for each other and for nobody else.
fn deadlock(snapshot: &Snapshot) -> Option<String> {
    // Whoever waits for one rank that does not go on itself does not either.
    let next: Vec<Vec<usize>> = (0..snapshot.ranks.len()).map(|rank| waits_for(snapshot, rank)).collect();
    let circle = (0..next.len()).find_map(|start| {
        let mut path = vec![start];
        while let [only] = next[path[path.len() - 1]].as_slice() {
            if let Some(at) = path.iter().position(|rank| rank == only) {
                return Some(path.split_off(at));
            }
            path.push(*only);
        }
        None
    })?;
    let (first, rest) = circle.split_first()?;
    let steps = rest.iter().chain([first]).zip(&circle);
    let steps: Vec<String> = steps
        .enumerate()
        .map(|(at, (to, from))| match at {
            0 => format!("Rank {from} waits for rank {to}"),
            _ => format!("rank {from} for rank {to}"),
        })
        .collect();
    Some(format!("{}: none of them can go on.", and(steps.into_iter())))
}

/// What a person can do about it.
fn advice(snapshot: &Snapshot) -> Option<String> {
    let of = |process: Process| snapshot.ranks.iter().filter(move |rank| rank.process == process);
    let stopped: Vec<&RankView> = of(Process::Stopped).collect();
    if !stopped.is_empty() {
        let mut pids: Vec<u32> = stopped.iter().map(|rank| rank.pid).collect();
        pids.dedup();
        let it = if pids.len() == 1 { "it" } else { "them" };
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        return Some(format!("Continue {it} with kill -CONT {}.", pids.join(" ")));
    }
    if snapshot.failure.is_some() {
        return None;
    }
    // A single rank that everybody waits for, and of which all that is known is that it is elsewhere.
    let waited_for: Vec<&RankView> = of(Process::Running)
        .filter(|rank| matches!(rank.standing(), Standing::Outside(_) | Standing::Nowhere))
        .filter(|rank| rank.presence == Presence::Here)
        .filter(|rank| snapshot.ranks.iter().any(|other| waits_for(snapshot, other.rank) == [rank.rank]))
        .collect();
    match waited_for.as_slice() {
        [rank] if rank.pid != 0 => {
            Some(format!("A debugger shows what it does instead: gdb -p {}.", rank.pid))
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "why_tests.rs"]
pub(super) mod tests;
