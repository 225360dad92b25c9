//! The command line: one file a subcommand, in [`SUBCOMMANDS`]. Without a subcommand it is `run`.

mod answer;
mod asker;
mod attach;
mod batch;
mod bench;
mod chat;
mod choices;
mod compared;
mod completions;
mod devices;
mod gate;
mod interrupt;
mod loading;
mod man;
mod media;
mod output;
mod plan;
mod prompts;
mod run;
mod setup;
mod sides;
mod table;

use std::{
    io::{self, Write},
    panic,
    process::ExitCode,
    sync::LazyLock,
};

use clap::{
    Arg, ArgAction, ArgMatches, Command, Id, builder::EnumValueParser, error::ErrorKind, parser::ValueSource,
};

use crate::{
    error::{Error, Result, panics_are_expected},
    telemetry::{self, LogFormat},
};

/// Wrong usage: an unknown flag, a value that cannot be used, a request that cannot be served.
const EXIT_USAGE: u8 = 2;
/// Something is worse than it was.
const EXIT_WORSE: u8 = 3;
/// A signal ended it.
const EXIT_INTERRUPTED: u8 = 130;

/// Flags of all subcommands.
const VERBOSE: &str = "verbose";
const LOG_FORMAT: &str = "log_format";

/// A subcommand: its flags and what it does with them. What it answers is the exit code.
struct Subcommand {
    name: &'static str,
    about: &'static str,
    flags: fn(Command) -> Command,
    run: fn(&ArgMatches) -> Result<u8>,
}

/// All subcommands. The first one's flags work without its name, too.
const SUBCOMMANDS: &[Subcommand] = &[
    run::SUBCOMMAND,
    batch::SUBCOMMAND,
    bench::SUBCOMMAND,
    plan::SUBCOMMAND,
    devices::SUBCOMMAND,
    completions::SUBCOMMAND,
    man::SUBCOMMAND,
];

impl Subcommand {
    fn command(&self) -> Command {
        numbers((self.flags)(Command::new(self.name)).about(self.about))
    }
}

/// With negative numbers as values of all flags: an error then names the flag that does not take them.
fn numbers(command: Command) -> Command {
    command.mut_args(|arg| {
        let values = arg.get_num_args().is_none_or(|n| n.takes_values());
        let takes = values && matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
        if takes { arg.allow_negative_numbers(true) } else { arg }
    })
}

/// What this binary was built as.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    format!(
        "{} ({} {}, {profile} build; backends: cpu, cuda; oldest Rust: {})",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        std::env::consts::OS,
        env!("CARGO_PKG_RUST_VERSION"),
    )
});

/// Parses, runs, and tells the exit code: 0; 1 for data that is wrong; 2 for wrong usage; 101 for a bug;
/// 130 after a signal.
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(|info| match panics_are_expected() {
        true => tracing::debug!("caught: {}", bug(info)),
        false => complain(&bug(info)),
    }));
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        Err(e) => return ExitCode::from(answer_clap(&e)),
    };
    let code = dispatch(&matches).unwrap_or_else(|e| {
        complain(&e.to_string());
        e.exit_code()
    });
    interrupt::end_for_certain();
    ExitCode::from(code)
}

/// Runs the subcommand, or the first one where none is named.
fn dispatch(matches: &ArgMatches) -> Result<u8> {
    telemetry::init(matches.get_count(VERBOSE), log_format(matches))?;
    let Some((name, flags)) = matches.subcommand() else { return (SUBCOMMANDS[0].run)(matches) };
    let given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let of_all = |id: &&str| [VERBOSE, LOG_FORMAT].contains(id);
    if let Some(id) = matches.ids().map(Id::as_str).filter(given).find(|id| !of_all(id)) {
        let why = format!("it goes after the subcommand: pipeline-infer {name} …");
        return Err(Error::usage(flag_name(id), why));
    }
    let subcommand = SUBCOMMANDS.iter().find(|s| s.name == name);
    (subcommand.expect("clap knows only the registered subcommands; this is a bug").run)(flags)
}

/// `--top-p`, of the field `top_p`.
fn flag_name(field: &str) -> String {
    format!("--{}", field.replace('_', "-"))
}

/// The whole command line.
fn command() -> Command {
    let mut command = (SUBCOMMANDS[0].flags)(Command::new("pipeline-infer"))
        .about("Runs a transformer cut into pipeline stages over several devices.")
        .version(env!("CARGO_PKG_VERSION"))
        .long_version(VERSION.as_str())
        .subcommand_negates_reqs(true)
        .after_help(
            "Without a prompt: a chat on a terminal, else the prompt is read from stdin.\n\
             Exit codes: 0 done, 1 wrong data, 2 wrong usage, 101 a bug, 130 interrupted.",
        )
        .arg(
            Arg::new(VERBOSE)
                .short('v')
                .long("verbose")
                .action(ArgAction::Count)
                .global(true)
                .help_heading("Output")
                .help("Says more on stderr: -v what is loaded, -vv each request; RUST_LOG overrules it"),
        )
        .arg(
            Arg::new(LOG_FORMAT)
                .long("log-format")
                .value_name("FORMAT")
                .value_parser(EnumValueParser::<LogFormat>::new())
                .default_value("text")
                .global(true)
                .help_heading("Output")
                .help("How log lines on stderr look"),
        );
    command = command.subcommands(SUBCOMMANDS.iter().map(Subcommand::command));
    numbers(command)
}

fn log_format(matches: &ArgMatches) -> LogFormat {
    matches.get_one(LOG_FORMAT).copied().unwrap_or_default()
}

/// Prints help and versions as clap does, and errors as one line.
fn answer_clap(e: &clap::Error) -> u8 {
    match e.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nobody is left to tell if stdout is gone.
            let _ = e.print();
            0
        }
        _ => {
            complain(clap_line(&e.render().to_string()).trim_start_matches("error: "));
            EXIT_USAGE
        }
    }
}

/// Clap's message without the usage text and the pointer to --help.
fn clap_line(text: &str) -> String {
    let paragraphs = text.split("\n\n").map(one_line);
    let told = paragraphs.take_while(|p| !p.starts_with("Usage:") && !p.starts_with("For more information"));
    told.collect::<Vec<_>>().join("; ")
}

/// The panic's message and place; a panic is never the user's fault.
fn bug(info: &panic::PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic");
    let message = text.replace("; this is a bug", "");
    let place = info.location().map_or(String::new(), |l| format!(" at {}:{}", source(l.file()), l.line()));
    format!("this is a bug: {}{place}", one_line(&message))
}

/// A source file without the folders of the machine that it was built on.
fn source(file: &str) -> &str {
    match file.rfind("/src/") {
        Some(at) => &file[at + 1..],
        None if file.starts_with("src/") => file,
        None => file.rsplit('/').next().unwrap_or(file),
    }
}

/// One `error:` line on stderr, which may be gone.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "error: {}", one_line(message));
}

/// One line on stderr, which may be gone.
fn say(message: &str) {
    let _ = writeln!(io::stderr(), "{}", one_line(message));
}

/// Text that spans lines, as one.
fn one_line(text: &str) -> String {
    match text.contains(['\n', '\r']) {
        true => text.split_whitespace().collect::<Vec<_>>().join(" "),
        false => text.to_owned(),
    }
}

/// What a failed write to stdout means: a reader that has gone away ends the program quietly, as it does
/// for other tools.
fn stdout_failed(e: &io::Error) -> Result<u8> {
    match e.kind() {
        io::ErrorKind::BrokenPipe => Ok(0),
        _ => Err(Error::io("stdout", e)),
    }
}

/// Writes a whole text to stdout.
fn print(text: &[u8]) -> Result<u8> {
    let mut out = io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Ok(()) => Ok(0),
        Err(e) => stdout_failed(&e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn places_are_within_the_crate() {
        for (file, place) in [
            ("src/cli/mod.rs", "src/cli/mod.rs"),
            ("/home/me/registry/src/index-1/crate-1.0/src/a/b.rs", "src/a/b.rs"),
            ("/build/x/lib.rs", "lib.rs"),
        ] {
            assert_eq!(source(file), place);
        }
    }

    #[test]
    fn clap_errors_become_one_line() {
        let line = |args: &[&str]| {
            let e = command().try_get_matches_from(args).unwrap_err();
            clap_line(&e.render().to_string())
        };
        let unknown = line(&["pipeline-infer", "--modle", "x"]);
        assert!(unknown.starts_with("error: unexpected argument '--modle' found"), "{unknown}");
        assert!(unknown.contains("tip: ") && unknown.contains("'--model'"), "{unknown}");
        let missing = line(&["pipeline-infer"]);
        assert!(missing.contains("--model"), "{missing}");
        assert!(!missing.contains("Usage") && !missing.contains('\n'), "{missing}");
    }
}
