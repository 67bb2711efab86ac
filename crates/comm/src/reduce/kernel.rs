//! The walk of a kernel over its elements; one generic function is every kernel, compiled for the three levels.
//!
//! Types that are computed in as they are stored go in *blocks*: every source's block is loaded to registers and folded
//! in rank order, and stored once. Types that are computed in f32 go in *tiles* of 1 KiB of accumulators on the stack:
//! plain loops over them are what compilers turn into SIMD conversions most reliably. Either way each source is read
//! once, and a stretch of `dst` is written only after that stretch of every source was read: `dst` may be a source.

use std::mem::MaybeUninit;

use super::number::{Number, Operator};
use super::storage::Storage;

/// A kernel: sources in rank order, a scalar per source if the operator is scaled, destination, number of elements.
///
/// It may be called where the machine has the level it was compiled for, with buffers as `Reduction::run` asks for them.
pub(super) type Kernel = unsafe fn(&[*const u8], &[f64], *mut u8, usize);

/// Elements of a block: 64 bytes and more. With fewer, compilers unroll the loops over a block before they look for
/// vectors, and find fewer (f32 sum with AVX-512: 16 GB/s with 32 elements, 220 with 64; EPYC 9005, rustc 1.95).
const BLOCK: usize = 64;

/// Elements of the blocks between the large ones and the last single elements.
const SMALL: usize = 4;

/// Below so many elements, types whose rows are converted by instructions go in small blocks, which start sooner.
const SHORT: usize = 32;

/// Elements of a tile.
const TILE: usize = 256;

/// # Safety
///
/// As for [`Kernel`].
pub(super) unsafe fn portable<S: Storage, O: Operator<S::Number>>(
    sources: &[*const u8],
    scalars: &[f64],
    dst: *mut u8,
    count: usize,
) {
    // SAFETY: the caller vouches for the buffers; every machine has this level.
    unsafe { reduce::<S, O>(sources, scalars, dst, count) }
}

/// # Safety
///
/// As for [`Kernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn avx2<S: Storage, O: Operator<S::Number>>(
    sources: &[*const u8],
    scalars: &[f64],
    dst: *mut u8,
    count: usize,
) {
    // SAFETY: the caller vouches for the buffers and the level.
    unsafe { reduce::<S, O>(sources, scalars, dst, count) }
}

/// # Safety
///
/// As for [`Kernel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn avx512<S: Storage, O: Operator<S::Number>>(
    sources: &[*const u8],
    scalars: &[f64],
    dst: *mut u8,
    count: usize,
) {
    // SAFETY: the caller vouches for the buffers and the level.
    unsafe { reduce::<S, O>(sources, scalars, dst, count) }
}

/// Two sources are by far the most frequent number: blocks then have both pointers in registers.
#[inline(always)]
unsafe fn reduce<S: Storage, O: Operator<S::Number>>(
    sources: &[*const u8],
    scalars: &[f64],
    dst: *mut u8,
    count: usize,
) {
    // SAFETY: passed on as it came, with at least one source.
    unsafe {
        match *sources {
            [] => {}
            _ if S::CONVERTED && !(S::ROWS && count < SHORT) => tiles::<S, O>(sources, scalars, dst, count),
            [a, b] => blocks::<S, O>(&[a, b], scalars, dst, count),
            _ => blocks::<S, O>(sources, scalars, dst, count),
        }
    }
}

/// # Safety
///
/// As for [`Kernel`], with at least one source.
#[inline(always)]
unsafe fn blocks<S: Storage, O: Operator<S::Number>>(
    sources: &[*const u8],
    scalars: &[f64],
    dst: *mut u8,
    count: usize,
) {
    let mut at = 0;
    // SAFETY: each block begins below `count` and ends at or before it.
    unsafe {
        while count - at >= BLOCK {
            block::<S, O, BLOCK>(sources, scalars, dst, at);
            at += BLOCK;
        }
        while count - at >= SMALL {
            block::<S, O, SMALL>(sources, scalars, dst, at);
            at += SMALL;
        }
        while at < count {
            block::<S, O, 1>(sources, scalars, dst, at);
            at += 1;
        }
    }
}

/// Elements `at .. at + N`.
///
/// # Safety
///
/// As for [`Kernel`], with `at + N <= count` and at least one source.
#[inline(always)]
unsafe fn block<S: Storage, O: Operator<S::Number>, const N: usize>(
    sources: &[*const u8],
    scalars: &[f64],
    dst: *mut u8,
    at: usize,
) {
    let load = |rank: usize| {
        let source = sources[rank].cast::<S::Stored>();
        let mut numbers = [S::Number::ZERO; N];
        // SAFETY: the elements lie in the source; they are copied once, unaligned, and any bits are valid.
        unsafe {
            if S::ROWS {
                S::decode_row(source.add(at), numbers.as_mut_ptr(), N);
            } else {
                numbers = source.add(at).cast::<[S::Stored; N]>().read_unaligned().map(S::decode);
            }
        }
        if O::SCALED {
            numbers = numbers.map(|number| number.scale(scalars[rank]));
        }
        numbers
    };
    let mut accumulator = load(0);
    for rank in 1..sources.len() {
        let numbers = load(rank);
        for i in 0..N {
            accumulator[i] = O::combine(accumulator[i], numbers[i]);
        }
    }
    let divisor = S::Number::divisor(sources.len());
    let numbers = accumulator.map(|number| finished::<S, O>(number, divisor));
    // SAFETY: the elements lie in the destination.
    unsafe {
        let dst = dst.cast::<S::Stored>().add(at);
        if S::ROWS {
            S::encode_row(numbers.as_ptr(), dst, N);
        } else {
            dst.cast::<[S::Stored; N]>().write_unaligned(numbers.map(S::encode));
        }
    }
}

/// # Safety
///
/// As for [`Kernel`], with at least one source.
#[inline(always)]
unsafe fn tiles<S: Storage, O: Operator<S::Number>>(
    sources: &[*const u8],
    scalars: &[f64],
    dst: *mut u8,
    count: usize,
) {
    let mut tile = [const { MaybeUninit::<S::Number>::uninit() }; TILE];
    let tile = tile.as_mut_ptr().cast::<S::Number>();
    let divisor = S::Number::divisor(sources.len());
    let mut at = 0;
    while at < count {
        let length = TILE.min(count - at);
        // SAFETY: `at + length <= count`, so the elements lie in their buffers; `length <= TILE`. `fold` writes the
        // first `length` numbers of the tile, which the rest of the step then reads.
        unsafe {
            fold::<S, O>(sources, scalars, tile, at, length);
            if O::AVERAGED {
                for i in 0..length {
                    tile.add(i).write(tile.add(i).read().divide(divisor));
                }
            }
            S::encode_row(tile, dst.cast::<S::Stored>().add(at), length);
        }
        at += length;
    }
}

/// Folds elements `at .. at + length` of every source into the tile.
///
/// # Safety
///
/// As for [`Kernel`], with `at + length <= count`, at least one source, and a tile of at least `length` numbers.
#[inline(always)]
unsafe fn fold<S: Storage, O: Operator<S::Number>>(
    sources: &[*const u8],
    scalars: &[f64],
    tile: *mut S::Number,
    at: usize,
    length: usize,
) {
    let mut row = [const { MaybeUninit::<S::Number>::uninit() }; TILE];
    let row = row.as_mut_ptr().cast::<S::Number>();
    // SAFETY: the elements lie in the sources, and are copied once, unaligned, any bits being valid; numbers of the tile
    // and the row are read below `length`, after they were written.
    unsafe {
        let source = |rank: usize| sources[rank].cast::<S::Stored>().add(at);
        S::decode_row(source(0), tile, length);
        if O::SCALED {
            for i in 0..length {
                tile.add(i).write(scaled::<S, O>(tile.add(i).read(), scalars, 0));
            }
        }
        for rank in 1..sources.len() {
            let source = source(rank);
            if S::ROWS {
                S::decode_row(source, row, length);
            }
            for i in 0..length {
                let number =
                    if S::ROWS { row.add(i).read() } else { S::decode(source.add(i).read_unaligned()) };
                let number = scaled::<S, O>(number, scalars, rank);
                tile.add(i).write(O::combine(tile.add(i).read(), number));
            }
        }
    }
}

#[inline(always)]
fn scaled<S: Storage, O: Operator<S::Number>>(number: S::Number, scalars: &[f64], rank: usize) -> S::Number {
    if O::SCALED { number.scale(scalars[rank]) } else { number }
}

#[inline(always)]
fn finished<S: Storage, O: Operator<S::Number>>(
    number: S::Number,
    divisor: <S::Number as Number>::Divisor,
) -> S::Number {
    if O::AVERAGED { number.divide(divisor) } else { number }
}
