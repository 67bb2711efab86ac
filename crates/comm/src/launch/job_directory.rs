//! Where the ranks of one host meet when their launcher names no store (mpirun, srun): files of the job in a private
//! directory of the user.
//!
//! `$XDG_RUNTIME_DIR/unisono`, else `/tmp/unisono-UID`, of mode 0700. Names begin with a hash of the job and of this
//! boot, so that files that outlived a crash of the machine are never met again. Whoever comes first makes the secret:
//! written under a private name, then linked to the one everybody reads, so nobody sees half of it. What is older than
//! a day is swept when somebody opens the directory.

use std::fmt::Write as _;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use unisono_core::Secret;

use super::secret::{SECRET_BYTES, from_private_file};
use crate::error::{Error, Result};

/// After this, a file is of a job that ended without removing it.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The files of one job in the user's private directory.
#[derive(Debug)]
pub struct JobDirectory {
    path: PathBuf,
    directory: OwnedFd,
    prefix: String,
}

impl JobDirectory {
    /// Opens the directory of this user, making it if need be, for the files of `job`. `lookup` answers environment
    /// variables.
    ///
    /// # Errors
    ///
    /// [`Error::JobDirectory`] if it belongs to somebody else, is open to others, or cannot be made.
    pub fn open(job: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let user = rustix::process::geteuid().as_raw();
        let runtime =
            lookup("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute() && path.is_dir());
        let path = match runtime {
            Some(runtime) => runtime.join("unisono"),
            None => PathBuf::from(format!("/tmp/unisono-{user}")),
        };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self::open_at(path, job, boot.trim())
    }

    fn open_at(path: PathBuf, job: &str, boot: &str) -> Result<Self> {
        let directory = private_directory(&path)
            .map_err(|message| Error::JobDirectory { path: path.display().to_string(), message })?;
        sweep(&path, SystemTime::now());
        Ok(Self { path, directory, prefix: prefix(job, boot) })
    }

    /// Where the store of this job lies.
    pub fn store_path(&self) -> PathBuf {
        self.path.join(format!("{}.store", self.prefix))
    }

    /// The secret of this job: the same for every rank that asks before [`JobDirectory::remove`].
    pub fn secret(&self) -> Result<Secret> {
        let name = format!("{}.secret", self.prefix);
        self.read_or_make(&name).map_err(|message| self.error(message))
    }

    /// Removes the files of the job. For one rank, once all have met. Files that are already gone are no error.
    pub fn remove(self) -> Result<()> {
        let entries = fs::read_dir(&self.path).map_err(|error| self.error(error.to_string()))?;
        for name in entries.flatten().map(|entry| entry.file_name()) {
            let ours = name.to_str().is_some_and(|name| name.starts_with(&self.prefix));
            if !ours {
                continue;
            }
            match rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(self.error(format!("{}: {errno}", name.display()))),
            }
        }
        Ok(())
    }

    fn error(&self, message: String) -> Error {
        Error::JobDirectory { path: self.path.display().to_string(), message }
    }

    fn read_or_make(&self, name: &str) -> Result<Secret, String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => return from_private_file(file.as_fd()),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(format!("{name}: {errno}")),
        }
        self.make(name).map_err(|errno| format!("{name}: {errno}"))?;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty());
        from_private_file(file.map_err(|errno| format!("{name}: {errno}"))?.as_fd())
    }

    /// Writes a fresh secret under a name of its own, then gives it the common one unless somebody was faster.
    fn make(&self, name: &str) -> std::io::Result<()> {
        let mut random = [0_u8; SECRET_BYTES + 8];
        getrandom::fill(&mut random).map_err(std::io::Error::other)?;
        let (content, suffix) = random.split_at(SECRET_BYTES);
        let private = format!("{name}.{}", hex(suffix));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, &private, flags, Mode::RUSR | Mode::WUSR)?;
        let written = std::io::Write::write_all(&mut fs::File::from(file), content);
        let linked = written.and_then(|()| {
            match rustix::fs::linkat(&self.directory, &private, &self.directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        });
        rustix::fs::unlinkat(&self.directory, &private, AtFlags::empty())?;
        linked
    }
}

/// Makes or opens `path` and checks that it is ours alone.
fn private_directory(path: &Path) -> Result<OwnedFd, String> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(format!("cannot be made: {errno}")),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::LOOP | Errno::NOTDIR => "is no directory (links are not followed)".to_owned(),
        errno => format!("cannot be opened: {errno}"),
    })?;
    let status = rustix::fs::fstat(&directory).map_err(|errno| errno.to_string())?;
    let user = rustix::process::geteuid().as_raw();
    if status.st_uid != user {
        return Err(format!("belongs to user {}, not to user {user}", status.st_uid));
    }
    let mode = status.st_mode & 0o777;
    if mode & 0o077 != 0 {
        return Err(format!("has mode {mode:04o}; only its owner may have access (chmod 700)"));
    }
    Ok(directory)
}

/// Removes files of jobs that ended long ago. Whatever cannot be removed is left for the next time.
fn sweep(path: &Path, now: SystemTime) {
    let Ok(entries) = fs::read_dir(path) else { return };
    for entry in entries.flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified.ok().and_then(|modified| now.duration_since(modified).ok());
        if age.is_some_and(|age| age > STALE_AFTER) {
            tracing::debug!(file = %entry.path().display(), "removing a file of a job that ended long ago");
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// What the names of a job's files begin with: 128 bits of a hash, so that any job name is a file name.
fn prefix(job: &str, boot: &str) -> String {
    let mut hash = Sha256::new();
    for part in ["unisono job directory", boot, job] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize()[..16])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::sync::Barrier;

    use super::*;

    fn open(base: &Path, job: &str) -> Result<JobDirectory> {
        JobDirectory::open_at(base.join("unisono"), job, "boot")
    }

    fn names(base: &Path) -> Vec<String> {
        let entries = fs::read_dir(base.join("unisono")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn all_ranks_of_a_job_read_the_secret_that_one_of_them_made() {
        let base = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let job = format!("job {round}");
            let start = Barrier::new(8);
            let secrets: Vec<[u8; 32]> = std::thread::scope(|scope| {
                let ranks: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            start.wait();
                            *open(base.path(), &job).unwrap().secret().unwrap().expose()
                        })
                    })
                    .collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            assert!(secrets.iter().all(|secret| *secret == secrets[0] && *secret != [0; 32]));
        }
        assert_eq!(names(base.path()).len(), 20, "one secret per job and no private file left");
    }

    #[test]
    fn jobs_and_boots_do_not_meet_each_other() {
        let base = tempfile::tempdir().unwrap();
        let (one, two) = (open(base.path(), "a/../b").unwrap(), open(base.path(), "c").unwrap());
        assert_ne!(one.secret().unwrap().expose(), two.secret().unwrap().expose());
        assert_ne!(one.store_path(), two.store_path());
        assert_eq!(one.store_path().parent(), Some(base.path().join("unisono").as_path()));
        assert_ne!(prefix("job", "this boot"), prefix("job", "the next boot"));
    }

    #[test]
    fn the_directory_and_the_secret_are_private_and_go_away() {
        let base = tempfile::tempdir().unwrap();
        let (job, other) = (open(base.path(), "job").unwrap(), open(base.path(), "other").unwrap());
        job.secret().unwrap();
        other.secret().unwrap();
        fs::write(job.store_path(), "content").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let secret = base.path().join("unisono").join(format!("{}.secret", job.prefix));
        assert_eq!((mode(&base.path().join("unisono")), mode(&secret)), (0o700, 0o600));
        job.remove().unwrap();
        assert_eq!(names(base.path()), [format!("{}.secret", other.prefix)]);
        open(base.path(), "job").unwrap().remove().unwrap();
    }

    #[test]
    fn a_directory_that_others_may_enter_or_a_link_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("unisono");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(
            open(base.path(), "job").unwrap_err().to_string(),
            format!(
                "the job directory {} has mode 0755; only its owner may have access (chmod 700)",
                path.display()
            )
        );
        let elsewhere = tempfile::tempdir().unwrap();
        fs::remove_dir(&path).unwrap();
        symlink(elsewhere.path(), &path).unwrap();
        let sentence = open(base.path(), "job").unwrap_err().to_string();
        assert!(sentence.ends_with("is no directory (links are not followed)"), "{sentence}");
        if rustix::process::geteuid().as_raw() != 0 {
            let sentence = JobDirectory::open_at(PathBuf::from("/"), "job", "").unwrap_err().to_string();
            assert!(sentence.contains("belongs to user 0"), "{sentence}");
        }
    }

    #[test]
    fn files_older_than_a_day_are_swept() {
        let base = tempfile::tempdir().unwrap();
        let job = open(base.path(), "job").unwrap();
        job.secret().unwrap();
        let later = |hours: u64| SystemTime::now() + Duration::from_secs(hours * 3600);
        sweep(&job.path, later(23));
        assert_eq!(names(base.path()).len(), 1);
        sweep(&job.path, later(25));
        assert_eq!(names(base.path()).len(), 0);
    }

    #[test]
    fn the_runtime_directory_is_used_where_there_is_one() {
        let base = tempfile::tempdir().unwrap();
        let runtime = base.path().to_str().unwrap().to_owned();
        let lookup = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| runtime.clone());
        let job = JobDirectory::open("job", &lookup).unwrap();
        assert!(job.store_path().starts_with(base.path().join("unisono")));
    }
}
