//! The trace: it opens, every step has a bar on every stage, an arrow at every boundary, and what is written first lasts.

mod common;

use std::{collections::HashMap, path::Path};

use common::{chat_llama, collect, request};
use pipeline_infer::{Engine, Request, engine::EngineBuilder, layout::Device, request::Media};
use serde_json::Value;

/// Eight requests through three stages, two micro-batches at a time; the trace's events.
fn trace(path: &Path, with: impl FnOnce(EngineBuilder) -> EngineBuilder) -> Vec<Value> {
    let builder = Engine::builder().model(chat_llama()).device(Device::Cpu);
    let engine = with(builder.stages(3).slots(2).chunk(16)).timeline(path).build().unwrap();
    let events: Vec<_> = (0..8u32)
        .map(|i| {
            engine
                .submit(request(&(0..5 + 4 * i).map(|t| (7 * t + 20 * i) % 200).collect::<Vec<_>>(), 6))
                .unwrap()
        })
        .collect();
    events.into_iter().for_each(|events| drop(collect(events)));
    assert_eq!(engine.stats().dropped, 0);
    let steps = engine.stats().stages[0].times.batches;
    drop(engine);
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(bars(&events).len() as u64, 3 * steps, "a bar for each step on each stage");
    events
}

fn of<'a>(events: &'a [Value], phase: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["ph"] == phase).collect()
}

/// A step on a stage: its beginning and end in nanoseconds.
fn bars(events: &[Value]) -> HashMap<(u64, u64), (u64, u64, &Value)> {
    let ns = |value: &Value| (value.as_f64().unwrap() * 1e3).round() as u64;
    of(events, "X")
        .into_iter()
        .map(|event| {
            let at = (event["tid"].as_u64().unwrap(), event["args"]["step"].as_u64().unwrap());
            (at, (ns(&event["ts"]), ns(&event["ts"]) + ns(&event["dur"]), event))
        })
        .collect()
}

#[test]
fn every_step_has_a_bar_on_every_stage_and_an_arrow_at_every_boundary() {
    let dir = tempfile::tempdir().unwrap();
    let events = trace(&dir.path().join("trace.json"), |b| b);
    let bars = bars(&events);
    let steps = bars.len() as u64 / 3;
    let (mut rows, mut prompt_rows, mut kinds) = (0, 0, Vec::new());
    for step in 0..steps {
        let [a, b, c] = [0, 1, 2].map(|stage| bars[&(stage, step)]);
        // A stage's bar ends a moment after its rows have been sent.
        assert!(a.0 < b.0 && b.0 < c.0, "a step goes from stage to stage: {a:?} {b:?} {c:?}");
        rows += a.2["args"]["rows"].as_u64().unwrap();
        prompt_rows += a.2["args"]["prompt_rows"].as_u64().unwrap();
        kinds.push(a.2["cat"].as_str().unwrap().to_owned());
        assert!(a.2["args"]["sequences"].as_u64().unwrap() > 0);
    }
    // The last token of six is never fed.
    let prompts: u64 = (0..8).map(|i| 5 + 4 * i).sum();
    assert_eq!(rows, prompts + 8 * 5);
    // A prompt's last chunk may be a single row, which looks like any step.
    assert!(prompt_rows <= prompts && prompts - prompt_rows < 8, "{prompt_rows} of {prompts}");
    assert_eq!((kinds[0].as_str(), kinds.last().unwrap().as_str()), ("prompt", "decode"));
    for stage in 0..3 {
        let mut times: Vec<(u64, u64)> = bars
            .iter()
            .filter(|(at, _)| at.0 == stage)
            .map(|(_, &(began, ended, _))| (began, ended))
            .collect();
        times.sort_unstable();
        assert!(times.windows(2).all(|pair| pair[0].1 <= pair[1].0), "bars of a stage lie side by side");
    }
    let ends = [of(&events, "s"), of(&events, "f")].map(|ends| {
        let key = |e: &&Value| (e["name"].as_str().unwrap().to_owned(), e["id"].as_str().unwrap().to_owned());
        let keyed: HashMap<_, _> = ends.iter().map(|e| (key(e), (*e).clone())).collect();
        assert_eq!(keyed.len(), ends.len(), "an arrow has one beginning and one end");
        keyed
    });
    assert_eq!(ends[0].len(), ends[1].len());
    for step in 0..steps {
        for stage in 1..3 {
            let key = ("rows".to_owned(), format!("{step}.{stage}"));
            let (from, to) = (&ends[0][&key], &ends[1][&key]);
            assert_eq!((&from["tid"], &to["tid"]), (&Value::from(stage - 1), &Value::from(stage)));
            for (end, stage) in [(from, stage - 1), (to, stage)] {
                let (at, bar) = ((end["ts"].as_f64().unwrap() * 1e3).round() as u64, bars[&(stage, step)]);
                assert!(bar.0 <= at && at < bar.1, "{end} is in no bar of {bar:?}");
            }
        }
    }
    // Steps that decode begin with tokens of a step before.
    let tokens = ends[1].keys().filter(|(name, _)| name == "tokens").count();
    assert_eq!(tokens, kinds.iter().filter(|kind| *kind != "prompt").count());
}

#[test]
fn rows_have_names_and_queues_are_curves() {
    let dir = tempfile::tempdir().unwrap();
    // A name that JSON and shells would read otherwise.
    let path = dir.path().join("a \"trace\"\n.json");
    let events = trace(&path, |b| b.running(4));
    let names: Vec<&str> = of(&events, "M")
        .iter()
        .filter(|e| e["name"] == "thread_name")
        .map(|e| e["args"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), 3);
    assert!(names[1].starts_with("stage 1: cpu, layers "), "{names:?}");
    let peak = |curve: &str, which: &str| {
        let of_it = of(&events, "C").into_iter().filter(|e| e["name"] == curve);
        of_it.map(|e| e["args"][which].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(peak("sequences", "running").into_iter().max(), Some(4));
    assert!(peak("sequences", "waiting").into_iter().max() >= Some(4));
    assert!(peak("KV blocks", "used").into_iter().max() >= Some(4));
    assert_eq!(peak("steps in flight", "steps").into_iter().max(), Some(2));
    assert_eq!(peak("sequences", "running").last(), Some(&0), "all have gone at the end");
}

#[test]
fn stages_of_the_tower_have_rows_and_bars() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let layout = "v0,v1-2,0-1,2".parse().unwrap();
    let engine = Engine::builder().model(folder.join("qwen2_5_vl")).layout(layout).timeline(&path);
    let engine = engine.build().unwrap();
    let watch = engine.watch().unwrap();
    let image = engine.image_file(&folder.join("vision/odd.png")).unwrap();
    for i in 0..3 {
        // Other pixels each time: an image that is known is not encoded again.
        let mut frame = image.frames[0].clone();
        frame[0] = i;
        let media = vec![Media { frames: vec![frame].into(), ..image.clone() }];
        drop(collect(engine.submit(Request { media, ..request(&[5, 320, 322, 321, 7], 3) }).unwrap()));
    }
    let comparison = engine.compare(&watch.end()).unwrap();
    let stages: Vec<(usize, u64)> = comparison.vision.iter().map(|pass| (pass.stage, pass.passes)).collect();
    assert_eq!(stages, [(0, 3), (1, 3)]);
    assert!(comparison.vision.iter().all(|pass| pass.predicted > 0.0 && pass.measured > 0.0));
    let times = engine.stats().vision.iter().map(|stage| stage.times).collect::<Vec<_>>();
    assert!(times.iter().all(|times| times.batches == 3 && !times.busy.is_zero()), "{times:?}");
    drop(engine);
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let names = of(&events, "M").into_iter().filter(|e| e["name"] == "thread_name");
    let names: Vec<&str> = names.map(|e| e["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(names[2..], ["vision 0: cpu, blocks v0", "vision 1: cpu, blocks v1-2"]);
    let bars: Vec<&Value> = of(&events, "X").into_iter().filter(|e| e["cat"] == "vision").collect();
    assert_eq!(bars.len(), 6);
    for pass in 0..3u64 {
        let of = |row: u64| {
            let bar = bars.iter().find(|e| e["tid"] == row && e["args"]["pass"] == pass).unwrap();
            (
                bar["ts"].as_f64().unwrap(),
                bar["dur"].as_f64().unwrap(),
                bar["args"]["patches"].as_u64().unwrap(),
            )
        };
        let (first, second) = (of(2), of(3));
        assert!(first.0 + first.1 <= second.0 + 0.002 && first.2 == second.2 && first.2 > 0);
    }
}

#[test]
fn a_file_that_cannot_be_written_is_told_before_anything_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none/trace.json");
    let loads = |_| panic!("it loads");
    let told = Engine::builder().model(chat_llama()).on_load(loads).timeline(&path).build().err().unwrap();
    let told = told.to_string();
    assert!(told.starts_with(path.to_str().unwrap()) && !told.contains('\n'), "{told}");
}
