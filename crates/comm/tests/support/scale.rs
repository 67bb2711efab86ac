//! How much a test repeats: the one setting of all campaigns.

/// How much more often than by default repeatable tests repeat.
pub(crate) fn scale() -> usize {
    std::env::var("UNISONO_TEST_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1).max(1)
}
