//! The binary as its users meet it: flags and errors (`flags`), answers of a small checkpoint (`answers`), images in prompts
//! (`images`), `batch`, `bench` (its other measurements than throughput in `measurements`, its images in `bench_images`), `plan`,
//! `profiles` and `devices`, signals and terminals (`terminal`).

mod answers;
mod batch;
mod bench;
mod bench_images;
mod devices;
mod flags;
mod images;
mod measurements;
mod plan;
mod profiles;
mod terminal;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// A small Llama with random weights, a tokenizer, a chat template and default sampling.
fn model() -> String {
    data("chat-llama")
}

fn data(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    path.to_str().unwrap().to_owned()
}

/// The program with these flags, without the caller's settings of logs and colours, and with a cache of its own.
fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pipeline-infer"));
    command.args(args).env_remove("RUST_LOG").stdin(Stdio::null());
    // What tests measure is nobody's profile.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

fn run(args: &[&str]) -> Output {
    program(args).output().unwrap()
}

/// Runs with a text on stdin.
fn run_with(stdin: &str, args: &[&str]) -> Output {
    let mut child =
        program(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let text = stdin.to_owned();
    let writer = std::thread::spawn(move || {
        // A program that rejects its flags does not read.
        let _ = pipe.write_all(text.as_bytes());
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// Runs the small model with more flags.
fn ask(args: &[&str]) -> Output {
    run(&[&["--model", &model()], args].concat())
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Stdout of a run that went well.
fn good(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    stdout(output)
}

/// The JSON lines on stdout.
fn lines(output: &Output) -> Vec<Value> {
    stdout(output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The one JSON line of a run that went well.
fn json(output: &Output) -> Value {
    good(output);
    let mut lines = lines(output);
    assert_eq!(lines.len(), 1);
    lines.remove(0)
}

/// The one error line of a run that failed with this code.
fn error(output: &Output, code: i32) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("error: "), "{text}");
    assert_eq!(stdout(output), "");
    text
}
