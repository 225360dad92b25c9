//! What the program says about its own work: tracing, to stderr.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends tracing to stderr: warnings, more with each `-v`; `RUST_LOG` overrules the count.
///
/// Call it once, before any thread starts.
pub fn init(verbosity: u8, format: LogFormat) -> Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(directives) if !directives.is_empty() => EnvFilter::try_new(&directives)
            .map_err(|e| Error::usage(format!("RUST_LOG={directives}"), e.to_string()))?,
        _ => EnvFilter::new(level(verbosity)),
    };
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    // It would complain to stderr, and panic where stderr itself is gone.
    let subscriber = subscriber.log_internal_errors(false);
    let set = match format {
        LogFormat::Text => subscriber.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => subscriber.json().try_init(),
    };
    set.map_err(|e| Error::Engine(format!("tracing: {e}")))
}

/// Dependencies stay at warnings until everything is asked for.
fn level(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "warn",
        1 => "warn,pipeline_infer=info",
        2 => "warn,pipeline_infer=debug",
        _ => "trace",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_is_a_filter() {
        for verbosity in 0..5 {
            EnvFilter::try_new(level(verbosity)).unwrap();
        }
    }
}
