//! How an engine's stages come to be, in its layout and in others.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    builder::{Towers, Wire},
    meter::Meter,
    place::{Free, Room},
    progress::Progress,
    stall::STALL,
    stock::Stock,
    vision::VisionConfig,
    wire::{PATIENCE, Shared, Wired},
};
use crate::{
    batch::KV_BLOCK,
    error::Result,
    layout::{Device, Layout, MemoryLimits},
    model::{decoder::DecoderConfig, units::Unit},
    pipeline::StageMetrics,
    schedule::{BlockPool, ImageConfig, Keys, Scheduler, SchedulerConfig},
};

/// How stages are started that may go on with what others hold.
pub(super) type Start = dyn Fn(Option<Arc<Stock>>, Progress) -> Result<Wired> + Send + Sync;

/// How the same engine comes to be in another layout.
type Redraw = dyn Fn(&Layout) -> Result<Recipe> + Send + Sync;

/// How an engine's stages come to be.
#[derive(Clone)]
pub(super) struct Recipe {
    /// Starts the stages' threads.
    pub(super) start: Arc<Start>,
    /// The same engine in another layout, if it fits there beside this one.
    pub(super) redraw: Arc<Redraw>,
    /// The layout of this one.
    pub(super) layout: Layout,
    /// How much runs at once.
    pub(super) scheduling: SchedulerConfig,
    /// The image store, of a model that reads images.
    pub(super) images: Option<ImageConfig>,
    /// What blocks are found by.
    pub(super) keys: Keys,
    /// KV blocks.
    pub(super) blocks: usize,
    /// How long stages may take to end.
    pub(super) patience: Duration,
    /// How long it may take from the end of a step to that of the next one, if there is a limit.
    pub(super) stall: Option<Duration>,
    /// Bytes of a unit's weights, and of its keys and values in a block.
    pub(super) weigh: Arc<dyn Fn(Unit) -> (usize, usize) + Send + Sync>,
}

/// How a model runs, whatever the layout.
pub(super) struct Runs {
    pub(super) wire: Arc<Wire>,
    pub(super) config: DecoderConfig,
    pub(super) scheduling: SchedulerConfig,
    pub(super) keys: Keys,
    /// Micro-batches in flight, if it is said how many.
    pub(super) slots: Option<usize>,
    /// Whether tokens are chosen after ops have returned, if it is said; else on GPUs.
    pub(super) ahead: Option<bool>,
    /// CPU threads, if it is said how many.
    pub(super) threads: Option<usize>,
    /// The vision tower, in some layout, if there is one.
    pub(super) vision: Option<VisionConfig>,
    /// Where it goes in other layouts.
    pub(super) towers: Arc<Towers>,
    /// What may be taken of devices.
    pub(super) memory: MemoryLimits,
    /// Whether GPUs keep room for a layer more.
    pub(super) spare: bool,
    /// What is free on them.
    pub(super) free: Free,
    pub(super) meter: Arc<Meter>,
    /// How long it may take from the end of a step to that of the next one, if it is said; else GPUs alone have a limit.
    pub(super) stall: Option<Duration>,
    /// Of each stage that there has been: those of other layouts go on counting in its place.
    pub(super) metrics: Mutex<Vec<Arc<StageMetrics>>>,
}

impl Recipe {
    /// A scheduler with nothing to do.
    pub(super) fn scheduler(&self) -> Scheduler {
        let scheduler = Scheduler::new(self.scheduling, BlockPool::new(self.blocks));
        self.images.into_iter().fold(scheduler.with_keys(self.keys.clone()), Scheduler::with_images)
    }
}

impl Runs {
    /// How it runs in a layout.
    pub(super) fn recipe(self: &Arc<Self>, layout: &Layout) -> Result<Recipe> {
        let (slots, ahead) = self.slots_of(layout);
        let scheduling = SchedulerConfig { slots, ahead, ..self.scheduling };
        let vision = self.vision.as_ref().map(|vision| vision.in_layout(layout)).transpose()?;
        let images = vision.as_ref().map(VisionConfig::scheduling);
        let (of, on) = (self.clone(), layout.clone());
        let start = move |before, progress| {
            let shared = Shared {
                in_flight: scheduling.in_flight_max(),
                threads: of.threads,
                meter: of.meter.clone(),
                metrics: of.metrics(on.stages().len()),
                patience: PATIENCE,
                vision: vision.clone(),
                before,
            };
            (of.wire)(&on, &of.config, &shared, progress)
        };
        let (of, now) = (self.clone(), layout.clone());
        let redraw = move |to: &Layout| {
            to.check(of.config.spec.layers.len())?;
            let recipe = of.recipe(&(of.towers)(to)?)?;
            let in_flight = recipe.scheduling.in_flight_max();
            let (room, before) = (of.room(&recipe.layout, in_flight)?, of.room(&now, in_flight)?);
            room.check_beside(&before, of.config.kv_blocks, of.free)?;
            drop(room);
            Ok(recipe)
        };
        let of = self.clone();
        let weigh = move |unit: Unit| {
            let DecoderConfig { spec, dtype, .. } = &of.config;
            (unit.weight_bytes(spec, *dtype), KV_BLOCK * unit.kv_bytes_per_token(spec, *dtype))
        };
        Ok(Recipe {
            start: Arc::new(start),
            redraw: Arc::new(redraw),
            layout: layout.clone(),
            scheduling,
            images,
            keys: self.keys.clone(),
            blocks: self.config.kv_blocks,
            patience: PATIENCE,
            stall: self.stall.or_else(|| on_gpus(layout).then_some(STALL)),
            weigh: Arc::new(weigh),
        })
    }

    fn room<'a>(&'a self, layout: &'a Layout, in_flight: usize) -> Result<Room<'a>> {
        let DecoderConfig { spec, dtype, limits, .. } = &self.config;
        let vision = self.vision.as_ref().map(|vision| vision.in_layout(layout)).transpose()?;
        let vision = vision.map(|vision| vision.bytes(layout.stages()[0].device)).unwrap_or_default();
        let (dtype, limits, memory, spare) = (*dtype, *limits, &self.memory, self.spare);
        Ok(Room { layout, spec, dtype, limits, in_flight, vision, memory, spare })
    }

    /// Micro-batches in flight in a layout, and whether a step is planned before the one before it has been read.
    fn slots_of(&self, layout: &Layout) -> (usize, bool) {
        slots_of(layout, self.slots, self.ahead)
    }

    /// Of so many stages.
    fn metrics(&self, stages: usize) -> Vec<Arc<StageMetrics>> {
        let mut metrics = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        if metrics.len() < stages {
            metrics.resize_with(stages, Arc::default);
        }
        metrics[..stages].to_vec()
    }
}

fn on_gpus(layout: &Layout) -> bool {
    layout.stages().iter().all(|stage| stage.device != Device::Cpu)
}

/// Micro-batches in flight in a layout, unless it is said how many, and whether the host runs a step ahead: tokens that it does
/// not know must be known where they are embedded.
pub(super) fn slots_of(layout: &Layout, slots: Option<usize>, ahead: Option<bool>) -> (usize, bool) {
    let stages = layout.stages();
    let devices: BTreeSet<Device> = stages.iter().map(|stage| stage.device).collect();
    let ends = [stages.first(), stages.last()].into_iter().flatten();
    let hands_on = || ends.into_iter().all(|stage| stage.device != Device::Cpu);
    (slots.unwrap_or(devices.len()), ahead.unwrap_or_else(hands_on))
}
