//! Durations and sizes as people write them: `30s`, `1.5m`, `16MiB`. Exact integer arithmetic; what does not fit or is
//! ambiguous (`16MB`: 10⁶ or 2²⁰?) is refused.

use std::time::Duration;

/// Units of time and their length in nanoseconds. Longer suffixes stand before those they end with.
const TIME_UNITS: [(&str, u128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("ms", 1_000_000),
    ("min", 60_000_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Units of size. `B` comes last because the others end with it.
const SIZE_UNITS: [(&str, u128); 5] =
    [("KIB", 1 << 10), ("MIB", 1 << 20), ("GIB", 1 << 30), ("TIB", 1 << 40), ("B", 1)];

/// Reads `30s`, `500ms`, `2m` (or `2min`), `1h`, `20us`, `1.5s`; a plain number is seconds.
///
/// ```
/// # use std::time::Duration;
/// # use unisono_core::settings::parse_duration;
/// assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
/// assert_eq!(parse_duration("2m"), parse_duration("120"));
/// assert_eq!(parse_duration("soon"), None);
/// ```
pub fn parse_duration(text: &str) -> Option<Duration> {
    let nanoseconds = scaled(text.trim(), &TIME_UNITS, 1_000_000_000)?;
    let seconds = u64::try_from(nanoseconds / 1_000_000_000).ok()?;
    Some(Duration::new(seconds, (nanoseconds % 1_000_000_000) as u32))
}

/// Like [`parse_duration`]; `never` and `off` are `Some(None)`.
pub fn parse_duration_or_never(text: &str) -> Option<Option<Duration>> {
    match text.trim() {
        "never" | "off" => Some(None),
        text => parse_duration(text).map(Some),
    }
}

/// A duration above zero.
pub(super) fn positive(text: &str) -> Option<Duration> {
    parse_duration(text).filter(|duration| !duration.is_zero())
}

/// Reads `16MiB`, `64KiB`, `1GiB`, `2TiB`, `100B` in any case; a plain number is bytes.
///
/// ```
/// # use unisono_core::settings::parse_size;
/// assert_eq!(parse_size("16MiB"), Some(16 << 20));
/// assert_eq!(parse_size("16MB"), None);
/// ```
pub fn parse_size(text: &str) -> Option<u64> {
    let bytes = scaled(&text.trim().to_ascii_uppercase(), &SIZE_UNITS, 1)?;
    u64::try_from(bytes).ok()
}

/// Writes `64 KiB`, or plain bytes where that is no whole number.
///
/// ```
/// # use unisono_core::settings::format_size;
/// assert_eq!([8, 1024, 1025, 64 << 20].map(format_size), ["8 B", "1 KiB", "1025 B", "64 MiB"]);
/// ```
pub fn format_size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// `number [unit]` in the smallest unit; digits after the point that are finer than that are refused.
fn scaled(text: &str, units: &[(&str, u128)], plain_unit: u128) -> Option<u128> {
    let unit = units.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)));
    let (number, unit) = unit.unwrap_or((text, plain_unit));
    let (whole, fraction) = number.trim_end().split_once('.').unwrap_or((number.trim_end(), ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 12 {
        return None;
    }
    if number.trim_end().ends_with('.') {
        return None;
    }
    let mut value = whole.parse::<u128>().ok()?.checked_mul(unit)?;
    if !fraction.is_empty() {
        let numerator = fraction.parse::<u128>().ok()?.checked_mul(unit)?;
        let denominator = 10_u128.pow(fraction.len() as u32);
        if !numerator.is_multiple_of(denominator) {
            return None;
        }
        value = value.checked_add(numerator / denominator)?;
    }
    Some(value)
}
