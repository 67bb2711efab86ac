//! `bench all_reduce_rms_norm`: what is measured of each number of tokens, as data and as lines of the table.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::table::{HEADING, WRONG, time};

/// What normalised rows are written as.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Output {
    /// The element type
    Same,
    /// f8e4m3, with one scale that is given
    Fp8,
    /// f8e4m3, with a scale of each token's own
    Fp8PerToken,
}

impl Output {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Fp8 => "fp8",
            Self::Fp8PerToken => "fp8_per_token",
        }
    }
}

/// One number of tokens. Times are microseconds per call in a CUDA graph: medians over rounds of the slowest rank.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct OnRows {
    pub(crate) tokens: u64,
    /// Elements of a row.
    pub(crate) hidden: u64,
    /// Bytes that each rank contributes to the sum.
    pub(crate) bytes: u64,
    /// What comes out: `same`, `fp8` or `fp8_per_token`.
    pub(crate) output: String,
    /// The form of the call, or of the all-reduce that it begins with, and its blocks.
    pub(crate) form: String,
    pub(crate) blocks: u32,
    /// Timed rounds, and calls of each.
    pub(crate) rounds: u64,
    pub(crate) batch: u64,
    /// Sum, residual and norm in one call.
    pub(crate) fused_us: f64,
    /// The sum alone.
    pub(crate) all_reduce_us: f64,
    /// How much longer the one call takes than the sum alone.
    pub(crate) difference_us: f64,
    /// The sum, and the rest in a kernel of its own behind it.
    pub(crate) separate_us: f64,
    /// Bytes of residuals, outputs and scales that were wrong, over all ranks.
    pub(crate) wrong: u64,
}

/// The title, and the names of the columns.
pub(super) fn heading(title: &str) -> String {
    format!(
        "{HEADING}{title}{HEADING:#}\n{:>8} {:>12} {:>10} {:>10} {:>10} {:>10}  {:<14} {}",
        "tokens", "bytes", "fused", "all-reduce", "difference", "separate", "form × blocks", "ok"
    )
}

/// One number of tokens.
pub(super) fn row(measured: &OnRows) -> String {
    let grid = format!("{} × {}", measured.form, measured.blocks);
    let ok = match measured.wrong {
        0 => "ok".to_owned(),
        wrong => format!("{WRONG}{wrong} WRONG{WRONG:#}"),
    };
    format!(
        "{:>8} {:>12} {:>10} {:>10} {:>7.2} µs {:>10}  {grid:<14} {ok}",
        measured.tokens,
        unisono::settings::format_size(measured.bytes),
        time(measured.fused_us),
        time(measured.all_reduce_us),
        measured.difference_us,
        time(measured.separate_us),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn columns_stand_below_their_names_and_what_is_wrong_is_said() {
        let measured = OnRows {
            tokens: 16,
            hidden: 8192,
            bytes: 256 << 10,
            output: "same".into(),
            form: "two-shot".into(),
            blocks: 64,
            rounds: 9,
            batch: 100,
            fused_us: 9.5,
            all_reduce_us: 10.0,
            difference_us: -0.5,
            separate_us: 14.0,
            wrong: 0,
        };
        let heading = plain(&heading("x"));
        let columns = heading.lines().nth(1).unwrap();
        let line = plain(&row(&measured));
        assert_eq!(columns.chars().count(), line.chars().count(), "{columns}\n{line}");
        assert!(line.contains(" -0.50 µs ") && line.contains("two-shot × 64"), "{line}");
        assert!(plain(&row(&OnRows { wrong: 3, ..measured })).ends_with("3 WRONG"));
    }
}
