//! The host's part of the way that tokens go from the head back to the embedding on the devices.
//!
//! A device waits for an event, and an event that has not been recorded is no wait. So the first stage passes a step
//! on to its device only when the last stage has passed the step whose tokens it needs on to its own.

use crate::{sync::channel, transport::Closed};

/// Makes the two ends: for the stage that holds the head, and for the one that holds the embedding.
pub fn token_edge() -> (Enqueued, AwaitEnqueued) {
    let (sender, steps) = channel::unbounded();
    (Enqueued(sender), AwaitEnqueued { steps, latest: None })
}

/// The last stage's end. Dropping it lets the first stage go.
pub struct Enqueued(channel::Sender<u64>);

/// The first stage's end.
pub struct AwaitEnqueued {
    /// One a step in flight at most: each wait empties it.
    steps: channel::Receiver<u64>,
    latest: Option<u64>,
}

impl Enqueued {
    /// Tells that the choice of a step's tokens is in the device's queue. Steps come in order.
    pub(super) fn tell(&self, step: u64) {
        // The first stage may have ended already.
        let _ = self.0.send(step);
    }
}

impl AwaitEnqueued {
    /// Waits until the choice of a step's tokens is in its device's queue; not at all if there is no such step.
    pub(super) fn wait(&mut self, step: Option<u64>) -> Result<(), Closed> {
        self.latest = self.steps.try_iter().last().or(self.latest);
        while self.latest < step {
            self.latest = Some(self.steps.recv().map_err(|_| Closed)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering::SeqCst},
        time::Duration,
    };

    use super::*;

    #[test]
    fn a_step_waits_for_the_one_that_it_needs_and_for_no_later_one() {
        let (enqueued, mut wait) = token_edge();
        wait.wait(None).unwrap();
        let told = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for step in 0..3 {
                    std::thread::sleep(Duration::from_millis(5));
                    told.store(step + 1, SeqCst);
                    enqueued.tell(step);
                }
            });
            wait.wait(Some(1)).unwrap();
            assert!(told.load(SeqCst) >= 2);
        });
        wait.wait(Some(0)).unwrap();
        wait.wait(Some(2)).unwrap();
    }

    #[test]
    fn the_end_of_the_last_stage_is_seen_by_a_step_that_waits_for_it() {
        let (enqueued, mut wait) = token_edge();
        enqueued.tell(0);
        drop(enqueued);
        assert_eq!(wait.wait(Some(0)), Ok(()));
        assert_eq!(wait.wait(None), Ok(()));
        assert_eq!(wait.wait(Some(1)), Err(Closed));
    }
}
