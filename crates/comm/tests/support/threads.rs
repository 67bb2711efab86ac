//! Worlds of threads: each rank runs the same function, and the test fails with the first rank that panics, or names
//! the ranks that have not come back in time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use unisono::store::MemoryStore;
use unisono::{Builder, Communicator};

/// No world of a test needs longer.
const PATIENCE: Duration = Duration::from_secs(100);

/// Runs `rank` on a world made by [`Communicator::threads`]. The results by rank.
pub(crate) fn on_threads<R: Send + 'static>(
    world_size: usize,
    rank: impl Fn(Communicator) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let communicators: Vec<_> =
        Communicator::threads(world_size).unwrap().into_iter().map(|one| Mutex::new(Some(one))).collect();
    run(world_size, move |number| rank(communicators[number].lock().unwrap().take().unwrap()))
}

/// Runs `rank` on a world that meets as processes do: sockets, descriptors and a mapping for each.
pub(crate) fn on_built<R: Send + 'static>(
    world_size: usize,
    configure: impl Fn(Builder) -> Builder + Send + Sync + 'static,
    rank: impl Fn(Communicator) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let store = MemoryStore::new();
    run(world_size, move |number| {
        let builder = Communicator::builder().store(Arc::new(store.clone()));
        rank(configure(builder.rank(number).world_size(world_size)).build().unwrap())
    })
}

/// Runs `rank(0)`, `rank(1)` and so on, each on a thread.
pub(crate) fn run<R: Send + 'static>(
    world_size: usize,
    rank: impl Fn(usize) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let (sender, results) = mpsc::channel();
    let rank = Arc::new(rank);
    for number in 0..world_size {
        let (sender, rank) = (sender.clone(), rank.clone());
        std::thread::Builder::new()
            .name(format!("rank {number}"))
            .spawn(move || {
                let result = catch_unwind(AssertUnwindSafe(|| rank(number)));
                drop(rank);
                let _ = sender.send((number, result));
            })
            .unwrap();
    }
    let start = Instant::now();
    let mut all: Vec<Option<R>> = (0..world_size).map(|_| None).collect();
    for _ in 0..world_size {
        match results.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) {
            Ok((number, Ok(result))) => all[number] = Some(result),
            Ok((_, Err(panic))) => std::panic::resume_unwind(panic),
            Err(_) => {
                let missing: Vec<usize> = (0..world_size).filter(|number| all[*number].is_none()).collect();
                panic!("ranks {missing:?} of {world_size} have not come back within {PATIENCE:?}");
            }
        }
    }
    all.into_iter().map(Option::unwrap).collect()
}
