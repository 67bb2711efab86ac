//! Stores of Python: any object with the methods of `torch.distributed.Store`, as a store of the library; and the store of a process group.
//!
//! The interpreter is held for each call only; torch's own methods give it away while they wait. `append` and `multi_get`, which some
//! stores do not have, are made of the others.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use unisono::store::{PrefixStore, Store};
use unisono::{Deadline, Error};

use crate::array::imported;
use crate::errors;

/// What a store must have.
const METHODS: [&str; 6] = ["set", "get", "add", "wait", "check", "compare_set"];
/// The longest single wait, where there is no deadline.
const A_DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An object of Python that is a store.
pub(crate) struct PythonStore {
    object: Py<PyAny>,
    name: String,
}

impl PythonStore {
    /// Refuses objects that lack a method.
    pub(crate) fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let name = object.get_type().name()?.to_string();
        for method in METHODS {
            if !object.hasattr(method)? {
                let expected = format!("a store, with the methods {}", METHODS.join(", "));
                let got = format!("{name} without {method}");
                return Err(errors::argument(object.py(), "from_store", 0, "store", expected, got));
            }
        }
        Ok(Self { object: object.clone().unbind(), name })
    }

    /// Calls something of the object.
    fn ask<R>(
        &self,
        action: &'static str,
        f: impl for<'py> FnOnce(&Bound<'py, PyAny>) -> PyResult<R>,
    ) -> Result<R, Error> {
        Python::attach(|py| {
            f(self.object.bind(py)).map_err(|error| {
                let (store, message) = (self.describe(), error.to_string());
                Error::StoreIo { store, action, message }
            })
        })
    }

    fn present(&self, key: &str) -> Result<Vec<u8>, Error> {
        self.ask("get", |store| store.call_method1(intern!(store.py(), "get"), (key,))?.extract())
    }
}

impl fmt::Debug for PythonStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PythonStore").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Store for PythonStore {
    fn set(&self, key: &str, value: &[u8], _deadline: Deadline) -> Result<(), Error> {
        self.ask("set", |store| {
            let value = PyBytes::new(store.py(), value);
            store.call_method1(intern!(store.py(), "set"), (key, value)).map(drop)
        })
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>, Error> {
        self.wait(&[key], deadline)?;
        self.present(key)
    }

    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<(), Error> {
        let begun = Instant::now();
        let patience = deadline.remaining_up_to(A_DAY);
        let waited = self.ask("wait", |store| {
            store.call_method1(intern!(store.py(), "wait"), (keys.to_vec(), patience)).map(drop)
        });
        let Err(error) = waited else { return Ok(()) };
        // What stores raise then differs; what they have does not.
        for key in keys {
            if !self.check(&[key], deadline)? {
                if begun.elapsed() + Duration::from_millis(50) < patience {
                    return Err(error);
                }
                let (store, key) = (self.describe(), (*key).to_owned());
                return Err(Error::StoreTimeout { store, key, waited: begun.elapsed() });
            }
        }
        Ok(())
    }

    fn check(&self, keys: &[&str], _deadline: Deadline) -> Result<bool, Error> {
        self.ask("check", |store| {
            store.call_method1(intern!(store.py(), "check"), (keys.to_vec(),))?.extract()
        })
    }

    fn add(&self, key: &str, amount: i64, _deadline: Deadline) -> Result<i64, Error> {
        self.ask("add", |store| store.call_method1(intern!(store.py(), "add"), (key, amount))?.extract())
    }

    fn compare_set(
        &self,
        key: &str,
        expected: &[u8],
        desired: &[u8],
        _deadline: Deadline,
    ) -> Result<Vec<u8>, Error> {
        self.ask("compare_set", |store| {
            let py = store.py();
            let values = (key, PyBytes::new(py, expected), PyBytes::new(py, desired));
            store.call_method1(intern!(py, "compare_set"), values)?.extract()
        })
    }

    fn delete(&self, key: &str, _deadline: Deadline) -> Result<bool, Error> {
        self.ask("delete_key", |store| {
            store.call_method1(intern!(store.py(), "delete_key"), (key,))?.extract()
        })
    }

    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>, Error> {
        self.wait(keys, deadline)?;
        keys.iter().map(|key| self.present(key)).collect()
    }

    /// By `compare_set`, until nobody came between.
    fn append(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<(), Error> {
        let mut before = Vec::new();
        loop {
            let desired = [&before[..], value].concat();
            let after = self.compare_set(key, &before, &desired, deadline)?;
            if after == desired {
                return Ok(());
            }
            if deadline.is_over() {
                let (store, key) = (self.describe(), key.to_owned());
                return Err(Error::StoreTimeout { store, key, waited: Duration::ZERO });
            }
            before = after;
        }
    }

    fn num_keys(&self, _deadline: Deadline) -> Result<u64, Error> {
        self.ask("num_keys", |store| store.call_method0(intern!(store.py(), "num_keys"))?.extract())
    }

    fn describe(&self) -> String {
        format!("python:{}", self.name)
    }
}

/// The store, the rank and the world size of a process group of torch: the default one, if none is given. Keys have a prefix of their
/// own each time, so a group can be used again.
///
/// # Errors
/// `ArgumentError` if `torch.distributed` was not imported, or is not initialised; what torch raises.
pub(crate) fn of_group(
    py: Python<'_>,
    group: Option<Bound<'_, PyAny>>,
) -> PyResult<(Arc<dyn Store>, usize, usize)> {
    static USED: Mutex<Option<HashMap<String, u32>>> = Mutex::new(None);
    let refuse = |expected, got| {
        Err(errors::argument(py, "from_process_group", 0, "torch.distributed", expected, got))
    };
    let Some(torch) = imported(py, intern!(py, "torch.distributed"))? else {
        return refuse("imported and initialised (init_process_group)", "not imported");
    };
    if !torch.call_method0("is_initialized")?.is_truthy()? {
        return refuse("initialised (init_process_group)", "not initialised");
    }
    let inner = torch.getattr("distributed_c10d")?;
    let group = match group {
        Some(group) => group,
        None => inner.call_method0("_get_default_group")?,
    };
    let store = inner.call_method1("_get_process_group_store", (&group,))?;
    let rank = torch.call_method1("get_rank", (&group,))?.extract()?;
    let world_size = torch.call_method1("get_world_size", (&group,))?.extract()?;
    let name: String = group.getattr("group_name")?.str()?.to_string();
    let time = {
        let mut used = USED.lock();
        let count = used.get_or_insert_default().entry(name.clone()).or_insert(0);
        *count += 1;
        *count
    };
    let store: Arc<dyn Store> = Arc::new(PythonStore::new(&store)?);
    Ok((Arc::new(PrefixStore::new(format!("unisono/{name}/{time}"), store)), rank, world_size))
}
