//! Tests of the settings: the table, the parsers, the sentences.

use std::collections::HashMap;

use proptest::prelude::*;

use crate::device::{Form, Wish};

use super::*;

fn from(pairs: &[(&str, &str)]) -> Result<Settings> {
    let map: HashMap<String, String> =
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Settings::from_lookup(&|name| map.get(name).cloned())
}

#[test]
fn without_variables_the_defaults_hold() {
    assert_eq!(from(&[]).unwrap(), Settings::default());
    assert_eq!(from(&[("UNISONO_TIMEOUT", ""), ("UNISONO_STORE", " ")]).unwrap(), Settings::default());
}

#[test]
fn the_defaults_in_the_table_are_the_defaults_of_the_code() {
    let written: Vec<(&str, &str)> = SETTINGS.iter().map(|row| (row.name, row.default)).collect();
    assert_eq!(from(&written).unwrap(), Settings::default());
}

#[test]
fn every_setting_is_read_into_its_own_field() {
    let settings = from(&[
        ("UNISONO_LOG", "debug,mio=warn"),
        ("UNISONO_TIMEOUT", "2m"),
        ("UNISONO_INIT_TIMEOUT", "60s"),
        ("UNISONO_LIVENESS", "500ms"),
        ("UNISONO_WARN_AFTER", "never"),
        ("UNISONO_ALGORITHM", "two-shot"),
        ("UNISONO_ORDER", "rank"),
        ("UNISONO_TUNE_FILE", "/etc/Unisono.tune"),
        ("UNISONO_REQUIRE", "AUTH"),
        ("UNISONO_STORE", "tcp://Head:29500"),
        ("UNISONO_INTERFACE", "ens5"),
        ("UNISONO_SPIN", "50us"),
        ("UNISONO_RECORDER", "off"),
        ("UNISONO_GPU_ALGORITHM", "bulk:32"),
        ("UNISONO_MULTIPROCESSORS", "16"),
        ("UNISONO_PEER_ACCESS", "off"),
        ("UNISONO_PINNED", "numa"),
        ("UNISONO_HANDLES", "Fabric"),
        ("UNISONO_GPU_LAUNCH", "both"),
    ]);
    let expected = Settings {
        log: "debug,mio=warn".to_owned(),
        timeout: Some(Duration::from_secs(120)),
        init_timeout: Duration::from_secs(60),
        liveness: Duration::from_millis(500),
        warn_after: None,
        algorithm: AlgorithmChoice::TwoShot,
        order: Order::Rank,
        tune_file: Some("/etc/Unisono.tune".to_owned()),
        require: Require::Auth,
        store: Some("tcp://Head:29500".to_owned()),
        interface: Some("ens5".to_owned()),
        spin: Spin::For(Duration::from_micros(50)),
        recorder: false,
        gpu_algorithm: Some(Wish { form: Form::Bulk, blocks: 32, tile: 0 }),
        multiprocessors: Some(16),
        peer_access: false,
        pinned: PinnedWay::Numa,
        handles: HandleKind::Fabric,
        gpu_launch: GpuLaunch::Both,
    };
    assert_eq!(settings.unwrap(), expected);
}

#[test]
fn a_cap_on_multiprocessors_leaves_enough_to_work_with() {
    assert_eq!(from(&[("UNISONO_MULTIPROCESSORS", "9")]).unwrap().multiprocessors, Some(9));
    for wrong in ["8", "0", "-1", "+16", "half", "4294967296"] {
        let error = from(&[("UNISONO_MULTIPROCESSORS", wrong)]).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "UNISONO_MULTIPROCESSORS={wrong} cannot be read: expected auto, or a whole number from 9"
            )
        );
    }
}

#[test]
fn every_word_of_a_choice_is_accepted_and_no_other() {
    for row in SETTINGS {
        if let ValueKind::Choice(words, _) = row.kind {
            for word in words {
                assert!(from(&[(row.name, word)]).is_ok(), "{}={word}", row.name);
            }
            assert!(matches!(from(&[(row.name, "nonsense")]), Err(Error::Setting { .. })), "{}", row.name);
        }
    }
}

#[test]
fn exactly_the_agreed_settings_change_the_agreement() {
    let changed = |name: &str| match find(name).unwrap().kind {
        ValueKind::Choice(words, _) => {
            words.iter().find(|word| **word != find(name).unwrap().default).unwrap()
        }
        ValueKind::Text(_) if name == "UNISONO_GPU_ALGORITHM" => "ring",
        ValueKind::Text(_) if name == "UNISONO_MULTIPROCESSORS" => "9",
        ValueKind::Text(_) => "x",
        _ => "7s",
    };
    let base = Settings::default().agreement_bytes(None);
    assert_eq!(base, b"algorithm=auto\norder=fixed\ntuning=none\ngpu=auto\npeer_access=on\n");
    let tuning = Tuning::new("this machine", std::collections::BTreeMap::new());
    for row in SETTINGS {
        let settings = from(&[(row.name, changed(row.name))]).unwrap();
        // A file counts by what it holds, wherever it lies.
        let other = settings.agreement_bytes(settings.tune_file.as_ref().map(|_| &tuning));
        assert_eq!(other != base, row.agreed, "{}", row.name);
    }
}

#[test]
fn durations_are_read_as_people_write_them() {
    let millis = |text| parse_duration(text).map(|duration| duration.as_millis());
    for (text, expected) in
        [("30s", 30_000), ("500ms", 500), ("2m", 120_000), ("2min", 120_000), ("1h", 3_600_000), ("7", 7_000)]
    {
        assert_eq!(millis(text), Some(expected), "{text}");
    }
    assert_eq!(parse_duration("20us"), parse_duration("20µs"));
    assert_eq!(parse_duration("0.25"), Some(Duration::from_millis(250)));
    assert_eq!(parse_duration(" 3 s "), Some(Duration::from_secs(3)));
    for text in
        ["", "s", "-1s", "1e3", "inf", "NaN", "1.s", ".5s", "1,5s", "1h30m", "0.1ns", "99999999999999999999h"]
    {
        assert_eq!(parse_duration(text), None, "{text}");
    }
    assert_eq!(parse_duration_or_never("never"), Some(None));
    assert_eq!(parse_duration_or_never("off"), Some(None));
    assert_eq!(parse_duration("never"), None);
}

#[test]
fn sizes_are_read_as_people_write_them() {
    for (text, expected) in [
        ("16MiB", 16 << 20),
        ("64KiB", 64 << 10),
        ("1gib", 1 << 30),
        ("2TiB", 2 << 40),
        ("100B", 100),
        ("4096", 4096),
    ] {
        assert_eq!(parse_size(text), Some(expected), "{text}");
    }
    assert_eq!(parse_size("1.5KiB"), Some(1536));
    for text in ["", "MiB", "16MB", "16M", "-1", "0.3B", "99999999TiB"] {
        assert_eq!(parse_size(text), None, "{text}");
    }
}

#[test]
fn waits_that_guard_the_job_cannot_be_turned_off() {
    for name in ["UNISONO_INIT_TIMEOUT", "UNISONO_LIVENESS"] {
        for value in ["never", "off", "0", "0ms"] {
            assert!(matches!(from(&[(name, value)]), Err(Error::Setting { .. })), "{name}={value}");
        }
    }
}

#[test]
fn a_value_that_cannot_be_read_says_what_was_expected() {
    let sentence = |name, value| from(&[(name, value)]).unwrap_err().to_string();
    assert_eq!(
        sentence("UNISONO_INIT_TIMEOUT", "soon"),
        "UNISONO_INIT_TIMEOUT=soon cannot be read: expected a duration such as 30s, 500ms, 2m or 1h"
    );
    assert_eq!(
        sentence("UNISONO_TIMEOUT", "-1"),
        "UNISONO_TIMEOUT=-1 cannot be read: expected a duration such as 30s, 500ms, 2m or 1h, or never"
    );
    assert_eq!(
        sentence("UNISONO_ALGORITHM", "ring"),
        "UNISONO_ALGORITHM=ring cannot be read: expected auto, one-shot, two-shot or direct"
    );
    assert_eq!(
        sentence("UNISONO_PINNED", "hugetlb"),
        "UNISONO_PINNED=hugetlb cannot be read: expected auto, memfd or numa"
    );
    assert_eq!(
        sentence("UNISONO_SPIN", "a lot"),
        "UNISONO_SPIN=a lot cannot be read: expected a duration such as 50us or 1ms, or auto"
    );
}

#[test]
fn the_documentation_has_a_row_for_every_public_setting() {
    let text = markdown();
    for row in SETTINGS {
        assert!(row.name.starts_with("UNISONO_") && row.meaning.ends_with('.'), "{}", row.name);
        assert_eq!(text.contains(&format!("| `{}` |", row.name)), !row.internal, "{}", row.name);
        assert_eq!(SETTINGS.iter().filter(|other| other.name == row.name).count(), 1, "{}", row.name);
    }
    assert!(text.contains(
        "| `UNISONO_ORDER` | fixed or rank | `fixed` | The order of sums: fixed is the same in every run; rank is \
         strictly 0 to n − 1, whatever the algorithm. The same on all ranks. |"
    ));
}

proptest! {
    #[test]
    fn no_text_makes_a_parser_panic(text in "\\PC*") {
        let _ = (parse_duration(&text), parse_duration_or_never(&text), parse_size(&text));
        let _ = unknown_names([text.as_str(), &format!("UNISONO_{text}")].into_iter());
    }

    #[test]
    fn whole_numbers_of_every_unit_round_trip(count in 0_u64..1_000_000) {
        prop_assert_eq!(parse_duration(&format!("{count}ms")), Some(Duration::from_millis(count)));
        prop_assert_eq!(parse_duration(&format!("{count}m")), Some(Duration::from_secs(count * 60)));
        prop_assert_eq!(parse_size(&format!("{count}KiB")), Some(count << 10));
    }
}
