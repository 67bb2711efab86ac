//! Stores, where the ranks of a job meet, and the unique id of one.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyType};
use pyo3::{PyClass, PyClassInitializer};
use unisono::{Deadline, Error, store};

use crate::torch_store::PythonStore;
use crate::{errors, interrupt, options};

/// How long a call waits that says nothing else.
const PATIENCE: Duration = Duration::from_secs(300);

/// A small key-value store that all ranks of a job can reach: what ``MemoryStore``, ``FileStore``, ``TcpStore``, ``TorchStore`` and
/// ``PrefixStore`` have in common, with the names of ``torch.distributed.Store``.
///
/// Keys are non-empty text of at most 8 KiB, values bytes (or text) of at most 8 MiB. ``timeout`` is in seconds or a timedelta, by
/// default 300 s. Any thread and any rank may call; raises ``StoreTimeoutError``, ``StoreIoError`` and their like.
///
/// >>> import unisono
/// >>> store = unisono.MemoryStore()
/// >>> store.set("a", b"1")
/// >>> store.add("a", 4), store.get("a"), store.check(["a", "b"])
/// (5, b'5', False)
#[pyclass(frozen, subclass, module = "unisono")]
pub(crate) struct Store(Arc<dyn store::Store>);

/// A store in this process, for ranks that are threads.
#[pyclass(frozen, extends = Store, module = "unisono")]
pub(crate) struct MemoryStore;

/// A store in the file at ``path``, for processes that share a file system. Each job needs a fresh file.
#[pyclass(frozen, extends = Store, module = "unisono")]
pub(crate) struct FileStore;

/// The store that a ``StoreServer`` serves at ``address`` ("HOST:PORT"), for who knows its ``secret`` (32 bytes).
#[pyclass(frozen, extends = Store, module = "unisono")]
pub(crate) struct TcpStore;

/// Torch's ``TCPStore`` at ``address`` ("HOST:PORT"), without torch. It is not authenticated.
#[pyclass(frozen, extends = Store, module = "unisono")]
pub(crate) struct TorchStore;

/// ``store`` with ``prefix`` and a slash in front of all keys, so that several can use it. ``store`` may be any object with the methods
/// of ``torch.distributed.Store``.
#[pyclass(frozen, extends = Store, module = "unisono")]
pub(crate) struct PrefixStore;

/// Bytes, or text as UTF-8.
fn value(object: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    match object.cast::<PyString>() {
        Ok(text) => Ok(text.to_str()?.as_bytes().to_vec()),
        Err(_) => object.extract(),
    }
}

fn deadline(timeout: Option<&Bound<'_, PyAny>>, call: &'static str) -> PyResult<Deadline> {
    let patience =
        timeout.map(|time| options::patience(time, call, 0)).transpose()?.unwrap_or(Some(PATIENCE));
    Ok(patience.map_or(Deadline::NEVER, Deadline::after))
}

fn unwrap<T>(py: Python<'_>, result: Result<T, Error>) -> PyResult<T> {
    result.map_err(|error| errors::raised(py, &error))
}

impl Store {
    /// The store that `object` is: one of ours, or one with torch's methods.
    ///
    /// # Errors
    /// `ArgumentError` if it has not these.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Arc<dyn store::Store>> {
        match object.cast::<Self>() {
            Ok(ours) => Ok(ours.get().0.clone()),
            Err(_) => Ok(Arc::new(PythonStore::new(object)?)),
        }
    }

    /// The initializer of a class of stores.
    fn with<T: PyClass<BaseType = Self>>(self, class: T) -> PyClassInitializer<T> {
        PyClassInitializer::from(self).add_subclass(class)
    }

    /// A store that waits outside of the interpreter; signals are handled meanwhile.
    fn do_it<R: Send + 'static>(
        &self,
        py: Python<'_>,
        what: impl FnOnce(&dyn store::Store) -> Result<R, Error> + Send + 'static,
    ) -> PyResult<R> {
        let store = self.0.clone();
        let done = interrupt::on_a_thread(py, move || what(store.as_ref()))?;
        unwrap(py, done)
    }
}

#[pymethods]
impl Store {
    /// Stores ``value`` under ``key``, replacing what was there.
    #[pyo3(signature = (key, value, *, timeout=None), text_signature = "($self, key, value, *, timeout=None)")]
    fn set(
        &self,
        py: Python<'_>,
        key: String,
        #[pyo3(from_py_with = value)] value: Vec<u8>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let deadline = deadline(timeout, "set")?;
        self.do_it(py, move |store| store.set(&key, &value, deadline))
    }

    /// The value of ``key``, waiting for it to appear.
    #[pyo3(signature = (key, *, timeout=None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        key: String,
        timeout: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let deadline = deadline(timeout, "get")?;
        Ok(PyBytes::new(py, &self.do_it(py, move |store| store.get(&key, deadline))?))
    }

    /// Returns once all ``keys`` are there.
    #[pyo3(signature = (keys, timeout=None))]
    fn wait(&self, py: Python<'_>, keys: Vec<String>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let deadline = deadline(timeout, "wait")?;
        self.do_it(py, move |store| store.wait(&texts(&keys), deadline))
    }

    /// Whether all ``keys`` are there now.
    #[pyo3(signature = (keys, *, timeout=None))]
    fn check(&self, py: Python<'_>, keys: Vec<String>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let deadline = deadline(timeout, "check")?;
        self.do_it(py, move |store| store.check(&texts(&keys), deadline))
    }

    /// Adds ``amount`` to the decimal integer under ``key`` (0 if missing), atomically, and returns the sum.
    #[pyo3(signature = (key, amount, *, timeout=None))]
    fn add(
        &self,
        py: Python<'_>,
        key: String,
        amount: i64,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<i64> {
        let deadline = deadline(timeout, "add")?;
        self.do_it(py, move |store| store.add(&key, amount, deadline))
    }

    /// Replaces the value of ``key`` by ``desired`` if it equals ``expected``, atomically; an empty ``expected`` matches a missing key.
    /// Returns the value after the call (``expected`` if the key is missing and ``expected`` is not empty).
    #[pyo3(signature = (key, expected, desired, *, timeout=None),
           text_signature = "($self, key, expected, desired, *, timeout=None)")]
    fn compare_set<'py>(
        &self,
        py: Python<'py>,
        key: String,
        #[pyo3(from_py_with = value)] expected: Vec<u8>,
        #[pyo3(from_py_with = value)] desired: Vec<u8>,
        timeout: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let deadline = deadline(timeout, "compare_set")?;
        let after = self.do_it(py, move |store| store.compare_set(&key, &expected, &desired, deadline))?;
        Ok(PyBytes::new(py, &after))
    }

    /// Removes ``key``; True if it was there.
    #[pyo3(signature = (key, *, timeout=None))]
    fn delete_key(&self, py: Python<'_>, key: String, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let deadline = deadline(timeout, "delete_key")?;
        self.do_it(py, move |store| store.delete(&key, deadline))
    }

    /// The values of all ``keys``, in order, waiting for them to appear.
    #[pyo3(signature = (keys, *, timeout=None))]
    fn multi_get<'py>(
        &self,
        py: Python<'py>,
        keys: Vec<String>,
        timeout: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let deadline = deadline(timeout, "multi_get")?;
        let values = self.do_it(py, move |store| store.multi_get(&texts(&keys), deadline))?;
        Ok(values.iter().map(|value| PyBytes::new(py, value)).collect())
    }

    /// Appends ``value`` to the value of ``key`` (empty if missing), atomically.
    #[pyo3(signature = (key, value, *, timeout=None), text_signature = "($self, key, value, *, timeout=None)")]
    fn append(
        &self,
        py: Python<'_>,
        key: String,
        #[pyo3(from_py_with = value)] value: Vec<u8>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let deadline = deadline(timeout, "append")?;
        self.do_it(py, move |store| store.append(&key, &value, deadline))
    }

    /// The number of keys.
    #[pyo3(signature = (*, timeout=None))]
    fn num_keys(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let deadline = deadline(timeout, "num_keys")?;
        self.do_it(py, move |store| store.num_keys(deadline))
    }

    fn __repr__(&self) -> String {
        format!("<unisono store {}>", self.0.describe())
    }
}

fn texts(keys: &[String]) -> Vec<&str> {
    keys.iter().map(String::as_str).collect()
}

#[pymethods]
impl MemoryStore {
    #[new]
    fn new() -> PyClassInitializer<Self> {
        Store(Arc::new(store::MemoryStore::new())).with(Self)
    }
}

#[pymethods]
impl FileStore {
    #[new]
    fn new(py: Python<'_>, path: std::path::PathBuf) -> PyResult<PyClassInitializer<Self>> {
        let opened = py.detach(|| store::FileStore::open(path, Deadline::after(PATIENCE)));
        Ok(Store(Arc::new(unwrap(py, opened)?)).with(Self))
    }
}

#[pymethods]
impl TcpStore {
    #[new]
    #[pyo3(signature = (address, secret, *, timeout=None))]
    fn new(
        py: Python<'_>,
        address: &str,
        secret: &Bound<'_, PyAny>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let (deadline, secret) = (deadline(timeout, "TcpStore")?, options::secret(secret)?);
        let address =
            address.parse().map_err(|_| PyValueError::new_err(format!("{address} is not IP:PORT")))?;
        let store = interrupt::on_a_thread(py, move || store::TcpStore::connect(address, &secret, deadline))?;
        Ok(Store(Arc::new(unwrap(py, store)?)).with(Self))
    }
}

#[pymethods]
impl TorchStore {
    #[new]
    #[pyo3(signature = (address, *, timeout=None))]
    fn new(
        py: Python<'_>,
        address: String,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let deadline = deadline(timeout, "TorchStore")?;
        let store = interrupt::on_a_thread(py, move || store::TorchStore::connect(address, deadline))?;
        Ok(Store(Arc::new(unwrap(py, store)?)).with(Self))
    }
}

#[pymethods]
impl PrefixStore {
    #[new]
    fn new(prefix: &str, store: &Bound<'_, PyAny>) -> PyResult<PyClassInitializer<Self>> {
        Ok(Store(Arc::new(store::PrefixStore::new(prefix, Store::of(store)?))).with(Self))
    }
}

/// Says that a store is listening somewhere, and what its secret is: 128 bytes, to be handed to the ranks of a job only. It can be
/// pickled.
///
/// >>> import pickle, unisono
/// >>> server = unisono.StoreServer()
/// >>> id = pickle.loads(pickle.dumps(server.unique_id))
/// >>> id == server.unique_id == unisono.UniqueId(bytes(id)) == unisono.UniqueId.from_text(id.to_text())
/// True
#[pyclass(frozen, eq, module = "unisono")]
#[derive(PartialEq)]
pub(crate) struct UniqueId(pub(crate) unisono::UniqueId);

#[pymethods]
impl UniqueId {
    /// Of the bytes that ``bytes(unique_id)`` gave.
    #[new]
    fn new(py: Python<'_>, value: Vec<u8>) -> PyResult<Self> {
        unwrap(py, unisono::UniqueId::from_bytes(&value).map_err(Error::from)).map(Self)
    }

    /// Of what ``to_text`` gave.
    #[classmethod]
    fn from_text(_class: &Bound<'_, PyType>, py: Python<'_>, text: &str) -> PyResult<Self> {
        unwrap(py, unisono::UniqueId::from_text(text).map_err(Error::from)).map(Self)
    }

    /// The bytes as 256 hexadecimal digits, for an environment variable or a file. They contain the secret.
    fn to_text(&self) -> String {
        self.0.to_text()
    }

    /// Where the store listens, as "HOST:PORT".
    #[getter]
    fn address(&self) -> String {
        self.0.address().to_string()
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    fn __reduce__<'py>(this: &Bound<'py, Self>) -> (Bound<'py, PyType>, (Bound<'py, PyBytes>,)) {
        (this.get_type(), (PyBytes::new(this.py(), &this.get().0.to_bytes()),))
    }

    fn __hash__(&self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0.job()[..8]);
        u64::from_le_bytes(first)
    }

    fn __repr__(&self) -> String {
        format!("<unisono.UniqueId {}>", self.0)
    }
}

/// Serves a store to processes that know its secret, until it is closed, at the end of a ``with``, or dropped. It listens on a free
/// port of the loopback interface, or at ``address`` ("IP:PORT"); ``secret`` (32 bytes) is random if it is not given.
///
/// >>> import unisono
/// >>> with unisono.StoreServer() as server:
/// ...     unisono.TcpStore(server.address, server.secret).add("ranks", 1)
/// 1
#[pyclass(frozen, module = "unisono")]
pub(crate) struct StoreServer {
    server: Mutex<Option<store::StoreServer>>,
    #[pyo3(get)]
    /// What ranks need to meet here.
    unique_id: Py<UniqueId>,
}

#[pymethods]
impl StoreServer {
    #[new]
    #[pyo3(signature = (*, address=None, secret=None))]
    fn new(py: Python<'_>, address: Option<&str>, secret: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let secret = match secret {
            Some(secret) => options::secret(secret)?,
            None => {
                let random = py.import("secrets")?.call_method1("token_bytes", (32,))?;
                options::secret(&random)?
            }
        };
        let mut config = store::StoreServerConfig::new(secret);
        if let Some(address) = address {
            let wrong = |_| PyValueError::new_err(format!("{address} is not IP:PORT"));
            config = config.address(address.parse().map_err(wrong)?);
        }
        let server = unwrap(py, py.detach(|| store::StoreServer::start_with(config)))?;
        let unique_id = Py::new(py, UniqueId(server.unique_id()))?;
        Ok(Self { server: Mutex::new(Some(server)), unique_id })
    }

    /// Where it listens, as "IP:PORT".
    #[getter]
    fn address(&self) -> String {
        self.unique_id.get().0.address().to_string()
    }

    /// The 32 bytes that clients must know.
    #[getter]
    fn secret<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.unique_id.get().0.secret().expose())
    }

    /// Ends the store.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.server.lock().take()));
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.close(py);
    }
}

/// Serves a store as torch's ``TCPStore`` does, without torch and without authentication, until it is closed or dropped: at ``address``
/// ("IP:PORT"), or on a free port of the loopback interface.
///
/// >>> import unisono
/// >>> with unisono.TorchStoreServer() as server:
/// ...     unisono.TorchStore(server.address).add("ranks", 1)
/// 1
#[pyclass(frozen, module = "unisono")]
pub(crate) struct TorchStoreServer {
    server: Mutex<Option<store::TorchStoreServer>>,
    #[pyo3(get)]
    /// Where it listens, as "IP:PORT".
    address: String,
}

#[pymethods]
impl TorchStoreServer {
    #[new]
    #[pyo3(signature = (*, address=None))]
    fn new(py: Python<'_>, address: Option<&str>) -> PyResult<Self> {
        let wrong = |address: &str| PyValueError::new_err(format!("{address} is not IP:PORT"));
        let address = address.map(|text| text.parse().map_err(|_| wrong(text))).transpose()?;
        let server = py.detach(|| match address {
            Some(address) => store::TorchStoreServer::bind(address),
            None => store::TorchStoreServer::on_loopback(),
        });
        let server = unwrap(py, server)?;
        Ok(Self { address: server.address().to_string(), server: Mutex::new(Some(server)) })
    }

    /// Ends the store.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.server.lock().take()));
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) {
        self.close(py);
    }
}
