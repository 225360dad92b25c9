//! A stage that fails says so once, with its place, and ends; the stages around it end too.

mod common;

use std::{
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use common::chat_llama;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use pipeline_infer::{
    Error, SamplingParams,
    backend::{Limits, cpu::Cpu},
    batch::{MicroBatch, OutputRow, SeqId, SeqRows, SeqStart, Step},
    model::{
        decoder::{Decoder, DecoderConfig},
        open_model,
    },
    pipeline::{Input, Outcome, Output, Probe, Stage, StageMetrics, spawn, token_edge},
    transport::{Host, Transport},
};

struct Pipeline {
    steps: Sender<Step>,
    results: Receiver<Outcome>,
    threads: Vec<JoinHandle<()>>,
}

fn config() -> DecoderConfig {
    let model = open_model(&chat_llama(), false).unwrap();
    let spec = Arc::new(model.spec);
    DecoderConfig {
        split_head: false,
        layers: 0..spec.layers.len(),
        spec,
        arch: model.arch,
        weights: Arc::new(model.weights),
        dtype: model.dtype,
        limits: Limits { rows_max: 8, seqs_max: 4, outputs_max: 4, context_max: 64 },
        kv_blocks: 8,
    }
}

/// Two stages over the small checkpoint, without an engine.
fn two_stages(one_thread: bool) -> Pipeline {
    let (cpu, config) = (Arc::new(Cpu::new(Some(1))), config());
    let (steps, steps_out) = bounded(4);
    let (results_in, results) = unbounded();
    let (sender, receiver) =
        Host.connect(cpu.clone(), cpu.clone(), 2, config.limits.rows_max * config.spec.dim).unwrap();
    let (enqueued, await_enqueued) = token_edge();
    let ends = [
        (Input::Steps(steps_out, await_enqueued), Output::Boundary(sender), 0..1),
        (Input::Boundary(receiver), Output::Results(enqueued), 1..config.spec.layers.len()),
    ];
    let mut stages = Vec::new();
    for (index, (input, output, layers)) in ends.into_iter().enumerate() {
        let own = DecoderConfig { layers, ..config.clone() };
        stages.push(vec![Stage {
            index,
            backend: cpu.clone(),
            load: Box::new(move |cpu| Decoder::load(cpu, &own)),
            input,
            output,
            results: results_in.clone(),
            turn: Arc::new(Mutex::new(())),
            metrics: Arc::new(StageMetrics::default()),
            probe: Probe::off(),
        }]);
    }
    if one_thread {
        stages = vec![stages.into_iter().flatten().collect()];
    }
    let start = |stages: Vec<_>| {
        let count = stages.len();
        let handle = spawn(stages).unwrap();
        assert!((0..count).all(|_| handle.loaded.recv().unwrap().unwrap() > 0));
        handle.thread
    };
    Pipeline { steps, results, threads: stages.into_iter().map(start).collect() }
}

fn step(step: u64, id: u32, started: bool) -> Step {
    let seq = SeqId(step);
    let start = SeqStart {
        seq,
        seat: 0,
        sampling: Arc::new(SamplingParams::default()),
        seed: 0,
        prompt: [id].into(),
        generated: [].into(),
    };
    let batch = MicroBatch {
        ids: vec![id],
        positions: vec![0],
        seqs: vec![SeqRows { seq, seat: 0, row: 0, len: 1, cached: 0, blocks: [step as u32].into() }],
        outputs: vec![OutputRow { row: 0, seq, seat: 0 }],
        // The sampler, in the last stage, relies on it.
        starts: if started { vec![start] } else { vec![] },
        ..MicroBatch::default()
    };
    Step { step, after: None, batch: Arc::new(batch) }
}

/// A good step, then a bad one: the first gives a token, the second an error, and then all is over; the same
/// whether the stages share a thread.
fn fails_at(bad: Step) -> Error {
    let [apart, together] = [false, true].map(|one_thread| {
        let pipeline = two_stages(one_thread);
        pipeline.steps.send(step(0, 5, true)).unwrap();
        let (number, sampled) = pipeline.results.recv().unwrap();
        assert_eq!((number, sampled.unwrap().len()), (0, 1));
        pipeline.steps.send(bad.clone()).unwrap();
        let (number, sampled) = pipeline.results.recv().unwrap();
        assert_eq!(number, 1);
        let error = sampled.unwrap_err();
        drop(pipeline.steps);
        for thread in pipeline.threads {
            thread.join().unwrap();
        }
        assert!(pipeline.results.recv().is_err(), "it is said once");
        error
    });
    assert_eq!(apart, together);
    together
}

#[test]
fn an_error_in_the_first_stage_is_the_steps_outcome() {
    let vocab = config().spec.vocab as u32;
    let error = fails_at(step(1, vocab, true));
    assert!(error.to_string().contains(&vocab.to_string()), "{error}");
}

#[test]
fn a_panic_in_the_last_stage_is_the_steps_outcome_and_names_the_stage() {
    let error = fails_at(step(1, 5, false));
    let Error::Engine(why) = &error else { panic!("{error:?}") };
    assert!(why.starts_with("stage 1 panicked: "), "{why}");
}

#[test]
fn a_step_that_waits_for_a_token_goes_on_once_it_is_asked_for_and_ends_with_the_last_stage() {
    for one_thread in [false, true] {
        let pipeline = two_stages(one_thread);
        let steps = [
            step(0, 5, true),
            Step { after: Some(0), ..step(1, 6, true) },
            // The sampler does not know its sequence.
            step(2, 7, false),
            Step { after: Some(2), ..step(3, 8, true) },
        ];
        // The last one may come when all is over.
        let _ = steps.map(|step| pipeline.steps.send(step));
        let outcomes: Vec<(u64, bool)> = pipeline.results.iter().map(|(step, o)| (step, o.is_ok())).collect();
        assert_eq!(outcomes, [(0, true), (1, true), (2, false)], "the first stage has let the last step go");
        for thread in pipeline.threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_stage_that_cannot_be_loaded_says_why_and_ends() {
    let (cpu, config) = (Arc::new(Cpu::new(Some(1))), config());
    let (_steps, steps) = bounded(1);
    let (enqueued, await_enqueued) = token_edge();
    let (results, _) = unbounded();
    let stage = Stage {
        index: 0,
        backend: cpu,
        load: Box::new(move |cpu: &Cpu| {
            let decoder = Decoder::load(cpu, &config)?;
            assert!(decoder.weight_bytes() == 0, "made to fail");
            Ok(decoder)
        }),
        input: Input::Steps(steps, await_enqueued),
        output: Output::Results(enqueued),
        results,
        turn: Arc::new(Mutex::new(())),
        metrics: Arc::new(StageMetrics::default()),
        probe: Probe::off(),
    };
    let handle = spawn(vec![stage]).unwrap();
    let error = handle.loaded.recv().unwrap().unwrap_err();
    assert_eq!(error, Error::Engine("stage 0 panicked: made to fail".into()));
    handle.thread.join().unwrap();
}
