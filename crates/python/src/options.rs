//! Arguments that many functions have: reductions, times, and how a communicator is made.

use std::time::Duration;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use unisono::settings::Settings;
use unisono::{Builder, Communicator, ReduceOp, Secret};

use crate::{dtype, errors, interrupt};

/// The reduction that `op` names: our names, torch's, or a member of torch's `ReduceOp`; none is a sum.
///
/// # Errors
/// `UnknownNameError`.
#[inline]
pub(crate) fn reduction(op: Option<&Bound<'_, PyAny>>) -> PyResult<ReduceOp> {
    let Some(op) = op else { return Ok(ReduceOp::Sum) };
    if let Ok(name) = op.cast::<PyString>()
        && name.to_str()? == "sum"
    {
        return Ok(ReduceOp::Sum);
    }
    named_reduction(op)
}

fn named_reduction(op: &Bound<'_, PyAny>) -> PyResult<ReduceOp> {
    let text = op.str()?.to_string();
    let name = match op.is_instance_of::<PyString>() {
        true => text.as_str(),
        false => text.rsplit('.').next().unwrap_or_default(),
    };
    let name = name.to_lowercase();
    let ours = match name.as_str() {
        "product" => "prod",
        "band" => "bit_and",
        "bor" => "bit_or",
        "bxor" => "bit_xor",
        name => name,
    };
    ours.parse().map_err(|error: unisono::CoreError| errors::raised(op.py(), &error.into()))
}

/// How long to wait: seconds, or a timedelta. `None` inside means for ever, as infinity says.
///
/// # Errors
/// `ArgumentError` for what is no time, or not above 0.
pub(crate) fn patience(
    time: &Bound<'_, PyAny>,
    call: &'static str,
    rank: usize,
) -> PyResult<Option<Duration>> {
    let wrong = || {
        let got = time.repr().map_or_else(|_| "something else".to_owned(), |text| text.to_string());
        errors::argument(time.py(), call, rank, "timeout", "seconds above 0, or a timedelta", got)
    };
    let duration = match time.extract::<f64>() {
        Ok(f64::INFINITY) => return Ok(None),
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?,
        Err(_) => time.extract::<Duration>().map_err(|_| wrong())?,
    };
    if duration.is_zero() { Err(wrong()) } else { Ok(Some(duration)) }
}

/// Sets what `options` say.
///
/// # Errors
/// `TypeError` for an option that there is not; those of the values.
pub(crate) fn configure(mut builder: Builder, options: Option<&Bound<'_, PyDict>>) -> PyResult<Builder> {
    let Some(options) = options else { return Ok(builder) };
    for (name, value) in options {
        let py = value.py();
        let name: String = name.extract()?;
        if value.is_none() {
            continue;
        }
        let time = || patience(&value, "Communicator", 0);
        let limited = || {
            let finite = "a time that ends";
            time()?.ok_or_else(|| errors::argument(py, "Communicator", 0, "timeout", finite, "infinity"))
        };
        let settings = |name: &str| -> PyResult<Settings> {
            let text: String = value.extract()?;
            let read = Settings::from_lookup(&|asked| (asked == name).then(|| text.clone()));
            read.map_err(|error| errors::raised(py, &error.into()))
        };
        builder = match name.as_str() {
            "timeout" => builder.timeout(time()?),
            "init_timeout" => builder.init_timeout(limited()?),
            "liveness" => builder.liveness(limited()?),
            "warn_after" => builder.warn_after(time()?),
            "job" => builder.job(value.extract::<String>()?),
            "generation" => builder.generation(value.extract()?),
            "secret" => builder.secret(secret(&value)?),
            "device" => builder.device(device(&value)?),
            "devices" => {
                let devices: Vec<u32> =
                    value.try_iter()?.map(|one| device(&one?)).collect::<PyResult<_>>()?;
                builder.devices(&devices)
            }
            "order" => builder.order(settings("UNISONO_ORDER")?.order),
            "require" => builder.require(settings("UNISONO_REQUIRE")?.require),
            "algorithm" => builder.algorithm(settings("UNISONO_ALGORITHM")?.algorithm),
            "tune_file" => builder.tune_file(Some(&value.extract::<String>()?)),
            "recorder" => builder.recorder(value.extract()?),
            "prepare" => prepare(builder, &value)?,
            "multiprocessors" => builder.multiprocessors(value.extract()?),
            _ => return Err(PyTypeError::new_err(format!("there is no option `{name}` of a communicator"))),
        };
    }
    Ok(builder)
}

/// Pairs of a dtype and a reduction, by name.
fn prepare(mut builder: Builder, pairs: &Bound<'_, PyAny>) -> PyResult<Builder> {
    let py = pairs.py();
    let raised = |error: unisono::Error| errors::raised(py, &error);
    for pair in pairs.try_iter()? {
        let (name, op): (String, Bound<'_, PyAny>) = pair?.extract()?;
        let unknown = || unisono::CoreError::UnknownName { kind: "dtype", got: name.clone() };
        let dtype = dtype::of_name(&name).ok_or_else(|| raised(unknown().into()))?;
        builder = builder.prepare(dtype, reduction(Some(&op))?).map_err(raised)?;
    }
    Ok(builder)
}

/// A number, `"cuda:1"`, or a `torch.device`.
fn device(value: &Bound<'_, PyAny>) -> PyResult<u32> {
    if let Ok(ordinal) = value.extract() {
        return Ok(ordinal);
    }
    let text = value.str()?.to_string();
    let ordinal = match text.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|number| number.parse().ok()),
        None => None,
    };
    ordinal
        .ok_or_else(|| errors::argument(value.py(), "Communicator", 0, "device", "a number or cuda:N", text))
}

/// 32 bytes.
///
/// # Errors
/// `ArgumentError`; its value is not told.
pub(crate) fn secret(value: &Bound<'_, PyAny>) -> PyResult<Secret> {
    let bytes: Vec<u8> = value.extract()?;
    let got = format!("{} bytes", bytes.len());
    let bytes = bytes.try_into();
    bytes
        .map(Secret::new)
        .map_err(|_| errors::argument(value.py(), "Communicator", 0, "secret", "32 bytes", got))
}

/// Meets the other ranks, and lets Ctrl-C end that.
///
/// # Errors
/// Those of [`Builder::build`], and what a handler raised.
pub(crate) fn build(py: Python<'_>, builder: Builder) -> PyResult<Communicator> {
    let built = interrupt::on_a_thread(py, move || builder.build())?;
    built.map_err(|error| errors::raised(py, &error))
}
