//! What clients and server of the TCP store say to each other.
//!
//! A body is `(number, Request)` or `(number, Reply)` in `postcard`; the number is the client's and comes back with the
//! reply. Each request gets one reply, in any order, except `Cancel`, which hurries the reply of an earlier one.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use unisono_core::wire::Bytes;

use crate::error::Error;
use crate::store::{MAX_KEY_BYTES, MAX_VALUE_BYTES};

/// Frame kind of requests.
pub(super) const REQUEST: u16 = 1;
/// Frame kind of replies.
pub(super) const REPLY: u16 = 2;
/// What the handshake is bound to.
pub(super) const CONTEXT: &[u8] = b"unisono tcp store";
/// The largest body: a key and two values (`compare_set`), or the values of one reply and one more.
pub(super) const MAX_BODY_BYTES: usize = 2 * MAX_VALUE_BYTES + MAX_KEY_BYTES + 1024 * 1024;
/// A reply with many values stops after this many bytes; the client asks again for the rest.
pub(super) const VALUES_BYTES: usize = MAX_VALUE_BYTES;

/// What a client asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request<'a> {
    /// → `Done`
    Set {
        key: &'a str,
        #[serde(borrow)]
        value: Bytes<'a>,
    },
    /// → `Done`, once all are there
    Wait {
        #[serde(borrow)]
        keys: Vec<&'a str>,
    },
    /// → `Values`, once all are there: at least the first, as many as fit
    Values {
        #[serde(borrow)]
        keys: Vec<&'a str>,
    },
    /// → `Truth`
    Check {
        #[serde(borrow)]
        keys: Vec<&'a str>,
    },
    /// → `Integer`
    Add { key: &'a str, amount: i64 },
    /// → `Value`
    CompareSet {
        key: &'a str,
        #[serde(borrow)]
        expected: Bytes<'a>,
        #[serde(borrow)]
        desired: Bytes<'a>,
    },
    /// → `Truth`
    Delete { key: &'a str },
    /// → `Done`
    Append {
        key: &'a str,
        #[serde(borrow)]
        value: Bytes<'a>,
    },
    /// → `Count`
    Count,
    /// The `Wait` or `Values` of this number is answered at once: `Cancelled`, unless its reply is on its way.
    Cancel,
}

/// What the server answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply<'a> {
    Done,
    Truth(bool),
    Integer(i64),
    Count(u64),
    Value(#[serde(borrow)] Bytes<'a>),
    Values(#[serde(borrow)] Vec<Bytes<'a>>),
    /// The wait was given up; `missing` is the first key that was not there.
    Cancelled {
        missing: &'a str,
    },
    /// Nothing was done.
    Refused(#[serde(borrow)] Refusal<'a>),
}

/// Why a request was refused.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Refusal<'a> {
    EmptyKey,
    Limit { what: &'a str, got: u64, cap: u64 },
    Value { key: &'a str, message: &'a str },
    Other { message: String },
}

/// How limits are named in [`Error::StoreLimit`]; a name from the wire becomes one of these.
pub(super) const LIMITS: [&str; 5] =
    ["key length", "value length", "number of keys", "total size", WAITING_BYTES];
/// The limit on what the server keeps for requests that wait.
pub(super) const WAITING_BYTES: &str = "size of all waiting requests";

impl<'a> Refusal<'a> {
    /// What the error of a [`crate::store::table::Table`] is on the wire.
    pub(super) fn of(error: &'a Error) -> Self {
        match error {
            Error::StoreKey { .. } => Self::EmptyKey,
            Error::StoreLimit { what, got, cap, .. } => Self::Limit { what, got: *got, cap: *cap },
            Error::StoreValue { key, message, .. } => Self::Value { key, message },
            other => Self::Other { message: other.to_string() },
        }
    }

    /// The error for the caller; `store` is the name under which the client knows the server.
    pub(super) fn into_error(self, store: String) -> Error {
        match self {
            Self::EmptyKey => Error::StoreKey { store },
            Self::Limit { what, got, cap } => {
                let what = LIMITS.into_iter().find(|known| *known == what).unwrap_or("size");
                Error::StoreLimit { store, what, got, cap }
            }
            Self::Value { key, message } => {
                Error::StoreValue { store, key: key.to_owned(), message: message.to_owned() }
            }
            Self::Other { message } => Error::StoreProtocol { store, message },
        }
    }
}

/// The name of a store in messages.
pub(super) fn name(address: SocketAddr) -> String {
    format!("tcp://{address}")
}
