//! The table that people read, a line per size as it is measured.

use anstyle::{AnsiColor, Style};

use unisono::settings::format_size;

use super::record::Measured;

pub(super) const HEADING: Style = Style::new().bold();
pub(super) const WRONG: Style = AnsiColor::Red.on_default().bold();

/// `all_reduce f32 sum · 2 processes · shared memory`, and the names of the columns.
pub(super) fn heading(title: &str) -> String {
    let columns = format!(
        "{:>10}  {:<11} {:>11} {:>11} {:>9} {:>9}  {}",
        "bytes", "algorithm", "p50", "p99", "algbw", "busbw", "ok"
    );
    format!("{HEADING}{title}{HEADING:#}\n{columns}")
}

/// One size.
pub(super) fn row(measured: &Measured) -> String {
    let ok = match measured.wrong {
        0 => "ok".to_owned(),
        wrong => format!("{WRONG}{wrong} WRONG{WRONG:#}"),
    };
    format!(
        "{:>10}  {:<11} {:>11} {:>11} {:>9} {:>9}  {ok}",
        format_size(measured.bytes),
        measured.algorithm,
        time(measured.p50_us),
        time(measured.p99_us),
        bandwidth(measured.algbw),
        bandwidth(measured.busbw),
    )
}

/// `44 sizes verified, 0 wrong`.
pub(super) fn footer(sizes: usize, wrong: usize) -> String {
    let style = if wrong > 0 { WRONG } else { Style::new() };
    format!("{style}{sizes} sizes verified, {wrong} wrong{style:#}")
}

/// GB/s, if there is such a figure.
pub(super) fn bandwidth(value: f64) -> String {
    if value > 0.0 { format!("{value:.2}") } else { "–".to_owned() }
}

/// A time, in the unit that fits.
pub(super) fn time(us: f64) -> String {
    match us {
        us if us < 10.0 => format!("{us:.2} µs"),
        us if us < 1000.0 => format!("{us:.1} µs"),
        us => format!("{:.2} ms", us / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(wrong: u64) -> Measured {
        Measured {
            operation: "all_reduce".into(),
            bytes: 65_536,
            algorithm: "two-shot".into(),
            calls: 1000,
            batch: 1,
            p50_us: 5.901,
            p99_us: 1234.5,
            min_us: 5.0,
            algbw: 11.1,
            busbw: 11.1,
            wrong,
        }
    }

    #[test]
    fn columns_stand_below_their_names() {
        let heading = anstream::adapter::strip_str(&heading("x")).to_string();
        let row = anstream::adapter::strip_str(&row(&measured(0))).to_string();
        assert_eq!(row, "    64 KiB  two-shot        5.90 µs     1.23 ms     11.10     11.10  ok");
        let columns = heading.lines().nth(1).unwrap();
        assert_eq!(columns.find("ok"), Some(row.char_indices().count() - 2));
    }

    #[test]
    fn wrong_sizes_are_counted_and_said() {
        let plain = |text: String| anstream::adapter::strip_str(&text).to_string();
        assert!(plain(row(&measured(3))).ends_with("3 WRONG"));
        assert_eq!(plain(footer(2, 1)), "2 sizes verified, 1 wrong");
    }
}
