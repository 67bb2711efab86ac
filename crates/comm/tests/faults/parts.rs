//! What the ranks do: each part is one process, told by its environment, speaking in lines on its output.
//!
//! `ready` once it has met the others, `done` after a good end, `failed <ns> <variant> <ranks> <sentence>` (with tabs)
//! for the error that ended it. A wrong result is `wrong …` and exit status 3.

use std::fmt::Display;
use std::io::Read;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use unisono::store::{FileStore, Store, StoreServer, TcpStore};
use unisono::{Builder, Communicator, Deadline, Error, Operations, ReduceOp, Result, Secret, UniqueId};

use super::random::Random;
use super::start::FaultyStore;

/// What a process of the test is to do.
pub(crate) struct Part {
    name: String,
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) job: String,
    store: Option<UniqueId>,
}

impl Part {
    /// `None`: this process is the test itself.
    pub(crate) fn from_environment() -> Option<Self> {
        let name = std::env::var("FAULTS_PART").ok()?;
        Some(Self {
            name,
            rank: setting("FAULTS_RANK")?,
            size: setting("FAULTS_SIZE")?,
            job: setting("FAULTS_JOB")?,
            store: setting::<String>("FAULTS_STORE").and_then(|text| UniqueId::from_text(&text).ok()),
        })
    }

    pub(crate) fn play(&self) -> ExitCode {
        let subscriber = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
        subscriber.with_max_level(tracing::Level::WARN).init();
        if let Some(descriptors) = setting("FAULTS_SOFT_DESCRIPTORS") {
            let limit = getrlimit(Resource::Nofile);
            setrlimit(Resource::Nofile, Rlimit { current: Some(descriptors), ..limit }).unwrap();
        }
        let result = match self.name.as_str() {
            "collectives" => self.collectives(),
            "late" => self.late(),
            "absent" => self.absent(),
            "start" => self.start(),
            "store" => self.serve(),
            "holder" => super::kills::hold_descriptors(self),
            "mismatches" => super::mismatches::all_pairs(self),
            "thread churn" => super::leftovers::thread_churn(),
            "forks" => super::forks::fork_and_go_on(self),
            "stormed" => super::forks::be_stormed(self),
            "small calls" => super::load::small_calls(self),
            "one large call" => super::load::one_large_call(self),
            "nothing" => Ok(()),
            "sprayer" => super::intruders::spray(),
            "squatter" => super::intruders::squat(),
            "short" => super::shortages::start(self),
            "scribbled threads" => super::scribbles::threads(),
            "scribbled process" => super::scribbles::process(self),
            "family churn" => super::leftovers::family_churn(self),
            "shrink churn" => super::leftovers::shrink_churn(),
            "survivor" => super::shrinks::survive(self),
            "experts" => super::experts::play(self),
            #[cfg(feature = "cuda")]
            "gpu" => super::gpu::calls(self),
            #[cfg(feature = "cuda")]
            "gpu experts" => super::gpu_experts::play(self),
            #[cfg(feature = "cuda")]
            "gpu survivor" => super::gpu::survive(self),
            #[cfg(feature = "cuda")]
            "gpu seats" => super::gpu_seats::survive(self),
            #[cfg(feature = "cuda")]
            "gpu hang" => super::gpu_hangs::hang(self),
            #[cfg(feature = "cuda")]
            "gpu orders" => super::gpu_hangs::opposite(self),
            #[cfg(feature = "cuda")]
            "gpu places" => super::gpu_hangs::places(self),
            #[cfg(feature = "cuda")]
            "pinned" => super::pinned::work(self),
            #[cfg(feature = "cuda")]
            "registered" => super::registrations::register(self),
            #[cfg(feature = "cuda")]
            "one-sided" => super::one_sided::play(self),
            #[cfg(feature = "cuda")]
            "gpu matrix" => super::gpu_matrix::play(self),
            "process churn" => super::leftovers::process_churn(self),
            other => panic!("no part is called {other}"),
        };
        match result {
            Ok(()) => {
                println!("done");
                ExitCode::SUCCESS
            }
            Err(error) => {
                report(&error);
                ExitCode::from(1)
            }
        }
    }

    /// A builder with everything that the environment says.
    pub(crate) fn builder(&self) -> Builder {
        let milliseconds = |name| setting(name).map(Duration::from_millis);
        let mut builder = Communicator::builder()
            .rank(self.rank)
            .world_size(self.size)
            .job(self.job.clone())
            .generation(setting("FAULTS_GENERATION").unwrap_or(1));
        if let Some(id) = &self.store {
            builder = builder.unique_id(id.clone());
        }
        if let Some(file) = setting::<String>("FAULTS_STORE_FILE") {
            let store = FileStore::open(file, Deadline::after(Duration::from_secs(20))).unwrap();
            builder = builder.store(Arc::new(store)).secret(Secret::new([0x5a; 32]));
        }
        if let Some(timeout) = milliseconds("FAULTS_INIT_MS") {
            builder = builder.init_timeout(timeout);
        }
        if let Some(liveness) = milliseconds("FAULTS_LIVENESS_MS") {
            builder = builder.liveness(liveness);
        }
        if let Some(after) = milliseconds("FAULTS_WARN_MS") {
            builder = builder.warn_after(Some(after));
        }
        builder.timeout(Some(milliseconds("FAULTS_TIMEOUT_MS").unwrap_or(Duration::from_secs(50))))
    }

    /// Random collectives, every result checked, until the input of any rank ends.
    fn collectives(&self) -> Result<()> {
        let communicator = self.builder().build()?;
        let mut collectives = Collectives::new(setting("FAULTS_CALLS").unwrap_or(1));
        println!("ready");
        let asked_to_end = end_of_input();
        loop {
            collectives.next(&communicator)?;
            let mut ends = [u8::from(asked_to_end())];
            communicator.all_reduce(&mut ends, ReduceOp::Max)?;
            if ends[0] == 1 {
                break;
            }
        }
        println!("calls {}", collectives.calls);
        communicator.destroy()
    }

    /// One rank is busy elsewhere, in between: once computing, once asleep.
    fn late(&self) -> Result<()> {
        let communicator = self.builder().build()?;
        let late = Duration::from_millis(setting("FAULTS_LATE_MS").unwrap_or(1000));
        println!("ready");
        for is_busy in [true, false] {
            communicator.barrier()?;
            if self.rank == self.size - 1 {
                let start = Instant::now();
                let mut random = Random::new(1);
                while is_busy && start.elapsed() < late {
                    std::hint::black_box(random.next());
                }
                std::thread::sleep(late.saturating_sub(start.elapsed()));
            }
            let mut sum = [1u32];
            communicator.all_reduce(&mut sum, ReduceOp::Sum)?;
            expect(sum[0] as usize == self.size, || format!("a sum of {}", sum[0]));
        }
        communicator.destroy()
    }

    /// The ranks of `FAULTS_ABSENT` make no call; the others wait for them.
    fn absent(&self) -> Result<()> {
        let communicator = self.builder().build()?;
        println!("ready");
        let absent: String = setting("FAULTS_ABSENT").unwrap_or_default();
        if absent.split(' ').any(|rank| rank == self.rank.to_string()) {
            let asked_to_end = end_of_input();
            while !asked_to_end() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        communicator.barrier()
    }

    /// Meets the others, with a store that can strike, and stays until something happens.
    fn start(&self) -> Result<()> {
        let builder = self.builder();
        let strike = (self.rank == setting("FAULTS_VICTIM").unwrap_or(usize::MAX)).then(FaultyStore::planned);
        let communicator = match (strike.flatten(), &self.store) {
            (Some(strike), Some(id)) => {
                let store = TcpStore::from_unique_id(id, Deadline::after(Duration::from_secs(20)))?;
                let store: Arc<dyn Store> = Arc::new(FaultyStore::new(store, strike));
                builder.store(store).secret(id.secret().clone()).build()?
            }
            _ => builder.build()?,
        };
        println!("ready");
        if self.rank == setting("FAULTS_VICTIM").unwrap_or(usize::MAX) {
            super::start::die();
        }
        let mut collectives = Collectives::new(2);
        let rounds: u64 = setting("FAULTS_ROUNDS").unwrap_or(u64::MAX);
        for _ in 0..rounds {
            collectives.next(&communicator)?;
        }
        communicator.destroy()
    }

    /// A store server that only this process keeps alive.
    fn serve(&self) -> Result<()> {
        let server = StoreServer::start(Secret::new([self.size as u8; 32]))?;
        println!("store {}", server.unique_id().to_text());
        let asked_to_end = end_of_input();
        while !asked_to_end() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// A sequence of random collectives, equal on all ranks.
pub(crate) struct Collectives {
    random: Random,
    pub(crate) calls: u64,
    most_bytes: usize,
}

impl Collectives {
    pub(crate) fn new(seed: u64) -> Self {
        Self { random: Random::new(seed), calls: 0, most_bytes: 4 << 20 }
    }

    /// The next one; a wrong result ends the process.
    pub(crate) fn next(&mut self, communicator: &Communicator) -> Result<()> {
        self.calls += 1;
        let (rank, size) = (communicator.rank() as u64, communicator.world_size() as u64);
        let (call, kind, root) = (self.calls, self.random.below(4), self.random.below(size));
        let count = self.random.count(self.most_bytes / 8);
        let mine = |rank: u64| move |at: usize| call * 31 + rank * 1_000_003 + at as u64;
        match kind {
            0 => {
                let mut x: Vec<u64> = (0..count).map(mine(rank)).collect();
                communicator.all_reduce(&mut x, ReduceOp::Sum)?;
                let ranks = size * (size - 1) / 2 * 1_000_003;
                expect_all(call, &x, |at| size * (call * 31 + at as u64) + ranks);
            }
            1 => {
                let mut x: Vec<u64> = (0..count).map(mine(rank)).collect();
                communicator.broadcast(&mut x, root as usize)?;
                expect_all(call, &x, mine(root));
            }
            2 => {
                let part = count.div_ceil(size as usize);
                let parts: Vec<u64> = (0..part).map(mine(rank)).collect();
                let mut all = vec![u64::MAX; part * size as usize];
                communicator.all_gather_into(&parts, &mut all)?;
                expect_all(call, &all, |at| mine((at / part) as u64)(at % part));
            }
            _ => communicator.barrier()?,
        }
        Ok(())
    }
}

fn expect_all(call: u64, got: &[u64], expected: impl Fn(usize) -> u64) {
    for (at, got) in got.iter().enumerate() {
        expect(*got == expected(at), || format!("call {call}, element {at}: {got}, not {}", expected(at)));
    }
}

/// Ends the process if a result is wrong.
pub(crate) fn expect(is_right: bool, what: impl FnOnce() -> String) {
    if !is_right {
        println!("wrong {}", what());
        std::process::exit(3);
    }
}

/// A value of the environment.
pub(crate) fn setting<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// Tells whether our input has ended, without waiting for it.
pub(crate) fn end_of_input() -> impl Fn() -> bool {
    let thread = std::thread::spawn(|| {
        // However it ends, it has ended.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
    });
    move || thread.is_finished()
}

/// Tells the test how this process failed.
pub(crate) fn report(error: &Error) {
    let variant: String = format!("{error:?}").chars().take_while(|char| char.is_alphanumeric()).collect();
    let names = names(error).iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    println!("failed\t{}\t{variant}\t{names}\t{}", super::now_ns(), one_line(error));
}

/// The ranks that an error names as gone or missing.
fn names(error: &Error) -> Vec<usize> {
    match error {
        Error::PeerDied { rank, .. } | Error::PeerLeft { rank, .. } | Error::InitStalled { rank, .. } => {
            vec![*rank]
        }
        Error::InitTimeout { missing, .. } | Error::Node(unisono_node::Error::Missing { missing, .. }) => {
            missing.clone()
        }
        Error::Node(
            unisono_node::Error::PeerLost { rank, .. } | unisono_node::Error::Timeout { rank, .. },
        ) => vec![*rank],
        _ => Vec::new(),
    }
}

fn one_line(error: &impl Display) -> String {
    error.to_string().replace(['\n', '\t'], " ")
}
