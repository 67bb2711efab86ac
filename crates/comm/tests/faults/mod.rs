//! Helpers and tests of `faults_processes`, by subject; what ranks do is in `parts`, how they are started in `world`.

pub(crate) mod experts;
pub(crate) mod forks;
#[cfg(feature = "cuda")]
pub(crate) mod gpu;
#[cfg(feature = "cuda")]
pub(crate) mod gpu_experts;
#[cfg(feature = "cuda")]
pub(crate) mod gpu_hangs;
#[cfg(feature = "cuda")]
pub(crate) mod gpu_matrix;
#[cfg(feature = "cuda")]
pub(crate) mod gpu_seats;
pub(crate) mod intruders;
pub(crate) mod kills;
pub(crate) mod leftovers;
pub(crate) mod load;
pub(crate) mod mismatches;
pub(crate) mod namespaces;
#[cfg(feature = "cuda")]
pub(crate) mod one_sided;
pub(crate) mod parts;
#[cfg(feature = "cuda")]
pub(crate) mod pinned;
pub(crate) mod proxy;
#[path = "../support/random.rs"]
pub(crate) mod random;
#[cfg(feature = "cuda")]
pub(crate) mod registrations;
#[path = "../support/scale.rs"]
mod scale;
pub(crate) mod scribbles;
pub(crate) mod shortages;
pub(crate) mod shrinks;
pub(crate) mod start;
pub(crate) mod stops;
pub(crate) mod strangers;
pub(crate) mod traces;
pub(crate) mod world;

use std::time::Duration;

pub(crate) use scale::scale;
use unisono::Secret;
use unisono::store::StoreServer;

/// The store that the ranks of a test meet in, served by the test.
pub(crate) fn server() -> StoreServer {
    StoreServer::start(Secret::new([0x5a; 32])).unwrap()
}

/// Nanoseconds of a clock that all processes of this machine share.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32).as_nanos() as u64
}

/// Milliseconds from `earlier` to `later`, both of [`now_ns`].
pub(crate) fn ms_between(earlier: u64, later: u64) -> f64 {
    (later as f64 - earlier as f64) / 1e6
}

/// `p50 0.21, p99 1.40, max 2.03 ms of 120`, and the 99th percentile itself.
pub(crate) fn percentiles(samples: &mut [f64]) -> (String, f64) {
    samples.sort_by(f64::total_cmp);
    let at = |part: f64| samples[((samples.len() - 1) as f64 * part).round() as usize];
    let text = format!("p50 {:.2}, p99 {:.2}, max {:.2} ms of {}", at(0.5), at(0.99), at(1.0), samples.len());
    (text, at(0.99))
}
