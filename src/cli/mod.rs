//! The command line: one file a subcommand.
use std::process::ExitCode;

/// Parses, runs, and tells the exit code.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
