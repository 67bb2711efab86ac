//! Where a rank stands: in a call or outside, waiting or not, and for whom.

use super::record::{Record, WaitsOn};
use super::snapshot::{RankView, Snapshot};
use crate::call::Kind;

/// Where a rank stands.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Standing<'s> {
    /// It has made no call yet.
    Nowhere,
    /// Its last call is done, and it has not begun another.
    Outside(&'s Record),
    /// It is in a call, and does not wait, or not for long.
    Inside(&'s Record),
    /// It waits in a call.
    Waiting(&'s Record),
    /// Its last call failed.
    Failed(&'s Record),
}

impl<'s> Standing<'s> {
    /// The call that it is about.
    pub const fn record(&self) -> Option<&'s Record> {
        match self {
            Self::Nowhere => None,
            Self::Outside(record) | Self::Inside(record) | Self::Waiting(record) | Self::Failed(record) => {
                Some(record)
            }
        }
    }
}

impl RankView {
    /// Where it stands. With several calls in flight, the one that waits counts.
    pub fn standing(&self) -> Standing<'_> {
        let open = || self.records.iter().filter(|record| record.is_open());
        if let Some(record) = open().find(|record| record.waits.is_some()) {
            return Standing::Waiting(record);
        }
        match (open().next_back(), self.records.last()) {
            (Some(record), _) => Standing::Inside(record),
            (None, None) => Standing::Nowhere,
            (None, Some(record)) if matches!(record.end, super::End::Failed(_)) => Standing::Failed(record),
            (None, Some(record)) => Standing::Outside(record),
        }
    }

    /// The number of the last collective that it has begun.
    pub fn last_begun(&self) -> Option<u64> {
        self.records.iter().filter_map(|record| record.number).max()
    }
}

impl Snapshot {
    /// The ranks for which `rank` waits, ascending; none if it does not wait.
    pub fn waits_for(&self, rank: usize) -> Vec<usize> {
        let Some(Standing::Waiting(record)) = self.ranks.get(rank).map(RankView::standing) else {
            return Vec::new();
        };
        let Some(waits) = record.waits else { return Vec::new() };
        let others = || (0..self.ranks.len()).filter(|other| *other != rank);
        if waits.on == WaitsOn::Message && matches!(record.header.kind, Kind::Recv { from: u32::MAX, .. }) {
            return others().collect();
        }
        let has_root = matches!(
            record.header.kind,
            Kind::Broadcast { .. }
                | Kind::BroadcastMulti { .. }
                | Kind::Scatter { .. }
                | Kind::ScatterV { .. }
        );
        if waits.on == WaitsOn::Arrival && !has_root {
            let is_late = |other: &usize| self.ranks[*other].last_begun() < record.number;
            let late: Vec<usize> = others().filter(is_late).collect();
            if !late.is_empty() {
                return late;
            }
        }
        if waits.peer < self.ranks.len() { vec![waits.peer] } else { Vec::new() }
    }
}
