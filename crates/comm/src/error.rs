//! The errors of the library. Each says what was expected, what came, and which rank.
//!
//! Over 500 lines because there is one list of them, each with what it tells.

use std::time::Duration;

/// Result of the public functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. `Clone`, so that a failed communicator can repeat its first cause cheaply.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Words, numbers or bytes that the pure logic refused.
    #[error(transparent)]
    Core(#[from] unisono_core::Error),
    /// The node plane or shared memory of this host refused something.
    #[error(transparent)]
    Node(#[from] unisono_node::Error),
    /// The driver, the compiler or a device refused something.
    #[cfg(feature = "cuda")]
    #[error("rank {rank}: {error}")]
    Cuda {
        /// The rank on which it happened.
        rank: usize,
        /// What happened.
        error: unisono_cuda::Error,
    },
    /// A GPU was asked for, and cannot be had on this or another rank.
    #[error("rank {rank} cannot work on its GPU: {reason}")]
    Device {
        /// The rank that says so.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// `UNISONO_REQUIRE=nvlink` is set, but GPUs do not reach each other's memory.
    #[error(
        "UNISONO_REQUIRE=nvlink, but on rank {rank} {reason}. Without it, the GPUs would meet in pinned host memory."
    )]
    NoPeerAccess {
        /// The rank that found it, or tells of another that did.
        rank: usize,
        /// Which devices, and why not.
        reason: String,
    },
    /// A rank's memory cannot be registered, or it cannot map that of another. No rank has the registration, and the
    /// communicator still works.
    #[error("rank {rank} could not take part in register: {reason}. No memory was registered.")]
    Registration {
        /// The rank that could not.
        rank: usize,
        /// What it says.
        reason: String,
    },
    /// The kernels of a call are not loaded, and cannot be now: a graph is captured; or calls are under way that loading would wait
    /// for, and that may wait for this very thread: those of other ranks of this process, or of another communicator that it has on
    /// the device, which were still there after half of the timeout. Nothing was done.
    #[error(
        "{call} on rank {rank} ({what}) needs kernels that cannot be loaded now, while {why}. Name it to Builder::prepare, or run it once before."
    )]
    NotPrepared {
        /// The operation.
        call: &'static str,
        /// The rank.
        rank: usize,
        /// Dtype, count and reduction.
        what: String,
        /// What goes on.
        why: &'static str,
    },
    /// Two calls of one communicator ran on its GPU at once. The communicator has failed on all ranks.
    #[error(
        "rank {rank} found two calls of one communicator on its GPU at once. Order the streams, or the branches and launches of graphs, or use two communicators."
    )]
    ConcurrentUse {
        /// The rank.
        rank: usize,
    },
    /// Two ranks made different calls. The communicator has failed on all ranks.
    #[error("{left} met {right}. All ranks must make the same calls in the same order.")]
    Mismatch {
        /// The call of the rank that found the difference.
        left: String,
        /// The call it met.
        right: String,
    },
    /// Counts in memory of an operation name a part that has no room: in the input that it should come from, or in the output that it
    /// should go to. Nothing was written there. The communicator has failed on all ranks.
    #[error(
        "{during}: the part from rank {from} to rank {to} needs {needed} elements of the {} of rank {}, which has {room}",
        if *is_input { "input" } else { "output" },
        if *is_input { from } else { to }
    )]
    Counts {
        /// What the rank that found it was doing.
        during: String,
        /// The rank whose counts these are.
        from: usize,
        /// The rank that the part is for.
        to: usize,
        /// Where the part ends in the input, or how large it is in the output, in elements.
        needed: u64,
        /// The elements of that input, or those that the output has for each rank.
        room: u64,
        /// Whether it is the input that is too short.
        is_input: bool,
    },
    /// A rank's process is gone, stopped or silent. The communicator has failed on all ranks.
    #[error("{who} died during {during}: {how}.{}", can_shrink(survivors))]
    PeerDied {
        /// The rank that died.
        rank: usize,
        /// The same with host and process: `rank 3 (host gpu07, pid 4121)`.
        who: String,
        /// What this rank was doing.
        during: String,
        /// How it is known.
        how: String,
        /// The other ranks: they can go on with `shrink()`. None while the job starts.
        survivors: Vec<usize>,
    },
    /// The other ranks gave us up: this process was stopped, and runs again. The communicator has failed on all ranks. Or an
    /// [`ep::Buffer`](crate::ep::Buffer) left us out; then the communicator works, and [`renew`](crate::ep::Buffer::renew) takes us in again.
    #[error(
        "the other ranks gave up rank {rank}, this process, during {during}: {how}. It runs again, but only a new communicator can join them (or a renewed ep::Buffer, where only that left it out)."
    )]
    GivenUp {
        /// This rank.
        rank: usize,
        /// What it was doing.
        during: String,
        /// What the others saw.
        how: String,
    },
    /// A rank dropped its communicator, or shrinks it, while others still used theirs.
    #[error(
        "rank {rank} left before {during} was complete: it dropped its communicator, or shrinks it. Call destroy() on every rank to end together; the others can go on with shrink()."
    )]
    PeerLeft {
        /// The rank that left.
        rank: usize,
        /// What this rank was doing.
        during: String,
    },
    /// Live ranks did not make a call in time. The communicator has failed on all ranks.
    #[error("rank {rank} waited {:.1} s in {call} for {}, which did not make the call. UNISONO_TIMEOUT or Builder::timeout waits longer.", *waited_ms as f64 / 1e3, missing.join(", "))]
    Timeout {
        /// The rank that gave up.
        rank: usize,
        /// The call it waited in.
        call: String,
        /// How long it waited, in milliseconds.
        waited_ms: u64,
        /// The ranks that did not come, with host and process.
        missing: Vec<String>,
    },
    /// Somebody aborted the communicator.
    #[error("rank {rank} aborted the communicator during {during}: {reason}")]
    Aborted {
        /// The rank on which `abort` was called.
        rank: usize,
        /// What this rank was doing.
        during: String,
        /// The reason it gave.
        reason: String,
    },
    /// A communicator is used in a child that was forked from its process. The parent and the job go on.
    #[error(
        "rank {rank} is process {parent}; this is process {child}, forked from it, which has no part in the job. Use the communicator in the parent, or make a new one here."
    )]
    Forked {
        /// The rank of the parent.
        rank: usize,
        /// The process that made the communicator.
        parent: u32,
        /// This process.
        child: u32,
    },
    /// The shared memory says what no rank can have written: a process wrote to it that should not, or wrongly. The
    /// communicator has failed on all ranks.
    #[error(
        "the shared memory of {who} is damaged: {word} (found by rank {rank} during {during}). Something else than this library wrote there; only a new communicator can go on."
    )]
    DamagedMemory {
        /// The rank that found it.
        rank: usize,
        /// What this rank was doing.
        during: String,
        /// Whose part of the memory it is, with host and process.
        who: String,
        /// Which word, what it says and what it could say.
        word: String,
    },
    /// An argument of this rank does not fit. Nothing was sent or written, and the communicator still works.
    #[error("{call} on rank {rank}: {what} should be {expected}, got {got}. Nothing was written.")]
    Argument {
        /// The operation.
        call: &'static str,
        /// The rank that was called.
        rank: usize,
        /// Which argument.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A buffer lies where this communicator cannot reach. Nothing was written, and the communicator still works.
    #[error(
        "{call} on rank {rank} got a buffer in {got}; this communicator works on {expected}. Nothing was written."
    )]
    Place {
        /// The operation.
        call: &'static str,
        /// The rank that was called.
        rank: usize,
        /// The places it can reach.
        expected: String,
        /// Where the buffer lies.
        got: String,
    },
    /// An expert-parallel buffer is not in the state that a call needs. Nothing was sent.
    #[error("{call} on rank {rank} needs an ep::Buffer that {expected}; this one {got}. Nothing was sent.")]
    BufferState {
        /// The operation.
        call: &'static str,
        /// The rank that was called.
        rank: usize,
        /// The state that it needs.
        expected: &'static str,
        /// The state that the buffer is in.
        got: &'static str,
    },
    /// Ranks made an expert-parallel buffer with different settings. No rank has it, and the communicator still works.
    #[error(
        "{what} of rank {rank}'s ep::Buffer is {got}, where others say {expected}. All ranks must give the same settings."
    )]
    BufferSettings {
        /// The setting.
        what: &'static str,
        /// The rank that differs from most.
        rank: usize,
        /// Its value; of a placement, a hash.
        got: String,
        /// The value of most ranks.
        expected: String,
    },
    /// A window whose communicator failed: peers may still have been writing, so its content is not lent.
    #[error(
        "window {id} is poisoned: its communicator failed while peers could touch it ({cause}). Make a new communicator."
    )]
    Poisoned {
        /// The window.
        id: u64,
        /// Why the communicator failed.
        cause: String,
    },
    /// A window of a communicator that was shrunk: it went on in fresh memory. What the window holds is lost.
    #[error(
        "window {window} was made before its communicator went on as generation {generation}, in fresh memory. Make a new window there."
    )]
    Generation {
        /// The window.
        window: u64,
        /// The generation that goes on.
        generation: u32,
    },
    /// A signal did not come in time. The communicator still works.
    #[error(
        "rank {rank} waited {waited:.1?} for signal {slot} to reach {expected}; it holds {got}. A peer raises it with signal()."
    )]
    Signal {
        /// The rank that waited.
        rank: usize,
        /// The slot.
        slot: usize,
        /// The value that was waited for.
        expected: u32,
        /// The value that it holds.
        got: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// A packet did not come to a kernel of a user in time. The communicator still works.
    #[error(
        "rank {rank} waited {waited:.1?} for the packet of epoch {expected} at place {place}, which holds that of {got}. A kernel of a peer sends it."
    )]
    Packet {
        /// The rank whose kernel waited.
        rank: usize,
        /// The place in its copy, counted in packets.
        place: u64,
        /// The epoch that was waited for.
        expected: u32,
        /// The epoch that the place held.
        got: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// Not all ranks met before the deadline.
    #[error(
        "{met} of {world_size} ranks met at {store} within {waited:.1?}; missing: {}. Were they started, and can they reach it? UNISONO_INIT_TIMEOUT=60s waits longer.",
        list(missing)
    )]
    InitTimeout {
        /// Ranks that came.
        met: usize,
        /// Ranks expected.
        world_size: usize,
        /// The store.
        store: String,
        /// How long was waited.
        waited: Duration,
        /// The first ranks that did not come (at most 64).
        missing: Vec<usize>,
    },
    /// A rank met the others, and was not heard of again before the deadline.
    #[error(
        "{who} met the others but did not {what} within {waited:.1?}. Is it alive? UNISONO_INIT_TIMEOUT=60s waits longer."
    )]
    InitStalled {
        /// The rank that is waited for.
        rank: usize,
        /// The same with host and process.
        who: String,
        /// What it should have done.
        what: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// A process of an earlier start of the job tried to join a later one.
    #[error(
        "rank {rank} belongs to generation {got} of job {job}, which is already at generation {expected}. It is left over from an older start: end it."
    )]
    StaleGeneration {
        /// The rank that was refused.
        rank: usize,
        /// The job.
        job: String,
        /// The generation that the store has seen.
        expected: u32,
        /// Ours.
        got: u32,
    },
    /// The world spans hosts, which this release does not reach.
    #[error("the {world_size} ranks lie on {} hosts ({}); this release connects the ranks of one host", hosts.len(), hosts.join(", "))]
    SeveralHosts {
        /// The world size.
        world_size: usize,
        /// The hosts' names.
        hosts: Vec<String>,
    },
    /// `UNISONO_REQUIRE=auth` is set, but the launcher gave no secret.
    #[error(
        "UNISONO_REQUIRE=auth, but {store} has no secret: start with `unisono run`, or hand over UNISONO_SECRET_FILE"
    )]
    NoSecret {
        /// The store.
        store: String,
    },
    /// The builder lacks something.
    #[error("the communicator cannot be built: {problem}")]
    Builder {
        /// What is missing or contradictory.
        problem: &'static str,
    },
    /// A key did not appear in the store before the deadline.
    #[error("{store} has no `{key}` after {waited:.1?}. Was every rank started, and can it reach the store?")]
    StoreTimeout {
        /// The store, as `tcp://10.0.0.5:29500`.
        store: String,
        /// The (first) key waited for.
        key: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The store could not be reached, or its connection broke.
    #[error("{store}: {action} failed: {message}")]
    StoreIo {
        /// The store, as `tcp://10.0.0.5:29500`.
        store: String,
        /// What was being done, for example `connect` or `set`.
        action: &'static str,
        /// What the system said.
        message: String,
    },
    /// A key, a value or the number of keys is above the store's cap; nothing was stored.
    #[error("{store}: {what} of {got} is above the cap of {cap}; nothing was stored")]
    StoreLimit {
        /// The store.
        store: String,
        /// `key length`, `value length`, `number of keys` or `total size`.
        what: &'static str,
        /// The size that came.
        got: u64,
        /// The largest allowed.
        cap: u64,
    },
    /// The empty key, which no store takes.
    #[error("{store}: a key must have at least one byte")]
    StoreKey {
        /// The store.
        store: String,
    },
    /// The other end of a store connection said something that is not of its protocol.
    #[error("{store}: the other end does not speak our protocol: {message}")]
    StoreProtocol {
        /// The store.
        store: String,
        /// What came, and what should have come.
        message: String,
    },
    /// `add` on a value that is no integer, or whose sum does not fit into 64 bits.
    #[error("{store}: nothing can be added to `{key}`: {message}")]
    StoreValue {
        /// The store.
        store: String,
        /// The key.
        key: String,
        /// What its value is.
        message: String,
    },
    /// Nothing says that a launcher started this process.
    #[error(
        "this process is no rank of a job: RANK and WORLD_SIZE are not set (looked for: unisono run, torchrun, Open MPI, PMI, Slurm). Start with: unisono run -n 4 -- PROGRAM"
    )]
    LaunchNothing,
    /// One of two variables that belong together is missing.
    #[error(
        "{set} is set but {missing} is not (looked for: unisono run, torchrun, Open MPI, PMI, Slurm). Start with: unisono run -n 4 -- PROGRAM"
    )]
    LaunchHalfSet {
        /// The one that is set, as `RANK=0`.
        set: String,
        /// The one that is missing.
        missing: &'static str,
    },
    /// A rank that is not below its world size.
    #[error("{rank_name}={rank} does not fit {size_name}={size}: ranks go from 0 to {size_name} − 1")]
    LaunchRank {
        /// The variable that gives the rank.
        rank_name: &'static str,
        /// The rank.
        rank: usize,
        /// The variable that gives the number of ranks.
        size_name: &'static str,
        /// The number of ranks.
        size: usize,
    },
    /// Ranks on several hosts, and no store that all can reach.
    #[error(
        "{launcher} started {world_size} ranks on several hosts and tells them no place to meet. Set UNISONO_STORE=tcp://HOST:PORT on all of them, with a host that all can reach (for example that of rank 0) and a free port"
    )]
    LaunchHosts {
        /// The launcher.
        launcher: &'static str,
        /// The world size.
        world_size: usize,
    },
    /// Several ranks, and nothing that says where they meet.
    #[error(
        "{launcher} says that there are {world_size} ranks, but not where they meet: neither MASTER_ADDR and MASTER_PORT nor UNISONO_STORE are set. Start with: unisono run -n {world_size} -- PROGRAM"
    )]
    LaunchNoStore {
        /// The launcher.
        launcher: &'static str,
        /// The world size.
        world_size: usize,
    },
    /// The job's secret is not where it should be. Never shows any of it.
    #[error("the job's secret cannot be read from {from}: {message}")]
    SecretSource {
        /// Where it should be, as `UNISONO_SECRET_FD=7`.
        from: String,
        /// What is wrong there.
        message: String,
    },
    /// The private directory for the files of a job cannot be used.
    #[error("the job directory {path} {message}")]
    JobDirectory {
        /// Its path.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// The tuning file cannot be read, is damaged, or was measured on another kind of machine.
    #[error(
        "the tuning file {path} cannot be used: {message}. Make one here with `unisono tune`, or do without UNISONO_TUNE_FILE"
    )]
    TuneFile {
        /// Its path.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// A network interface that is not there.
    #[error("this host has no network interface {name} with an address; there are: {there_are}")]
    Interface {
        /// The name that was given.
        name: String,
        /// The interfaces there are.
        there_are: String,
    },
    /// An address on which a store must not listen.
    #[error("a store cannot listen on {address}: {reason}")]
    StoreAddress {
        /// The address asked for.
        address: std::net::SocketAddr,
        /// Why not, and what to do instead.
        reason: &'static str,
    },
}

/// What these ranks can do after a death.
fn can_shrink(survivors: &[usize]) -> String {
    match survivors {
        [] => String::new(),
        [rank] => format!(" Rank {rank} can go on with shrink()."),
        ranks => format!(" Ranks {} can go on with shrink().", list(ranks)),
    }
}

/// `0, 1, 5` for messages.
fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod sentences;
