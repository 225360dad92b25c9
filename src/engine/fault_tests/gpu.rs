//! The same on GPUs, if there are any: stages whose host fails are built anew, and give the same tokens in no more memory.

use std::{io::Write as _, process::Command};

use super::*;
use crate::backend::cuda;

/// Set in a child process, which is to do it: what fails there are the stages of all its engines.
const CHILD: &str = "PIPELINE_INFER_TEST_GPU_FAULTS";
const NAME: &str = "engine::fault_tests::gpu::stages_on_gpus_are_built_anew";
/// Engines of each layout, and how often each is built anew; a third fault within a minute would end it.
const ENGINES: usize = 3;
const FAULTS: [Kind; 2] = [Kind::DeviceError, Kind::Panic];
/// What a driver may take for itself meanwhile.
const SLACK: usize = 32 << 20;

#[test]
fn stages_on_gpus_are_built_anew() {
    if std::env::var_os(CHILD).is_some() {
        return several_on_one_and_on_several();
    }
    if cuda::devices().map_or(0, <[_]>::len) == 0 {
        assert!(std::env::var_os("PIPELINE_INFER_REQUIRE_GPU").is_none(), "there is no GPU");
        // Not by `println!`, which is shown for failing tests alone.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no GPU");
        return;
    }
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (said(&run.stdout), said(&run.stderr));
    assert!(run.status.success() && out.contains("1 passed"), "{}:\n{out}\n{err}", run.status);
    println!("{out}");
}

fn several_on_one_and_on_several() {
    let gpus = cuda::devices().unwrap().len();
    let mut layouts = vec!["0@cuda:0,1@cuda:0,2-3@cuda:0".to_owned()];
    if gpus > 1 {
        layouts.push(format!("0@cuda:0,1@cuda:1,2-3@cuda:{}", 2 % gpus));
    }
    for layout in layouts {
        let answers = |engine| {
            let of = layout.clone();
            watched(format!("{layout}, engine {engine}"), move || built_anew(&of, engine))
        };
        let answers: Vec<_> = (0..ENGINES).map(answers).collect();
        assert!(answers.iter().all(|tokens| *tokens == answers[0]), "{layout}: {answers:?}");
    }
}

fn on_gpus(layout: &str) -> Engine {
    let root = std::env::var_os("PIPELINE_INFER_ROOT")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let builder = Engine::builder().model(root.join("tests/data/chat-llama")).layout(layout.parse().unwrap());
    builder.running(2).max_context(128).kv_memory(64 << 20).build().unwrap()
}

/// The tokens of some requests, one after another: company may change last bits.
fn alone(engine: &Engine) -> Vec<Vec<u32>> {
    (0..3).map(|i| ended(engine.submit(request(i, ANSWER)).unwrap()).0).collect()
}

fn free() -> Vec<usize> {
    (0..cuda::devices().unwrap().len()).map(|gpu| cuda::free_bytes(gpu).unwrap()).collect()
}

/// Lets stages of an engine fail, in turn; the tokens that it always gives.
fn built_anew(layout: &str, turn: usize) -> Vec<Vec<u32>> {
    let engine = on_gpus(layout);
    let (want, before) = (alone(&engine), free());
    for (i, kind) in FAULTS.into_iter().enumerate() {
        // A panic and an error of each stage, over the engines; the last stage also while it hands tokens on.
        let stage = (turn + i) % 3;
        let point = if stage == 2 && turn > 0 { Point::Enqueue } else { Point::AfterReceive };
        plan(vec![Fault::new(stage, point, kind, 6..7)]).install_everywhere();
        let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i, 60)).unwrap()).collect();
        let ends: Vec<(Vec<u32>, Result<FinishReason>)> = open.into_iter().map(ended).collect();
        let told: Vec<String> =
            ends.iter().filter_map(|(_, end)| Some(end.as_ref().err()?.to_string())).collect();
        let cause = if kind == Kind::Panic { "made to panic" } else { "made to fail" };
        assert!(!told.is_empty() && told.iter().all(|told| told.contains(cause)), "{ends:?}");
        assert_eq!(alone(&engine), want, "after {kind:?} in stage {stage}");
        let stats = engine.stats();
        assert_eq!(stats.rebuilds, i as u64 + 1);
        let now = free();
        println!(
            "{layout}: {kind:?} in stage {stage}, {point:?}: {} requests failed; free {before:?}, then {now:?}",
            told.len()
        );
        let grown = before.iter().zip(&now).any(|(before, now)| now + SLACK < *before);
        assert!(!grown, "memory grows: {before:?} bytes were free, and {now:?} are");
    }
    rests(&engine);
    want
}
