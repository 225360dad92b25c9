//! Faults made on purpose: tests make a stage fail at any point of a step. There is nothing of it in a build that is
//! not for tests.

#[cfg(not(test))]
use crate::error::Result;

/// A point of a stage's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    /// Before it waits for a step.
    BeforeReceive,
    /// When one has come, or no more will.
    AfterReceive,
    /// When tokens have been asked for, before word of it is sent to the first stage.
    Enqueue,
    /// The others are a device's: see the backend that fails.
    #[cfg(test)]
    Load,
    #[cfg(test)]
    SetBatch,
    #[cfg(test)]
    Take,
    #[cfg(test)]
    Embed,
    #[cfg(test)]
    Layer,
    #[cfg(test)]
    Head,
    #[cfg(test)]
    Sample,
    #[cfg(test)]
    Collect,
    #[cfg(test)]
    Send,
    #[cfg(test)]
    FindWay,
    #[cfg(test)]
    Fetch,
    #[cfg(test)]
    Tower,
    #[cfg(test)]
    Keep,
}

/// Fails if a test wants it here.
#[cfg(not(test))]
#[inline(always)]
pub(super) fn at(_: Point, _stage: usize) -> Result<()> {
    Ok(())
}

#[cfg(test)]
pub(super) use plan::at;
#[cfg(test)]
pub(crate) use plan::{Fault, Kind, Plan};

#[cfg(test)]
mod plan {
    use std::{
        cell::RefCell,
        ops::Range,
        sync::{
            Arc, Mutex, PoisonError,
            atomic::{AtomicU64, Ordering::SeqCst},
        },
        time::Duration,
    };

    use super::Point;
    use crate::error::{Error, Result};

    /// What goes wrong.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Kind {
        DeviceError,
        OutOfMemory,
        Panic,
        /// Nothing, but it takes so long.
        Slow(Duration),
    }

    /// Where and when something goes wrong.
    #[derive(Debug)]
    pub(crate) struct Fault {
        pub(crate) stage: usize,
        pub(crate) point: Point,
        pub(crate) kind: Kind,
        /// At these visits of the point, from 0.
        pub(crate) visits: Range<u64>,
        /// Visits so far.
        pub(crate) seen: AtomicU64,
    }

    /// All that goes wrong with an engine.
    #[derive(Debug, Default)]
    pub(crate) struct Plan(pub(crate) Vec<Fault>);

    /// Of all threads that have none of their own: those of stages on devices that know nothing of plans.
    static EVERYWHERE: Mutex<Option<Arc<Plan>>> = Mutex::new(None);

    thread_local! {
        /// Of the thread's stages.
        static PLAN: RefCell<Option<Arc<Plan>>> = const { RefCell::new(None) };
    }

    pub(in crate::pipeline) fn at(point: Point, stage: usize) -> Result<()> {
        let everywhere = || EVERYWHERE.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let plan = PLAN.with_borrow(Clone::clone).or_else(everywhere);
        plan.map_or(Ok(()), |plan| plan.at(point, stage))
    }

    impl Fault {
        pub(crate) fn new(stage: usize, point: Point, kind: Kind, visits: Range<u64>) -> Self {
            Fault { stage, point, kind, visits, seen: AtomicU64::new(0) }
        }

        fn come(&self) -> Result<()> {
            let stage = self.stage;
            let failed = |why: &str| Err(Error::Device { device: format!("test:{stage}"), why: why.into() });
            match self.kind {
                Kind::DeviceError => failed("made to fail"),
                Kind::OutOfMemory => failed("out of memory"),
                Kind::Panic => panic!("made to panic"),
                Kind::Slow(time) => {
                    std::thread::sleep(time);
                    Ok(())
                }
            }
        }
    }

    impl Plan {
        /// For the thread that calls it: the points that no device sees are looked up there.
        pub(crate) fn install(self: &Arc<Self>) {
            PLAN.set(Some(self.clone()));
        }

        /// For all threads of the process that have none of their own.
        pub(crate) fn install_everywhere(self: &Arc<Self>) {
            *EVERYWHERE.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.clone());
        }

        pub(crate) fn at(&self, point: Point, stage: usize) -> Result<()> {
            let here = self.0.iter().filter(|fault| (fault.point, fault.stage) == (point, stage));
            here.filter(|fault| fault.visits.contains(&fault.seen.fetch_add(1, SeqCst)))
                .try_for_each(Fault::come)
        }
    }
}
