//! The sentence of every error, as people read it.

use std::time::Duration;

use super::{Error, Lost};

/// One line per example: the variant, an error of it, its sentence. A variant without a line does not compile.
macro_rules! sentences {
    ($($variant:ident: $error:expr => $sentence:expr;)*) => {
        #[test]
        fn every_error_says_what_happened_and_what_to_do() {
            $(
                let error: Error = $error;
                assert!(matches!(error, Error::$variant { .. }), "{error:?}");
                assert_eq!(error.to_string(), $sentence);
            )*
        }

        #[expect(unreachable_patterns, dead_code, reason = "a variant may have several examples; it is there to compile")]
        fn has_a_sentence(error: &Error) {
            match error {
                $(Error::$variant { .. } => {})*
            }
        }
    };
}

fn lost(lost: Lost) -> Error {
    Error::PeerLost { rank: 3, pid: 4121, lost }
}

sentences! {
    Core: Error::Core(unisono_core::Error::Tampered { sequence: 7 })
        => "frame 7 was altered, repeated or reordered on its way (its authentication tag does not match)";
    Memory: Error::Memory { bytes: 4096, action: "fallocate", message: "No space left on device (os error 28)".into() }
        => "4096 bytes of shared memory cannot be had: fallocate says No space left on device (os error 28)";
    ForeignMemory: Error::ForeignMemory { expected: "4096 bytes, sealed".into(), got: "0 bytes".into() }
        => "the shared memory that came should be 4096 bytes, sealed, but is 0 bytes";
    Socket: Error::Socket { action: "bind", message: "Too many open files (os error 24)".into() }
        => "bind between the ranks of this host failed: Too many open files (os error 24)";
    ForeignUser: Error::ForeignUser { expected: 1000, got: 1001 }
        => "a process of user 1001 connected as a rank of this job; only user 1000 may";
    Missing: Error::Missing { rank: 0, missing: vec![1, 3], waited: Duration::from_millis(30_012) }
        => "no connection between rank 0 and ranks 1, 3 of this host within 30.0s. Are they alive, or stopped?";
    PeerLost: lost(Lost::SocketClosed) => "rank 3 (pid 4121) is gone: its socket closed";
    PeerLost: lost(Lost::ProcessEnded) => "rank 3 (pid 4121) is gone: its process ended";
    PeerLost: lost(Lost::Stopped { silent_ms: 3050 })
        => "rank 3 (pid 4121) is gone: its process is stopped and did not answer for 3.0 s";
    PeerLost: lost(Lost::Silent { silent_ms: 9000 })
        => "rank 3 (pid 4121) is gone: it did not answer for 9.0 s";
    PeerLost: lost(Lost::Misbehaved) => "rank 3 (pid 4121) is gone: it sent what no rank sends";
    PeerLost: lost(Lost::Left)
        => "rank 3 (pid 4121) is gone: it left the job, and its own output says why";
    Timeout: Error::Timeout { rank: 0, what: "its shared memory", waited: Duration::from_secs(30) }
        => "rank 0 did not send its shared memory within 30.0s. Is it alive, or stopped?";
    Inspect: Error::Inspect { what: "/proc".into(), message: "Permission denied (os error 13)".into() }
        => "/proc cannot be read: Permission denied (os error 13)";
    Aborted: Error::Aborted => "given up, because the communicator failed meanwhile; its first cause says why";
}
