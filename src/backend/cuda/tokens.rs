//! The way of tokens from the stage that chooses them to the one that embeds them, and to the host.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::{Duration, Instant},
};

use super::{
    driver::Context,
    memory::{DevicePtr, Event, Pinned, Stream},
};
use crate::error::{Error, Result};

/// Steps in flight at most.
const STEPS: usize = 2048;
/// How long the host sleeps between two looks: a step is longer, and the host is a step ahead.
const LOOK: Duration = Duration::from_micros(20);
/// How often it looks after the stages while it waits.
const CARE: Duration = Duration::from_millis(500);

/// The last token of every seat: what the head's stage chooses and the embedding's stage reads.
///
/// It lies in pinned memory of the host, which every GPU reaches, whether or not they reach each other.
pub(super) struct Tokens {
    context: Context,
    table: Pinned, // [seats] of u32
    in_flight: usize,
    /// By step, that its tokens are there.
    chosen: Vec<Event>,
    /// Of all stages: if one of them fails, the others wait for its events for ever.
    stages: Mutex<Vec<Weak<Stream>>>,
    /// Why no more tokens come.
    failed: OnceLock<Error>,
}

impl Tokens {
    /// For so many sequences, and steps in flight.
    pub(super) fn new(context: Context, seats: usize, in_flight: usize) -> Result<Tokens> {
        assert!(in_flight <= STEPS, "more steps in flight than events; this is a bug");
        let chosen = (0..STEPS).map(|_| Event::new(context)).collect::<Result<_>>()?;
        let table = Pinned::new(context, 4 * seats.max(1))?;
        Ok(Tokens { context, table, in_flight, chosen, stages: Mutex::default(), failed: OnceLock::new() })
    }

    /// Steps in flight at most.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Tokens come by way of this stream too.
    pub(super) fn depend_on(&self, stream: &Arc<Stream>) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        stages.retain(|stage| stage.strong_count() > 0);
        stages.push(Arc::downgrade(stream));
    }

    pub(super) fn table(&self) -> DevicePtr {
        self.table.ptr()
    }

    pub(super) fn seats(&self) -> usize {
        self.table.bytes() / 4
    }

    /// Is recorded when the step's tokens have been chosen.
    pub(super) fn chosen(&self, step: u64) -> &Event {
        &self.chosen[step as usize % STEPS]
    }

    /// Waits until the step's tokens are there, or a stage has failed.
    pub(super) fn wait(&self, step: u64) -> Result<()> {
        self.until(self.chosen(step))
    }

    /// Waits until an event has been reached, or a stage has failed.
    pub(super) fn until(&self, event: &Event) -> Result<()> {
        let mut since = Instant::now();
        while !event.reached()? {
            if let Some(error) = self.failed.get() {
                return Err(error.clone());
            }
            std::thread::sleep(LOOK);
            if since.elapsed() > CARE || self.context.is_abandoned() {
                self.look_after_stages()?;
                since = Instant::now();
            }
        }
        Ok(())
    }

    fn look_after_stages(&self) -> Result<()> {
        let stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let mut outcome = stages.iter().filter_map(Weak::upgrade).try_for_each(|stream| stream.check());
        if outcome.is_ok() && self.context.is_abandoned() {
            // The stage has ended, and has said more.
            outcome = Err(Error::Engine("a GPU of the pipeline is lost".into()));
        }
        outcome.inspect_err(|error| drop(self.failed.set(error.clone())))
    }
}
