//! Signals, closed pipes and terminals.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io::{BufReader, Read},
    os::fd::{FromRawFd, OwnedFd},
    process::Child,
    ptr,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;

/// A model that answers long enough to be interrupted: random weights, the small model's tokenizer.
fn slow_model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("{}/{name}", model()), folder.path().join(name)).unwrap();
    }
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
        "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "torch_dtype": "float32", "eos_token_id": 2, "hidden_act": "silu"}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

fn slow_flags(folder: &TempDir) -> Vec<&str> {
    let path = folder.path().to_str().unwrap();
    vec!["--model", path, "--weights", "dummy", "--ignore-eos", "--max-tokens", "8000", "--stages", "2"]
}

fn interrupt(child: &Child) {
    // SAFETY: the call touches no memory; the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id().try_into().unwrap(), libc::SIGINT) }, 0);
}

#[test]
fn an_interrupted_run_shows_what_there_is() {
    let folder = slow_model();
    let flags = [&slow_flags(&folder)[..], &["--prompt", "Hello"]].concat();
    let mut child = program(&flags).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(output.stdout.last(), Some(&b'\n'));
    assert!(stderr(&output).contains("new tokens"), "{}", stderr(&output));
}

#[test]
fn an_interrupted_file_shows_what_each_prompt_has() {
    let folder = slow_model();
    let flags = [&slow_flags(&folder)[..], &["--prompt-file", "-", "--format", "json"]].concat();
    let mut child =
        program(&flags).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"{\"prompt\": \"a\", \"max_tokens\": 1}\n\"b\"\n\"c\"\n").unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    std::io::BufRead::read_line(&mut stdout, &mut text).unwrap();
    interrupt(&child);
    stdout.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let reasons: Vec<&Value> = lines.iter().map(|l| &l["finish_reason"]).collect();
    assert_eq!(reasons, ["length", "cancelled", "cancelled"]);
    drop(stdin);
}

#[test]
fn a_closed_pipe_ends_an_answer_quietly() {
    let folder = slow_model();
    let flags = [&slow_flags(&folder)[..], &["--prompt", "Hello"]].concat();
    let mut child = program(&flags).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &stderr(&output)[..]), (Some(0), ""));
}

/// The program on a terminal of its own.
struct Session {
    child: Child,
    terminal: File,
    seen: String,
}

impl Session {
    fn start(args: &[&str]) -> Session {
        let (mut ours, mut theirs) = (0, 0);
        // SAFETY: both numbers are written before the call returns; name, modes and size may be null.
        let opened = unsafe {
            libc::openpty(&mut ours, &mut theirs, ptr::null_mut(), ptr::null_mut(), ptr::null_mut())
        };
        assert_eq!(opened, 0, "openpty: {}", std::io::Error::last_os_error());
        // SAFETY: openpty has just made both, and nobody else owns them.
        let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
        let copy = || Stdio::from(theirs.try_clone().unwrap());
        let child =
            program(args).env("TERM", "xterm").stdin(copy()).stdout(copy()).stderr(copy()).spawn().unwrap();
        Session { child, terminal: File::from(ours), seen: String::new() }
    }

    fn send(&mut self, text: &str) {
        self.terminal.write_all(text.as_bytes()).unwrap();
    }

    /// Reads until this is shown, and forgets what came before it.
    fn wait_for(&mut self, text: &str) {
        let started = Instant::now();
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{text:?} is not in {:?}", self.seen);
            let mut bytes = [0; 4096];
            match self.terminal.read(&mut bytes) {
                Ok(count) if count > 0 => self.seen += &String::from_utf8_lossy(&bytes[..count]),
                end => panic!("{end:?}: {text:?} is not in {:?}", self.seen),
            }
        }
    }

    /// The program's exit code, once it has ended by itself.
    fn code(mut self) -> Option<i32> {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill().unwrap();
        panic!("it goes on; it has shown {:?}", self.seen);
    }
}

#[test]
fn a_conversation_on_a_terminal() {
    let mut session = Session::start(&["--model", &model(), "--max-tokens", "8", "--max-context", "96"]);
    session.wait_for("Ctrl-D leaves.");
    session.wait_for("> ");
    session.send("Hello\r");
    session.wait_for("\n");
    session.wait_for("> ");
    session.send("half a line\x03");
    session.wait_for("> ");
    session.send("/help\r");
    session.wait_for("forgets the conversation");
    session.send("/reset\r");
    session.wait_for("The conversation is forgotten.");
    session.send(&format!("{}\r", "long ".repeat(60)));
    session.wait_for("error: request: ");
    session.wait_for("> ");
    session.send("\x04");
    assert_eq!(session.code(), Some(0));
}

#[test]
fn a_conversation_about_images() {
    let (model, odd, frames) = (data("qwen2_5_vl"), data("vision/odd.png"), data("qwen2_5_vl/frames"));
    let flags = ["--model", &model, "--max-tokens", "4", "--ignore-eos", "--image", &odd];
    let mut session = Session::start(&flags);
    session.wait_for("odd.png: 84x56 pixels, 6 tokens, go with the next message.");
    let mut say = |line: &str, answers: &[&str]| {
        session.wait_for("> ");
        session.send(&format!("{line}\r"));
        answers.iter().for_each(|answer| session.wait_for(answer));
    };
    say(
        &format!("/video {frames} 2"),
        &["frames: 4 frames of 84x56 pixels, 12 tokens, go with the next message."],
    );
    say("/image", &["odd.png: 84x56 pixels, 6 tokens\r\n", "12 tokens\r\n"]);
    say("/image /no/such.png", &["error: /no/such.png: No such file"]);
    say("What is this?", &["(cut off"]);
    say("/image", &["Nothing is attached"]);
    session.wait_for("> ");
    session.send("\x04");
    assert_eq!(session.code(), Some(0));
}

#[test]
fn a_bar_shows_how_far_a_batch_is() {
    let (folder, place) = (slow_model(), tempfile::tempdir().unwrap());
    let [input, output] = ["in", "out"].map(|name| place.path().join(name).to_str().unwrap().to_owned());
    std::fs::write(&input, "\"one\"\n{\"prompt\": 2}\n\"three\"\n\"four\"\n").unwrap();
    let model = folder.path().to_str().unwrap();
    let flags =
        ["--model", model, "--weights", "dummy", "--ignore-eos", "--max-tokens", "150", "--running", "1"];
    let mut session =
        Session::start(&[&["batch", "--input", &input, "--output", &output][..], &flags].concat());
    session.wait_for("batch [");
    session.wait_for("0 of 4");
    session.wait_for("2 of 4, ");
    session.wait_for("/s, ");
    session.wait_for(" left, 1 failed");
    session.wait_for("error: 1 of 4 items failed");
    assert_eq!(session.code(), Some(1));
}

#[test]
fn a_bar_shows_how_far_loading_is() {
    let folder = slow_model();
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    // 126 million random numbers take longer than what shows nothing.
    let text = text.replace("\"hidden_size\": 256", "\"hidden_size\": 1024");
    let text = text.replace("\"intermediate_size\": 1024", "\"intermediate_size\": 4096");
    std::fs::write(&config, text.replace("float32", "bfloat16")).unwrap();
    let mut session = Session::start(&[&slow_flags(&folder)[..], &["--device", "cpu"]].concat());
    session.wait_for("loading weights [");
    session.wait_for(" of 0.25 GB, ");
    session.wait_for("Ctrl-D leaves.");
    session.wait_for("> ");
    assert!(!session.seen.contains("loading"), "{:?}", session.seen);
    session.send("\x04");
    assert_eq!(session.code(), Some(0));
}

#[test]
fn ctrl_c_stops_an_answer_and_the_conversation_goes_on() {
    let folder = slow_model();
    let mut session = Session::start(&slow_flags(&folder));
    // A bar has an arrow, too.
    session.wait_for("Ctrl-D leaves.");
    session.wait_for("> ");
    session.send("Hello\r");
    session.wait_for("\n");
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&session.child);
    session.wait_for("(stopped)");
    session.wait_for("> ");
    session.send("\x04");
    assert_eq!(session.code(), Some(0));
}

#[test]
fn a_conversation_is_text_and_has_one_answer() {
    for (flags, needle) in [(&["--format", "json"][..], "--format json"), (&["--n", "2"], "--n")] {
        let mut session = Session::start(&[&["--model", "x"], flags].concat());
        session.wait_for("error: ");
        session.wait_for(needle);
        assert_eq!(session.code(), Some(2));
    }
}
