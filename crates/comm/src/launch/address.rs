//! Where the ranks meet, and how people write it: `tcp://host:port`, `torch://host:port`, `file:///path`.

use std::fmt;
use std::path::PathBuf;

use unisono_core::Error as CoreError;
use unisono_core::settings;

use crate::error::Result;

/// Where the ranks of a job meet.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum StoreAddress {
    /// A store of ours, authenticated by the job's secret.
    Tcp {
        /// Name or address of the host.
        host: String,
        /// Port.
        port: u16,
    },
    /// The store that a torchrun agent serves.
    TorchAgent {
        /// Name or address of the host.
        host: String,
        /// Port.
        port: u16,
    },
    /// A store that rank 0 serves, in the wire format of torch's TCP store.
    TorchHosted {
        /// Name or address of rank 0's host.
        host: String,
        /// Port.
        port: u16,
    },
    /// A file in the directory of this job, for the ranks of one host. See [`super::JobDirectory`].
    File {
        /// The job that keys the directory.
        job: String,
    },
    /// A file that was named.
    Path {
        /// Its absolute path.
        path: PathBuf,
    },
}

impl StoreAddress {
    /// Reads what `UNISONO_STORE` may hold: `tcp://host:port`, `torch://host:port` or `file:///absolute/path`. An IPv6
    /// address stands in brackets.
    pub fn parse(text: &str) -> Result<Self> {
        let parsed = text.split_once("://").and_then(|(scheme, rest)| match scheme {
            "tcp" => host_and_port(rest).map(|(host, port)| Self::Tcp { host, port }),
            "torch" => host_and_port(rest).map(|(host, port)| Self::TorchHosted { host, port }),
            "file" if rest.starts_with('/') && rest.len() > 1 => {
                Some(Self::Path { path: PathBuf::from(rest) })
            }
            _ => None,
        });
        parsed.ok_or_else(|| {
            let expected = settings::find("UNISONO_STORE").map_or("a store", |row| row.kind.expected());
            CoreError::Setting { name: "UNISONO_STORE".to_owned(), value: text.to_owned(), expected }.into()
        })
    }
}

fn host_and_port(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let wrong = |character: char| character.is_whitespace() || "/@?#[]".contains(character);
    (!host.is_empty() && !host.contains(wrong)).then(|| (host.to_owned(), port))
}

impl fmt::Display for StoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Tcp { host, port } => ("tcp", host, port),
            Self::TorchAgent { host, port } | Self::TorchHosted { host, port } => ("torch", host, port),
            Self::File { job } => return write!(f, "the files of job {job} on this host"),
            Self::Path { path } => return write!(f, "file://{}", path.display()),
        };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in
            ["tcp://10.0.0.5:29500", "torch://head.cluster:1", "tcp://[fd00::5]:65535", "file:///tmp/store"]
        {
            assert_eq!(StoreAddress::parse(text).unwrap().to_string(), text);
        }
        let expected = StoreAddress::Tcp { host: "fd00::5".to_owned(), port: 7 };
        assert_eq!(StoreAddress::parse("tcp://[fd00::5]:7").unwrap(), expected);
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_three_forms() {
        let wrong = [
            "",
            "head:29500",
            "tcp://head",
            "tcp://:29500",
            "tcp://head:0",
            "tcp://head:65536",
            "tcp://fd00::5:29500",
            "tcp://user@head:1",
            "tcp://head/x:1",
            "http://head:80",
            "file://relative",
            "file:///",
            "tcp://[head:1",
        ];
        for text in wrong {
            let sentence = StoreAddress::parse(text).unwrap_err().to_string();
            let expected = format!(
                "UNISONO_STORE={text} cannot be read: expected tcp://HOST:PORT, torch://HOST:PORT or file:///PATH"
            );
            assert_eq!(sentence, expected);
        }
    }
}
