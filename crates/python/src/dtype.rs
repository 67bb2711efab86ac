//! The names that frameworks give to element types.

use unisono::DType;

/// Of the last part of what numpy, ml_dtypes, torch, jax and this library call it: `float32`, `bfloat16`, `bf16`, …
pub(crate) fn of_name(name: &str) -> Option<DType> {
    Some(match name {
        "float8_e4m3fn" => DType::F8E4M3,
        "float8_e5m2" => DType::F8E5M2,
        "bfloat16" => DType::BF16,
        "float16" | "half" => DType::F16,
        "float32" | "float" => DType::F32,
        "float64" | "double" => DType::F64,
        "int8" => DType::I8,
        "int16" => DType::I16,
        "int32" => DType::I32,
        "int64" => DType::I64,
        "uint8" => DType::U8,
        "uint16" => DType::U16,
        "uint32" => DType::U32,
        "uint64" => DType::U64,
        other => return other.parse().ok(),
    })
}

/// What numpy (with ml_dtypes) and torch call it.
pub(crate) const fn common_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "bool",
        DType::I8 => "int8",
        DType::U8 => "uint8",
        DType::I16 => "int16",
        DType::U16 => "uint16",
        DType::I32 => "int32",
        DType::U32 => "uint32",
        DType::I64 => "int64",
        DType::U64 => "uint64",
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F32 => "float32",
        DType::F64 => "float64",
        DType::F8E4M3 => "float8_e4m3fn",
        DType::F8E5M2 => "float8_e5m2",
        DType::Complex64 => "complex64",
        DType::Complex128 => "complex128",
    }
}

/// Of a format of the module `struct` (as PEP 3118 extends it), in this machine's byte order.
#[inline]
pub(crate) fn of_format(format: &[u8], bytes: usize) -> Option<DType> {
    let letters = match format {
        [b'@' | b'=' | b'<', letters @ ..] => letters,
        letters => letters,
    };
    let kind = match letters {
        [b'e' | b'f' | b'd'] => b'f',
        [b'b' | b'h' | b'i' | b'l' | b'q' | b'n'] => b'i',
        [b'B' | b'H' | b'I' | b'L' | b'Q' | b'N'] => b'u',
        [b'?'] => b'b',
        [b'Z', b'f' | b'd'] => b'c',
        _ => return None,
    };
    of_kind(kind, bytes)
}

/// Of a `typestr` of an array interface: byte order, kind and bytes, as in `<f4`.
pub(crate) fn of_typestr(typestr: &str) -> Option<DType> {
    let (order, rest) = typestr.split_at_checked(1)?;
    let (kind, bytes) = rest.split_at_checked(1)?;
    let bytes = bytes.parse().ok()?;
    if order == ">" && bytes > 1 {
        return None;
    }
    of_kind(*kind.as_bytes().first()?, bytes)
}

/// The `typestr` of an array interface; `None` where none can name it.
pub(crate) fn typestr(dtype: DType) -> Option<String> {
    let kind = match dtype {
        DType::Bool => 'b',
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => 'i',
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => 'u',
        DType::F16 | DType::F32 | DType::F64 => 'f',
        DType::Complex64 | DType::Complex128 => 'c',
        DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => return None,
    };
    let order = if dtype.size() == 1 { '|' } else { '<' };
    Some(format!("{order}{kind}{}", dtype.size()))
}

const fn of_kind(kind: u8, bytes: usize) -> Option<DType> {
    Some(match (kind, bytes) {
        (b'f', 2) => DType::F16,
        (b'f', 4) => DType::F32,
        (b'f', 8) => DType::F64,
        (b'i', 1) => DType::I8,
        (b'i', 2) => DType::I16,
        (b'i', 4) => DType::I32,
        (b'i', 8) => DType::I64,
        (b'u', 1) => DType::U8,
        (b'u', 2) => DType::U16,
        (b'u', 4) => DType::U32,
        (b'u', 8) => DType::U64,
        (b'b', 1) => DType::Bool,
        (b'c', 8) => DType::Complex64,
        (b'c', 16) => DType::Complex128,
        _ => return None,
    })
}

/// The code and the bits of DLPack.
pub(crate) const fn dlpack(dtype: DType) -> (u8, u8) {
    let code = match dtype {
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => 0,
        DType::U8 | DType::U16 | DType::U32 | DType::U64 => 1,
        DType::F16 | DType::F32 | DType::F64 => 2,
        DType::BF16 => 4,
        DType::Complex64 | DType::Complex128 => 5,
        DType::Bool => 6,
        DType::F8E4M3 => 10,
        DType::F8E5M2 => 12,
    };
    (code, (dtype.size() * 8) as u8)
}

/// Of the code and the bits of DLPack.
pub(crate) fn of_dlpack(code: u8, bits: u8) -> Option<DType> {
    DType::ALL.into_iter().find(|dtype| dlpack(*dtype) == (code, bits))
}
