//! Logging of the command: to standard error, warnings by default, `-v` or `UNISONO_LOG` for more.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use unisono::settings;

use crate::Common;

/// Installs the subscriber and warns of `UNISONO_*` variables that nobody knows.
pub(crate) fn start(common: &Common) {
    let level = match (common.quiet, common.verbose) {
        (true, _) => Some("error"),
        (false, 0) => None,
        (false, 1) => Some("info"),
        (false, 2) => Some("debug"),
        (false, _) => Some("trace"),
    };
    install(level);
    let names: Vec<String> = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
    for (name, nearest) in settings::unknown_names(names.iter().map(String::as_str)) {
        match nearest {
            Some(nearest) => tracing::warn!("{name} is no setting of unisono; {nearest} is"),
            None => tracing::warn!("{name} is no setting of unisono"),
        }
    }
}

/// Installs the subscriber, for `level`, or else what `UNISONO_LOG` says, or else warnings.
pub(crate) fn install(level: Option<&str>) {
    let wanted = std::env::var("UNISONO_LOG").ok().filter(|filter| !filter.trim().is_empty());
    // An option of this command line says more than a variable that may have been set long ago.
    let filter = level.map(str::to_owned).or(wanted).unwrap_or_else(|| "warn".to_owned());
    let parsed = EnvFilter::try_new(&filter);
    let refused = parsed.as_ref().err().map(ToString::to_string);
    // Fails only if the calling program has a subscriber already, which is then the right one.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(parsed.unwrap_or_else(|_| EnvFilter::new("warn")))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .try_init();
    if let Some(refused) = refused {
        tracing::warn!("UNISONO_LOG={filter} cannot be read ({refused}); warnings are logged");
    }
}
