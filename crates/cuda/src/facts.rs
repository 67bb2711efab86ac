//! What a CUBIN says of its kernels: registers, stack, shared memory and code, without a device to load it into.
//!
//! A CUBIN is an ELF file. Each kernel has a section `.text.KERNEL` with its code and, if it wants any, a section
//! `.nv.shared.KERNEL` of the size of its shared memory; `.nv.info` is a list of attributes, of which some tell a number for
//! a symbol. The numbers are those that `cuobjdump --dump-resource-usage` prints. Bytes that are no such file are an error:
//! every offset is checked, and what is kept is bounded by the length of the file.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod sample;

/// What one kernel takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KernelFacts {
    /// Its name, as [`crate::Module::function`] takes it.
    pub name: String,
    /// Registers of each thread.
    pub registers: u32,
    /// Bytes of stack of each thread, the functions that it calls included; not known, and 0 or less than it needs, if they
    /// call themselves.
    pub stack_bytes: u32,
    /// Bytes of shared memory of each block that the kernel declares, those that the compiler reserves included: up to 1024
    /// since `sm_90`.
    pub shared_bytes: u32,
    /// Bytes of machine code.
    pub code_bytes: u64,
}

/// Mangled names are long; what is longer than this is no name.
const MAX_NAME_BYTES: usize = 1024;
const MAGIC: &[u8] = b"\x7fELF\x02\x01\x01";
/// `EM_CUDA`.
const MACHINE: u16 = 190;
const SECTION_BYTES: usize = 64;
const SYMBOL_BYTES: u64 = 24;
/// `SHT_NOBITS`: a section that has a size and no bytes.
const NO_BITS: u32 = 8;
/// The only format of attributes that has a payload behind its head; of the others, the head holds all.
const SIZED: u8 = 0x04;
pub(crate) const FRAME_SIZE: u8 = 0x11;
pub(crate) const MIN_STACK_SIZE: u8 = 0x12;
pub(crate) const REGISTER_COUNT: u8 = 0x2f;

/// The kernels of a CUBIN, sorted by name.
///
/// # Errors
/// [`Error::NoCubin`] if the bytes are not a whole CUBIN.
pub fn kernels(cubin: &[u8]) -> Result<Vec<KernelFacts>> {
    let file = File::read(cubin)?;
    let mut kernels = BTreeMap::new();
    for section in &file.sections {
        let Some(name) = section.name.strip_prefix(".text.") else { continue };
        file.content(section)?;
        let facts = KernelFacts {
            name: name.to_owned(),
            // It stands here, too, for architectures before `sm_90`; for later ones, these bits are empty.
            registers: section.info >> 24,
            stack_bytes: 0,
            shared_bytes: 0,
            code_bytes: section.bytes,
        };
        if kernels.insert(name, facts).is_some() {
            return refuse(format!("two kernels are named {name}"));
        }
    }
    for section in &file.sections {
        if let Some(name) = section.name.strip_prefix(".nv.shared.")
            && let Some(kernel) = kernels.get_mut(name)
        {
            let bytes = u32::try_from(section.bytes);
            kernel.shared_bytes =
                bytes.or_else(|_| refuse(format!("{name} takes 4 GiB of shared memory")))?;
        }
    }
    for section in file.sections.iter().filter(|section| section.name == ".nv.info") {
        let symbols = file.sections.get(section.link as usize);
        let symbols = symbols.map_or_else(|| refuse("it has no table of symbols"), Ok)?;
        for (attribute, symbol, value) in attributes(file.content(section)?)? {
            let Some(kernel) = kernels.get_mut(file.symbol(symbols, symbol)?) else { continue };
            match attribute {
                REGISTER_COUNT => kernel.registers = value,
                _ => kernel.stack_bytes = kernel.stack_bytes.max(value),
            }
        }
    }
    Ok(kernels.into_values().collect())
}

struct File<'f> {
    bytes: &'f [u8],
    sections: Vec<Section<'f>>,
}

struct Section<'f> {
    name: &'f str,
    kind: u32,
    start: u64,
    bytes: u64,
    link: u32,
    info: u32,
}

impl<'f> File<'f> {
    fn read(bytes: &'f [u8]) -> Result<Self> {
        if !bytes.starts_with(MAGIC) || u16_at(bytes, 18)? != MACHINE {
            return refuse("it does not begin as one");
        }
        let start = u64_at(bytes, 40)?;
        let (each, count, names) =
            (u16_at(bytes, 58)? as usize, u16_at(bytes, 60)? as usize, u16_at(bytes, 62)?);
        if each != SECTION_BYTES {
            return refuse(format!("heads of sections have {SECTION_BYTES} bytes, these have {each}"));
        }
        // Both factors have 16 bits.
        let table = part(bytes, start, (each * count) as u64)?;
        let sections = table.chunks_exact(SECTION_BYTES).map(|head| {
            Ok::<_, Error>(Section {
                name: "",
                kind: u32_at(head, 4)?,
                start: u64_at(head, 24)?,
                bytes: u64_at(head, 32)?,
                link: u32_at(head, 40)?,
                info: u32_at(head, 44)?,
            })
        });
        let mut file = Self { bytes, sections: sections.collect::<Result<_>>()? };
        let Some(names) = file.sections.get(names as usize) else {
            return refuse("its sections have no names");
        };
        let names = file.content(names)?;
        for (section, head) in file.sections.iter_mut().zip(table.chunks_exact(SECTION_BYTES)) {
            section.name = text_at(names, u32_at(head, 0)?)?;
        }
        Ok(file)
    }

    fn content(&self, section: &Section<'_>) -> Result<&'f [u8]> {
        if section.kind == NO_BITS {
            return refuse(format!("section {} has no bytes", section.name));
        }
        part(self.bytes, section.start, section.bytes)
    }

    /// The name of symbol number `index` of a table.
    fn symbol(&self, table: &Section<'_>, index: u32) -> Result<&'f str> {
        let symbol = part(self.content(table)?, u64::from(index) * SYMBOL_BYTES, SYMBOL_BYTES)?;
        match self.sections.get(table.link as usize) {
            Some(names) => text_at(self.content(names)?, u32_at(symbol, 0)?),
            None => refuse("its symbols have no names"),
        }
    }
}

/// Those attributes that tell a number of a symbol which is asked for here: (attribute, symbol, number).
fn attributes(mut list: &[u8]) -> Result<Vec<(u8, u32, u32)>> {
    let mut found = Vec::new();
    while !list.is_empty() {
        let head = part(list, 0, 4)?;
        let (format, attribute) = (head[0], head[1]);
        let bytes = if format == SIZED { u64::from(u16_at(head, 2)?) } else { 0 };
        let payload = part(list, 4, bytes)?;
        list = &list[4 + payload.len()..];
        if format == SIZED && matches!(attribute, REGISTER_COUNT | FRAME_SIZE | MIN_STACK_SIZE) {
            found.push((attribute, u32_at(payload, 0)?, u32_at(payload, 4)?));
        }
    }
    Ok(found)
}

fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::NoCubin { reason: reason.into() })
}

/// `count` bytes from `start`.
fn part(bytes: &[u8], start: u64, count: u64) -> Result<&[u8]> {
    let range = start.checked_add(count).and_then(|end| Some(start.try_into().ok()?..end.try_into().ok()?));
    range
        .and_then(|range: std::ops::Range<usize>| bytes.get(range))
        .map_or_else(|| refuse(format!("{count} bytes at {start} lie outside of {}", bytes.len())), Ok)
}

fn u16_at(bytes: &[u8], start: u64) -> Result<u16> {
    Ok(part(bytes, start, 2)?.iter().rev().fold(0, |value, byte| value << 8 | u16::from(*byte)))
}

fn u32_at(bytes: &[u8], start: u64) -> Result<u32> {
    Ok(part(bytes, start, 4)?.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte)))
}

fn u64_at(bytes: &[u8], start: u64) -> Result<u64> {
    Ok(part(bytes, start, 8)?.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// The terminated text at `start`.
fn text_at(texts: &[u8], start: u32) -> Result<&str> {
    let rest = texts.get(start as usize..).unwrap_or(&[]);
    let text = rest.iter().take(MAX_NAME_BYTES + 1).position(|byte| *byte == 0).map(|end| &rest[..end]);
    match text.map(std::str::from_utf8) {
        Some(Ok(text)) => Ok(text),
        _ => refuse(format!("there is no name at {start}")),
    }
}

#[cfg(test)]
mod tests {
    use super::sample::{attribute, cubin};
    use super::*;

    fn facts(registers: u32, stack_bytes: u32) -> KernelFacts {
        KernelFacts { name: "k".to_owned(), registers, stack_bytes, shared_bytes: 4096, code_bytes: 128 }
    }

    #[test]
    fn attributes_and_sections_of_a_kernel_are_its_facts() {
        let mut list = attribute(REGISTER_COUNT, 1, 40);
        // One of another format, and one of another symbol.
        list.extend([0x03, 0x50, 0xff, 0xff]);
        list.extend(attribute(FRAME_SIZE, 0, 5000));
        list.extend(attribute(FRAME_SIZE, 1, 16));
        list.extend(attribute(MIN_STACK_SIZE, 1, 288));
        assert_eq!(kernels(&cubin(&list, 0)), Ok(vec![facts(40, 288)]));
        assert_eq!(kernels(&cubin(&[], 72)), Ok(vec![facts(72, 0)]), "as older compilers say it");
    }

    #[test]
    fn what_is_no_cubin_is_refused_and_says_why() {
        let reason = |bytes: &[u8]| match kernels(bytes) {
            Err(Error::NoCubin { reason }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(b""), "it does not begin as one");
        assert_eq!(reason(&[0x5a; 5000]), "it does not begin as one");
        assert_eq!(reason(&cubin(&attribute(REGISTER_COUNT, 9, 40), 0)), "24 bytes at 216 lie outside of 48");
        assert_eq!(
            reason(&cubin(&[SIZED, REGISTER_COUNT, 4, 0, 1, 0, 0, 0], 0)),
            "4 bytes at 4 lie outside of 4"
        );
    }

    #[test]
    fn every_shorter_file_is_refused_and_no_changed_byte_panics() {
        let mut list = attribute(REGISTER_COUNT, 1, 40);
        list.extend(attribute(FRAME_SIZE, 1, 16));
        let whole = cubin(&list, 0);
        for length in 0..whole.len() {
            assert!(matches!(kernels(&whole[..length]), Err(Error::NoCubin { .. })), "{length}");
        }
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                let kernels = kernels(&changed);
                assert!(
                    kernels.is_err() || kernels.as_ref().unwrap().len() <= 1,
                    "{at} {value}: {kernels:?}"
                );
            }
        }
    }
}
