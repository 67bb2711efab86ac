//! Keeps `docs/src/settings.md` true: it is the table of `unisono_core::settings` and nothing else.
//!
//! When a setting changes, `UNISONO_BLESS=1 cargo test -p unisono-core --test settings_document` writes the file anew.

use std::path::Path;

use unisono_core::settings::markdown;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/src/settings.md");
const OPENING: &str = "\
# Settings

The methods of the builder and the options of the command line stand above these variables, and these above the tuning
file (`unisono tune`) and the defaults. `unisono doctor --env` shows them with their values in your shell.
A value that cannot be read is an error that says what was expected. A `UNISONO_*` name that is no setting is a warning,
with the nearest name that is one. Rows that end with “The same on all ranks” are compared when the ranks meet; ranks
that differ are refused, and the error names both sides.

This page is written by a test from the table in `crates/core/src/settings.rs`.

";

#[test]
fn the_document_is_what_the_table_says() {
    let text = OPENING.to_owned() + &markdown();
    if std::env::var_os("UNISONO_BLESS").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(Path::new(PATH).parent().unwrap()).unwrap();
        std::fs::write(PATH, &text).unwrap();
    }
    let document = std::fs::read_to_string(PATH).unwrap();
    for (ours, written) in text.lines().zip(document.lines()) {
        assert_eq!(ours, written, "write it anew with UNISONO_BLESS=1");
    }
    assert_eq!(text, document, "write it anew with UNISONO_BLESS=1");
}
