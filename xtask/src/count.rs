//! Reads how many tests passed and failed from the closing lines of `cargo nextest`, `cargo test` and pytest.

use std::ops::AddAssign;

/// Tests that passed and that did not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// What a closing line of `cargo test` reports; zeros for other lines.
pub(crate) fn cargo_test(line: &str) -> Count {
    match line.trim().strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) {
        Some((_, numbers)) => sum(numbers),
        None => Count::default(),
    }
}

/// What the closing line of `cargo nextest` reports; zeros for other lines, those of failed tests included.
pub(crate) fn nextest(line: &str) -> Count {
    match line.trim().strip_prefix("Summary [").and_then(|rest| rest.split_once(" run: ")) {
        // In brackets nextest tells more about those that it has counted already.
        Some((_, numbers)) => sum(&without_brackets(numbers)),
        None => Count::default(),
    }
}

/// What the closing line of pytest reports; zeros for other lines.
pub(crate) fn pytest(line: &str) -> Count {
    match line.trim().trim_matches(['=', ' ']).split_once(" in ") {
        Some((numbers, time)) if time.starts_with(|first: char| first.is_ascii_digit()) => sum(numbers),
        _ => Count::default(),
    }
}

fn sum(numbers: &str) -> Count {
    let mut count = Count::default();
    for piece in numbers.split([',', ';']) {
        let Some((number, outcome)) = piece.trim().split_once(' ') else {
            continue;
        };
        let Ok(number) = number.parse::<u64>() else {
            continue;
        };
        match outcome {
            "passed" => count.passed += number,
            "failed" | "exec failed" | "timed out" | "error" | "errors" => count.failed += number,
            _ => {}
        }
    }
    count
}

fn without_brackets(text: &str) -> String {
    let mut depth = 0_usize;
    text.chars()
        .filter(|letter| {
            match letter {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                _ => return depth == 0,
            }
            false
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_cargo_test_are_read() {
        let line =
            "test result: ok. 22 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.07s";
        assert_eq!(cargo_test(line), Count { passed: 22, failed: 0 });
        let line = "test result: FAILED. 9 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(cargo_test(line), Count { passed: 9, failed: 2 });
    }

    #[test]
    fn closing_lines_of_nextest_are_read() {
        let line = "     Summary [   0.512s] 86 tests run: 86 passed, 2 skipped";
        assert_eq!(nextest(line), Count { passed: 86, failed: 0 });
        let line = "     Summary [ 120.1s] 9/12 tests run: 4 passed (1 slow, 1 leaky), 3 failed, 1 exec failed, \
                    1 timed out, 0 skipped";
        assert_eq!(nextest(line), Count { passed: 4, failed: 5 });
        assert_eq!(
            nextest("     Summary [   0.1s] 1 test run: 1 passed, 0 skipped"),
            Count { passed: 1, failed: 0 }
        );
    }

    #[test]
    fn closing_lines_of_pytest_are_read() {
        assert_eq!(pytest("218 passed, 1 skipped in 16.13s"), Count { passed: 218, failed: 0 });
        let line = "==== 2 failed, 45 passed, 1 error in 72.30s (0:01:12) ====";
        assert_eq!(pytest(line), Count { passed: 45, failed: 3 });
        assert_eq!(pytest("FAILED a.py::test - 3 passed, 1 failed in the end"), Count::default());
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(nextest("    test result: FAILED. 0 passed; 1 failed; 0 ignored"), Count::default());
        for line in ["", "running 3 tests", "test a ... ok", "3 passed, 1 failed", "    Finished in 3 s"] {
            assert_eq!(cargo_test(line), Count::default(), "{line}");
            assert_eq!(nextest(line), Count::default(), "{line}");
            assert_eq!(pytest(line), Count::default(), "{line}");
        }
    }
}
