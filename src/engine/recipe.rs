//! How an engine's stages come to be, in its layout and in others.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    builder::Wire,
    meter::Meter,
    place::{Free, Room},
    progress::Progress,
    stock::Stock,
    wire::{PATIENCE, Shared, Wired},
};
use crate::{
    batch::KV_BLOCK,
    error::Result,
    layout::{Device, Layout},
    model::{decoder::DecoderConfig, units::Unit},
    pipeline::StageMetrics,
    schedule::{BlockPool, Scheduler, SchedulerConfig},
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
    /// KV blocks.
    pub(super) blocks: usize,
    /// How long stages may take to end.
    pub(super) patience: Duration,
    /// Bytes of a unit's weights, and of its keys and values in a block.
    pub(super) weigh: Arc<dyn Fn(Unit) -> (usize, usize) + Send + Sync>,
}

/// What does not depend on the layout.
pub(super) struct Model {
    pub(super) wire: Arc<Wire>,
    pub(super) config: DecoderConfig,
    pub(super) scheduling: SchedulerConfig,
    /// Micro-batches in flight, if it is said how many.
    pub(super) slots: Option<usize>,
    /// Whether tokens are chosen after ops have returned, if it is said; else on GPUs.
    pub(super) ahead: Option<bool>,
    /// CPU threads, if it is said how many.
    pub(super) threads: Option<usize>,
    /// Whether GPUs keep room for a layer more.
    pub(super) spare: bool,
    /// What is free on them.
    pub(super) free: Free,
    pub(super) meter: Arc<Meter>,
    /// Of each stage that there has been: those of other layouts go on counting in its place.
    pub(super) metrics: Mutex<Vec<Arc<StageMetrics>>>,
}

impl Recipe {
    /// A scheduler with nothing to do.
    pub(super) fn scheduler(&self) -> Scheduler {
        Scheduler::new(self.scheduling, BlockPool::new(self.blocks))
    }
}

impl Model {
    /// How it runs in a layout.
    pub(super) fn recipe(self: &Arc<Self>, layout: &Layout) -> Recipe {
        let (slots, ahead) = self.slots_of(layout);
        let scheduling = SchedulerConfig { slots, ahead, ..self.scheduling };
        let (of, on) = (self.clone(), layout.clone());
        let start = move |before, progress| {
            let shared = Shared {
                in_flight: scheduling.in_flight_max(),
                threads: of.threads,
                meter: of.meter.clone(),
                metrics: of.metrics(on.stages().len()),
                patience: PATIENCE,
                before,
            };
            (of.wire)(&on, &of.config, &shared, progress)
        };
        let (of, now) = (self.clone(), layout.clone());
        let redraw = move |to: &Layout| {
            to.check(of.config.spec.layers.len())?;
            let recipe = of.recipe(to);
            of.room(to, recipe.scheduling.in_flight_max()).check_beside(
                &now,
                of.config.kv_blocks,
                of.free,
            )?;
            Ok(recipe)
        };
        let of = self.clone();
        let weigh = move |unit: Unit| {
            let DecoderConfig { spec, dtype, .. } = &of.config;
            (unit.weight_bytes(spec, *dtype), KV_BLOCK * unit.kv_bytes_per_token(spec, *dtype))
        };
        Recipe {
            start: Arc::new(start),
            redraw: Arc::new(redraw),
            layout: layout.clone(),
            scheduling,
            blocks: self.config.kv_blocks,
            patience: PATIENCE,
            weigh: Arc::new(weigh),
        }
    }

    fn room<'a>(&'a self, layout: &'a Layout, in_flight: usize) -> Room<'a> {
        let DecoderConfig { spec, dtype, limits, .. } = &self.config;
        Room { layout, spec, dtype: *dtype, limits: *limits, in_flight, spare: self.spare }
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

/// Micro-batches in flight in a layout, unless it is said how many, and whether ops return before they are done there.
pub(super) fn slots_of(layout: &Layout, slots: Option<usize>, ahead: Option<bool>) -> (usize, bool) {
    let devices: std::collections::BTreeSet<Device> = layout.stages().iter().map(|s| s.device).collect();
    let gpus = devices.iter().any(|device| *device != Device::Cpu);
    (slots.unwrap_or(devices.len()), ahead.unwrap_or(gpus))
}
