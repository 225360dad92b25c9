//! From a description to running threads.

mod vision;

use std::{path::PathBuf, sync::Arc, time::Instant};

use super::{
    Engine, Facts,
    meter::Meter,
    place::{Count, Place, Room, Unplaced, check_limits},
    progress::{LoadProgress, Observer, Progress},
    rebuild::Recipe,
    start::{Ready, start},
    timeline::Timeline,
    vision::VisionConfig,
    wire::{PATIENCE, Shared, Wired, wire},
};
use crate::{
    backend::{DType, Limits},
    batch::KV_BLOCK,
    error::{Error, Result},
    layout::{Device, Layout, MemoryLimits, Stage, Workload, planner::Split},
    model::{
        Model,
        decoder::{DecoderConfig, weight_bytes},
        open_model,
        spec::ModelSpec,
    },
    schedule::{BlockPool, ImageConfig, Scheduler, SchedulerConfig},
    text::{Template, Tokenizer},
};

/// Tokens of a sequence at most, unless asked otherwise: long contexts cost memory whether used or not.
const CONTEXT_DEFAULT: usize = 8192;
/// Prompt tokens in a micro-batch. Beyond this the CPU's matrix products gain nothing and buffers grow.
const CHUNK_CPU: usize = 256;
/// A GPU's matrix units want more rows, and the more there are, the less power goes into reading weights: on an H200, whose clock
/// falls to 1.5 GHz under its limit of power, 8,192 bring 6% more than 2,048. But the last of N stages has nothing to do until a
/// chunk has gone through the others.
const CHUNK_GPU: usize = 8192;
const CHUNK_STAGE: usize = 2048;
/// With fewer a pass takes as long, since it reads all weights.
const CHUNK_MIN_GPU: usize = 128;
/// Passes over the CPU's weights are cheap against so many rows.
const CHUNK_MIN_CPU: usize = 32;
/// Sequences that run at once, unless asked otherwise.
const RUNNING_CPU: usize = 64;
const RUNNING_GPU: usize = 256;
/// Sequences of the longest context that the KV cache holds, where nobody says how many run at once.
const KV_SEQUENCES_DEFAULT: usize = 8;
/// Requests that wait, unless asked otherwise.
const WAITING_DEFAULT: usize = 4096;
/// The most sequences that can be said to run at once.
pub const RUNNING_MAX: usize = 4096;
/// Bounds of flags, so that sizes computed from them cannot overflow.
const WAITING_MAX: usize = 1 << 24;
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
    cuts: Option<Layout>,
    stages: Option<Count>,
    split: Option<Split>,
    place: Place,
    dtype: Option<DType>,
    weights: WeightSource,
    max_context: Option<usize>,
    expected: Option<(usize, usize)>,
    kv_memory: Option<usize>,
    device_memory: MemoryLimits,
    no_profiles: bool,
    slots: Option<usize>,
    chunk: Option<usize>,
    running: Option<usize>,
    no_prefix_cache: bool,
    waiting: Option<usize>,
    threads: Option<usize>,
    observer: Option<Observer>,
    timeline: Option<PathBuf>,
    measure_all: bool,
    pixels: (Option<u64>, Option<u64>),
    image_patches: Option<usize>,
    image_rows: Option<usize>,
}

/// How stages are started.
pub(super) type Wire = dyn Fn(&Layout, &DecoderConfig, &Shared, Progress) -> Result<Wired> + Send + Sync;

/// What follows from the description.
struct Plan {
    layout: Layout,
    scheduling: SchedulerConfig,
    images: Option<ImageConfig>,
    config: DecoderConfig,
    shared: Shared,
}

/// Prompt tokens in a micro-batch on GPUs.
fn chunk_gpu(stages: usize) -> usize {
    (CHUNK_GPU / stages.max(1)).max(CHUNK_STAGE)
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

    /// The cuts of a layout, whose stages go where as many would go without one, whatever devices it names.
    pub fn cuts(mut self, layout: Layout) -> Self {
        self.cuts = Some(layout);
        self
    }

    /// This many stages, when no layout is given. Default: 1.
    pub fn stages(mut self, stages: usize) -> Self {
        self.stages = Some(Count::Of(stages));
        self
    }

    /// As many stages as are worth it, at most one a GPU, when no layout is given.
    pub fn stages_auto(mut self) -> Self {
        self.stages = Some(Count::Auto);
        self
    }

    /// How the layers are cut, when no layout is given. Default: planned on several GPUs, else even.
    pub fn split(mut self, split: Split) -> Self {
        self.split = Some(split);
        self
    }

    /// Where the stages run, when no layout is given. Default: on successive GPUs, or on the CPU if there are none.
    pub fn device(mut self, device: Device) -> Self {
        self.place = Place::One(device);
        self
    }

    /// On any of these devices, when no layout is given, and by default in as many stages as are worth it. With the CPU among
    /// them, it gets the layers that have no room on the GPUs.
    pub fn devices(mut self, devices: impl Into<Vec<Device>>) -> Self {
        self.place = Place::Among(devices.into());
        self
    }

    /// On successive GPUs, when no layout is given. It is an error if there are none.
    pub fn gpus(mut self) -> Self {
        self.place = Place::Gpus;
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

    /// Prompt and new tokens of a usual request, which the cut is planned for where none is given: prompts alone hardly use
    /// the head, and many short answers use it much. Default: 512 and 256.
    pub fn expect(mut self, prompt: usize, new: usize) -> Self {
        self.expected = Some((prompt, new));
        self
    }

    /// Bytes for the KV cache, all stages together. Default: on the CPU enough for 8 sequences of the longest context,
    /// or for as many as are said to run at once, at most a quarter of the free memory; on GPUs, and on the CPU beside
    /// them, what weights and buffers leave.
    pub fn kv_memory(mut self, bytes: usize) -> Self {
        self.kv_memory = Some(bytes);
        self
    }

    /// How much of devices' memory may be taken: layouts are planned, and the KV cache is made, as if no more were free.
    /// Default: what is free.
    ///
    /// ```no_run
    /// # use pipeline_infer::Engine;
    /// let builder = Engine::builder().model("DIR").stages(4).device_memory("cuda:1=40g".parse()?);
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn device_memory(mut self, limits: MemoryLimits) -> Self {
        self.device_memory = limits;
        self
    }

    /// Whether plans and comparisons believe what was measured in earlier runs, and [`Engine::keep_profiles`] keeps what this one
    /// measures. Default: yes.
    pub fn profiles(mut self, wanted: bool) -> Self {
        self.no_profiles = !wanted;
        self
    }

    /// Micro-batches in flight at most. Default: the number of devices, since stages that share one take turns.
    pub fn slots(mut self, slots: usize) -> Self {
        self.slots = Some(slots);
        self
    }

    /// Prompt tokens in each micro-batch, where as many wait. Default: up to 256 on the CPU, and on GPUs 8192 over the
    /// number of stages, at least 2048; fewer where few wait and where sequences that decode would notice.
    pub fn chunk(mut self, tokens: usize) -> Self {
        self.chunk = Some(tokens);
        self
    }

    /// Sequences that run at once at most; others wait. Default: 64 on the CPU, 256 on GPUs.
    pub fn running(mut self, sequences: usize) -> Self {
        self.running = Some(sequences);
        self
    }

    /// Whether keys and values of a prompt's beginning are used again for prompts that begin the same. Default: yes. On
    /// GPUs the last bits of an answer can depend on it, since they depend on the rows that are computed together.
    pub fn prefix_cache(mut self, wanted: bool) -> Self {
        self.no_prefix_cache = !wanted;
        self
    }

    /// Requests that wait for their first step at most; more are refused with [`Error::Busy`]. Default: 4096.
    pub fn waiting(mut self, requests: usize) -> Self {
        self.waiting = Some(requests);
        self
    }

    /// CPU threads. Default: all cores.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Calls this while weights load: first with nothing done, last with everything. It is called from the stages' threads,
    /// one at a time, and should return soon.
    pub fn on_load(mut self, observer: impl Fn(LoadProgress) + Send + Sync + 'static) -> Self {
        self.observer = Some(Observer::new(observer));
        self
    }

    /// Writes a trace of what the stages do to this file, for Perfetto or chrome://tracing, until the engine is dropped. Every
    /// pass is measured.
    pub fn timeline(mut self, path: impl Into<PathBuf>) -> Self {
        self.timeline = Some(path.into());
        self
    }

    /// Measures every pass of the stages. By default a GPU measures its first ones and an eighth of the others, since each takes
    /// it ten microseconds more.
    pub fn measure_all(mut self) -> Self {
        self.measure_all = true;
        self
    }

    /// Loads the model and starts the stages.
    pub fn build(self) -> Result<Engine> {
        self.build_on(None, Arc::new(wire))
    }

    /// The same, with stages that are started in this way, and of which it can be said whether they choose tokens after
    /// their ops have returned, and hand them on by themselves; by default GPUs do.
    pub(super) fn build_on(mut self, ahead: Option<bool>, wire: Arc<Wire>) -> Result<Engine> {
        within("--slots", self.slots, SLOTS_MAX)?;
        within("--chunk", self.chunk, CHUNK_MAX)?;
        within("--running", self.running, RUNNING_MAX)?;
        within("--waiting", self.waiting, WAITING_MAX)?;
        within("--threads", self.threads, THREADS_MAX)?;
        self.check_image_room()?;
        check_limits(&self.device_memory)?;
        let timeline = self.timeline.take().map(Timeline::open).transpose()?;
        let meter = Meter::new(self.measure_all || timeline.is_some());
        let model = open_model(&self.model, self.weights == WeightSource::Dummy)?;
        let generation = model.generation.clone();
        let Plan { layout, scheduling, images, config, shared } = self.plan(model, ahead, meter.clone())?;
        let read = self.open_images(&config.spec)?;
        let weights = |stage: &Stage| weight_bytes(&config.spec, config.dtype, &stage.layers);
        let progress = Progress::new(self.observer.take(), layout.stages().iter().map(weights).sum());
        let (spec, dtype, blocks) = (config.spec.clone(), config.dtype, config.kv_blocks);
        let (context_max, kv_tokens) = (config.limits.context_max, blocks * KV_BLOCK);
        let (since, patience, of) = (Instant::now(), shared.patience, layout.clone());
        let recipe = Recipe {
            wire: Arc::new(move |progress| wire(&of, &config, &shared, progress)),
            scheduler: Box::new(move || {
                let scheduler = Scheduler::new(scheduling, BlockPool::new(blocks));
                images.into_iter().fold(scheduler, Scheduler::with_images)
            }),
            patience,
        };
        let wired = (recipe.wire)(progress)?;
        // The stages load while the tokenizer is read.
        let tokenizer = Tokenizer::open(&self.model)?.map(Arc::new);
        let template = match &tokenizer {
            Some(tokenizer) => Template::open(&self.model, tokenizer)?,
            None => None,
        };
        let (images, profiles, threads) = (read, !self.no_profiles, self.threads);
        let facts = Facts {
            profiles,
            threads,
            spec,
            generation,
            tokenizer,
            template,
            layout,
            dtype,
            context_max,
            kv_tokens,
            images,
        };
        let waiting = self.waiting.unwrap_or(WAITING_DEFAULT);
        start(Ready { facts, recipe, wired, since, waiting, meter, timeline })
    }

    fn plan(&self, model: Model, ahead: Option<bool>, meter: Arc<Meter>) -> Result<Plan> {
        let spec = Arc::new(model.spec);
        let dtype = self.dtype.unwrap_or(model.dtype);
        let context = self.plan_context(&spec)?;
        let layout = self.place_tower(self.plan_layout(&spec, dtype, context)?, &spec)?;
        let weights = Arc::new(model.weights);
        let vision = self.plan_vision(&layout, &spec, (&weights, dtype))?;
        let on_gpu = |stage: &Stage| stage.device != Device::Cpu;
        // Beside GPUs it is the processor whose time counts.
        let gpus = layout.stages().iter().all(on_gpu);
        // Tokens that the host does not know must be known where they are embedded.
        let hands_on = [layout.stages().first(), layout.stages().last()].into_iter().flatten().all(on_gpu);
        let running = self.running.unwrap_or(if gpus { RUNNING_GPU } else { RUNNING_CPU });
        // Several short prompts share a chunk; more than all sequences together hold never comes.
        let chunk = self.chunk.unwrap_or(if gpus { chunk_gpu(layout.stages().len()) } else { CHUNK_CPU });
        let chunk = chunk.min(context.saturating_mul(running));
        let chunk_min = match (self.chunk, gpus) {
            (Some(_), _) => chunk,
            (None, true) => CHUNK_MIN_GPU.min(chunk),
            (None, false) => CHUNK_MIN_CPU.min(chunk),
        };
        let mut scheduling = SchedulerConfig {
            slots: self.slots.unwrap_or_else(|| devices(&layout)),
            chunk,
            chunk_min,
            running_max: running,
            ahead: ahead.unwrap_or(hands_on),
            prefix_reuse: !self.no_prefix_cache,
        };
        let limits = |scheduling: SchedulerConfig, context_max| Limits {
            rows_max: Scheduler::rows_max(scheduling),
            seqs_max: scheduling.running_max,
            outputs_max: scheduling.running_max,
            context_max,
        };
        let in_flight = scheduling.in_flight_max();
        let room = Room {
            layout: &layout,
            spec: &spec,
            dtype,
            limits: limits(scheduling, context),
            in_flight,
            vision: vision.as_ref().map(|vision| vision.gpu_bytes(layout.stages()[0].device)),
            memory: &self.device_memory,
        };
        let (context_max, blocks) = self.plan_kv(&room, context)?;
        scheduling.running_max = scheduling.running_max.min(blocks);
        let config = DecoderConfig {
            layers: 0..spec.layers.len(),
            spec,
            arch: model.arch,
            weights,
            dtype,
            limits: limits(scheduling, context_max),
            kv_blocks: blocks,
        };
        let metrics = layout.stages().iter().map(|_| Arc::default()).collect();
        let images = vision.as_ref().map(VisionConfig::scheduling);
        let shared = Shared { in_flight, threads: self.threads, meter, metrics, patience: PATIENCE, vision };
        Ok(Plan { layout, scheduling, images, config, shared })
    }

    fn plan_layout(&self, spec: &ModelSpec, dtype: DType, context: usize) -> Result<Layout> {
        let layers = spec.layers.len();
        let given = self.layout.as_ref().or(self.cuts.as_ref());
        let refused = [("--stages", self.stages.is_some()), ("--split", self.split.is_some())];
        if let (Some(_), Some((flag, _))) = (given, refused.iter().find(|(_, given)| *given)) {
            return Err(Error::usage(*flag, "it cannot be used with --layout"));
        }
        if let Some(layout) = given {
            layout.check(layers)?;
        }
        if let Some(layout) = &self.layout {
            return Ok(layout.clone());
        }
        let chunk = match self.stages {
            Some(Count::Of(n)) => chunk_gpu(n),
            Some(Count::Auto) | None => CHUNK_GPU,
        };
        let all_layers = spec.kv_bytes_per_token(dtype) * layers;
        let unplaced = Unplaced {
            spec,
            dtype,
            place: &self.place,
            workload: self.workload(context, RUNNING_GPU, chunk),
            workload_mixed: self.workload(context, RUNNING_CPU, CHUNK_CPU),
            kv_tokens: self.kv_memory.map(|bytes| bytes / all_layers),
            context,
            threads: self.threads,
            memory: &self.device_memory,
            profiles: !self.no_profiles,
        };
        match &self.cuts {
            Some(layout) => unplaced.cuts(layout),
            None => unplaced.stages(self.stages, self.split),
        }
    }

    /// What a layout is planned for, with what runs at once by default.
    fn workload(&self, context: usize, running: usize, chunk: usize) -> Workload {
        let usual = Workload::default();
        let running = self.running.unwrap_or(running);
        // Sequences with a third of them new, as usual, where contexts are short.
        let short = (usual.prompt.min(context * 2 / 3), usual.new.min(context / 3).max(1));
        let (prompt, new) = self.expected.unwrap_or(short);
        let chunk = self.chunk.unwrap_or(chunk).min(context.saturating_mul(running));
        Workload { running, prompt, new, chunk }
    }

    /// The longest sequence and the number of KV blocks.
    fn plan_kv(&self, place: &Room, context: usize) -> Result<(usize, usize)> {
        let block_bytes = place.spec.kv_bytes_per_token(place.dtype) * place.spec.layers.len() * KV_BLOCK;
        let wanted = self.running.unwrap_or(KV_SEQUENCES_DEFAULT) * BlockPool::blocks_for(context);
        let blocks = match self.kv_memory {
            Some(bytes) => bytes / block_bytes,
            None => place.blocks(wanted)?,
        };
        // More could never be leased.
        let blocks = blocks.min(place.limits.seqs_max * BlockPool::blocks_for(context));
        if self.kv_memory.is_some() {
            place.check(blocks)?;
        }
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
