//! From errors of the library to exceptions: a class for each kind, named as the variant, in `unisono.errors`.
//!
//! The fields of a variant become attributes. Some are renamed, so that `rank`, `call`, `expected` and `got` are called so everywhere.

use std::time::Duration;

use pyo3::IntoPyObjectExt;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use unisono::Error;

/// The value of an attribute.
pub(crate) enum Value {
    Number(u64),
    Flag(bool),
    Text(String),
    Numbers(Vec<usize>),
    Texts(Vec<String>),
    Seconds(f64),
}

impl Value {
    fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self {
            Self::Number(value) => value.into_py_any(py),
            Self::Flag(value) => value.into_py_any(py),
            Self::Text(value) => value.into_py_any(py),
            Self::Numbers(value) => value.into_py_any(py),
            Self::Texts(value) => value.into_py_any(py),
            Self::Seconds(value) => value.into_py_any(py),
        }
    }
}

macro_rules! values {
    ($($type:ty => |$value:ident| $made:expr),* $(,)?) => {
        $(impl From<&$type> for Value {
            fn from($value: &$type) -> Self {
                $made
            }
        })*
    };
}

values! {
    usize => |value| Self::Number(*value as u64),
    u64 => |value| Self::Number(*value),
    u32 => |value| Self::Number(u64::from(*value)),
    bool => |value| Self::Flag(*value),
    &'static str => |value| Self::Text((*value).to_owned()),
    String => |value| Self::Text(value.clone()),
    Vec<usize> => |value| Self::Numbers(value.clone()),
    Vec<String> => |value| Self::Texts(value.clone()),
    Duration => |value| Self::Seconds(value.as_secs_f64()),
    unisono::DType => |value| Self::Text(value.to_string()),
    std::net::SocketAddr => |value| Self::Text(value.to_string()),
}

/// A class and its attributes.
type Described = (String, Vec<(&'static str, Value)>);

/// Makes, of a list of variants, a function that describes an error, and one that lists all classes and their attributes.
macro_rules! table {
    ($describe:ident, $list:ident, $error:ty; $($variant:ident { $($field:ident $(as $name:ident)?),* })*) => {
        fn $describe(error: &$error) -> Option<Described> {
            type This = $error;
            Some(match error {
                $(This::$variant { $($field,)* .. } => (
                    concat!(stringify!($variant), "Error").to_owned(),
                    vec![$((table!(@name $field $($name)?), Value::from($field))),*],
                ),)*
                _ => return None,
            })
        }

        fn $list() -> Vec<(String, Vec<&'static str>)> {
            vec![$((
                concat!(stringify!($variant), "Error").to_owned(),
                vec![$(table!(@name $field $($name)?)),*],
            )),*]
        }
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:ident) => { stringify!($name) };
}

table! {
    describe_own, own_kinds, Error;
    Device { rank, reason }
    NoPeerAccess { rank, reason }
    Registration { rank, reason }
    NotPrepared { call, rank, what, why }
    ConcurrentUse { rank }
    Mismatch { left as expected, right as got }
    Counts { during as call, from as source, to, needed as got, room as expected, is_input }
    PeerDied { rank, who, during as call, how, survivors }
    GivenUp { rank, during as call, how }
    PeerLeft { rank, during as call }
    Timeout { rank, call, waited_ms, missing }
    Aborted { rank, during as call, reason }
    Forked { rank, parent, child }
    DamagedMemory { rank, during as call, who, word }
    Argument { call, rank, what, expected, got }
    Place { call, rank, expected, got }
    Poisoned { id, cause }
    Generation { window, generation }
    Signal { rank, slot, expected, got, waited }
    Packet { rank, place, expected, got, waited }
    InitTimeout { met, world_size, store, waited, missing }
    InitStalled { rank, who, what, waited }
    StaleGeneration { rank, job, expected, got }
    SeveralHosts { world_size, hosts }
    NoSecret { store }
    Builder { problem }
    StoreTimeout { store, key, waited }
    StoreIo { store, action, message }
    StoreLimit { store, what, got, cap as expected }
    StoreKey { store }
    StoreProtocol { store, message }
    StoreValue { store, key, message }
    LaunchNothing {}
    LaunchHalfSet { set, missing }
    LaunchRank { rank_name, rank, size_name, size }
    LaunchHosts { launcher, world_size }
    LaunchNoStore { launcher, world_size }
    SecretSource { from as source, message }
    JobDirectory { path, message }
    TuneFile { path, message }
    Interface { name, there_are }
    StoreAddress { address, reason }
}

table! {
    describe_core, core_kinds, unisono::CoreError;
    UnknownName { kind, got }
    Member { rank, world_size, max }
    Unsupported { op, dtype, supported as expected }
    Reduction { op, dtype, what, expected, got }
    UniqueId { what, expected, got }
    Malformed { what, expected, got }
    TooLarge { what, got, cap as expected }
    Auth { reason }
    Tampered { sequence }
    Version { expected, got }
    Disagreement { what, left, left_value as expected, right, right_value as got }
    DuplicateRank { rank, first as expected, second as got }
    Setting { name, value as got, expected }
    Tuning { line, expected, got }
    ForeignTuning { here as expected, there as got }
}

/// All classes, with their attributes.
pub(crate) fn kinds() -> Vec<(String, Vec<&'static str>)> {
    let others = [("NodeError", vec![]), ("NodeTimeoutError", vec![]), ("CudaError", vec!["rank"])];
    let mut kinds = own_kinds();
    kinds.extend(core_kinds());
    kinds.extend(others.map(|(name, attributes)| (name.to_owned(), attributes)));
    kinds.push(("ClosedError".to_owned(), vec!["rank", "call"]));
    kinds
}

fn describe(error: &Error) -> Described {
    use unisono::NodeError;
    let described = match error {
        Error::Core(core) | Error::Node(NodeError::Core(core)) => describe_core(core),
        Error::Node(NodeError::Missing { .. } | NodeError::Timeout { .. }) => {
            Some(("NodeTimeoutError".to_owned(), Vec::new()))
        }
        Error::Node(_) => Some(("NodeError".to_owned(), Vec::new())),
        Error::Cuda { rank, .. } => Some(("CudaError".to_owned(), vec![("rank", rank.into())])),
        other => describe_own(other),
    };
    described.unwrap_or_else(|| ("UnisonoError".to_owned(), Vec::new()))
}

/// The exception of an error.
pub(crate) fn raised(py: Python<'_>, error: &Error) -> PyErr {
    let (class, attributes) = describe(error);
    make(py, &class, &error.to_string(), attributes).unwrap_or_else(|error| error)
}

/// An array or another argument that does not fit. Nothing was written.
pub(crate) fn argument(
    py: Python<'_>,
    call: &'static str,
    rank: usize,
    what: &'static str,
    expected: impl Into<String>,
    got: impl Into<String>,
) -> PyErr {
    raised(py, &Error::Argument { call, rank, what, expected: expected.into(), got: got.into() })
}

/// A communicator or memory that was closed.
pub(crate) fn closed(py: Python<'_>, what: &str, call: &'static str, rank: usize) -> PyErr {
    let message = format!(
        "{call} on rank {rank}: the {what} is closed (by destroy, shrink, close or the end of a `with`). Nothing was written."
    );
    let attributes = vec![("rank", Value::from(&rank)), ("call", Value::from(&call))];
    make(py, "ClosedError", &message, attributes).unwrap_or_else(|error| error)
}

fn make(
    py: Python<'_>,
    class: &str,
    message: &str,
    attributes: Vec<(&'static str, Value)>,
) -> PyResult<PyErr> {
    let class = py.import(intern!(py, "unisono.errors"))?.getattr(class)?;
    let values = PyDict::new(py);
    for (name, value) in attributes {
        values.set_item(name, value.into_python(py)?)?;
    }
    Ok(PyErr::from_value(class.call((message,), Some(&values))?))
}
