//! From a layout to running threads.

use std::{
    cell::Cell,
    sync::{Arc, Mutex, atomic::AtomicU64},
    thread::JoinHandle,
    time::Instant,
};

use crossbeam_channel as channel;

use super::{
    Engine, Facts, StageFacts,
    meter::Meter,
    progress::Progress,
    timeline::Timeline,
    worker::{Running, Worker},
};
use crate::{
    backend::{
        Backend,
        cpu::Cpu,
        cuda::{Cuda, PipelineFacts},
    },
    batch::{KV_BLOCK, Step},
    error::{Error, Result},
    layout::{Device, Layout},
    model::decoder::{Decoder, DecoderConfig},
    pipeline::{
        self, Collecting, Input, Outcome, Output, Probe, Stage, StageMetrics, StagesHandle, token_edge,
    },
    schedule::Scheduler,
    transport::{Host, Peer, Transport},
};

/// Threads that have been started, and the channels to them.
pub(super) struct Wired {
    stages: Vec<(Vec<StageFacts>, StagesHandle)>,
    /// Reads what they measure; it ends after them.
    collector: Option<JoinHandle<()>>,
    /// `None` once the engine's thread has it.
    steps: Option<channel::Sender<Step>>,
    results: channel::Receiver<Outcome>,
}

/// What the stages have in common.
pub(super) struct Shared {
    /// Steps in flight at most: boundaries have room for as many.
    pub(super) in_flight: usize,
    /// CPU threads, if it is said how many.
    pub(super) threads: Option<usize>,
    /// Of loading.
    pub(super) progress: Progress,
    /// Is told what the stages measure.
    pub(super) meter: Arc<Meter>,
}

/// Starts the stages' threads, with boundaries between the stages.
pub(super) fn wire(layout: &Layout, config: &DecoderConfig, shared: &Shared) -> Result<Wired> {
    let gpu = |device| match device {
        Device::Cpu => None,
        Device::Cuda(i) => Some(i),
    };
    let gpus: Vec<usize> = layout.stages().iter().filter_map(|stage| gpu(stage.device)).collect();
    if gpus.is_empty() {
        let cpu = Arc::new(Cpu::new(shared.threads));
        return wire_on(&vec![cpu; layout.stages().len()], &Host, layout, config, shared);
    }
    if gpus.len() < layout.stages().len() {
        let why = "stages on the processor and on GPUs in one pipeline are not possible yet";
        return Err(Error::usage(format!("--layout {layout}"), why));
    }
    let facts = PipelineFacts {
        dtype: config.dtype,
        head_dim: config.spec.heads.head_dim,
        seats: config.limits.seqs_max,
        in_flight: shared.in_flight,
    };
    wire_on(&Cuda::pipeline(&gpus, facts)?, &Peer::default(), layout, config, shared)
}

fn wire_on<B: Backend>(
    backends: &[Arc<B>],
    transport: &dyn Transport<B>,
    layout: &Layout,
    config: &DecoderConfig,
    shared: &Shared,
) -> Result<Wired> {
    let in_flight = shared.in_flight;
    let (steps, steps_out) = channel::bounded(in_flight);
    let (enqueued, await_enqueued) = token_edge();
    let (results_in, results) = channel::unbounded();
    let hidden_max = config.limits.rows_max * config.spec.dim;
    let layer_kv_bytes = config.kv_blocks * KV_BLOCK * config.spec.kv_bytes_per_token(config.dtype);
    let (mut inputs, mut outputs) = (vec![Input::Steps(steps_out, await_enqueued)], Vec::new());
    for pair in backends.windows(2) {
        let (sender, receiver) =
            transport.connect(pair[0].clone(), pair[1].clone(), in_flight, hidden_max)?;
        outputs.push(Output::Boundary(sender));
        inputs.push(Input::Boundary(receiver));
    }
    outputs.push(Output::Results(enqueued));
    let (measured, collector) = measure(backends, &shared.meter)?;
    let mut ends = inputs.into_iter().zip(outputs).zip(backends).zip(measured).enumerate();
    let turn = Arc::new(Mutex::new(()));
    let mut wired = Wired { stages: Vec::new(), collector: Some(collector), steps: Some(steps), results };
    // Stages on the processor cannot overlap. Others have a thread each, and their device shares itself out.
    for run in layout.stages().chunk_by(|a, b| a.device == Device::Cpu && b.device == Device::Cpu) {
        let (mut facts, mut run_stages) = (Vec::new(), Vec::new());
        for (stage, (index, (((input, output), backend), (metrics, probe)))) in run.iter().zip(&mut ends) {
            let own = DecoderConfig { layers: stage.layers.clone(), ..config.clone() };
            let progress = shared.progress.clone();
            let load = move |backend: &B| load_stage(index, backend, &own, &progress);
            run_stages.push(Stage {
                index,
                backend: backend.clone(),
                load: Box::new(load),
                input,
                output,
                results: results_in.clone(),
                turn: if B::ASYNC { Arc::default() } else { turn.clone() },
                metrics: metrics.clone(),
                probe,
            });
            let (device, layers) = (stage.device.to_string(), stage.to_string());
            let kv_bytes = stage.layers.len() * layer_kv_bytes;
            let of = backend.clone();
            let memory = Box::new(move || of.memory());
            facts.push(StageFacts { device, layers, weight_bytes: 0, kv_bytes, memory, metrics });
        }
        wired.stages.push((facts, pipeline::spawn(run_stages)?));
    }
    Ok(wired)
}

/// Loads a stage's units, and lets its device try what it will be asked for.
fn load_stage<B: Backend>(
    index: usize,
    backend: &B,
    config: &DecoderConfig,
    progress: &Progress,
) -> Result<Decoder<B>> {
    progress.begin();
    let mut decoder = Decoder::load_told(backend, config, &|bytes| progress.add(bytes))?;
    let (began, passes) = (Instant::now(), Cell::new(0));
    decoder.warm_up(backend, config.limits, &|done, total| {
        progress.add_passes(if done == 0 { total } else { 0 }, done - passes.replace(done));
    })?;
    let (device, ms) = (backend.name(), began.elapsed().as_millis() as u64);
    tracing::info!(stage = index, device, passes = passes.get(), ms, "warmed up");
    Ok(decoder)
}

/// What a stage measures itself with.
type Measured<B> = (Arc<StageMetrics>, Probe<B>);

/// Counters and a probe for each stage, and the thread that tells what they measure.
fn measure<B: Backend>(
    backends: &[Arc<B>],
    meter: &Arc<Meter>,
) -> Result<(Vec<Measured<B>>, JoinHandle<()>)> {
    let metrics: Vec<Arc<StageMetrics>> = backends.iter().map(|_| Arc::default()).collect();
    let of = meter.clone();
    let (probes, collector) = pipeline::collect(Collecting {
        stages: backends.iter().cloned().zip(metrics.iter().cloned()).collect(),
        start: meter.start(),
        every: meter.every(),
        dropped: meter.dropped().clone(),
        tell: Box::new(move |span| of.span(span)),
    })?;
    Ok((metrics.into_iter().zip(probes).collect(), collector))
}

/// What an engine is started with.
pub(super) struct Ready {
    pub(super) facts: Facts,
    pub(super) wired: Wired,
    pub(super) scheduler: Scheduler,
    pub(super) meter: Arc<Meter>,
    pub(super) timeline: Option<Timeline>,
}

/// Waits until every stage has loaded, and starts the engine's own thread.
pub(super) fn start(ready: Ready) -> Result<Engine> {
    let Ready { facts, mut wired, scheduler, meter, timeline } = ready;
    let facts = Arc::new(facts);
    let mut stages = Vec::new();
    for (run, handle) in &mut wired.stages {
        for mut stage in run.drain(..) {
            let i = stages.len();
            let gone = |_| Err(Error::Engine(format!("stage {i} ended while loading; this is a bug")));
            stage.weight_bytes = handle.loaded.recv().unwrap_or_else(gone)?;
            stages.push(stage);
        }
    }
    let rows =
        |(i, stage): (usize, &StageFacts)| format!("stage {i}: {}, layers {}", stage.device, stage.layers);
    let names = stages.iter().enumerate().map(rows).collect();
    let timeline = timeline.map(|timeline| timeline.start(&meter, names)).transpose()?;
    let Wired { stages: threads, collector, steps, results } = &mut wired;
    let (commands, commands_out) = channel::unbounded();
    let worker = Worker {
        facts: facts.clone(),
        scheduler,
        commands: commands_out,
        steps: steps.take().expect("the steps' channel is taken once; this is a bug"),
        results: results.clone(),
        running: Running::default(),
        meter: meter.clone(),
    };
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || worker.run())
        .map_err(|e| Error::Engine(format!("no thread: {e}")))?;
    let mut all = vec![thread];
    all.extend(threads.drain(..).map(|(_, handle)| handle.thread));
    all.extend(collector.take());
    Ok(Engine { facts, stages, commands, next_request: AtomicU64::new(0), threads: all, meter, timeline })
}

impl Drop for Wired {
    /// Of an engine that could not be started: its stages end, and give back what they hold, before the error is told.
    fn drop(&mut self) {
        self.steps = None;
        for (_, handle) in self.stages.drain(..) {
            // A stage's thread catches what panics in it.
            let _ = handle.thread.join();
        }
        let _ = self.collector.take().map(JoinHandle::join);
    }
}
