//! The arguments of calls, as users give them and as calls use them once they are checked.

use unisono_core::DType;
use unisono_core::ep::MAX_TOKENS;

use super::Buffer;
use super::tensor::{Input, Lent};
#[cfg(feature = "cuda")]
use crate::buffer::Place;
use crate::error::{Error, Result};
use crate::stream::Stream;

/// Scales that travel with rows: f32 or i32 (of which the meaning is the caller's own), some for each token, at any strides.
#[derive(Clone, Copy, Debug)]
pub struct RowScales<'b> {
    values: Input<'b>,
    per_token: usize,
    strides: (usize, usize),
}

impl<'b> RowScales<'b> {
    /// tokens × `per_token`, row-major.
    pub fn rows(values: impl Into<Input<'b>>, per_token: usize) -> Self {
        Self::strided(values, per_token, (per_token, 1))
    }

    /// Scale j of token t at element t · `strides.0` + j · `strides.1`. Column-major scales of T tokens have strides (1, T).
    pub fn strided(values: impl Into<Input<'b>>, per_token: usize, strides: (usize, usize)) -> Self {
        Self { values: values.into(), per_token, strides }
    }
}

/// Tokens to be sent: tokens × hidden, bf16, f16, f32 or f8e4m3, and perhaps scales.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'b> {
    x: Input<'b>,
    scales: Option<RowScales<'b>>,
}

impl<'b> Tokens<'b> {
    /// Without scales.
    pub fn new(x: impl Into<Input<'b>>) -> Self {
        Self { x: x.into(), scales: None }
    }

    /// With scales, which arrive row-major.
    pub fn scaled(x: impl Into<Input<'b>>, scales: RowScales<'b>) -> Self {
        Self { x: x.into(), scales: Some(scales) }
    }
}

impl<'b, I: Into<Input<'b>>> From<I> for Tokens<'b> {
    fn from(x: I) -> Self {
        Self::new(x)
    }
}

/// Rows that were checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'b> {
    pub(super) dtype: DType,
    pub(super) row_bytes: usize,
    pub(super) count: usize,
    pub(super) lent: Lent<'b>,
    scales: Option<(RowScales<'b>, Lent<'b>)>,
}

impl Rows<'_> {
    pub(super) fn row(&self, at: usize) -> &[u8] {
        &self.lent.bytes[at * self.row_bytes..][..self.row_bytes]
    }

    /// Scales of a row, and their type.
    pub(super) fn scales(&self) -> (usize, DType) {
        self.scales.map_or((0, DType::F32), |(scales, _)| (scales.per_token, scales.values.raw().dtype))
    }

    /// Gathers the scales of row `at`.
    pub(super) fn copy_scales(&self, at: usize, target: &mut [u8]) {
        let Some((scales, Lent { bytes, .. })) = self.scales else { return };
        let first = at * scales.strides.0;
        for (block, scale) in target.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            scale.copy_from_slice(&bytes[(first + block * scales.strides.1) * 4..][..4]);
        }
    }
}

#[cfg(feature = "cuda")]
impl Rows<'_> {
    /// The same for kernels.
    pub(super) fn outgoing(&self) -> super::gpu::Outgoing {
        let scales = self.scales.map(|(scales, lent)| super::gpu::OutgoingScales {
            address: lent.address,
            count: scales.per_token,
            strides: scales.strides,
            dtype: scales.values.raw().dtype,
        });
        super::gpu::Outgoing {
            x: self.lent.address,
            dtype: self.dtype,
            row_bytes: self.row_bytes,
            scales,
            selections: None,
            weights: None,
            top_k: 0,
        }
    }
}

impl Buffer {
    /// Checks that `stream` is one that this buffer works on.
    pub(super) fn check_stream(&self, call: &'static str, stream: Option<&Stream>) -> Result<()> {
        #[cfg(feature = "cuda")]
        {
            let is_of_gpu = stream.is_some_and(|stream| stream.as_cuda().is_some());
            let (expected, got) = match (self.place(), is_of_gpu) {
                (Place::Host, false) | (Place::Cuda { .. }, true) => return Ok(()),
                (Place::Host, true) => {
                    ("host memory and the host's stream".to_owned(), "the order of a stream of a GPU")
                }
                (place, false) => (format!("{place} and its streams (on())"), "the order of the host"),
                (place, true) => (place.to_string(), "the order of a stream of a GPU"),
            };
            Err(Error::Place { call, rank: self.rank, expected, got: got.to_owned() })
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (call, stream);
            Ok(())
        }
    }

    /// Checks tokens: any number of rows, of a type that travels.
    pub(super) fn rows<'b>(&self, call: &'static str, tokens: &Tokens<'b>) -> Result<Rows<'b>> {
        let (raw, hidden) = (tokens.x.raw(), self.settings.hidden);
        let is_moved = matches!(raw.dtype, DType::BF16 | DType::F16 | DType::F32 | DType::F8E4M3);
        if !is_moved || raw.dtype.size() > self.settings.dtype.size() {
            let widest = self.settings.dtype;
            return Err(self.refuse(
                call,
                "dtype",
                format!("bf16, f16, f32 or f8e4m3, no wider than {widest}"),
                raw.dtype,
            ));
        }
        if !raw.count.is_multiple_of(hidden) || raw.count / hidden > MAX_TOKENS {
            let expected = format!("rows of {hidden}, at most {MAX_TOKENS}");
            return Err(self.refuse(call, "elements of x", expected, raw.count));
        }
        let count = raw.count / hidden;
        let lent = tokens.x.lent((call, self.rank, self.place()))?;
        let scales = tokens.scales.map(|scales| self.check_scales(call, count, scales)).transpose()?;
        Ok(Rows { dtype: raw.dtype, row_bytes: hidden * raw.dtype.size(), count, lent, scales })
    }

    fn check_scales<'b>(
        &self,
        call: &'static str,
        tokens: usize,
        scales: RowScales<'b>,
    ) -> Result<(RowScales<'b>, Lent<'b>)> {
        let (raw, per_token) = (scales.values.raw(), scales.per_token);
        if !matches!(raw.dtype, DType::F32 | DType::I32) {
            return Err(self.refuse(call, "dtype of scales", "f32 or i32".to_owned(), raw.dtype));
        }
        let most = self.settings.hidden / 8;
        if !(1..=most).contains(&per_token) {
            return Err(self.refuse(call, "scales of a token", format!("1 to {most}"), per_token));
        }
        let last = |count: usize, stride: usize| count.saturating_sub(1).saturating_mul(stride);
        let end = last(tokens, scales.strides.0).saturating_add(last(per_token, scales.strides.1));
        if tokens > 0 && end >= raw.count {
            let expected = format!("more than {end}, which the strides reach");
            return Err(self.refuse(call, "elements of scales", expected, raw.count));
        }
        Ok((scales, scales.values.lent((call, self.rank, self.place()))?))
    }

    /// Checks an input of `count` elements of type `dtype`.
    pub(super) fn exactly<'b>(
        &self,
        (call, what): (&'static str, &'static str),
        input: &Input<'b>,
        (dtype, count): (DType, usize),
    ) -> Result<Lent<'b>> {
        let raw = input.raw();
        if raw.dtype != dtype || raw.count != count {
            let got = format!("{} of {}", raw.count, raw.dtype);
            return Err(self.refuse(call, what, format!("{count} of {dtype}"), got));
        }
        input.lent((call, self.rank, self.place()))
    }

    /// Checks how many experts a token may have.
    pub(super) fn check_top_k(&self, call: &'static str, top_k: usize) -> Result<()> {
        let most = self.settings.top_k;
        if (1..=most).contains(&top_k) {
            return Ok(());
        }
        Err(self.refuse(call, "top_k", format!("1 to {most}"), top_k))
    }

    pub(super) fn refuse(
        &self,
        call: &'static str,
        what: &'static str,
        expected: String,
        got: impl ToString,
    ) -> Error {
        Error::Argument { call, rank: self.rank, what, expected, got: got.to_string() }
    }
}

/// Bytes as the numbers that they are.
pub(super) fn indices(bytes: &[u8]) -> Vec<i64> {
    bytes.as_chunks().0.iter().map(|bytes| i64::from_ne_bytes(*bytes)).collect()
}
