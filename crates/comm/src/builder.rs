//! How a communicator is made: who we are, where the ranks meet, and what holds for all of them.
//!
//! Argument > builder > `UNISONO_*` > tuning file > default. Building is collective: it returns when every rank has met, shares the
//! control memory and passed a first barrier, or fails on all of them by the deadline.

#[cfg(feature = "cuda")]
mod gpu;

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "cuda")]
use unisono_core::hello::DeviceIdentity;
use unisono_core::hello::{Hello, PROTOCOL_VERSION};
use unisono_core::layout::ControlLayout;
use unisono_core::settings::{AlgorithmChoice, Order, Require, Settings, unknown_names};
use unisono_core::topology::Topology;
use unisono_core::{Member, Secret, UniqueId};
use unisono_node::{Endpoint, NodePlane, PeerAddress, PlaneConfig, identity};
use unisono_sync::Deadline;

use crate::communicator::{Communicator, Parts, wait_policy};
use crate::control::About;
use crate::error::{Error, Result};
use crate::launch::{JobDirectory, Launch, StoreAddress, read_secret};
use crate::neighbours::{Host, Neighbours};
use crate::rendezvous::Rendezvous;
use crate::store::{
    FileStore, Store, StoreServer, StoreServerConfig, TcpStore, TorchStore, TorchStoreServer,
    interface_address,
};
use crate::tuning::{AskedBy, Selection};

/// Makes a [`Communicator`]. Rank, world size and a store (or unique id) are needed; the rest has defaults.
///
/// ```
/// # use std::sync::Arc;
/// # use unisono::{Communicator, Operations, store::MemoryStore};
/// let store = Arc::new(MemoryStore::new());
/// let alone = Communicator::builder().store(store).rank(0).world_size(1).build()?;
/// alone.barrier()?;
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Builder {
    meeting: Option<Meeting>,
    rank: Option<usize>,
    world_size: Option<usize>,
    job: Option<String>,
    generation: u32,
    secret: Option<Secret>,
    overrides: Overrides,
    #[cfg(feature = "cuda")]
    devices: Vec<u32>,
    #[cfg(feature = "cuda")]
    extra: crate::gpu::Extra,
}

/// Where the ranks meet.
#[derive(Debug)]
enum Meeting {
    Store(Arc<dyn Store>),
    UniqueId(UniqueId),
    Launch(Box<Launch>),
}

#[derive(Debug, Default)]
struct Overrides {
    timeout: Option<Option<Duration>>,
    init_timeout: Option<Duration>,
    liveness: Option<Duration>,
    warn_after: Option<Option<Duration>>,
    algorithm: Option<AlgorithmChoice>,
    order: Option<Order>,
    require: Option<Require>,
    tune_file: Option<Option<String>>,
    recorder: Option<bool>,
    #[cfg(feature = "cuda")]
    gpu_algorithm: Option<unisono_core::device::Wish>,
    #[cfg(feature = "cuda")]
    multiprocessors: Option<u32>,
    #[cfg(feature = "cuda")]
    peer_access: Option<bool>,
    #[cfg(feature = "cuda")]
    pinned: Option<unisono_core::settings::PinnedWay>,
    #[cfg(feature = "cuda")]
    handles: Option<unisono_core::settings::HandleKind>,
    #[cfg(feature = "cuda")]
    gpu_launch: Option<unisono_core::settings::GpuLaunch>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A builder that holds what the launcher of this process says. See [`Communicator::from_env`].
    ///
    /// # Errors
    /// The variables of the launcher are missing or contradict each other.
    pub fn from_env() -> Result<Self> {
        let launch = Launch::from_env()?;
        let secret = read_secret(&environment)?;
        Ok(Self {
            rank: Some(launch.member.rank() as usize),
            world_size: Some(launch.member.world_size() as usize),
            job: Some(launch.job.clone()),
            generation: launch.generation,
            secret,
            meeting: Some(Meeting::Launch(Box::new(launch))),
            ..Self::default()
        })
    }

    /// The ranks meet in this store.
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.meeting = Some(Meeting::Store(store));
        self
    }

    /// The ranks meet in the store that this id names, and share its secret.
    pub fn unique_id(mut self, id: UniqueId) -> Self {
        self.meeting = Some(Meeting::UniqueId(id));
        self
    }

    /// This rank.
    pub const fn rank(mut self, rank: usize) -> Self {
        self.rank = Some(rank);
        self
    }

    /// The number of ranks.
    pub const fn world_size(mut self, world_size: usize) -> Self {
        self.world_size = Some(world_size);
        self
    }

    /// The job's name: worlds with different names can meet in one store. Equal on all ranks.
    pub fn job(mut self, job: impl Into<String>) -> Self {
        self.job = Some(job.into());
        self
    }

    /// Which start of the job this is. Ranks of an older generation are refused. Equal on all ranks.
    pub const fn generation(mut self, generation: u32) -> Self {
        self.generation = generation;
        self
    }

    /// The job's secret, where the store has none of its own.
    pub fn secret(mut self, secret: Secret) -> Self {
        self.secret = Some(secret);
        self
    }

    /// How long an operation waits for a rank that lives but has not arrived; `None` for ever. Default 600 s.
    pub const fn timeout(mut self, timeout: Option<Duration>) -> Self {
        self.overrides.timeout = Some(timeout);
        self
    }

    /// How long the ranks have to meet. Default 30 s.
    pub const fn init_timeout(mut self, timeout: Duration) -> Self {
        self.overrides.init_timeout = Some(timeout);
        self
    }

    /// After how long without a heartbeat a rank is suspected to be dead. Default 3 s.
    pub const fn liveness(mut self, liveness: Duration) -> Self {
        self.overrides.liveness = Some(liveness);
        self
    }

    /// After how long a waiting operation warns, naming the ranks it waits for; `None` for never. Default 10 s.
    pub const fn warn_after(mut self, after: Option<Duration>) -> Self {
        self.overrides.warn_after = Some(after);
        self
    }

    /// The algorithm of collectives, where it can serve the call. Equal on all ranks.
    pub const fn algorithm(mut self, algorithm: AlgorithmChoice) -> Self {
        self.overrides.algorithm = Some(algorithm);
        self
    }

    /// The order of sums. Equal on all ranks. On one host both orders are strictly by rank.
    pub const fn order(mut self, order: Order) -> Self {
        self.overrides.order = Some(order);
        self
    }

    /// The tuning file that `unisono tune` wrote, or `None` for the defaults, whatever `UNISONO_TUNE_FILE` says. The same
    /// content on all ranks.
    pub fn tune_file(mut self, path: Option<&str>) -> Self {
        self.overrides.tune_file = Some(path.map(str::to_owned));
        self
    }

    /// What to refuse to run without.
    pub const fn require(mut self, require: Require) -> Self {
        self.overrides.require = Some(require);
        self
    }

    /// Whether this rank records its last calls in shared memory, where `unisono top`, `dump` and `why` read them. Default
    /// on.
    pub const fn recorder(mut self, is_on: bool) -> Self {
        self.overrides.recorder = Some(is_on);
        self
    }

    /// Meets the other ranks and connects. Collective: every rank builds at the same time.
    ///
    /// # Errors
    /// [`Error::Builder`] if something is missing; [`Error::InitTimeout`] listing the ranks that did not come;
    /// [`Error::Core`] naming both sides of a disagreement (world size, rank, options, version);
    /// [`Error::StaleGeneration`]; [`Error::SeveralHosts`]; [`Error::TuneFile`]; those of the store and of the node plane.
    pub fn build(self) -> Result<Communicator> {
        let settings = self.settings()?;
        let tuning = crate::tuning::of_settings(&settings)?;
        let options = settings.agreement_bytes(tuning.as_ref());
        let asked_by = self.overrides.algorithm.map_or(AskedBy::Setting, |_| AskedBy::Builder);
        let lacks = |problem| Error::Builder { problem };
        let rank = self.rank.ok_or(lacks("rank() was not given"))?;
        let world_size = self.world_size.ok_or(lacks("world_size() was not given"))?;
        let member = Member::new(rank, world_size)?;
        let deadline = Deadline::after(settings.init_timeout);
        let selection = Arc::new(Selection::new(&settings, tuning, asked_by, world_size));
        #[cfg(feature = "cuda")]
        let devices = self.open_devices(rank, world_size)?;
        #[cfg(feature = "cuda")]
        devices.iter().try_for_each(|device| selection.check_device(device))?;
        let endpoint = Endpoint::bind()?;
        let (store, secret) = match self.meeting.ok_or(lacks("neither store() nor unique_id() was given"))? {
            Meeting::Store(store) => (Connected::to(store), self.secret),
            Meeting::UniqueId(id) => {
                let store = TcpStore::from_unique_id(&id, deadline)?;
                (Connected::to(Arc::new(store)), Some(id.secret().clone()))
            }
            Meeting::Launch(launch) => {
                connect(&launch, self.secret, settings.interface.as_deref(), deadline)?
            }
        };
        let hello = Hello {
            version: PROTOCOL_VERSION,
            job: self.job.unwrap_or_else(|| "default".to_owned()),
            generation: self.generation,
            member,
            host: identity::host(),
            pid: identity::pid(),
            endpoint: endpoint.name(),
            #[cfg(feature = "cuda")]
            devices: devices.iter().map(crate::gpu::identity).collect(),
            #[cfg(not(feature = "cuda"))]
            devices: Vec::new(),
            options_text: String::from_utf8_lossy(&options).trim().replace('\n', " "),
            options,
        };
        let meeting = Rendezvous::new(store.store.as_ref(), &hello, deadline);
        let table = meeting.meet()?;
        let topology = Arc::new(Topology::new(&table));
        if topology.hosts().len() > 1 {
            let hosts = topology.hosts().iter().map(|host| host.name.clone()).collect();
            return Err(Error::SeveralHosts { world_size, hosts });
        }
        ControlLayout::check(world_size)?;
        #[cfg(feature = "cuda")]
        crate::gpu::check_devices(table.hellos(), rank)?;
        let secret = match secret {
            Some(secret) => secret,
            None if settings.require == Require::Auth => {
                return Err(Error::NoSecret { store: store.store.describe() });
            }
            None => meeting.agree_on_secret(&random_secret()?)?,
        };
        let peers = table.hellos().iter().filter(|other| other.member.rank() as usize != rank);
        let config = PlaneConfig {
            context: format!("{} {}", hello.job, hello.generation),
            rank,
            peers: peers
                .map(|peer| PeerAddress {
                    rank: peer.member.rank() as usize,
                    pid: peer.pid,
                    endpoint: peer.endpoint,
                })
                .collect(),
            secret,
            liveness: Some(settings.liveness),
        };
        // Before anything is closed that the others watch, they are told why.
        let explain = |error: Error| meeting.first_cause(error, &table);
        let plane =
            NodePlane::connect(&endpoint, &config, deadline).map_err(|error| explain(error.into()))?;
        let host = Host::Processes(Arc::new(plane));
        let neighbours = Neighbours::world(host, rank, world_size, self.generation);
        let memory = Communicator::share_control(&neighbours, deadline, &|| false).map_err(explain)?;
        let places = table.hellos().iter().map(Hello::place).collect();
        let about = About {
            job: hello.job.clone(),
            generation: hello.generation,
            host: hello.host.name.clone(),
            is_recording: settings.recorder,
        };
        let parts = Parts { places, topology, neighbours, memory, selection, about };
        #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "only a device is attached"))]
        let mut communicator = Communicator::assemble(parts, wait_policy(&settings, world_size));
        communicator.meet(deadline.remaining_up_to(settings.init_timeout)).map_err(explain)?;
        #[cfg(feature = "cuda")]
        if !devices.is_empty() {
            let place = |device: &DeviceIdentity| (unisono_cuda::Uuid(device.uuid), device.ordinal);
            let all = table.hellos().iter().map(|hello| hello.devices.iter().map(place).collect()).collect();
            let origin = crate::gpu::Origin::new(devices, all, &settings, &self.extra);
            communicator.attach_all(Arc::new(origin), deadline)??;
        }
        store.end(rank);
        Ok(communicator)
    }

    fn settings(&self) -> Result<Settings> {
        let mut settings = environment_settings()?;
        let overrides = &self.overrides;
        settings.timeout = overrides.timeout.unwrap_or(settings.timeout);
        settings.init_timeout = overrides.init_timeout.unwrap_or(settings.init_timeout);
        settings.liveness = overrides.liveness.unwrap_or(settings.liveness);
        settings.warn_after = overrides.warn_after.unwrap_or(settings.warn_after);
        settings.algorithm = overrides.algorithm.unwrap_or(settings.algorithm);
        settings.order = overrides.order.unwrap_or(settings.order);
        if let Some(path) = &overrides.tune_file {
            settings.tune_file.clone_from(path);
        }
        settings.require = overrides.require.unwrap_or(settings.require);
        settings.recorder = overrides.recorder.unwrap_or(settings.recorder);
        #[cfg(feature = "cuda")]
        {
            settings.gpu_algorithm = overrides.gpu_algorithm.or(settings.gpu_algorithm);
            settings.multiprocessors = self.checked_multiprocessors()?.or(settings.multiprocessors);
            settings.peer_access = overrides.peer_access.unwrap_or(settings.peer_access);
            settings.pinned = overrides.pinned.unwrap_or(settings.pinned);
            settings.handles = overrides.handles.unwrap_or(settings.handles);
            settings.gpu_launch = overrides.gpu_launch.unwrap_or(settings.gpu_launch);
        }
        Ok(settings)
    }
}

/// A store and what has to live, or to be cleaned up, as long as the ranks meet in it.
struct Connected {
    store: Arc<dyn Store>,
    server: Option<Server>,
    directory: Option<JobDirectory>,
}

/// A server that this rank runs because the launcher has none. Held until all ranks have met.
enum Server {
    Tcp(#[expect(dead_code, reason = "held for its life")] StoreServer),
    Torch(#[expect(dead_code, reason = "held for its life")] TorchStoreServer),
}

impl Connected {
    fn to(store: Arc<dyn Store>) -> Self {
        Self { store, server: None, directory: None }
    }

    /// Every rank has met: nothing of the meeting is needed any more.
    fn end(self, rank: usize) {
        if let (0, Some(directory)) = (rank, self.directory)
            && let Err(error) = directory.remove()
        {
            tracing::warn!("rank 0: {error}");
        }
        drop(self.server);
    }
}

/// Connects to the store that the launcher names, serving it first where that is this rank's part.
fn connect(
    launch: &Launch,
    secret: Option<Secret>,
    interface: Option<&str>,
    deadline: Deadline,
) -> Result<(Connected, Option<Secret>)> {
    match &launch.store {
        StoreAddress::Tcp { host, port } => {
            let text = format!("tcp://{host}:{port}");
            let secret = secret.ok_or(Error::NoSecret { store: text.clone() })?;
            let address = resolve(host, *port, &text)?;
            let server = match launch.serves_store() {
                // An address that is taken, or is not ours, means that a store is there already.
                true => {
                    let config =
                        StoreServerConfig::new(secret.clone()).address(listen_at(address, interface)?);
                    StoreServer::start_with(config).ok()
                }
                false => None,
            };
            let store = TcpStore::connect(address, &secret, deadline)?;
            let connected = Connected { server: server.map(Server::Tcp), ..Connected::to(Arc::new(store)) };
            Ok((connected, Some(secret)))
        }
        StoreAddress::TorchAgent { host, port } | StoreAddress::TorchHosted { host, port } => {
            let text = format!("torch://{host}:{port}");
            let server = match launch.serves_store() {
                // An address that is taken, or is not ours, means that a store is there already.
                true => TorchStoreServer::bind(listen_at(resolve(host, *port, &text)?, interface)?).ok(),
                false => None,
            };
            let store = TorchStore::connect(format!("{host}:{port}"), deadline)?;
            if secret.is_none() && !is_loopback(host) && launch.member.rank() == 0 {
                tracing::warn!(
                    "{text} does not authenticate: whoever reaches it can join this job. UNISONO_SECRET_FILE hands over a \
                     secret, and UNISONO_REQUIRE=auth insists on one."
                );
            }
            let connected = Connected { server: server.map(Server::Torch), ..Connected::to(Arc::new(store)) };
            Ok((connected, secret))
        }
        StoreAddress::File { job } => {
            let directory = JobDirectory::open(job, &environment)?;
            let secret = match secret {
                Some(secret) => secret,
                None => directory.secret()?,
            };
            let store = FileStore::open(directory.store_path(), deadline)?;
            Ok((Connected { directory: Some(directory), ..Connected::to(Arc::new(store)) }, Some(secret)))
        }
        StoreAddress::Path { path } => {
            Ok((Connected::to(Arc::new(FileStore::open(path, deadline)?)), secret))
        }
    }
}

fn resolve(host: &str, port: u16, store: &str) -> Result<SocketAddr> {
    let failed = |message: String| Error::StoreIo { store: store.to_owned(), action: "resolve", message };
    let mut addresses = (host, port).to_socket_addrs().map_err(|error| failed(error.to_string()))?;
    addresses.next().ok_or_else(|| failed(format!("{host} has no address")))
}

/// Where rank 0 listens: at `address`, or at its port on the interface that was named.
fn listen_at(mut address: SocketAddr, interface: Option<&str>) -> Result<SocketAddr> {
    if let Some(name) = interface {
        address.set_ip(interface_address(name)?);
    }
    Ok(address)
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

fn random_secret() -> Result<Secret> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|_| Error::Builder { problem: "the system gave no random bytes" })?;
    Ok(Secret::new(bytes))
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The `UNISONO_*` settings; unknown names are warned about, with the nearest known one.
pub(crate) fn environment_settings() -> Result<Settings> {
    let names: Vec<String> = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
    for (name, nearest) in unknown_names(names.iter().map(String::as_str)) {
        match nearest {
            Some(nearest) => tracing::warn!("{name} is no setting of ours; did you mean {nearest}?"),
            None => tracing::warn!("{name} is no setting of ours"),
        }
    }
    Ok(Settings::from_lookup(&environment)?)
}
