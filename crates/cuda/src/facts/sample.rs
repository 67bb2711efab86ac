//! A CUBIN made by hand, as small as one can be: for tests, and as a seed of fuzzing.

use super::{MACHINE, MAGIC, NO_BITS, SECTION_BYTES, SIZED};

/// A CUBIN of one kernel `k`, with these attributes and these upper bits of the section's info.
pub(crate) fn cubin(attributes: &[u8], info: u32) -> Vec<u8> {
    let names = b"\0.names\0.strings\0.symtab\0.text.k\0.nv.shared.k\0.nv.info\0";
    let name = |wanted: &str| {
        let at = names.windows(wanted.len()).position(|window| window == wanted.as_bytes());
        at.unwrap() as u32
    };
    let mut symbols = vec![0; 48];
    // The second symbol is `k`.
    symbols[24] = 1;
    let contents = [
        (".names", 3, &names[..], names.len() as u64, 0u32, 0),
        (".strings", 3, b"\0k\0", 3, 0, 0),
        (".symtab", 2, &symbols, 48, 1, 0),
        (".text.k", 1, &[7; 128], 128, 2, info << 24 | 1),
        (".nv.shared.k", NO_BITS, &[], 4096, 0, 3),
        (".nv.info", 0x7000_0000, attributes, attributes.len() as u64, 2, 0),
    ];
    let mut file = vec![0; 64];
    let mut heads = Vec::new();
    for (title, kind, content, bytes, link, info) in contents {
        let mut head = [0; SECTION_BYTES];
        head[0..4].copy_from_slice(&name(title).to_le_bytes());
        head[4..8].copy_from_slice(&kind.to_le_bytes());
        head[24..32].copy_from_slice(&(file.len() as u64).to_le_bytes());
        head[32..40].copy_from_slice(&bytes.to_le_bytes());
        head[40..44].copy_from_slice(&link.to_le_bytes());
        head[44..48].copy_from_slice(&info.to_le_bytes());
        heads.extend_from_slice(&head);
        file.extend_from_slice(content);
    }
    let table = file.len() as u64;
    file[..7].copy_from_slice(MAGIC);
    file[18..20].copy_from_slice(&MACHINE.to_le_bytes());
    file[40..48].copy_from_slice(&table.to_le_bytes());
    file[58..60].copy_from_slice(&64u16.to_le_bytes());
    file[60..62].copy_from_slice(&6u16.to_le_bytes());
    file.extend_from_slice(&heads);
    file
}

/// The attribute of a symbol.
pub(crate) fn attribute(attribute: u8, symbol: u32, value: u32) -> Vec<u8> {
    let mut bytes = vec![SIZED, attribute, 8, 0];
    bytes.extend_from_slice(&symbol.to_le_bytes());
    bytes.extend_from_slice(&value.to_le_bytes());
    bytes
}
