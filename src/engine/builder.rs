//! From a description to running threads.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, atomic::AtomicU64},
};

use crossbeam_channel as channel;

use super::{
    Engine, Facts, StageFacts,
    worker::{Running, Worker},
};
use crate::{
    backend::{Backend, DType, Limits, cpu::Cpu},
    batch::{KV_BLOCK, Step},
    error::{Error, Result},
    layout::{Device, Layout},
    model::{
        decoder::{Decoder, DecoderConfig},
        open_model,
        spec::ModelSpec,
    },
    pipeline::{self, Input, Outcome, Output, Stage, StageMetrics, StagesHandle, token_edge},
    schedule::{BlockPool, Scheduler, SchedulerConfig},
    text::{Template, Tokenizer},
    transport::{Host, Transport},
};

/// Tokens of a sequence at most, unless asked otherwise: long contexts cost memory whether used or not.
const CONTEXT_DEFAULT: usize = 8192;
/// Prompt tokens in a micro-batch. Beyond this the CPU's matrix products gain nothing and buffers grow.
const CHUNK_DEFAULT: usize = 256;
/// Sequences that run at once.
const RUNNING_MAX: usize = 64;
/// Sequences of the longest context that the KV cache holds, unless asked otherwise.
const KV_SEQUENCES_DEFAULT: usize = 8;
/// Bounds of flags, so that sizes computed from them cannot overflow.
const SLOTS_MAX: usize = 1024;
const CHUNK_MAX: usize = 65_536;
const THREADS_MAX: usize = 1024;

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightSource {
    /// The model folder's safetensors.
    #[default]
    Real,
    /// Random numbers of the right shapes, from config.json alone; the same for any split.
    Dummy,
}

/// What an engine is made from. Every value but the model has a default.
#[derive(Debug, Clone, Default)]
pub struct EngineBuilder {
    model: PathBuf,
    layout: Option<Layout>,
    stages: Option<usize>,
    device: Device,
    dtype: Option<DType>,
    weights: WeightSource,
    max_context: Option<usize>,
    kv_memory: Option<usize>,
    slots: Option<usize>,
    chunk: Option<usize>,
    threads: Option<usize>,
}

impl EngineBuilder {
    /// The model folder.
    pub fn model(mut self, path: impl Into<PathBuf>) -> Self {
        self.model = path.into();
        self
    }

    /// Which layers run where.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = Some(layout);
        self
    }

    /// This many stages of near-equal length, when no layout is given. Default: 1.
    pub fn stages(mut self, stages: usize) -> Self {
        self.stages = Some(stages);
        self
    }

    /// Where the stages run, when no layout is given. Default: the CPU.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// The type that weights, keys and values are kept in. Default: the checkpoint's.
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Where weights come from.
    pub fn weights(mut self, source: WeightSource) -> Self {
        self.weights = source;
        self
    }

    /// The longest sequence, prompt and answer together. Default: the model's, at most 8,192.
    pub fn max_context(mut self, tokens: usize) -> Self {
        self.max_context = Some(tokens);
        self
    }

    /// Bytes for the KV cache, all stages together. Default: enough for 8 sequences of the longest context,
    /// at most a quarter of the free memory.
    pub fn kv_memory(mut self, bytes: usize) -> Self {
        self.kv_memory = Some(bytes);
        self
    }

    /// Micro-batches in flight at most. Default: the number of devices, since stages that share one take turns.
    pub fn slots(mut self, slots: usize) -> Self {
        self.slots = Some(slots);
        self
    }

    /// Prompt tokens in a micro-batch at most. Default: 256.
    pub fn chunk(mut self, tokens: usize) -> Self {
        self.chunk = Some(tokens);
        self
    }

    /// CPU threads. Default: all cores.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Loads the model and starts the stages.
    pub fn build(self) -> Result<Engine> {
        within("--slots", self.slots, SLOTS_MAX)?;
        within("--chunk", self.chunk, CHUNK_MAX)?;
        within("--threads", self.threads, THREADS_MAX)?;
        let model = open_model(&self.model, self.weights == WeightSource::Dummy)?;
        let spec = Arc::new(model.spec.clone());
        let layout = self.plan_layout(&spec)?;
        let dtype = self.dtype.unwrap_or(model.dtype);
        let (context_max, blocks) = self.plan_kv(&spec, dtype)?;
        let scheduling = SchedulerConfig {
            slots: self.slots.unwrap_or_else(|| devices(&layout)),
            chunk: self.chunk.unwrap_or(CHUNK_DEFAULT).min(context_max),
            running_max: RUNNING_MAX.min(blocks),
            ahead: Cpu::ASYNC,
        };
        let limits = Limits {
            rows_max: Scheduler::rows_max(scheduling),
            seqs_max: scheduling.running_max,
            outputs_max: scheduling.running_max,
            context_max,
        };
        let config = DecoderConfig {
            spec: spec.clone(),
            arch: model.arch,
            weights: Arc::new(model.weights),
            layers: 0..spec.layers.len(),
            dtype,
            limits,
            kv_blocks: blocks,
        };
        let wired = wire(&layout, &config, scheduling.in_flight_max(), self.threads)?;
        // The stages load while the tokenizer is read.
        let tokenizer = Tokenizer::open(&self.model)?.map(Arc::new);
        let template = match &tokenizer {
            Some(tokenizer) => Template::open(&self.model, tokenizer)?,
            None => None,
        };
        let kv_tokens = blocks * KV_BLOCK;
        let generation = model.generation;
        let facts = Facts { spec, generation, tokenizer, template, layout, context_max, kv_tokens };
        start(facts, wired, Scheduler::new(scheduling, BlockPool::new(blocks)))
    }

    fn plan_layout(&self, spec: &ModelSpec) -> Result<Layout> {
        let layers = spec.layers.len();
        match (&self.layout, self.stages) {
            (Some(_), Some(_)) => Err(Error::usage("--stages", "it cannot be used with --layout")),
            (Some(layout), None) => layout.check(layers).map(|()| layout.clone()),
            (None, stages) => Layout::even(stages.unwrap_or(1), layers, self.device),
        }
    }

    /// The longest sequence and the number of KV blocks.
    fn plan_kv(&self, spec: &ModelSpec, dtype: DType) -> Result<(usize, usize)> {
        let context = self.plan_context(spec)?;
        let block_bytes = spec.kv_bytes_per_token(dtype) * spec.layers.len() * KV_BLOCK;
        let wanted = KV_SEQUENCES_DEFAULT * BlockPool::blocks_for(context);
        let blocks = match self.kv_memory {
            Some(bytes) => bytes / block_bytes,
            None => wanted.min(memory_free() / 4 / block_bytes),
        };
        // More could never be leased.
        let blocks = blocks.min(RUNNING_MAX * BlockPool::blocks_for(context));
        let room = blocks * KV_BLOCK;
        if room < context && (self.kv_memory.is_some() && self.max_context.is_some() || room < 2) {
            let (need, have) = (BlockPool::blocks_for(context) * block_bytes, blocks * block_bytes);
            let why = format!("a sequence of {context} tokens needs {need} bytes, and there are {have}");
            return Err(Error::usage("--kv-memory", why));
        }
        if room < context {
            tracing::warn!(
                tokens = room,
                "the KV cache is smaller than the longest context, which it limits"
            );
        }
        Ok((context.min(room), blocks))
    }

    fn plan_context(&self, spec: &ModelSpec) -> Result<usize> {
        let made_for = spec.context_max;
        match self.max_context {
            None => Ok(made_for.min(CONTEXT_DEFAULT)),
            Some(tokens) if tokens < 2 => {
                Err(Error::usage("--max-context", "a prompt and an answer need at least 2 tokens"))
            }
            Some(tokens) if tokens > made_for => {
                let why = format!("{tokens} tokens are more than the {made_for} that the model was made for");
                Err(Error::usage("--max-context", why))
            }
            Some(tokens) => Ok(tokens),
        }
    }
}

fn within(flag: &str, value: Option<usize>, max: usize) -> Result<()> {
    match value {
        Some(n) if n == 0 || n > max => Err(Error::usage(flag, format!("{n} is not between 1 and {max}"))),
        _ => Ok(()),
    }
}

fn devices(layout: &Layout) -> usize {
    let distinct: std::collections::HashSet<Device> = layout.stages().iter().map(|s| s.device).collect();
    distinct.len()
}

/// Bytes that the system says are available; a guess of 4 GiB where it does not say.
fn memory_free() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    kib.map_or(4 << 30, |kib| kib << 10)
}

/// Threads that have been started, and the channels to them.
struct Wired {
    stages: Vec<(Vec<StageFacts>, StagesHandle)>,
    steps: channel::Sender<Step>,
    results: channel::Receiver<Outcome>,
}

/// Starts the stages' threads, with boundaries between the stages that hold as many steps as may be in flight.
fn wire(layout: &Layout, config: &DecoderConfig, in_flight: usize, threads: Option<usize>) -> Result<Wired> {
    for stage in layout.stages() {
        match stage.device {
            Device::Cpu => (),
            Device::Cuda(_) => {
                let why = "this build has no CUDA backend; --device cpu runs the model on the processor";
                return Err(Error::Device { device: stage.device.to_string(), why: why.into() });
            }
        }
    }
    let cpu = Arc::new(Cpu::new(threads));
    let backends = vec![cpu; layout.stages().len()];
    wire_on(&backends, &Host, layout, config, in_flight)
}

fn wire_on<B: Backend>(
    backends: &[Arc<B>],
    transport: &dyn Transport<B>,
    layout: &Layout,
    config: &DecoderConfig,
    in_flight: usize,
) -> Result<Wired> {
    let (steps, steps_out) = channel::bounded(in_flight);
    let (enqueued, await_enqueued) = token_edge();
    let (results_in, results) = channel::unbounded();
    let hidden_max = config.limits.rows_max * config.spec.dim;
    let (mut inputs, mut outputs) = (vec![Input::Steps(steps_out, await_enqueued)], Vec::new());
    for pair in backends.windows(2) {
        let (sender, receiver) =
            transport.connect(pair[0].clone(), pair[1].clone(), in_flight, hidden_max)?;
        outputs.push(Output::Boundary(sender));
        inputs.push(Input::Boundary(receiver));
    }
    outputs.push(Output::Results(enqueued));
    let mut ends = inputs.into_iter().zip(outputs).zip(backends).enumerate();
    let turn = Arc::new(Mutex::new(()));
    let mut stages = Vec::new();
    // Stages on the processor cannot overlap. Others have a thread each, and their device shares itself out.
    for run in layout.stages().chunk_by(|a, b| a.device == Device::Cpu && b.device == Device::Cpu) {
        let (mut facts, mut run_stages) = (Vec::new(), Vec::new());
        for (stage, (index, ((input, output), backend))) in run.iter().zip(&mut ends) {
            let metrics = Arc::new(StageMetrics::default());
            let own = DecoderConfig { layers: stage.layers.clone(), ..config.clone() };
            run_stages.push(Stage {
                index,
                backend: backend.clone(),
                load: Box::new(move |backend| Decoder::load(backend, &own)),
                input,
                output,
                results: results_in.clone(),
                turn: if B::ASYNC { Arc::default() } else { turn.clone() },
                metrics: metrics.clone(),
            });
            let (device, layers) = (stage.device.to_string(), stage.to_string());
            facts.push(StageFacts { device, layers, weight_bytes: 0, metrics });
        }
        stages.push((facts, pipeline::spawn(run_stages)?));
    }
    Ok(Wired { stages, steps, results })
}

/// Waits until every stage has loaded, and starts the engine's own thread.
fn start(facts: Facts, wired: Wired, scheduler: Scheduler) -> Result<Engine> {
    let facts = Arc::new(facts);
    let (mut stages, mut threads) = (Vec::new(), Vec::new());
    for (run, handle) in wired.stages {
        for mut stage in run {
            let i = stages.len();
            let gone = |_| Err(Error::Engine(format!("stage {i} ended while loading; this is a bug")));
            stage.weight_bytes = handle.loaded.recv().unwrap_or_else(gone)?;
            stages.push(stage);
        }
        threads.push(handle.thread);
    }
    let (commands, commands_out) = channel::unbounded();
    let worker = Worker {
        facts: facts.clone(),
        scheduler,
        commands: commands_out,
        steps: wired.steps,
        results: wired.results,
        running: Running::default(),
    };
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || worker.run())
        .map_err(|e| Error::Engine(format!("no thread: {e}")))?;
    threads.insert(0, thread);
    Ok(Engine { facts, stages, commands, next_request: AtomicU64::new(0), threads })
}
