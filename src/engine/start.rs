//! From stages' threads that have been started to an engine.

use std::{
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Instant,
};

use crossbeam_channel as channel;

use super::{
    Engine, Facts,
    balance::{Balancer, Pace},
    counts::{Counts, WaitingLimits},
    meter::Meter,
    rebuild::Faults,
    recipe::Recipe,
    stall::Stall,
    text,
    timeline::{self, Timeline},
    wire::Wired,
    worker::{Open, Stages, Worker},
};
use crate::{
    error::{Error, Result},
    model::units::Unit,
};

/// What an engine is started with.
pub(super) struct Ready {
    pub(super) facts: Facts,
    pub(super) recipe: Recipe,
    /// Made by it.
    pub(super) wired: Wired,
    /// When they began to load.
    pub(super) since: Instant,
    /// How much may wait.
    pub(super) waiting: WaitingLimits,
    pub(super) meter: Arc<Meter>,
    pub(super) timeline: Option<Timeline>,
    /// Whether layers move by themselves, and after how long.
    pub(super) balance: Option<Pace>,
}

/// Waits until every stage has loaded, and starts the engine's own threads.
pub(super) fn start(ready: Ready) -> Result<Engine> {
    let Ready { facts, recipe, mut wired, since, waiting, meter, timeline, balance } = ready;
    let stages = wired.loaded()?;
    let loading = since.elapsed();
    let rows = timeline::rows(&recipe.layout);
    let timeline = timeline.map(|timeline| timeline.start(&meter, rows)).transpose()?;
    let (stages, counts) = (Arc::new(Mutex::new(stages)), Arc::new(Counts::new(waiting)));
    let scheduler = recipe.scheduler();
    let weight = |unit| (recipe.weigh)(unit).0 as f64;
    let head = weight(Unit::Head) / weight(Unit::Layer(0));
    let balancer = balance.map(|pace| Balancer::new(pace, &recipe.layout, head));
    let layout = Arc::new(Mutex::new(recipe.layout.clone()));
    meter.set_queues(scheduler.stats());
    let (commands, commands_out) = channel::unbounded();
    let (text, text_thread) = text::spawn(commands.clone())?;
    let worker = Worker {
        recipe,
        scheduler,
        commands: commands_out,
        text,
        stages: Stages::Up(wired),
        facts: stages.clone(),
        counts: counts.clone(),
        meter: meter.clone(),
        open: Open::default(),
        faults: Faults::default(),
        loading,
        change: None,
        balancer,
        stall: Stall::new(),
        layout: layout.clone(),
    };
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || worker.run())
        .map_err(|e| Error::Engine(format!("no thread: {e}")))?;
    let (threads, next_request) = (vec![thread, text_thread], AtomicU64::new(0));
    Ok(Engine { facts, layout, stages, counts, commands, next_request, threads, meter, timeline })
}
