//! How this process was started: by which launcher, as which rank of how many, and where the ranks meet.
//!
//! [`Launch::detect`] is a function over a lookup of environment variables. The innermost launcher wins, because outer
//! ones leave their variables behind: torchrun, Open MPI, PMI (MPICH, Intel MPI, Cray), then `unisono run` and plain
//! `RANK` / `WORLD_SIZE`, then Slurm, whose variables stand in every process of an allocation. `unisono run` takes the
//! variables of the others away from its ranks. `UNISONO_STORE`, `UNISONO_JOB` and `UNISONO_GENERATION` override what
//! the launcher says. Costs some twenty look-ups, once.

use unisono_core::{Error as CoreError, Member};

use crate::error::{Error, Result};

mod address;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod job_directory;
mod secret;
#[cfg(test)]
mod tests;

pub use address::StoreAddress;
pub use job_directory::JobDirectory;
pub use secret::{SECRET_BYTES, read_secret};

/// Who started this process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Launcher {
    /// `unisono run`.
    UnisonoRun,
    /// `torchrun` (torch elastic).
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// A launcher with the process management interface: MPICH, Intel MPI, Cray, `srun --mpi=pmi2`.
    Pmi,
    /// `srun`.
    Slurm,
    /// Somebody who set `RANK` and `WORLD_SIZE`.
    Environment,
}

impl Launcher {
    /// The name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UnisonoRun => "unisono run",
            Self::Torchrun => "torchrun",
            Self::OpenMpi => "Open MPI",
            Self::Pmi => "PMI",
            Self::Slurm => "Slurm",
            Self::Environment => "the environment",
        }
    }

    /// Who started this process, or `None` if there is no complete sign of any launcher.
    pub fn detect(lookup: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let variables = Variables { lookup };
        let any = |names: &[&str]| names.iter().any(|name| variables.text(name).is_some());
        if any(&["TORCHELASTIC_RUN_ID"]) {
            Some(Self::Torchrun)
        } else if any(&["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]) {
            Some(Self::OpenMpi)
        } else if any(&["PMI_RANK", "PMI_SIZE"]) {
            Some(Self::Pmi)
        } else if any(&["RANK"]) && any(&["WORLD_SIZE"]) {
            // Only `unisono run` hands over a descriptor.
            Some(if any(&["UNISONO_SECRET_FD"]) { Self::UnisonoRun } else { Self::Environment })
        } else if any(&["SLURM_PROCID"]) && any(SLURM_STEP) {
            // A batch script has a SLURM_PROCID too, but no step: it is one process, not a rank.
            Some(Self::Slurm)
        } else {
            None
        }
    }

    /// The variables that say rank, world size, local rank and local world size; the first one that is set counts.
    const fn names(self) -> Names {
        match self {
            Self::UnisonoRun | Self::Torchrun | Self::Environment => Names {
                rank: &["RANK"],
                world_size: &["WORLD_SIZE"],
                local_rank: &["LOCAL_RANK"],
                local_world_size: &["LOCAL_WORLD_SIZE"],
            },
            Self::OpenMpi => Names {
                rank: &["OMPI_COMM_WORLD_RANK"],
                world_size: &["OMPI_COMM_WORLD_SIZE"],
                local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
                local_world_size: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
            },
            Self::Pmi => Names {
                rank: &["PMI_RANK"],
                world_size: &["PMI_SIZE"],
                local_rank: &["MPI_LOCALRANKID", "PMI_LOCAL_RANK"],
                local_world_size: &["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
            },
            Self::Slurm => Names {
                rank: &["SLURM_PROCID"],
                world_size: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
                local_rank: &["SLURM_LOCALID"],
                local_world_size: &[],
            },
        }
    }
}

struct Names {
    rank: &'static [&'static str],
    world_size: &'static [&'static str],
    local_rank: &'static [&'static str],
    local_world_size: &'static [&'static str],
}

const SLURM_STEP: &[&str] = &["SLURM_STEP_ID", "SLURM_STEPID"];
const SLURM_NODES: &[&str] = &["SLURM_STEP_NUM_NODES", "SLURM_NNODES"];

/// What a process knows about its job before it has met anybody.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Launch {
    /// Who started it.
    pub launcher: Launcher,
    /// Its rank and the world size.
    pub member: Member,
    /// Its rank among those of this host, if the launcher tells.
    pub local_rank: Option<usize>,
    /// The number of ranks on this host, if the launcher tells.
    pub local_world_size: Option<usize>,
    /// The name of the job, the same on all ranks.
    pub job: String,
    /// Which start of the job this is.
    pub generation: u32,
    /// Where the ranks meet.
    pub store: StoreAddress,
}

impl Launch {
    /// Reads the variables of this process. See [`Launch::detect`].
    pub fn from_env() -> Result<Self> {
        Self::detect(&environment)
    }

    /// Finds the launcher and reads what it says.
    ///
    /// The job of a PMI launcher that names none is told by the parent process (its pid and start time), which all
    /// ranks of a host share when they are started directly, without a wrapper script that stays; `UNISONO_JOB` helps
    /// there.
    ///
    /// # Errors
    ///
    /// [`Error::LaunchNothing`], [`Error::LaunchHalfSet`], [`Error::LaunchRank`], [`Error::LaunchHosts`], and
    /// `Error::Core` for values that are no number, no address or too large a world.
    pub fn detect(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        Self::detect_below(lookup, &parent_process)
    }

    /// True if this rank has to serve the store at [`Launch::store`]: rank 0, unless a launcher serves it or it is a
    /// file. When the address is taken or not one of this host, a store is there already and rank 0 connects too.
    pub fn serves_store(&self) -> bool {
        let served_by_rank_zero = match self.store {
            StoreAddress::Tcp { .. } => self.launcher != Launcher::UnisonoRun,
            StoreAddress::TorchHosted { .. } => true,
            StoreAddress::TorchAgent { .. } | StoreAddress::File { .. } | StoreAddress::Path { .. } => false,
        };
        served_by_rank_zero && self.member.rank() == 0
    }

    fn detect_below(lookup: &dyn Fn(&str) -> Option<String>, parent: &dyn Fn() -> String) -> Result<Self> {
        let variables = Variables { lookup };
        let launcher = Launcher::detect(lookup).ok_or_else(|| variables.nobody())?;
        let names = launcher.names();

        let rank = variables.paired(names.rank, names.world_size)?;
        let world_size = variables.paired(names.world_size, names.rank)?;
        check_rank(&rank, &world_size)?;
        let local_rank = variables.number(names.local_rank)?;
        let mut local_world_size = variables.number(names.local_world_size)?;
        if let (Some(local_rank), Some(local_world_size)) = (&local_rank, &local_world_size) {
            check_rank(local_rank, local_world_size)?;
        }
        let nodes = variables.number(SLURM_NODES)?;
        if launcher == Launcher::Slurm && nodes.as_ref().is_none_or(|nodes| nodes.value == 1) {
            local_world_size = Some(world_size.clone());
        }

        // Below `unisono run`, another launcher's ranks inherit variables that name a store they have no secret for.
        let inherited = launcher != Launcher::UnisonoRun && variables.text("UNISONO_SECRET_FD").is_some();
        let own = |name: &'static str| if inherited { None } else { variables.text(name) };
        let job = own("UNISONO_JOB").unwrap_or_else(|| variables.job(launcher, parent));
        let generation = match own("UNISONO_GENERATION") {
            Some(value) => number("UNISONO_GENERATION", value)?,
            None if launcher == Launcher::Torchrun => variables.generation("TORCHELASTIC_RESTART_COUNT")?,
            None => 0,
        };
        let store = match own("UNISONO_STORE") {
            Some(value) => StoreAddress::parse(&value)?,
            None => {
                let hosts = Hosts {
                    world_size: &world_size,
                    local: local_world_size.as_ref(),
                    nodes: nodes.as_ref(),
                };
                variables.store(launcher, &job, &hosts)?
            }
        };
        Ok(Self {
            launcher,
            member: Member::new(rank.value, world_size.value)?,
            local_rank: local_rank.map(|number| number.value),
            local_world_size: local_world_size.map(|number| number.value),
            job,
            generation,
            store,
        })
    }
}

/// The variables of this process; bytes that are no UTF-8 are replaced, and then refused where they matter.
pub(crate) fn environment(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// A number and the variable that said it.
#[derive(Clone, Debug)]
struct Number {
    name: &'static str,
    value: usize,
}

/// What is known about how the ranks are spread over hosts.
struct Hosts<'n> {
    world_size: &'n Number,
    local: Option<&'n Number>,
    nodes: Option<&'n Number>,
}

fn check_rank(rank: &Number, size: &Number) -> Result<()> {
    if rank.value < size.value {
        return Ok(());
    }
    Err(Error::LaunchRank { rank_name: rank.name, rank: rank.value, size_name: size.name, size: size.value })
}

fn number<T: std::str::FromStr>(name: &str, value: String) -> Result<T> {
    value.parse().map_err(|_| {
        CoreError::Setting { name: name.to_owned(), value, expected: "a whole number from 0" }.into()
    })
}

struct Variables<'l> {
    lookup: &'l dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    /// The value, if it is set and not empty.
    fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// The first of `names` that is set.
    fn first(&self, names: &[&'static str]) -> Option<(&'static str, String)> {
        names.iter().find_map(|name| Some((*name, self.text(name)?)))
    }

    fn number(&self, names: &[&'static str]) -> Result<Option<Number>> {
        let Some((name, value)) = self.first(names) else { return Ok(None) };
        Ok(Some(Number { name, value: number(name, value)? }))
    }

    /// A number that must be there because its partner is.
    fn paired(&self, names: &[&'static str], partner: &[&'static str]) -> Result<Number> {
        let missing = names.last().copied().unwrap_or_default();
        self.number(names)?.ok_or_else(|| match self.first(partner) {
            Some((name, value)) => Error::LaunchHalfSet { set: format!("{name}={value}"), missing },
            None => Error::LaunchNothing,
        })
    }

    fn generation(&self, name: &'static str) -> Result<u32> {
        self.text(name).map_or(Ok(0), |value| number(name, value))
    }

    /// Why no launcher was found.
    fn nobody(&self) -> Error {
        let set = |name| self.text(name).map(|value| format!("{name}={value}"));
        match (set("RANK"), set("WORLD_SIZE")) {
            (Some(set), _) => Error::LaunchHalfSet { set, missing: "WORLD_SIZE" },
            (None, Some(set)) => Error::LaunchHalfSet { set, missing: "RANK" },
            (None, None) => Error::LaunchNothing,
        }
    }

    fn job(&self, launcher: Launcher, parent: &dyn Fn() -> String) -> String {
        let named = |names: &[&'static str]| self.first(names).map(|(_, value)| value);
        match launcher {
            Launcher::UnisonoRun | Launcher::Environment => "default".to_owned(),
            Launcher::Torchrun => format!("torchrun-{}", named(&["TORCHELASTIC_RUN_ID"]).unwrap_or_default()),
            Launcher::OpenMpi => {
                let job = named(&["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"]).unwrap_or_else(parent);
                format!("openmpi-{job}")
            }
            Launcher::Pmi => {
                format!("pmi-{}", named(&["PMI_JOBID", "PMI_KVS", "PMI_PORT"]).unwrap_or_else(parent))
            }
            Launcher::Slurm => {
                let job = named(&["SLURM_JOB_ID", "SLURM_JOBID"]).unwrap_or_else(parent);
                let step = named(SLURM_STEP).unwrap_or_default();
                let restart = named(&["SLURM_RESTART_COUNT"]).map(|count| format!("-restart-{count}"));
                format!("slurm-{job}.{step}{}", restart.unwrap_or_default())
            }
        }
    }

    fn store(&self, launcher: Launcher, job: &str, hosts: &Hosts<'_>) -> Result<StoreAddress> {
        match launcher {
            Launcher::UnisonoRun => {
                Err(Error::LaunchHalfSet { set: "UNISONO_SECRET_FD".to_owned(), missing: "UNISONO_STORE" })
            }
            Launcher::Torchrun | Launcher::Environment => {
                let master = self.text("MASTER_ADDR").zip(self.text("MASTER_PORT"));
                let Some((host, port)) = master else {
                    return self.without_master(launcher, job, hosts);
                };
                let port = number("MASTER_PORT", port)?;
                let agent = self.text("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
                Ok(if agent && launcher == Launcher::Torchrun {
                    StoreAddress::TorchAgent { host, port }
                } else {
                    StoreAddress::TorchHosted { host, port }
                })
            }
            Launcher::OpenMpi | Launcher::Pmi | Launcher::Slurm => {
                let world_size = hosts.world_size.value;
                let several = match (hosts.local, hosts.nodes) {
                    (Some(local), _) => local.value < world_size,
                    (None, Some(nodes)) => nodes.value > 1,
                    (None, None) => false,
                };
                if several {
                    return Err(Error::LaunchHosts { launcher: launcher.name(), world_size });
                }
                Ok(StoreAddress::File { job: job.to_owned() })
            }
        }
    }

    fn without_master(&self, launcher: Launcher, job: &str, hosts: &Hosts<'_>) -> Result<StoreAddress> {
        let set = |name| self.text(name).map(|value| format!("{name}={value}"));
        match (set("MASTER_ADDR"), set("MASTER_PORT")) {
            (Some(set), _) => Err(Error::LaunchHalfSet { set, missing: "MASTER_PORT" }),
            (None, Some(set)) => Err(Error::LaunchHalfSet { set, missing: "MASTER_ADDR" }),
            // Who is alone meets nobody; a file of its own is never shared.
            (None, None) if hosts.world_size.value == 1 => {
                Ok(StoreAddress::File { job: format!("{job}-alone-{}", std::process::id()) })
            }
            (None, None) => {
                Err(Error::LaunchNoStore { launcher: launcher.name(), world_size: hosts.world_size.value })
            }
        }
    }
}

/// The parent process, so that its number reused means another one: pid and start time.
fn parent_process() -> String {
    let pid = std::os::unix::process::parent_id();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything; the start time is the 20th field after it.
    let started = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19));
    format!("parent-{pid}-{}", started.unwrap_or("unknown"))
}
