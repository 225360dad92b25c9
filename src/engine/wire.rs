//! From a layout to running threads.

mod asides;
mod sites;

use std::{
    cell::Cell,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

pub(super) use super::vision::{VisionConfig, VisionOn};

pub(super) use self::sites::{Either, On, Ways};

use self::{
    asides::PartOn,
    sites::{Ends, Site, Sites, Size, sites},
};
use super::{
    StageFacts,
    meter::Meter,
    progress::Progress,
    stock::Stock,
    vision::{self, Vision},
};
use crate::{
    backend::{
        Backend, DeviceMemory,
        cpu::Cpu,
        cuda::{self, Cuda, PipelineFacts},
        vision::VisionOps,
    },
    batch::{KV_BLOCK, Step},
    error::{Error, Result},
    layout::{self, Device, Layout},
    model::decoder::{Decoder, DecoderConfig, ImageStore},
    pipeline::{self, Outcome, Stage, StageMetrics, StagesHandle, token_edge},
    transport::{Host, Peer, Staged},
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
    /// The vision tower's, of a model that reads images.
    pub(super) vision: Option<Vision>,
    /// They read what stages measure, one for each kind of devices, and end after them.
    pub(super) collectors: Vec<JoinHandle<()>>,
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
    /// The vision tower, if there is one.
    pub(super) vision: Option<VisionConfig>,
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
    let gpu = |stage: &layout::Stage| stage.device.gpu();
    let gpus: Vec<usize> = layout.stages().iter().filter_map(gpu).collect();
    let asides: Vec<&layout::Stage> = layout.part_stages().into_iter().map(|i| &layout.stages()[i]).collect();
    let urgent: Vec<usize> = asides.iter().filter_map(|stage| gpu(stage)).collect();
    let facts = PipelineFacts {
        dtype: config.dtype,
        head_dim: config.spec.heads.head_dim,
        seats: config.limits.seqs_max,
        in_flight: shared.in_flight,
    };
    let lost = if gpus.is_empty() { || false } else { cuda::any_lost };
    // Views of the GPUs know of each other: they are made together, in the order of their stages.
    let mut cuda = Cuda::pipeline_with(&gpus, &urgent, facts)?.into_iter();
    let mut cpu: Option<Arc<Cpu>> = None;
    let mut backend = |stage: &layout::Stage| match gpu(stage) {
        Some(_) => Either::Two(cuda.next().expect("a view for each stage on a GPU; this is a bug")),
        None => Either::One(cpu.get_or_insert_with(|| Arc::new(Cpu::new(shared.threads))).clone()),
    };
    let backends: Vec<_> = layout.stages().iter().map(&mut backend).collect();
    let asides = asides.into_iter().map(backend).collect();
    let vision = shared.vision.as_ref().map(|config| vision_on(config, &backends[0], facts, shared.threads));
    let ways = Ways { ones: &Host, twos: &Peer::default(), one_to_two: &Staged, two_to_one: &Staged };
    let on = On { backends, ways, lost, vision: vision.transpose()?, asides };
    wire_on(on, layout, config, shared, progress)
}

/// What the tower runs on: views of its GPUs, and threads of its own on the processor, which the system shares out between
/// them and those of the decoder. A pass of the tower takes long: taking turns would keep the decoder waiting.
fn vision_on(
    config: &VisionConfig,
    first: &Either<Arc<Cpu>, Arc<Cuda>>,
    facts: PipelineFacts,
    threads: Option<usize>,
) -> Result<VisionOn<Cpu, Cuda>> {
    let mut gpus: Vec<usize> = config.stages.iter().filter_map(|(device, _)| device.gpu()).collect();
    if let Either::Two(first) = first {
        gpus.push(first.facts().ordinal);
    }
    let mut cuda = Cuda::pipeline(&gpus, facts)?.into_iter();
    let mut view = || Either::Two(cuda.next().expect("a view for each stage on a GPU; this is a bug"));
    let mut cpu: Option<Arc<Cpu>> = None;
    let mut backend = |device: Device| match device.gpu() {
        Some(_) => view(),
        None => Either::One(cpu.get_or_insert_with(|| Arc::new(Cpu::new(threads))).clone()),
    };
    let backends = config.stages.iter().map(|(device, _)| backend(*device)).collect();
    let keeper = match first {
        Either::One(first) => Either::One(first.clone()),
        Either::Two(_) => view(),
    };
    Ok(VisionOn { backends, keeper })
}

/// The same, on these devices, whatever the layout says.
pub(super) fn wire_on<A: VisionOps, B: VisionOps>(
    mut on: On<'_, A, B>,
    layout: &Layout,
    config: &DecoderConfig,
    shared: &Shared,
    progress: Progress,
) -> Result<Wired> {
    let in_flight = shared.in_flight;
    let (steps, steps_out) = channel::bounded(in_flight);
    let (enqueued, await_enqueued) = token_edge();
    let (results_in, results) = channel::unbounded();
    let size = Size { depth: in_flight, len_max: config.limits.rows_max * config.spec.dim };
    let ends = Ends { steps: (steps_out, await_enqueued), results: enqueued };
    let lost = on.lost;
    let store = match (&shared.vision, on.backends.first()) {
        (Some(config), Some(Either::One(first))) => Some(Either::One(vision::store(&**first, config)?)),
        (Some(config), Some(Either::Two(first))) => Some(Either::Two(vision::store(&**first, config)?)),
        _ => None,
    };
    let vision = match (&shared.vision, on.vision.take(), &store) {
        (Some(config), Some(of), Some(store)) => Some(vision::start(of, &on.ways, config, store.clone())?),
        _ => None,
    };
    let parts = std::mem::take(&mut on.asides);
    let Sites { all, collectors } = sites(on, ends, size, shared)?;
    let mut wired = Wired {
        stages: Vec::new(),
        vision,
        collectors,
        steps: Some(steps),
        results,
        stock: Arc::default(),
        patience: shared.patience,
        lost,
    };
    let (turn, stock) = (Arc::default(), wired.stock.clone());
    let start = Start { layout, config, shared, progress, results: results_in, turn, stock };
    let mut sites = all.into_iter();
    // Stages on the processor cannot overlap. Others have a thread each, and their device shares itself out.
    for run in layout.stages().chunk_by(|a, b| a.device == Device::Cpu && b.device == Device::Cpu) {
        let (mut facts, mut ones, mut twos) = (Vec::new(), Vec::new(), Vec::new());
        for (stage, site) in run.iter().zip(&mut sites) {
            facts.push(match site {
                Either::One(site) => {
                    let images = store.clone().and_then(Either::one).filter(|_| site.index == 0);
                    let parts = asides::parts(layout, &parts, Either::one);
                    start.stage(stage, site, (images, parts), &mut ones)
                }
                Either::Two(site) => {
                    let images = store.clone().and_then(Either::two).filter(|_| site.index == 0);
                    start.stage(stage, site, (images, asides::parts(layout, &parts, Either::two)), &mut twos)
                }
            });
        }
        assert!(ones.is_empty() || twos.is_empty(), "a thread for two kinds of devices; this is a bug");
        let handle = if twos.is_empty() { pipeline::spawn(ones) } else { pipeline::spawn(twos) };
        wired.stages.push((facts, handle?));
    }
    wired.count_keeper();
    wired.count_asides(layout, config, &parts);
    Ok(wired)
}

/// What stages start with.
struct Start<'a> {
    layout: &'a Layout,
    config: &'a DecoderConfig,
    shared: &'a Shared,
    progress: Progress,
    results: channel::Sender<Outcome>,
    /// Of those that share the processor.
    turn: Arc<Mutex<()>>,
    stock: Arc<Stock>,
}

impl Start<'_> {
    /// Adds the stage at this site to those of its thread. What can be said of it before it has loaded.
    fn stage<B: Backend>(
        &self,
        stage: &layout::Stage,
        site: Site<B>,
        (images, parts): (Option<ImageStore<B>>, Vec<PartOn<B>>),
        thread: &mut Vec<Stage<B>>,
    ) -> StageFacts {
        let Site { index, backend, input, output, probe } = site;
        let metrics = self.shared.metrics[index].clone();
        let split_head = !self.layout.part_stages().is_empty();
        let own = DecoderConfig { layers: stage.layers.clone(), split_head, ..self.config.clone() };
        let parts = if index + 1 == self.layout.stages().len() { parts } else { Vec::new() };
        let layer_kv_bytes = own.kv_blocks * KV_BLOCK * own.spec.kv_bytes_per_token(own.dtype);
        let kv_bytes = stage.layers.len() * layer_kv_bytes;
        let (device, layers) = (stage.device.to_string(), stage.to_string());
        // Whoever asks must not keep the device's memory from being given back.
        let of = Arc::downgrade(&backend);
        let memory = Box::new(move || of.upgrade()?.memory());
        let of = Arc::downgrade(&backend);
        let idle = Arc::new(move || of.upgrade()?.is_idle());
        let progress = self.progress.clone();
        let stocks = (self.stock.clone(), self.shared.before.clone());
        let on = (stage.device, backend.clone());
        let unconnected = "a site that is not connected; this is a bug";
        thread.push(Stage {
            index,
            backend,
            load: Box::new(move |_: &B| load_stage(index, &on, (&own, images, parts), &stocks, &progress)),
            input: input.expect(unconnected),
            output: output.expect(unconnected),
            results: self.results.clone(),
            turn: if B::ASYNC { Arc::default() } else { self.turn.clone() },
            metrics: metrics.clone(),
            probe,
        });
        StageFacts { device, layers, vision: false, weight_bytes: 0, kv_bytes, memory, idle, metrics }
    }
}

/// Loads a stage's units into the stock, but for those that the stock before has on the same device, and lets its device
/// try what it will be asked for.
fn load_stage<B: Backend>(
    index: usize,
    (device, backend): &(Device, Arc<B>),
    (config, images, parts): (&DecoderConfig, Option<ImageStore<B>>, Vec<PartOn<B>>),
    (stock, before): &(Arc<Stock>, Option<Arc<Stock>>),
    progress: &Progress,
) -> Result<Decoder<B>> {
    progress.begin();
    let tell = |bytes| progress.add(bytes);
    let mut decoder = stock.load(before.as_deref(), (*device, backend), config, &tell)?;
    let backend = &**backend;
    if !parts.is_empty() {
        let aside = |part: &PartOn<B>| {
            let on = (part.device, &part.backend, backend);
            stock.load_aside(before.as_deref(), on, config, part.unit, &tell)
        };
        let asides = parts.iter().map(aside).collect::<Result<_>>()?;
        decoder = decoder.with_parts(backend, config.limits, asides)?;
    }
    let mut decoder = match images {
        Some(store) => decoder.with_images(store),
        None => decoder,
    };
    let (began, passes) = (Instant::now(), Cell::new(0));
    decoder.warm_up(backend, config.limits, &|done, total| {
        progress.add_passes(if done == 0 { total } else { 0 }, done - passes.replace(done));
    })?;
    let (device, ms) = (backend.name(), began.elapsed().as_millis() as u64);
    tracing::info!(stage = index, device, passes = passes.get(), ms, "warmed up");
    Ok(decoder)
}

impl Wired {
    /// Waits until every stage has loaded.
    pub(super) fn loaded(&mut self) -> Result<Vec<StageFacts>> {
        let mut stages = Vec::new();
        for (run, handle) in &mut self.stages {
            for mut stage in run.drain(..) {
                let i = stages.len();
                let gone = |_| Err(Error::Engine(format!("stage {i} ended while loading; this is a bug")));
                stage.weight_bytes += handle.loaded.recv().unwrap_or_else(gone)?;
                stages.push(stage);
            }
        }
        if let Some(vision) = &mut self.vision {
            stages.extend(vision.loaded()?);
        }
        Ok(stages)
    }

    /// What brings images' tokens to the store belongs to the embedding's stage.
    fn count_keeper(&mut self) {
        let Some(vision) = &self.vision else { return };
        let Some(first) = self.stages.first_mut().and_then(|(facts, _)| facts.first_mut()) else { return };
        let (keeping, own) =
            (vision.keeping.clone(), std::mem::replace(&mut first.memory, Box::new(|| None)));
        first.memory =
            Box::new(move || own().map(|memory| DeviceMemory { taken: memory.taken + keeping(), ..memory }));
    }

    /// Ends the stages, which give back what they hold. An error names those that do not end in time: a thread that a
    /// driver does not let go must not keep others waiting.
    pub(super) fn end(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        self.steps = None;
        if let Some(vision) = &mut self.vision {
            (vision.works, vision.gate) = (None, None);
        }
        let mut limit = Limit { deadline: Instant::now() + self.patience, lost: Some(self.lost) };
        let mut late = Vec::new();
        for (_, StagesHandle { thread, loaded }) in self.stages.drain(..) {
            // Nobody is told any more whether it could be loaded.
            drop(loaded);
            late.extend(limit.join(thread));
        }
        for thread in self.vision.iter_mut().flat_map(|vision| vision.threads.drain(..)) {
            late.extend(limit.join(thread));
        }
        for collector in self.collectors.drain(..) {
            // It would wait for stages that are left behind.
            if late.is_empty() {
                late.extend(limit.join(collector));
            }
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
