//! What sets of kernels take, as people read it: a line per set, and a sum below.

use std::time::Duration;

use anstyle::{AnsiColor, Style};
use serde::Serialize;
use unisono::cuda::KernelFacts;

use crate::output::bytes;

const SPILLS: Style = AnsiColor::Yellow.on_default();

/// One set of kernels: a CUBIN in the cache. Of what its kernels take, the most.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Row {
    pub(super) architecture: String,
    /// `device` or `host`.
    pub(super) link: &'static str,
    pub(super) ranks: usize,
    /// `copies`, or `f32 sum`.
    pub(super) purpose: String,
    pub(super) kernels: usize,
    /// Of each thread.
    pub(super) registers: u32,
    /// Of each thread: arrays, and what has no room in registers.
    pub(super) stack_bytes: u32,
    /// Of each block.
    pub(super) shared_bytes: u32,
    pub(super) code_bytes: u64,
    pub(super) cubin_bytes: usize,
    /// How long it took; none if the cache had it.
    pub(super) compiled_ms: Option<u64>,
}

impl Row {
    /// Fills in what `kernels` take.
    pub(super) fn measure(&mut self, kernels: &[KernelFacts]) {
        self.kernels = kernels.len();
        for kernel in kernels {
            self.registers = self.registers.max(kernel.registers);
            self.stack_bytes = self.stack_bytes.max(kernel.stack_bytes);
            self.shared_bytes = self.shared_bytes.max(kernel.shared_bytes);
            self.code_bytes = self.code_bytes.max(kernel.code_bytes);
        }
    }

    pub(super) fn line(&self) -> String {
        let style = if self.stack_bytes > 0 { SPILLS } else { Style::new() };
        let how = match self.compiled_ms {
            Some(ms) => format!("{:.1} s", ms as f64 / 1e3),
            None => "was there".to_owned(),
        };
        format!(
            "{:<8} {:<6} {:>5}  {:<20} {:>9} {style}{:>8}{style:#} {:>9} {:>9}  {how:>9}",
            self.architecture,
            self.link,
            self.ranks,
            self.purpose,
            self.registers,
            bytes(self.stack_bytes.into()),
            bytes(self.shared_bytes.into()),
            bytes(self.code_bytes),
        )
    }
}

/// What the lines below are about, and the names of the columns.
pub(super) fn heading(title: &str) -> String {
    let bold = Style::new().bold();
    format!(
        "{bold}{title}{bold:#}\n{:<8} {:<6} {:>5}  {:<20} {:>9} {:>8} {:>9} {:>9}  {:>9}",
        "arch", "link", "ranks", "kernels", "registers", "stack", "shared", "code", "compiled"
    )
}

/// `32 sets: 28 compiled in 12.5 s, 4 were there; 2.4 MiB in /home/ada/.cache/unisono`.
pub(super) fn footer(rows: &[Row], took: Duration, folder: &str) -> String {
    let compiled = rows.iter().filter(|row| row.compiled_ms.is_some()).count();
    let size: usize = rows.iter().map(|row| row.cubin_bytes).sum();
    let there = match rows.len() - compiled {
        0 => String::new(),
        1 => ", 1 was there".to_owned(),
        there => format!(", {there} were there"),
    };
    let noun = if rows.len() == 1 { "set" } else { "sets" };
    format!(
        "{} {noun}: {compiled} compiled in {:.1} s{there}; {} in {folder}",
        rows.len(),
        took.as_secs_f64(),
        bytes(size as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(registers: u32, stack_bytes: u32) -> KernelFacts {
        KernelFacts { name: "k".into(), registers, stack_bytes, shared_bytes: 1040, code_bytes: 20_480 }
    }

    fn row(compiled_ms: Option<u64>) -> Row {
        Row {
            architecture: "sm_90".into(),
            link: "device",
            ranks: 8,
            purpose: "bf16 sum".into(),
            kernels: 0,
            registers: 0,
            stack_bytes: 0,
            shared_bytes: 0,
            code_bytes: 0,
            cubin_bytes: 65_536,
            compiled_ms,
        }
    }

    #[test]
    fn a_set_takes_what_the_largest_of_its_kernels_take() {
        let mut row = row(Some(1234));
        row.measure(&[kernel(64, 0), kernel(40, 288)]);
        assert_eq!((row.kernels, row.registers, row.stack_bytes, row.shared_bytes), (2, 64, 288, 1040));
        let line = anstream::adapter::strip_str(&row.line()).to_string();
        assert_eq!(
            line,
            "sm_90    device     8  bf16 sum                    64    288 B     1 KiB    20 KiB      1.2 s"
        );
        let heading = anstream::adapter::strip_str(&heading("x")).to_string();
        assert_eq!(heading.lines().nth(1).unwrap().len(), line.len());
    }

    #[test]
    fn what_was_there_is_counted_apart() {
        let rows = [row(Some(1500)), row(None), row(None)];
        assert!(rows[1].line().ends_with("was there"));
        let footer = footer(&rows, Duration::from_millis(1600), "/cache");
        assert_eq!(footer, "3 sets: 1 compiled in 1.6 s, 2 were there; 192 KiB in /cache");
    }
}
