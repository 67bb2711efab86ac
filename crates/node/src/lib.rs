//! One host: the memory that its ranks share, and the plane on which they pass descriptors and watch each other live.
//!
//! What is in here: sealed anonymous memory ([`SharedMemory`]), what a descriptor is of ([`descriptor`]), the identity of this machine ([`identity`]) and of this process ([`fork`]), what its control groups allow
//! ([`cgroup`]), the sockets
//! between the processes of a host ([`NodePlane`]) and their counterpart for threads of one process
//! ([`ThreadHub`]), and a look at the shared memory of other processes ([`inspect`]). Nothing of it has a name in a file system, so nothing is left behind by a kill.
//!
//! What never will be: a collective, a store, or any idea of what the memory is for.

pub mod cgroup;
pub mod connect;
mod credentials;
pub mod descriptor;
pub mod error;
pub mod fork;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod identity;
pub mod inspect;
pub mod mailbox;
pub mod memory;
pub mod plane;
pub mod socket;
pub mod threads;

pub use connect::{Endpoint, PeerAddress, PlaneConfig};
pub use error::{Error, Lost, Result};
pub use fork::Process;
pub use inspect::ForeignMemory;
pub use mailbox::{Mailbox, Tag};
pub use memory::SharedMemory;
pub use plane::{NodePlane, PlaneEvents, WatchId};
pub use threads::{ThreadHub, ThreadMessage};
