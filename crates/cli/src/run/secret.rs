//! The job's secret: made here, handed to the ranks in a sealed memory file that they inherit.
//!
//! It is in no environment, no argument list and no file system. The descriptor is closed on exec everywhere but in a
//! rank, where the flag is taken away between fork and exec.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};
use unisono::Secret;

use crate::Failure;

/// A fresh secret.
pub(super) fn random() -> Result<Secret, Failure> {
    random_bytes().map(Secret::new)
}

/// Random bytes of the system.
pub(super) fn random_bytes<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::new(format!("the system gives no random bytes: {error}")))?;
    Ok(bytes)
}

/// The secret in a memory file that nobody can change any more.
pub(super) fn memory_file(secret: &Secret) -> Result<OwnedFd, Failure> {
    let make = || {
        let file =
            rustix::fs::memfd_create("unisono-secret", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let written = rustix::io::write(&file, secret.expose())?;
        debug_assert_eq!(written, secret.expose().len(), "a memory file takes 32 bytes at once");
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok::<OwnedFd, rustix::io::Errno>(file)
    };
    make()
        .map_err(|errno| Failure::new(format!("a memory file for the job's secret cannot be made: {errno}")))
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn the_memory_file_holds_the_secret_and_cannot_be_changed() {
        let secret = random().unwrap();
        let file = memory_file(&secret).unwrap();
        let mut bytes = [0; 33];
        assert_eq!(rustix::io::pread(&file, &mut bytes, 0).unwrap(), 32);
        assert_eq!(&bytes[..32], secret.expose());
        assert_eq!(rustix::io::pwrite(&file, b"x", 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::PERM));
        assert_ne!(random().unwrap().expose(), secret.expose());
    }
}
