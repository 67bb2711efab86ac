//! The sentence of every error, as people read it.

use std::time::Duration;

use super::Error;

/// One line per example: the variant, an error of it, its sentence. A variant without a line does not compile.
macro_rules! sentences {
    ($($(#[$meta:meta])* $variant:ident: $error:expr => $sentence:expr;)*) => {
        #[test]
        fn every_error_says_what_happened_and_what_to_do() {
            $($(#[$meta])*
            {
                let error: Error = $error;
                assert!(matches!(error, Error::$variant { .. }), "{error:?}");
                assert_eq!(error.to_string(), $sentence);
            })*
        }

        #[expect(dead_code, reason = "it is there to compile")]
        fn has_a_sentence(error: &Error) {
            match error {
                $($(#[$meta])* Error::$variant { .. } => {})*
            }
        }
    };
}

const WHO: &str = "rank 3 (host gpu07, pid 4121)";
const STORE: &str = "tcp://10.0.0.5:29500";

sentences! {
    #[cfg(feature = "cuda")]
    Cuda: Error::Cuda {
        rank: 3,
        error: unisono_cuda::Error::NoSuchDevice { ordinal: 8, count: 2 },
    } => "rank 3: there is no cuda:8; this process sees 2 devices";
    Device: Error::Device { rank: 3, reason: "rank 1 could not make its arena".into() }
        => "rank 3 cannot work on its GPU: rank 1 could not make its arena";
    NoPeerAccess: Error::NoPeerAccess { rank: 3, reason: "cuda:0 does not reach cuda:1".into() }
        => "UNISONO_REQUIRE=nvlink, but on rank 3 cuda:0 does not reach cuda:1. Without it, the GPUs would meet in pinned \
            host memory.";
    Registration: Error::Registration {
        rank: 1,
        reason: "register on rank 1: buffer should be memory of cuda:1 from cudaMalloc or cuMemCreate, got host memory. \
                 Nothing was written"
            .into(),
    } => "rank 1 could not take part in register: register on rank 1: buffer should be memory of cuda:1 from cudaMalloc or \
          cuMemCreate, got host memory. Nothing was written. No memory was registered.";
    NotPrepared: Error::NotPrepared { call: "all_reduce", rank: 3, what: "i8, 5, max".into(), why: "a graph is captured" }
        => "all_reduce on rank 3 (i8, 5, max) needs kernels that cannot be loaded now, while a graph is captured. Name it to \
            Builder::prepare, or run it once before.";
    ConcurrentUse: Error::ConcurrentUse { rank: 3 }
        => "rank 3 found two calls of one communicator on its GPU at once. Order the streams, or the branches and \
            launches of graphs, or use two communicators.";
    Core: Error::Core(unisono_core::Error::UnknownName { kind: "dtype", got: "float7".into() })
        => "`float7` is not a known dtype";
    Node: Error::Node(unisono_node::Error::PeerLost { rank: 3, pid: 4121, lost: unisono_node::Lost::SocketClosed })
        => "rank 3 (pid 4121) is gone: its socket closed";
    Mismatch: Error::Mismatch {
        left: "all_reduce #812 on rank 2 (bf16, 4096, sum)".into(),
        right: "broadcast #812 on rank 0 (bf16, 4096, root 0)".into(),
    } => "all_reduce #812 on rank 2 (bf16, 4096, sum) met broadcast #812 on rank 0 (bf16, 4096, root 0). All ranks must \
          make the same calls in the same order.";
    Counts: Error::Counts {
        during: "all_to_all_counted #812".into(),
        from: 1,
        to: 3,
        needed: 300,
        room: 256,
        is_input: false,
    } => "all_to_all_counted #812: the part from rank 1 to rank 3 needs 300 elements of the output of rank 3, which has 256";
    PeerDied: Error::PeerDied {
        rank: 3,
        who: WHO.into(),
        during: "all_reduce #812".into(),
        how: "its socket closed".into(),
        survivors: vec![0, 1, 2],
    } => "rank 3 (host gpu07, pid 4121) died during all_reduce #812: its socket closed. Ranks 0, 1, 2 can go on \
          with shrink().";
    GivenUp: Error::GivenUp {
        rank: 3,
        during: "all_reduce #812".into(),
        how: "its process is stopped and did not answer for 3.0 s".into(),
    } => "the other ranks gave up rank 3, this process, during all_reduce #812: its process is stopped and did not \
          answer for 3.0 s. It runs again, but only a new communicator can join them (or a renewed ep::Buffer, where only \
          that left it out).";
    PeerLeft: Error::PeerLeft { rank: 3, during: "barrier #9".into() }
        => "rank 3 left before barrier #9 was complete: it dropped its communicator, or shrinks it. Call destroy() on every \
            rank to end together; the others can go on with shrink().";
    Forked: Error::Forked { rank: 3, parent: 4121, child: 4188 }
        => "rank 3 is process 4121; this is process 4188, forked from it, which has no part in the job. Use the communicator \
          in the parent, or make a new one here.";
    DamagedMemory: Error::DamagedMemory {
        rank: 0,
        during: "all_reduce #812".into(),
        who: WHO.into(),
        word: "its steps staged are 71234, expected 16 to 48".into(),
    } => "the shared memory of rank 3 (host gpu07, pid 4121) is damaged: its steps staged are 71234, expected 16 to 48 \
          (found by rank 0 during all_reduce #812). Something else than this library wrote there; only a new \
          communicator can go on.";
    Timeout: Error::Timeout {
        rank: 0,
        call: "all_reduce #812".into(),
        waited_ms: 600_040,
        missing: vec![WHO.into(), "rank 5 (host gpu07, pid 4123)".into()],
    } => "rank 0 waited 600.0 s in all_reduce #812 for rank 3 (host gpu07, pid 4121), rank 5 (host gpu07, pid 4123), \
          which did not make the call. UNISONO_TIMEOUT or Builder::timeout waits longer.";
    Aborted: Error::Aborted { rank: 1, during: "barrier #9".into(), reason: "out of patience".into() }
        => "rank 1 aborted the communicator during barrier #9: out of patience";
    Argument: Error::Argument {
        call: "all_gather",
        rank: 1,
        what: "count of the output",
        expected: "16".into(),
        got: "12".into(),
    } => "all_gather on rank 1: count of the output should be 16, got 12. Nothing was written.";
    Place: Error::Place {
        call: "all_reduce",
        rank: 0,
        expected: "host memory and its windows".into(),
        got: "cuda:1".into(),
    } => "all_reduce on rank 0 got a buffer in cuda:1; this communicator works on host memory and its windows. Nothing was \
          written.";
    Signal: Error::Signal { rank: 1, slot: 3, expected: 8, got: 7, waited: Duration::from_millis(1500) }
        => "rank 1 waited 1.5s for signal 3 to reach 8; it holds 7. A peer raises it with signal().";
    Packet: Error::Packet { rank: 1, place: 300, expected: 8, got: 7, waited: Duration::from_millis(1500) }
        => "rank 1 waited 1.5s for the packet of epoch 8 at place 300, which holds that of 7. A kernel of a peer sends it.";
    BufferState: Error::BufferState {
        call: "dispatch",
        rank: 1,
        expected: "all ranks have exchanged",
        got: "is only constructed",
    } => "dispatch on rank 1 needs an ep::Buffer that all ranks have exchanged; this one is only constructed. Nothing was sent.";
    BufferSettings: Error::BufferSettings { what: "hidden", rank: 2, got: "512".into(), expected: "1024".into() }
        => "hidden of rank 2's ep::Buffer is 512, where others say 1024. All ranks must give the same settings.";
    Poisoned: Error::Poisoned { id: 2, cause: "rank 3 died".into() }
        => "window 2 is poisoned: its communicator failed while peers could touch it (rank 3 died). Make a new \
            communicator.";
    Generation: Error::Generation { window: 3, generation: 1 }
        => "window 3 was made before its communicator went on as generation 1, in fresh memory. Make a new window there.";
    InitTimeout: Error::InitTimeout {
        met: 6,
        world_size: 8,
        store: STORE.into(),
        waited: Duration::from_millis(30_012),
        missing: vec![3, 7],
    } => "6 of 8 ranks met at tcp://10.0.0.5:29500 within 30.0s; missing: 3, 7. Were they started, and can they reach it? \
          UNISONO_INIT_TIMEOUT=60s waits longer.";
    InitStalled: Error::InitStalled {
        rank: 3,
        who: WHO.into(),
        what: "write the table of ranks",
        waited: Duration::from_secs(30),
    } => "rank 3 (host gpu07, pid 4121) met the others but did not write the table of ranks within 30.0s. Is it alive? \
          UNISONO_INIT_TIMEOUT=60s waits longer.";
    StaleGeneration: Error::StaleGeneration { rank: 3, job: "train".into(), expected: 2, got: 1 }
        => "rank 3 belongs to generation 1 of job train, which is already at generation 2. It is left over from an older \
            start: end it.";
    SeveralHosts: Error::SeveralHosts { world_size: 4, hosts: vec!["a".into(), "b".into()] }
        => "the 4 ranks lie on 2 hosts (a, b); this release connects the ranks of one host";
    NoSecret: Error::NoSecret { store: STORE.into() }
        => "UNISONO_REQUIRE=auth, but tcp://10.0.0.5:29500 has no secret: start with `unisono run`, or hand over \
            UNISONO_SECRET_FILE";
    Builder: Error::Builder { problem: "rank() was not given" }
        => "the communicator cannot be built: rank() was not given";
    StoreTimeout: Error::StoreTimeout { store: STORE.into(), key: "model".into(), waited: Duration::from_millis(1540) }
        => "tcp://10.0.0.5:29500 has no `model` after 1.5s. Was every rank started, and can it reach the store?";
    StoreIo: Error::StoreIo { store: STORE.into(), action: "connect", message: "Connection refused".into() }
        => "tcp://10.0.0.5:29500: connect failed: Connection refused";
    StoreLimit: Error::StoreLimit { store: STORE.into(), what: "value length", got: 9_000_000, cap: 8_388_608 }
        => "tcp://10.0.0.5:29500: value length of 9000000 is above the cap of 8388608; nothing was stored";
    StoreKey: Error::StoreKey { store: STORE.into() } => "tcp://10.0.0.5:29500: a key must have at least one byte";
    StoreProtocol: Error::StoreProtocol { store: STORE.into(), message: "reply 7 came for request 6".into() }
        => "tcp://10.0.0.5:29500: the other end does not speak our protocol: reply 7 came for request 6";
    StoreValue: Error::StoreValue { store: STORE.into(), key: "step".into(), message: "it holds 3 bytes, no number".into() }
        => "tcp://10.0.0.5:29500: nothing can be added to `step`: it holds 3 bytes, no number";
    LaunchNothing: Error::LaunchNothing
        => "this process is no rank of a job: RANK and WORLD_SIZE are not set (looked for: unisono run, torchrun, Open \
            MPI, PMI, Slurm). Start with: unisono run -n 4 -- PROGRAM";
    LaunchHalfSet: Error::LaunchHalfSet { set: "RANK=0".into(), missing: "WORLD_SIZE" }
        => "RANK=0 is set but WORLD_SIZE is not (looked for: unisono run, torchrun, Open MPI, PMI, Slurm). Start with: \
            unisono run -n 4 -- PROGRAM";
    LaunchRank: Error::LaunchRank { rank_name: "RANK", rank: 4, size_name: "WORLD_SIZE", size: 4 }
        => "RANK=4 does not fit WORLD_SIZE=4: ranks go from 0 to WORLD_SIZE − 1";
    LaunchHosts: Error::LaunchHosts { launcher: "srun", world_size: 16 }
        => "srun started 16 ranks on several hosts and tells them no place to meet. Set UNISONO_STORE=tcp://HOST:PORT on \
            all of them, with a host that all can reach (for example that of rank 0) and a free port";
    LaunchNoStore: Error::LaunchNoStore { launcher: "the environment", world_size: 4 }
        => "the environment says that there are 4 ranks, but not where they meet: neither MASTER_ADDR and \
            MASTER_PORT nor UNISONO_STORE are set. Start with: unisono run -n 4 -- PROGRAM";
    SecretSource: Error::SecretSource { from: "UNISONO_SECRET_FD=7".into(), message: "it holds 12 bytes, not 32".into() }
        => "the job's secret cannot be read from UNISONO_SECRET_FD=7: it holds 12 bytes, not 32";
    JobDirectory: Error::JobDirectory { path: "/run/user/1000/unisono".into(), message: "belongs to another user".into() }
        => "the job directory /run/user/1000/unisono belongs to another user";
    TuneFile: Error::TuneFile { path: "a.tune".into(), message: "line 3: expected a checksum, got the end of the file".into() }
        => "the tuning file a.tune cannot be used: line 3: expected a checksum, got the end of the file. Make one here \
            with `unisono tune`, or do without UNISONO_TUNE_FILE";
    StoreAddress: Error::StoreAddress {
        address: std::net::SocketAddr::from(([0, 0, 0, 0], 29500)),
        reason: "name the address of one interface, or 127.0.0.1",
    } => "a store cannot listen on 0.0.0.0:29500: name the address of one interface, or 127.0.0.1";
    Interface: Error::Interface { name: "eth7".into(), there_are: "lo, eth0".into() }
        => "this host has no network interface eth7 with an address; there are: lo, eth0";
}

#[test]
fn only_who_is_left_is_told_to_shrink() {
    let died = |survivors| Error::PeerDied {
        rank: 3,
        who: WHO.into(),
        during: "the start of the job".into(),
        how: "its socket closed".into(),
        survivors,
    };
    assert!(died(vec![]).to_string().ends_with("its socket closed."));
    assert!(died(vec![0]).to_string().ends_with("its socket closed. Rank 0 can go on with shrink()."));
}
