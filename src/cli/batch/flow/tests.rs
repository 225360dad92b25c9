//! Answers that come out of order, faults of the engine, and signals, with an engine that is played.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use serde_json::Value;

use super::{super::results::Mode, *};
use crate::{
    cli::prompts::Content,
    request::{Event, FinishReason, Usage},
};

/// Plays an engine: what a prompt says is what becomes of it.
#[derive(Default)]
struct Played {
    submitted: Mutex<Vec<String>>,
    opened: AtomicUsize,
}

/// Events, and whether something comes after them.
struct Events(VecDeque<Event>, bool);

impl Stream for Events {
    fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, TimedOut> {
        match self.0.pop_front() {
            None if self.1 => {
                thread::sleep(timeout);
                Err(TimedOut)
            }
            event => Ok(event),
        }
    }

    fn cancel(&mut self) {}
}

impl Answerer for Played {
    fn open(&self, _: &Source) -> Result<Media> {
        self.opened.fetch_add(1, SeqCst);
        Ok(Media { width: 1, height: 1, frames: vec![vec![0; 3]].into(), seconds: None })
    }

    fn submit(&self, asked: Asked) -> Result<Underway> {
        let Content::Text(text) = asked.content else { panic!("{asked:?}") };
        let mut submitted = self.submitted.lock().unwrap();
        let before = submitted.iter().filter(|other| **other == text).count();
        submitted.push(text.clone());
        drop(submitted);
        let events = |events: Vec<Event>, more| Events(events.into(), more);
        let fault = Event::Error(Error::Engine("stage 1 failed".into()));
        let answer = |text: &str| {
            let token = Event::Token { sample: 0, id: 1, text: text.into(), logprobs: None };
            let usage = Usage::default();
            vec![token, Event::Finished { sample: 0, reason: FinishReason::Stop, text: String::new(), usage }]
        };
        let events = match &text[..] {
            "late" => {
                thread::sleep(Duration::from_millis(30));
                events(answer("late"), false)
            }
            "wrong" => return Err(Error::Request("wrong".into())),
            "gone" => return Err(Error::Engine("it has ended".into())),
            "endless" => events(Vec::new(), true),
            "once faulty" if before == 0 => events(vec![answer("half").remove(0), fault], false),
            "faulty" => events(vec![fault], false),
            other => events(answer(other), false),
        };
        Ok(Underway { events: Box::new(events), answer: Answer::new(vec![7], 1), bytes: 100 })
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        None
    }
}

/// Runs a batch of these prompts. How it has ended, the texts or errors in the results, and the engine.
fn play(prompts: &[&str], interrupt: &Interrupt) -> (Result<Ended>, Vec<String>, Arc<Played>) {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let lines: String = prompts.iter().map(|prompt| serde_json::json!(prompt).to_string() + "\n").collect();
    std::fs::write(&input, lines).unwrap();
    let items = Items::of_lines(&input, String::new()).unwrap().items;
    let (ended, lines, engine) = flow(items, output, interrupt);
    let told = |line: &Value| line["text"].as_str().or(line["error"].as_str()).unwrap().to_owned();
    (ended, lines.iter().map(told).collect(), engine)
}

fn flow(items: Items, output: PathBuf, interrupt: &Interrupt) -> (Result<Ended>, Vec<Value>, Arc<Played>) {
    let engine = Arc::new(Played::default());
    let mut results = Results::open(&output, Mode::New).unwrap();
    results.begin().unwrap();
    let progress = Progress::new(None, Done::default());
    let ended = Flow::start(engine.clone(), items, interrupt, progress).write_all(&mut results);
    let text = std::fs::read_to_string(output).unwrap();
    (ended, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), engine)
}

#[test]
fn results_are_in_order_whatever_comes_first() {
    let prompts = ["late", "b", "wrong", "late", "e"];
    let (ended, told, _) = play(&prompts, &Interrupt::detached());
    let ended = ended.unwrap();
    assert_eq!(told, ["late", "b", "request: wrong", "late", "e"]);
    assert_eq!((ended.items, ended.failed, ended.answered, ended.new_tokens), (5, 1, 4, 4));
    assert_eq!(ended.first_failure.as_deref(), Some("3: request: wrong"));
}

#[test]
fn what_the_engine_failed_at_is_asked_again_and_is_no_error_of_the_item() {
    let (ended, told, engine) = play(&["a", "once faulty", "c"], &Interrupt::detached());
    assert_eq!(ended.unwrap().failed, 0);
    assert_eq!(told, ["a", "once faulty", "c"], "nothing of the first try is left");
    assert_eq!(engine.submitted.lock().unwrap().iter().filter(|text| *text == "once faulty").count(), 2);
    for (prompt, why) in [
        (
            "faulty",
            "engine: stage 1 failed; item 2 was tried 3 times; 1 items are written, and --resume goes on with the rest",
        ),
        ("gone", "engine: it has ended; 1 items are written, and --resume goes on with the rest"),
    ] {
        let (ended, told, _) = play(&["a", prompt, "c"], &Interrupt::detached());
        assert_eq!(ended.unwrap_err().to_string(), why);
        assert_eq!(told, ["a"], "the item has no line, and is asked again by the next run");
    }
}

#[test]
fn a_signal_ends_what_nothing_finished_waits_for() {
    let interrupt = Interrupt::detached();
    interrupt.listen();
    let signal = interrupt.clone();
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(150));
        assert!(signal.signal());
    });
    let (ended, told, _) = play(&["a", "b", "endless", "endless"], &interrupt);
    let ended = ended.unwrap();
    assert!(ended.interrupted && ended.items == 2 && ended.failed == 0);
    assert_eq!(told, ["a", "b"]);
    thread.join().unwrap();
}

#[test]
fn an_image_is_opened_once_for_all_questions() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["1.png", "2.png", "3.png"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    let questions = ["a", "b", "wrong", "d"].map(str::to_owned);
    let named = [dir.path().to_str().unwrap().to_owned()];
    let items = Items::of_images(&named, &questions, String::new()).unwrap().items;
    let (ended, lines, engine) = flow(items, dir.path().join("out"), &Interrupt::detached());
    assert_eq!((ended.unwrap().items, lines.len()), (12, 12));
    assert_eq!(engine.opened.load(SeqCst), 3);
    assert!(
        lines.iter().filter(|line| line["question"] != "wrong").all(|line| line["text"] == line["question"])
    );
}
