//! From a layout to running threads.

use std::{
    cell::Cell,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::{StageFacts, meter::Meter, progress::Progress, stock::Stock};
use crate::{
    backend::{
        Backend,
        cpu::Cpu,
        cuda::{self, Cuda, PipelineFacts},
    },
    batch::{KV_BLOCK, Step},
    error::{Error, Result},
    layout::{Device, Layout},
    model::decoder::{Decoder, DecoderConfig},
    pipeline::{
        self, Collecting, Input, Outcome, Output, Probe, Stage, StageMetrics, StagesHandle, token_edge,
    },
    transport::{Host, Peer, Transport},
};

/// How long stages may take to end; then their threads are left behind.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// The same, from when a GPU is lost: what waits for it may wait for ever.
const LOST_PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked whether a thread has ended.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Stages' threads that have been started, and the channels to them.
pub(super) struct Wired {
    pub(super) stages: Vec<(Vec<StageFacts>, StagesHandle)>,
    /// Reads what they measure; it ends after them.
    pub(super) collector: Option<JoinHandle<()>>,
    /// To the first stage, with room for every step that may be in flight. `None` once they have been told to end.
    pub(super) steps: Option<channel::Sender<Step>>,
    pub(super) results: channel::Receiver<Outcome>,
    /// What they hold of the model. It is given back when the last one lets go of it.
    pub(super) stock: Arc<Stock>,
    /// How long they may take to end.
    pub(super) patience: Duration,
    /// Whether a device of theirs is lost to the process.
    pub(super) lost: fn() -> bool,
}

/// What the stages have in common.
pub(super) struct Shared {
    /// Steps in flight at most: boundaries have room for as many.
    pub(super) in_flight: usize,
    /// CPU threads, if it is said how many.
    pub(super) threads: Option<usize>,
    /// Is told what the stages measure.
    pub(super) meter: Arc<Meter>,
    /// Of each stage; they go on counting when the stages are built anew.
    pub(super) metrics: Vec<Arc<StageMetrics>>,
    /// How long stages may take to end.
    pub(super) patience: Duration,
    /// What stages hold that run until these are ready to take over.
    pub(super) before: Option<Arc<Stock>>,
}

/// Starts the stages' threads, with boundaries between the stages.
pub(super) fn wire(
    layout: &Layout,
    config: &DecoderConfig,
    shared: &Shared,
    progress: Progress,
) -> Result<Wired> {
    let gpu = |device| match device {
        Device::Cpu => None,
        Device::Cuda(i) => Some(i),
    };
    let gpus: Vec<usize> = layout.stages().iter().filter_map(|stage| gpu(stage.device)).collect();
    if gpus.is_empty() {
        let cpu = Arc::new(Cpu::new(shared.threads));
        let on = On { backends: &vec![cpu; layout.stages().len()], transport: &Host, lost: || false };
        return wire_on(on, layout, config, shared, progress);
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
    let on =
        On { backends: &Cuda::pipeline(&gpus, facts)?, transport: &Peer::default(), lost: cuda::any_lost };
    wire_on(on, layout, config, shared, progress)
}

/// What stages run on.
pub(super) struct On<'a, B: Backend> {
    /// One a stage.
    pub(super) backends: &'a [Arc<B>],
    /// Between neighbours.
    pub(super) transport: &'a dyn Transport<B>,
    /// Whether one of them is lost to the process.
    pub(super) lost: fn() -> bool,
}

/// The same, on these devices, whatever the layout says.
pub(super) fn wire_on<B: Backend>(
    on: On<'_, B>,
    layout: &Layout,
    config: &DecoderConfig,
    shared: &Shared,
    progress: Progress,
) -> Result<Wired> {
    let On { backends, transport, lost } = on;
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
    let (measured, collector) = measure(backends, shared)?;
    let mut ends = inputs.into_iter().zip(outputs).zip(backends).zip(measured).enumerate();
    let turn = Arc::new(Mutex::new(()));
    let (patience, collector) = (shared.patience, Some(collector));
    let (stages, steps) = (Vec::new(), Some(steps));
    let stock = Arc::<Stock>::default();
    let mut wired = Wired { stages, collector, steps, results, stock: stock.clone(), patience, lost };
    // Stages on the processor cannot overlap. Others have a thread each, and their device shares itself out.
    for run in layout.stages().chunk_by(|a, b| a.device == Device::Cpu && b.device == Device::Cpu) {
        let (mut facts, mut run_stages) = (Vec::new(), Vec::new());
        for (stage, (index, (((input, output), backend), probe))) in run.iter().zip(&mut ends) {
            let metrics = shared.metrics[index].clone();
            let own = DecoderConfig { layers: stage.layers.clone(), ..config.clone() };
            let progress = progress.clone();
            let (on, stocks) = ((stage.device, backend.clone()), (stock.clone(), shared.before.clone()));
            let load = move |_: &B| load_stage(index, &on, &own, &stocks, &progress);
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
            // Whoever asks must not keep the device's memory from being given back.
            let of = Arc::downgrade(backend);
            let memory = Box::new(move || of.upgrade()?.memory());
            facts.push(StageFacts { device, layers, weight_bytes: 0, kv_bytes, memory, metrics });
        }
        wired.stages.push((facts, pipeline::spawn(run_stages)?));
    }
    Ok(wired)
}

/// Loads a stage's units into the stock, but for those that the stock before has on the same device, and lets its device
/// try what it will be asked for.
fn load_stage<B: Backend>(
    index: usize,
    (device, backend): &(Device, Arc<B>),
    config: &DecoderConfig,
    (stock, before): &(Arc<Stock>, Option<Arc<Stock>>),
    progress: &Progress,
) -> Result<Decoder<B>> {
    progress.begin();
    let tell = |bytes| progress.add(bytes);
    let mut decoder = stock.load(before.as_deref(), (*device, backend), config, &tell)?;
    let backend = &**backend;
    let (began, passes) = (Instant::now(), Cell::new(0));
    decoder.warm_up(backend, config.limits, &|done, total| {
        progress.add_passes(if done == 0 { total } else { 0 }, done - passes.replace(done));
    })?;
    let (device, ms) = (backend.name(), began.elapsed().as_millis() as u64);
    tracing::info!(stage = index, device, passes = passes.get(), ms, "warmed up");
    Ok(decoder)
}

/// A probe for each stage, and the thread that tells what they measure.
fn measure<B: Backend>(backends: &[Arc<B>], shared: &Shared) -> Result<(Vec<Probe<B>>, JoinHandle<()>)> {
    let (meter, metrics) = (&shared.meter, shared.metrics.iter().cloned());
    let of = meter.clone();
    pipeline::collect(Collecting {
        stages: backends.iter().cloned().zip(metrics).collect(),
        start: meter.start(),
        every: meter.every(),
        dropped: meter.dropped().clone(),
        tell: Box::new(move |span| of.span(span)),
    })
}

impl Wired {
    /// Waits until every stage has loaded.
    pub(super) fn loaded(&mut self) -> Result<Vec<StageFacts>> {
        let mut stages = Vec::new();
        for (run, handle) in &mut self.stages {
            for mut stage in run.drain(..) {
                let i = stages.len();
                let gone = |_| Err(Error::Engine(format!("stage {i} ended while loading; this is a bug")));
                stage.weight_bytes = handle.loaded.recv().unwrap_or_else(gone)?;
                stages.push(stage);
            }
        }
        Ok(stages)
    }

    /// Ends the stages, which give back what they hold. An error names those that do not end in time: a thread that a
    /// driver does not let go must not keep others waiting.
    pub(super) fn end(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        self.steps = None;
        let mut limit = Limit { deadline: Instant::now() + self.patience, lost: Some(self.lost) };
        let mut late = Vec::new();
        for (_, StagesHandle { thread, loaded }) in self.stages.drain(..) {
            // Nobody is told any more whether it could be loaded.
            drop(loaded);
            late.extend(limit.join(thread));
        }
        // It would wait for stages that are left behind.
        if let Some(collector) = self.collector.take().filter(|_| late.is_empty()) {
            late.extend(limit.join(collector));
        }
        match &late[..] {
            [] => Ok(()),
            names => Err(Error::Engine(format!("{} did not end in time", names.join(" and ")))),
        }
    }
}

/// Until when threads are waited for.
struct Limit {
    deadline: Instant,
    /// Whether a device is lost, as long as none is known to be.
    lost: Option<fn() -> bool>,
}

impl Limit {
    /// Waits for a thread's end. Gives its name if it is left behind.
    fn join(&mut self, thread: JoinHandle<()>) -> Option<String> {
        while !thread.is_finished() {
            let now = Instant::now();
            if self.lost.is_some_and(|lost| lost()) {
                self.lost = None;
                self.deadline = self.deadline.min(now + LOST_PATIENCE);
            }
            if now >= self.deadline {
                let name = thread.thread().name().unwrap_or("a thread").to_owned();
                tracing::warn!(thread = name, "it does not end, and is left behind with what it holds");
                return Some(name);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        // What panics in it has been caught, or a panic hook has reported it.
        let _ = thread.join();
        None
    }
}

impl Drop for Wired {
    /// Also of an engine that could not be started: its stages end, and give back what they hold, before the error is told.
    fn drop(&mut self) {
        // A thread that hangs has been warned of.
        let _ = self.take_down();
    }
}
