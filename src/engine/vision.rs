//! The vision pipeline: threads that take images from pixels to the image store, beside the decoder's stages.
//!
//! Each stage of the tower has a thread, of which the first one brings pixels to its device, where they are cut into patches;
//! the last thread brings tokens to the store, on the device of the embedding, and waits until they are there. So no stage of
//! the decoder waits for an image, and none is waited for.

mod needs;
mod spans;
mod stage;

use std::{
    ops::Range,
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use crossbeam_channel as channel;

pub(super) use self::needs::{Extent, tower_scratch};

use self::{
    needs::PASSES_AT_BOUNDARY,
    stage::{Feed, Keeper, Part},
};
use super::{
    StageFacts,
    images::Tables,
    meter::Meter,
    wire::{Either, Ways},
};
use crate::{
    backend::{Backend, DType, vision::VisionOps},
    batch::{MicroBatch, Step},
    error::{Error, Result, quiet_panic},
    grid::Grid,
    layout::{Device, VisionStage},
    model::{
        decoder::ImageStore,
        vision::{VisionPass, VisionSpec},
        weights::Weights,
    },
    pipeline::StageMetrics,
    request::Media,
    vision::Preprocessor,
};

/// The tower, and how much goes through it at once.
#[derive(Clone)]
pub(super) struct VisionConfig {
    /// The device and the blocks of each stage.
    pub(super) stages: Vec<(Device, Range<usize>)>,
    pub(super) spec: Arc<VisionSpec>,
    pub(super) weights: Arc<Weights>,
    pub(super) dtype: DType,
    /// Patches of a pass.
    pub(super) patches_max: usize,
    /// Passes in flight.
    pub(super) passes: usize,
    /// Rows of the store.
    pub(super) rows: usize,
    pub(super) preprocessor: Preprocessor,
    /// Of each stage; they go on counting when the stages are built anew.
    pub(super) metrics: Vec<Arc<StageMetrics>>,
    /// Is told what stages take.
    pub(super) meter: Arc<Meter>,
}

/// What the tower runs on.
pub(super) struct VisionOn<A: VisionOps, B: VisionOps> {
    /// One a stage.
    pub(super) backends: Vec<Either<Arc<A>, Arc<B>>>,
    /// For what is brought to the store, on the device of the embedding.
    pub(super) keeper: Either<Arc<A>, Arc<B>>,
}

/// The store, on either kind of device.
pub(super) type AnyStore<A, B> = Either<ImageStore<A>, ImageStore<B>>;

/// Images of a pass.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) pass: u64,
    pub(super) images: Vec<Media>,
    /// Where each image's tokens begin in the store.
    pub(super) rows: Vec<u32>,
}

/// A pass that has come to its end, or the reason why none will any more.
pub(super) type Arrived = Result<u64>;

/// The vision pipeline's threads, and the channels to them.
pub(super) struct Vision {
    /// With room for every pass that may be in flight. `None` once they have been told to end.
    pub(super) works: Option<channel::Sender<Work>>,
    pub(super) arrived: channel::Receiver<Arrived>,
    pub(super) threads: Vec<JoinHandle<()>>,
    /// Bytes of the memory of the embedding's device that whoever brings tokens to the store has taken.
    pub(super) keeping: Arc<dyn Fn() -> usize + Send + Sync>,
    loading: Vec<(StageFacts, channel::Receiver<Result<usize>>)>,
    /// Goes when stages may try their devices.
    pub(super) gate: Option<channel::Sender<()>>,
}

/// From a stage to the next one, beside the packets.
type Works = (channel::Sender<Arc<Cut>>, channel::Receiver<Arc<Cut>>);

/// What stages behind the first know of a pass.
struct Cut {
    pass: u64,
    grids: Vec<Grid>,
    rows: Vec<u32>,
    cost: VisionPass,
}

/// Where the packets of either kind of devices come from.
enum AnyInput<A: VisionOps, B: VisionOps> {
    Pixels(channel::Receiver<Work>),
    One(Box<dyn crate::transport::Receiver<A>>, channel::Receiver<Arc<Cut>>),
    Two(Box<dyn crate::transport::Receiver<B>>, channel::Receiver<Arc<Cut>>),
}

/// Starts the threads.
pub(super) fn start<A: VisionOps, B: VisionOps>(
    on: VisionOn<A, B>,
    ways: &Ways<'_, A, B>,
    config: &VisionConfig,
    store: AnyStore<A, B>,
) -> Result<Vision> {
    let (works, works_out) = channel::bounded(config.passes);
    let (arrived_in, arrived) = channel::unbounded();
    let keeping = match &on.keeper {
        Either::One(backend) => taken(backend),
        Either::Two(backend) => taken(backend),
    };
    let (gate, opens) = channel::bounded(0);
    let (works, gate, threads, loading) = (Some(works), Some(gate), Vec::new(), Vec::new());
    let mut vision = Vision { works, arrived, threads, keeping, loading, gate };
    let mut input = AnyInput::Pixels(works_out);
    for (index, (_, blocks)) in config.stages.iter().enumerate() {
        let (works, works_out): Works = channel::unbounded();
        let last = index + 1 == config.stages.len();
        let to = if last { &on.keeper } else { &on.backends[index + 1] };
        let (results, opens) = (arrived_in.clone(), opens.clone());
        let link = Link { config, index, blocks: blocks.clone(), last, works, results, opens };
        let numbers = link.numbers();
        let depth = PASSES_AT_BOUNDARY;
        input = match (&on.backends[index], to) {
            (Either::One(a), Either::One(b)) => {
                let (sender, receiver) = ways.ones.connect(a.clone(), b.clone(), depth, numbers)?;
                link.start(&mut vision, a, input.one(), sender)?;
                AnyInput::One(receiver, works_out)
            }
            (Either::Two(a), Either::Two(b)) => {
                let (sender, receiver) = ways.twos.connect(a.clone(), b.clone(), depth, numbers)?;
                link.start(&mut vision, a, input.two(), sender)?;
                AnyInput::Two(receiver, works_out)
            }
            (Either::One(a), Either::Two(b)) => {
                let (sender, receiver) = ways.one_to_two.connect(a.clone(), b.clone(), depth, numbers)?;
                link.start(&mut vision, a, input.one(), sender)?;
                AnyInput::Two(receiver, works_out)
            }
            (Either::Two(a), Either::One(b)) => {
                let (sender, receiver) = ways.two_to_one.connect(a.clone(), b.clone(), depth, numbers)?;
                link.start(&mut vision, a, input.two(), sender)?;
                AnyInput::One(receiver, works_out)
            }
        };
    }
    let thread = match (input, on.keeper, store) {
        (AnyInput::One(packets, works), Either::One(backend), Either::One(store)) => {
            Keeper { backend, packets, works, store, results: arrived_in }.spawn(config)?
        }
        (AnyInput::Two(packets, works), Either::Two(backend), Either::Two(store)) => {
            Keeper { backend, packets, works, store, results: arrived_in }.spawn(config)?
        }
        _ => unreachable!("a store on another device; this is a bug"),
    };
    vision.threads.push(thread);
    Ok(vision)
}

/// What a view of a device has taken of its memory, as long as it lives; the processor's is not counted.
fn taken<B: Backend>(backend: &Arc<B>) -> Arc<dyn Fn() -> usize + Send + Sync> {
    let of = Arc::downgrade(backend);
    Arc::new(move || of.upgrade().and_then(|backend| backend.memory()).map_or(0, |memory| memory.taken))
}

/// A stage and what comes after it.
struct Link<'a> {
    config: &'a VisionConfig,
    index: usize,
    blocks: Range<usize>,
    last: bool,
    works: channel::Sender<Arc<Cut>>,
    results: channel::Sender<Arrived>,
    opens: channel::Receiver<()>,
}

impl Link<'_> {
    /// Of a packet, at most.
    fn numbers(&self) -> usize {
        let VisionConfig { spec, patches_max, .. } = self.config;
        match self.last {
            true => patches_max / spec.cell_rows() * spec.out,
            false => patches_max * spec.dim,
        }
    }

    fn start<B: VisionOps>(
        self,
        vision: &mut Vision,
        backend: &Arc<B>,
        input: Feed<B>,
        output: Box<dyn crate::transport::Sender<B>>,
    ) -> Result<()> {
        let Link { config, index, blocks, works, results, opens, .. } = self;
        let VisionConfig { stages, metrics, meter, .. } = config;
        let (device, metrics) = (stages[index].0, metrics[index].clone());
        let tower = config.part(blocks.clone());
        let (of, asked) = (Arc::downgrade(backend), Arc::downgrade(backend));
        let facts = StageFacts {
            device: device.to_string(),
            layers: VisionStage { device, blocks: Some(blocks) }.to_string(),
            vision: true,
            weight_bytes: 0,
            kv_bytes: 0,
            memory: Box::new(move || of.upgrade()?.memory()),
            idle: Arc::new(move || asked.upgrade()?.is_idle()),
            metrics: metrics.clone(),
        };
        let (loaded, loading) = channel::bounded(1);
        let backend = backend.clone();
        let (tables, meter) = (Tables::new(&config.preprocessor), meter.clone());
        let part =
            Part { index, backend, tower, tables, opens, input, output, works, results, metrics, meter };
        vision.threads.push(part.spawn(loaded)?);
        vision.loading.push((facts, loading));
        Ok(())
    }
}

impl<A: VisionOps, B: VisionOps> AnyInput<A, B> {
    fn one(self) -> Feed<A> {
        match self {
            AnyInput::Pixels(works) => Feed::Pixels(works),
            AnyInput::One(packets, works) => Feed::Packets(packets, works),
            AnyInput::Two(..) => unreachable!("packets for another device; this is a bug"),
        }
    }

    fn two(self) -> Feed<B> {
        match self {
            AnyInput::Pixels(works) => Feed::Pixels(works),
            AnyInput::Two(packets, works) => Feed::Packets(packets, works),
            AnyInput::One(..) => unreachable!("packets for another device; this is a bug"),
        }
    }
}

impl Vision {
    /// Waits until every stage has loaded. The decoder's have: nothing disturbs any more what is tried on their devices.
    pub(super) fn loaded(&mut self) -> Result<Vec<StageFacts>> {
        self.gate = None;
        let gone = |_| Err(Error::Engine("a vision stage ended while loading; this is a bug".into()));
        let stage = |(facts, loaded): (StageFacts, channel::Receiver<Result<usize>>)| {
            Ok(StageFacts { weight_bytes: loaded.recv().unwrap_or_else(gone)?, ..facts })
        };
        self.loading.drain(..).map(stage).collect()
    }
}

/// The store: nothing is in it.
pub(super) fn store<B: VisionOps>(backend: &B, config: &VisionConfig) -> Result<ImageStore<B>> {
    Ok(Arc::new(Mutex::new(backend.buf(config.rows * config.spec.out)?)))
}

/// What crosses boundaries beside the numbers: the pass alone, of which the works tell the rest.
fn packet(pass: u64) -> Step {
    Step { step: pass, after: None, batch: Arc::<MicroBatch>::default() }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let failed = |e| Error::Engine(format!("{name}: no thread: {e}"));
    std::thread::Builder::new().name(name.clone()).spawn(run).map_err(failed)
}

/// Turns a panic into an error that names where it was.
fn guard<T>(place: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    quiet_panic(work).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Error::Engine(format!("{place} panicked: {text}")))
    })
}
