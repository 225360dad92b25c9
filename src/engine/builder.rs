//! From a description to running threads.

mod plan;
mod vision;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

pub(super) use self::vision::Towers;

use super::{
    Engine, Facts,
    balance::Pace,
    counts::WaitingLimits,
    meter::Meter,
    place::{Count, Free, Place, check_limits},
    progress::{LoadProgress, Observer, Progress},
    start::{Ready, start},
    timeline::Timeline,
    wire::{Shared, Wired, wire},
};
use crate::{
    backend::DType,
    batch::KV_BLOCK,
    error::{Error, Result},
    layout::{Device, Layout, MemoryLimits, planner::Split},
    model::{
        decoder::{DecoderConfig, weight_bytes},
        open_model,
    },
    text::{Template, Tokenizer},
    vision::Size,
};

/// Requests that wait, unless asked otherwise.
const WAITING_DEFAULT: usize = 4096;
/// Tokens of their prompts: as many short requests as may wait never come to this, and long ones do not fill the memory.
const WAITING_TOKENS_DEFAULT: usize = 1 << 26;
/// The most sequences that can be said to run at once.
pub const RUNNING_MAX: usize = 4096;
/// Bounds of flags, so that sizes computed from them cannot overflow.
const WAITING_MAX: usize = 1 << 24;
const WAITING_TOKENS_MAX: usize = usize::MAX >> 1;
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
///
/// What cannot be served is said when it is submitted:
///
/// ```
/// # use pipeline_infer::{Engine, Prompt, Request};
/// let builder = Engine::builder().model("tests/data/chat-llama").max_context(64).running(8);
/// let engine = builder.waiting(100).waiting_tokens(40).build()?;
/// let told = |tokens: usize| match engine.submit(Request::new(Prompt::Ids(vec![7; tokens]))) {
///     Ok(_) => "taken".to_owned(),
///     Err(error) => error.to_string(),
/// };
/// assert_eq!(told(40), "taken");
/// assert_eq!(told(41), "request: the prompt has 41 tokens; all that wait may have 40 together");
/// assert_eq!(told(64), "request: the prompt has 64 tokens; prompt and answer together have room for 64");
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
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
    expected_images: Option<(usize, Size)>,
    kv_memory: Option<usize>,
    device_memory: MemoryLimits,
    no_profiles: bool,
    slots: Option<usize>,
    chunk: Option<usize>,
    running: Option<usize>,
    no_prefix_cache: bool,
    waiting: Option<usize>,
    waiting_tokens: Option<usize>,
    threads: Option<usize>,
    observer: Option<Observer>,
    timeline: Option<PathBuf>,
    measure_all: bool,
    pixels: (Option<u64>, Option<u64>),
    image_patches: Option<usize>,
    image_rows: Option<usize>,
    movable: bool,
    balance: Option<Pace>,
    free: Option<Free>,
    stall: Option<Duration>,
}

/// How stages are started.
pub(super) type Wire = dyn Fn(&Layout, &DecoderConfig, &Shared, Progress) -> Result<Wired> + Send + Sync;

impl EngineBuilder {
    /// The model folder.
    pub fn model(mut self, path: impl Into<PathBuf>) -> Self {
        self.model = path.into();
        self
    }

    /// Which layers run where.
    ///
    /// ```
    /// # use pipeline_infer::{Engine, layout::Device};
    /// let builder = Engine::builder().model("tests/data/chat-llama");
    /// let engine = builder.clone().layout("0@cpu,1-3@cpu".parse()?).build()?;
    /// assert_eq!((engine.stats().stages.len(), engine.layout().to_string()), (2, "0@cpu,1-3@cpu".into()));
    /// // Cuts alone, on this device; or as many stages of near-equal length.
    /// let engine = builder.clone().cuts("0-2,3".parse()?).device(Device::Cpu).build()?;
    /// assert_eq!(engine.layout().to_string(), "0-2@cpu,3@cpu");
    /// let engine = builder.stages(2).devices([Device::Cpu]).build()?;
    /// assert_eq!(engine.layout().to_string(), "0-1@cpu,2-3@cpu");
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
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

    /// Prompt tokens (those of images among them) and new tokens of a usual request, which the cut is planned for where none is given: prompts alone hardly use
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
    /// ```
    /// # use pipeline_infer::{Engine, Result, layout::Device};
    /// let builder = Engine::builder().model("tests/data/chat-llama").device(Device::Cpu);
    /// let tokens = |limit: &str| -> Result<usize> {
    ///     Ok(builder.clone().device_memory(limit.parse()?).build()?.kv_tokens())
    /// };
    /// assert!(tokens("cpu=400k")? < tokens("cpu=1g")?);
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

    /// Prompt tokens in each micro-batch, where as many wait. Default: up to 256 on the CPU, on one GPU 8192, and on several
    /// 1024 to 4096, the fewer the wider the model is; fewer where few wait and where sequences that decode would notice.
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

    /// Tokens of the prompts of all requests that wait, together, at most; more are refused with [`Error::BusyTokens`].
    /// Default: 67,108,864, which take some 300 MB.
    pub fn waiting_tokens(mut self, tokens: usize) -> Self {
        self.waiting_tokens = Some(tokens);
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

    /// Whether each GPU keeps room for one more layer with its keys and values, and for what a relayout needs beside the
    /// stages that run. Default: no. [`Engine::relayout`] takes what room there is.
    pub fn movable(mut self, wanted: bool) -> Self {
        self.movable = wanted;
        self
    }

    /// Whether a layer moves to another device by itself where a stage is slower than the others for long: another process
    /// is on its GPU, or it is throttled. GPUs keep room for it, as if [`movable`](Self::movable). Default: no.
    ///
    /// ```
    /// # use pipeline_infer::{Engine, Prompt, Request, layout::Device};
    /// let builder = Engine::builder().model("tests/data/chat-llama").device(Device::Cpu).stages(2);
    /// let engine = builder.balance(true).build()?;
    /// engine.submit(Request::new(Prompt::Ids(vec![1, 2, 3])))?.for_each(drop);
    /// // Stages of one device take as long whichever of them does the work: nothing moves.
    /// assert_eq!(engine.stats().relayouts, 0);
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn balance(mut self, wanted: bool) -> Self {
        self.balance = wanted.then(Pace::default);
        self
    }

    /// With GPUs that have so much memory free when layouts change.
    #[cfg(test)]
    pub(super) fn free_when_moving(mut self, free: Free) -> Self {
        self.free = Some(free);
        self
    }

    /// With stages that may take so long from the end of a step to that of the next one, wherever they are.
    #[cfg(test)]
    pub(super) fn stall(mut self, limit: Duration) -> Self {
        self.stall = Some(limit);
        self
    }

    /// The same as `balance`, after some other time than usual.
    #[cfg(test)]
    pub(super) fn balance_at(mut self, pace: Pace) -> Self {
        self.balance = Some(pace);
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
        within("--waiting-tokens", self.waiting_tokens, WAITING_TOKENS_MAX)?;
        within("--threads", self.threads, THREADS_MAX)?;
        self.check_image_room()?;
        check_limits(&self.device_memory)?;
        let timeline = self.timeline.take().map(Timeline::open).transpose()?;
        let meter = Meter::new(self.measure_all || timeline.is_some());
        let model = open_model(&self.model, self.weights == WeightSource::Dummy)?;
        let generation = model.generation.clone();
        let (layout, runs) = self.plan(model, (ahead, wire), meter.clone())?;
        let config = &runs.config;
        let read = self.open_images(&config.spec)?;
        let weights = |stage| weight_bytes(&config.spec, config.dtype, &layout.units(stage, &config.spec));
        let progress = Progress::new(self.observer.take(), (0..layout.stages().len()).map(weights).sum());
        let (spec, dtype, blocks) = (config.spec.clone(), config.dtype, config.kv_blocks);
        let (context_max, kv_tokens) = (config.limits.context_max, blocks * KV_BLOCK);
        let keys = runs.scheduling.prefix_reuse.then(|| runs.keys.clone());
        let (since, recipe) = (Instant::now(), Arc::new(runs).recipe(&layout)?);
        let wired = (recipe.start)(None, progress)?;
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
            dtype,
            context_max,
            kv_tokens,
            images,
            keys,
        };
        let waiting = WaitingLimits {
            requests: self.waiting.unwrap_or(WAITING_DEFAULT),
            tokens: self.waiting_tokens.unwrap_or(WAITING_TOKENS_DEFAULT),
        };
        let balance = self.balance;
        start(Ready { facts, recipe, wired, since, waiting, meter, timeline, balance })
    }
}

fn within(flag: &str, value: Option<usize>, max: usize) -> Result<()> {
    match value {
        Some(n) if n == 0 || n > max => Err(Error::usage(flag, format!("{n} is not between 1 and {max}"))),
        _ => Ok(()),
    }
}
