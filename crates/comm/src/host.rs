//! What this machine gives to a job, for those who diagnose it: who it is, and what its kernel and control groups allow.

pub use unisono_core::hello::HostIdentity;
pub use unisono_core::topology::Host;
pub use unisono_node::cgroup::{memory_left, processor_quota};
pub use unisono_node::identity::{host, processor_model, processors};
pub use unisono_node::memory::available_bytes;
pub use unisono_sync::wait::check_futex;

/// Bytes of shared memory that a communicator of `world_size` ranks takes, without windows.
pub fn communicator_bytes(world_size: usize) -> usize {
    crate::control::Control::bytes(world_size)
}
