//! The copies of a window in host memory, as this process reaches them: where each begins, what keeps it there, and the signals
//! of the ranks beside.
//!
//! Plain windows are one mapping with all of that in it. A pinned one, on GPUs, has memory of its own for each rank.

use std::sync::Arc;

use unisono_core::layout::WindowLayout;
use unisono_node::SharedMemory;

use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::gpu::pinned::Pinned;

/// All copies of a window. Clones are the same memory.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    /// Where the copy of each rank begins, in this process.
    starts: Arc<[usize]>,
    /// Of each copy, as they were asked for.
    bytes: usize,
    /// The signals of all ranks; of a plain window, the copies too.
    signals: Arc<SharedMemory>,
    layout: WindowLayout,
    #[cfg(feature = "cuda")]
    pinned: Option<Arc<Pinned>>,
}

impl Copies {
    /// Those of `ranks` in one mapping.
    pub(crate) fn in_one(memory: Arc<SharedMemory>, layout: WindowLayout, ranks: usize) -> Self {
        let base = memory.as_ptr().expose_provenance();
        Self {
            starts: (0..ranks).map(|rank| base + layout.copy(rank).offset).collect(),
            bytes: layout.bytes(),
            signals: memory,
            layout,
            #[cfg(feature = "cuda")]
            pinned: None,
        }
    }

    /// Copies of `bytes` in pinned memory, with signals in a mapping without any.
    #[cfg(feature = "cuda")]
    pub(crate) fn pinned(
        pinned: Pinned,
        bytes: usize,
        signals: Arc<SharedMemory>,
        layout: WindowLayout,
    ) -> Self {
        Self { starts: pinned.starts().collect(), bytes, signals, layout, pinned: Some(Arc::new(pinned)) }
    }

    /// Where the copy of `rank` begins. All of its pages may be accessed while these copies are held.
    #[inline]
    pub(crate) fn start(&self, rank: usize) -> usize {
        self.starts[rank]
    }

    /// Bytes of each copy, as they were asked for.
    #[inline]
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory that holds the signals of all ranks, and where.
    pub(crate) fn signals(&self) -> (&SharedMemory, &WindowLayout) {
        (&self.signals, &self.layout)
    }

    /// What pins them, if they are.
    #[cfg(feature = "cuda")]
    pub(crate) const fn as_pinned(&self) -> Option<&Arc<Pinned>> {
        self.pinned.as_ref()
    }

    /// Whether GPUs may be at work on them.
    #[inline]
    pub(crate) const fn are_pinned(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.pinned.is_some();
        #[cfg(not(feature = "cuda"))]
        return false;
    }

    /// Waits until our GPU is done with the calls on them that it was given.
    pub(crate) fn settle(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(pinned) = &self.pinned {
            return pinned.settle();
        }
        Ok(())
    }

    /// Keeps them for the rest of our life: somebody who was given up may still write there.
    pub(crate) fn quarantine(self) {
        unisono_node::memory::quarantine(self.signals);
        #[cfg(feature = "cuda")]
        if let Some(pinned) = self.pinned {
            let _ = std::mem::ManuallyDrop::new(pinned);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::communicator::Communicator;
    use crate::operations::Operations;
    use crate::window::{Held, Window};
    use unisono_core::ReduceOp;

    const RANKS: usize = 3;
    const COUNT: usize = 50_000;

    /// Each copy in memory of its own, as pinned ones are.
    fn apart(memories: &[Arc<SharedMemory>], signals: Arc<SharedMemory>) -> Copies {
        Copies {
            starts: memories.iter().map(|memory| memory.as_ptr().expose_provenance()).collect(),
            bytes: COUNT * 4,
            signals,
            layout: signal_layout(),
            #[cfg(feature = "cuda")]
            pinned: None,
        }
    }

    fn signal_layout() -> WindowLayout {
        WindowLayout::new(RANKS, 0, 1).unwrap()
    }

    fn work(rank: &Communicator, copies: Copies) {
        let me = rank.rank() as u32;
        let id = rank.engine().next_window_id();
        rank.engine().open_window(id, copies.clone());
        let mut window = Window::<u32>::new(rank.control.clone(), Held::Host(copies), id, COUNT);
        window.lend().unwrap().iter_mut().zip(0..).for_each(|(value, at)| *value = at * 3 + me * 1000);
        // At another place on every rank; what lies around it stays.
        let (from, count) = (5 * rank.rank(), COUNT - 100);
        rank.all_reduce(window.range_mut(from..from + count), ReduceOp::Max).unwrap();
        let expected = |at: u32| (0..RANKS as u32).map(|rank| (at + 5 * rank) * 3 + rank * 1000).max();
        for (at, value) in window.lend().unwrap().iter().enumerate() {
            let inside = (from..from + count).contains(&at);
            let before = Some(at as u32 * 3 + me * 1000);
            assert_eq!(Some(*value), if inside { expected((at - from) as u32) } else { before }, "{at}");
        }
        let part = COUNT / RANKS;
        window.lend().unwrap()[part * me as usize..][..part].fill(me + 1);
        rank.all_gather(window.range_mut(0..part * RANKS)).unwrap();
        let all = window.lend().unwrap().chunks(part).take(RANKS).zip(1..);
        all.for_each(|(part, rank)| assert!(part.iter().all(|value| *value == rank)));
        let shared = window.into_symmetric(rank).unwrap();
        let next = (rank.rank() + 1) % RANKS;
        shared.write(next, COUNT - 2, &[me + 10, me + 20]).unwrap();
        shared.signal(next, 63, 1).unwrap();
        shared.wait_signal(63, 1, Duration::from_secs(60)).unwrap();
        let (mut got, before) = ([0; 3], (me + RANKS as u32 - 1) % RANKS as u32);
        shared.read(rank.rank(), COUNT - 3, &mut got).unwrap();
        assert_eq!(got[1..], [before + 10, before + 20]);
        shared.close(rank).unwrap();
    }

    #[test]
    fn collectives_and_one_sided_memory_reach_copies_that_lie_apart() {
        let memories: Vec<_> =
            (0..RANKS).map(|_| Arc::new(SharedMemory::create(COUNT * 4).unwrap())).collect();
        let signals = Arc::new(SharedMemory::create(signal_layout().total_bytes()).unwrap());
        let ranks = Communicator::threads(RANKS).unwrap();
        std::thread::scope(|scope| {
            for rank in ranks {
                let copies = apart(&memories, signals.clone());
                scope.spawn(move || {
                    work(&rank, copies);
                    rank.destroy().unwrap();
                });
            }
        });
    }
}
