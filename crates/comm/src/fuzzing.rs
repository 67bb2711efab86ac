//! What the fuzz targets call: decoders that nobody else can reach. Only with the feature `fuzzing`, and no promise.

use unisono_core::layout::CAUSE_BYTES;

use crate::cause::Cause;
#[cfg(feature = "cuda")]
pub use crate::gpu::foreign::fuzzing::{offer, offer_seeds};
pub use crate::launch::fuzzing::{launch, launch_seeds, secret_file, secret_seeds};
pub use crate::rendezvous::fuzzing::{meeting, meeting_seeds};
pub use crate::store::fuzzing::*;

/// The cause of a failure, as a peer wrote it into shared memory or the store.
///
/// # Panics
/// If it is not the same, or too long, once written and read again.
pub fn cause(bytes: &[u8]) {
    let Some(cause) = Cause::from_bytes(bytes) else { return };
    let cap = CAUSE_BYTES - 8;
    let again = cause.to_bytes(cap);
    assert!(again.len() <= cap, "{} bytes", again.len());
    let read = Cause::from_bytes(&again).expect("what was written can be read");
    // A longer one is cut.
    assert!(read == cause || bytes.len() > cap, "{cause:?} became {read:?}");
    for me in 0..2 {
        drop(cause.clone().into_error("barrier #3", (me, 2)).to_string());
    }
}

/// One cause of each kind.
pub fn cause_seeds() -> Vec<Vec<u8>> {
    let text = || "rank 1 (host b, pid 7)".to_owned();
    let causes = [
        Cause::Died { rank: 1, who: text(), how: "its socket closed".to_owned() },
        Cause::Mismatch { left: text(), right: text() },
        Cause::Counts { during: text(), from: 0, to: 1, needed: u64::MAX, room: 4, is_input: true },
        Cause::TimedOut { rank: 0, call: text(), waited_ms: 1 << 40, missing: vec![text(), text()] },
        Cause::Aborted { rank: u32::MAX, reason: "é".repeat(40) },
        Cause::Dropped { rank: 3 },
    ];
    causes.iter().map(|cause| cause.to_bytes(CAUSE_BYTES)).collect()
}
