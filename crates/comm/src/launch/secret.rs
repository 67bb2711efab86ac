//! Reading the job's secret: from an inherited descriptor or a private file, never from the environment.
//!
//! A launcher writes 32 bytes into a sealed memfd and lets its children inherit it; reading is positional, so that any
//! number of processes and forks read the same bytes. Once read, the descriptor is closed on exec. No message shows any
//! of the content.

use std::os::fd::{AsFd, BorrowedFd, RawFd};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::{Errno, FdFlags};
use unisono_core::Secret;

use super::{Launcher, Variables};
use crate::error::{Error, Result};

/// The length of a secret.
pub const SECRET_BYTES: usize = 32;

/// The job's secret, from `UNISONO_SECRET_FD` or `UNISONO_SECRET_FILE`; `None` if neither is set.
///
/// The descriptor must be readable at offset 0 and hold exactly 32 bytes. The file must be a regular file, owned by
/// this user, unreadable for everybody else, and hold 32 raw bytes or 64 hex digits. A descriptor that a rank of
/// `unisono run` passed on by accident to the ranks of another launcher is not looked at.
///
/// # Errors
///
/// [`Error::SecretSource`], which says what is wrong with the source.
pub fn read_secret(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Option<Secret>> {
    let variables = Variables { lookup };
    let below_another = Launcher::detect(lookup).is_some_and(|launcher| launcher != Launcher::UnisonoRun);
    if let Some(text) = variables.text("UNISONO_SECRET_FD").filter(|_| !below_another) {
        let secret = text.parse::<RawFd>().map_err(|_| "it is not the number of a descriptor".to_owned());
        return secret
            .and_then(from_descriptor)
            .map(Some)
            .map_err(|message| source("UNISONO_SECRET_FD", &text, message));
    }
    if let Some(path) = variables.text("UNISONO_SECRET_FILE") {
        return from_file(&path).map(Some).map_err(|message| source("UNISONO_SECRET_FILE", &path, message));
    }
    Ok(None)
}

fn source(name: &str, value: &str, message: String) -> Error {
    Error::SecretSource { from: format!("{name}={value}"), message }
}

fn from_descriptor(number: RawFd) -> Result<Secret, String> {
    if number < 3 {
        return Err("descriptors 0 to 2 are for input and output".to_owned());
    }
    // SAFETY: the launcher opened this descriptor for us before exec and it is nobody else's, so nothing in this
    // process closes it while the borrow lasts; if the variable lies, the first call below answers EBADF or the checks
    // of type and size refuse, and nothing is written to it.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    let status = rustix::fs::fstat(descriptor).map_err(|errno| match errno {
        Errno::BADF => {
            "no such descriptor is open; a wrapper between launcher and program may have closed it".to_owned()
        }
        errno => errno.to_string(),
    })?;
    if !is_regular(&status) {
        return Err("the descriptor is no memory file".to_owned());
    }
    let content = read_small(descriptor, &status)?;
    rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC).map_err(|errno| errno.to_string())?;
    match <[u8; SECRET_BYTES]>::try_from(content) {
        Ok(bytes) => Ok(Secret::new(bytes)),
        Err(content) => Err(format!("it holds {} bytes instead of {SECRET_BYTES}", content.len())),
    }
}

fn from_file(path: &str) -> Result<Secret, String> {
    // NONBLOCK, so that a named pipe is refused instead of waited for.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| errno.to_string())?;
    from_private_file(file.as_fd())
}

/// Checks owner and mode, then reads. Shared with the job directory.
pub(super) fn from_private_file(file: BorrowedFd<'_>) -> Result<Secret, String> {
    let status = rustix::fs::fstat(file).map_err(|errno| errno.to_string())?;
    if !is_regular(&status) {
        return Err("it is no regular file".to_owned());
    }
    let user = rustix::process::geteuid().as_raw();
    if status.st_uid != user {
        return Err(format!("it belongs to user {}, not to user {user}", status.st_uid));
    }
    let mode = status.st_mode & 0o7777;
    if mode & 0o177 != 0 {
        return Err(format!("its mode is {mode:04o}; only its owner may have access (chmod 600)"));
    }
    let content = read_small(file, &status)?;
    let bytes = <[u8; SECRET_BYTES]>::try_from(content.as_slice()).ok().or_else(|| from_hex(&content));
    bytes.map(Secret::new).ok_or_else(|| {
        format!(
            "it holds {} bytes that are neither {SECRET_BYTES} raw bytes nor 64 hex digits",
            content.len()
        )
    })
}

fn is_regular(status: &Stat) -> bool {
    FileType::from_raw_mode(status.st_mode) == FileType::RegularFile
}

/// The content from offset 0, which leaves the shared file position alone.
fn read_small(file: BorrowedFd<'_>, status: &Stat) -> Result<Vec<u8>, String> {
    let cap = 2 * SECRET_BYTES + 2; // hex digits and a line end
    let length = usize::try_from(status.st_size).unwrap_or(usize::MAX);
    if length > cap {
        return Err(format!("it holds {length} bytes, more than any secret"));
    }
    let mut content = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match rustix::io::pread(file, &mut content[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.to_string()),
        }
    }
    content.truncate(filled);
    Ok(content)
}

fn from_hex(content: &[u8]) -> Option<[u8; SECRET_BYTES]> {
    let digits = content.trim_ascii_end();
    if digits.len() != 2 * SECRET_BYTES {
        return None;
    }
    let mut bytes = [0; SECRET_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |character: u8| char::from(character).to_digit(16);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use rustix::fs::MemfdFlags;

    use super::*;

    fn memory_file(content: &[u8]) -> OwnedFd {
        let file = rustix::fs::memfd_create("test", MemfdFlags::empty()).unwrap();
        assert_eq!(rustix::io::write(&file, content).unwrap(), content.len());
        file
    }

    fn read(name: &str, value: &str) -> Result<Option<Secret>> {
        read_secret(&|asked| (asked == name).then(|| value.to_owned()))
    }

    fn file(directory: &Path, content: &[u8], mode: u32) -> String {
        let path = directory.join(format!("secret-{mode:o}-{}", content.len()));
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn without_a_source_there_is_no_secret() {
        assert!(read_secret(&|_| None).unwrap().is_none());
    }

    #[test]
    fn a_descriptor_can_be_read_again_and_again_and_is_not_inherited_further() {
        let bytes: [u8; 32] = std::array::from_fn(|i| i as u8 * 7 + 1);
        let file = memory_file(&bytes);
        let number = file.as_raw_fd().to_string();
        for _ in 0..3 {
            assert_eq!(read("UNISONO_SECRET_FD", &number).unwrap().unwrap().expose(), &bytes);
        }
        assert_eq!(rustix::io::fcntl_getfd(&file).unwrap(), FdFlags::CLOEXEC);
    }

    #[test]
    fn a_descriptor_handed_on_below_another_launcher_is_not_looked_at() {
        let lookup = |name: &str| match name {
            "UNISONO_SECRET_FD" => Some("999999".to_owned()),
            "TORCHELASTIC_RUN_ID" => Some("a".to_owned()),
            _ => None,
        };
        assert!(read_secret(&lookup).unwrap().is_none());
    }

    #[test]
    fn a_wrong_descriptor_says_what_is_wrong() {
        let sentence = |value: &str| read("UNISONO_SECRET_FD", value).unwrap_err().to_string();
        let short = memory_file(&[0x41; 31]);
        let number = short.as_raw_fd();
        assert_eq!(
            sentence(&number.to_string()),
            format!(
                "the job's secret cannot be read from UNISONO_SECRET_FD={number}: it holds 31 bytes instead of 32"
            )
        );
        assert_eq!(
            sentence("999999"),
            "the job's secret cannot be read from UNISONO_SECRET_FD=999999: no such descriptor is open; a wrapper \
             between launcher and program may have closed it"
        );
        assert!(sentence("x").ends_with("UNISONO_SECRET_FD=x: it is not the number of a descriptor"));
        assert!(sentence("-1").ends_with("descriptors 0 to 2 are for input and output"));
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert!(sentence(&reader.as_raw_fd().to_string()).ends_with("the descriptor is no memory file"));
    }

    #[test]
    fn a_private_file_holds_raw_bytes_or_hex_digits() {
        let directory = tempfile::tempdir().unwrap();
        let bytes = [0xa5; 32];
        let raw = file(directory.path(), &bytes, 0o600);
        let hex = file(directory.path(), format!("{}\n", "A5".repeat(32)).as_bytes(), 0o400);
        for path in [raw, hex] {
            assert_eq!(read("UNISONO_SECRET_FILE", &path).unwrap().unwrap().expose(), &bytes);
        }
    }

    #[test]
    fn a_file_that_is_not_private_or_holds_something_else_is_refused_without_showing_it() {
        let directory = tempfile::tempdir().unwrap();
        let sentence = |path: &str| read("UNISONO_SECRET_FILE", path).unwrap_err().to_string();
        let public = file(directory.path(), &[0x41; 32], 0o644);
        assert_eq!(
            sentence(&public),
            format!(
                "the job's secret cannot be read from UNISONO_SECRET_FILE={public}: its mode is 0644; only its owner \
                 may have access (chmod 600)"
            )
        );
        for (content, length) in [(&b"AAAAAAAA"[..], 8), (&[b'g'; 64][..], 64), (&[b'A'; 63][..], 63)] {
            let sentence = sentence(&file(directory.path(), content, 0o600));
            let expected = format!("it holds {length} bytes that are neither 32 raw bytes nor 64 hex digits");
            assert!(sentence.ends_with(&expected), "{sentence}");
            assert!(!sentence.contains("AAAA") && !sentence.contains("gggg"));
        }
        let long = file(directory.path(), &[0x41; 4096], 0o600);
        assert!(sentence(&long).ends_with("it holds 4096 bytes, more than any secret"));
        assert!(sentence(directory.path().to_str().unwrap()).ends_with("it is no regular file"));
        assert!(sentence("/nonexistent/secret").contains("No such file"));
    }
}
