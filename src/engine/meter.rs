//! What an engine tells of itself while it runs: to its scheduler, to a timeline, to whoever asks.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use crate::{
    batch::{Observation, Step},
    layout::Layout,
    model::vision::VisionPass,
    pipeline::StageSpan,
    schedule::{Scheduler, SchedulerStats},
};

/// Observations on their way to the scheduler; it reads them when it plans.
const OBSERVATIONS: usize = 1024;
/// Where every pass is measured, those of one step in so many are observed after the first ones: each takes the scheduler some
/// microseconds. No multiple of usual numbers of slots, of which each should be seen.
const OBSERVED_FIRST: u64 = 64;
const OBSERVED_EVERY: u64 = 5;

/// Something that an engine tells of itself. Times count from its start.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Measurement {
    /// A stage has done its part of a step.
    Span(StageSpan),
    /// A stage of the vision tower has done its part of a pass.
    Vision(VisionSpan),
    /// A step has been planned.
    Planned {
        /// When.
        at: Duration,
        /// The step.
        step: Step,
        /// Queues and blocks with it.
        queues: SchedulerStats,
    },
    /// What a step came to has been told to the clients.
    Applied {
        /// When.
        at: Duration,
        /// The step.
        step: u64,
        /// Sequences that ended with it.
        ended: usize,
        /// Queues and blocks after it.
        queues: SchedulerStats,
    },
    /// Later spans are of the stages of another layout.
    Relaid {
        /// When.
        at: Duration,
        /// It.
        layout: Layout,
    },
}

/// What a stage of the vision tower did for a pass. Times count from the engine's start; what others do on the same device
/// meanwhile is among them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VisionSpan {
    /// Which stage.
    pub stage: usize,
    /// Which pass.
    pub pass: u64,
    /// When what it works on had come.
    pub began: Duration,
    /// When it was done.
    pub ended: Duration,
    /// Images and videos.
    pub images: usize,
    /// What there was to do.
    pub cost: VisionPass,
}

/// Measurements as they come, a little late. Those that find no room are dropped.
pub struct Measurements(channel::Receiver<Measurement>);

impl Measurements {
    /// Those that have come.
    pub fn try_iter(&self) -> impl Iterator<Item = Measurement> {
        self.0.try_iter()
    }
}

/// Where measurements come together.
pub(super) struct Meter {
    start: Instant,
    /// Measures every pass.
    every: bool,
    /// Whether there are listeners, for those who would have to make something to tell.
    heard: AtomicBool,
    listeners: Mutex<Vec<channel::Sender<Measurement>>>,
    dropped: Arc<AtomicU64>,
    observations: (channel::Sender<Observation>, channel::Receiver<Observation>),
    queues: Mutex<SchedulerStats>,
}

impl Meter {
    pub(super) fn new(every: bool) -> Arc<Meter> {
        Arc::new(Meter {
            start: Instant::now(),
            every,
            heard: AtomicBool::new(false),
            listeners: Mutex::default(),
            dropped: Arc::default(),
            observations: channel::bounded(OBSERVATIONS),
            queues: Mutex::default(),
        })
    }

    /// The moment that all times count from.
    pub(super) fn start(&self) -> Instant {
        self.start
    }

    pub(super) fn every(&self) -> bool {
        self.every
    }

    /// What found no room.
    pub(super) fn dropped(&self) -> &Arc<AtomicU64> {
        &self.dropped
    }

    /// Everything from now on, up to so many that have not been read.
    pub(super) fn listen(&self, room: usize) -> channel::Receiver<Measurement> {
        let (sender, receiver) = channel::bounded(room);
        lock(&self.listeners).push(sender);
        self.heard.store(true, Relaxed);
        receiver
    }

    /// Lets the listeners go: nothing more comes.
    pub(super) fn end(&self) {
        self.heard.store(false, Relaxed);
        lock(&self.listeners).clear();
    }

    pub(super) fn span(&self, span: StageSpan) {
        let sampled = span.weight > 1.0 || span.step < OBSERVED_FIRST;
        if sampled || span.step.is_multiple_of(OBSERVED_EVERY) {
            let observation = Observation { stage: span.stage, step: span.step, busy: span.taken() };
            // A scheduler that has not read for so long does not need them all.
            let _ = self.observations.0.try_send(observation);
        }
        self.tell(|| Measurement::Span(span));
    }

    pub(super) fn vision(&self, span: VisionSpan) {
        self.tell(|| Measurement::Vision(span));
    }

    /// A step has been planned, and not been given to the stages yet.
    pub(super) fn planned(&self, step: &Step, scheduler: &Scheduler) {
        self.tell(|| {
            let (at, queues) = (self.start.elapsed(), scheduler.stats());
            Measurement::Planned { at, step: step.clone(), queues }
        });
    }

    /// A step has come back, and nobody has been told of its tokens yet.
    pub(super) fn applied(&self, step: u64, ended: usize, scheduler: &Scheduler) {
        if ended > 0 {
            // Whoever learns that an answer has come to its last token finds it gone.
            self.set_queues(scheduler.stats());
        }
        self.tell(|| {
            let (at, queues) = (self.start.elapsed(), scheduler.stats());
            Measurement::Applied { at, step, ended, queues }
        });
    }

    /// Other stages go on; those of before have told everything.
    pub(super) fn relaid(&self, layout: &Layout) {
        // They know nothing of these.
        self.observations().for_each(drop);
        self.tell(|| Measurement::Relaid { at: self.start.elapsed(), layout: layout.clone() });
    }

    pub(super) fn set_queues(&self, queues: SchedulerStats) {
        *lock(&self.queues) = queues;
    }

    /// What stages have observed since the last time.
    pub(super) fn observations(&self) -> channel::TryIter<'_, Observation> {
        self.observations.1.try_iter()
    }

    /// The latest queues.
    pub(super) fn queues(&self) -> SchedulerStats {
        *lock(&self.queues)
    }

    fn tell(&self, measurement: impl FnOnce() -> Measurement) {
        if !self.heard.load(Relaxed) {
            return;
        }
        let measurement = measurement();
        lock(&self.listeners).retain(|listener| match listener.try_send(measurement.clone()) {
            Ok(()) => true,
            Err(channel::TrySendError::Full(_)) => {
                self.dropped.fetch_add(1, Relaxed);
                true
            }
            Err(channel::TrySendError::Disconnected(_)) => false,
        });
    }
}

impl From<channel::Receiver<Measurement>> for Measurements {
    fn from(receiver: channel::Receiver<Measurement>) -> Self {
        Measurements(receiver)
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under the lock is complete before anything in it can panic.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Work;

    fn span(step: u64) -> StageSpan {
        let at = Duration::from_millis(step);
        StageSpan {
            stage: 0,
            step,
            began: at,
            computed: at,
            ended: at,
            copy: Duration::ZERO,
            wait_output: Duration::ZERO,
            wait_input: None,
            weight: 1.0,
            work: Work::default(),
        }
    }

    #[test]
    fn nobody_waits_for_a_listener() {
        let meter = Meter::new(false);
        meter.span(span(0));
        let (slow, fast) = (meter.listen(2), meter.listen(8));
        (1..6).for_each(|step| meter.span(span(step)));
        let steps = |listener: &channel::Receiver<Measurement>| {
            let step = |m| match m {
                Measurement::Span(span) => span.step,
                other => panic!("{other:?}"),
            };
            listener.try_iter().map(step).collect::<Vec<_>>()
        };
        assert_eq!((steps(&slow), steps(&fast)), (vec![1, 2], vec![1, 2, 3, 4, 5]));
        assert_eq!(meter.dropped().load(Relaxed), 3);
        drop(slow);
        meter.span(span(6));
        assert_eq!(meter.dropped().load(Relaxed), 3, "one that has gone misses nothing");
        meter.end();
        assert_eq!(steps(&fast), [6]);
        assert!(fast.recv().is_err());
        assert_eq!(meter.observations().count(), 7);
    }
}
