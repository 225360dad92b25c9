//! From stages' threads that have been started to an engine.

use std::{
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Instant,
};

use crossbeam_channel as channel;

use super::{
    Engine, Facts, StageFacts,
    counts::{Counts, WaitingLimits},
    meter::Meter,
    rebuild::{Faults, Recipe},
    text,
    timeline::Timeline,
    wire::Wired,
    worker::{Open, Stages, Worker},
};
use crate::error::{Error, Result};

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
}

/// Waits until every stage has loaded, and starts the engine's own threads.
pub(super) fn start(ready: Ready) -> Result<Engine> {
    let Ready { facts, recipe, mut wired, since, waiting, meter, timeline } = ready;
    let stages = wired.loaded()?;
    let loading = since.elapsed();
    let row =
        |(i, stage): (usize, &StageFacts)| format!("stage {i}: {}, layers {}", stage.device, stage.layers);
    let rows = stages.iter().filter(|stage| !stage.vision).enumerate().map(row).collect();
    let timeline = timeline.map(|timeline| timeline.start(&meter, rows)).transpose()?;
    let (stages, counts) = (Arc::new(Mutex::new(stages)), Arc::new(Counts::new(waiting)));
    let scheduler = (recipe.scheduler)();
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
    };
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || worker.run())
        .map_err(|e| Error::Engine(format!("no thread: {e}")))?;
    let (threads, next_request) = (vec![thread, text_thread], AtomicU64::new(0));
    Ok(Engine { facts, stages, counts, commands, next_request, threads, meter, timeline })
}
