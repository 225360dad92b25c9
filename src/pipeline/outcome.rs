//! From tokens that a device may still be choosing to what a step came to.

use std::{any::Any, sync::Arc};

use crate::{
    backend::Backend,
    batch::{MicroBatch, Sampled, Step},
    error::{Error, Result, quiet_panic},
    sync::{channel, thread},
};

/// What a step came to.
pub type Outcome = (u64, Result<Vec<Sampled>>);

/// Waits for a micro-batch's tokens.
type Collect<P> = Box<dyn Fn(P, &MicroBatch) -> Result<Vec<Sampled>> + Send>;

/// Sends a stage's outcomes, in the order of its steps.
pub(super) enum Outcomes<P> {
    /// From the stage's own thread: its device is done when it returns.
    Inline(Teller<P>),
    /// From another thread, which waits for the device while the stage goes on.
    Thread(TellerThread<P>),
}

/// A thread that tells outcomes. Dropping it waits until it has told all.
pub(super) struct TellerThread<P> {
    /// As many as steps may be in flight. `None` once it has been told to end.
    pending: Option<channel::Sender<(Step, Result<P>)>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Waits for tokens and sends them.
pub(super) struct Teller<P> {
    stage: usize,
    collect: Collect<P>,
    results: channel::Sender<Outcome>,
}

impl<P: Send + 'static> Outcomes<P> {
    /// With a thread for the tokens that `backend` chooses after it has returned; a stage without the head has none.
    pub(super) fn new<B: Backend<Pending = P>>(
        stage: usize,
        backend: &Arc<B>,
        head: bool,
        results: channel::Sender<Outcome>,
    ) -> Result<Self> {
        let backend = backend.clone();
        let collect = Box::new(move |pending, batch: &MicroBatch| backend.collect(pending, batch));
        let teller = Teller { stage, collect, results };
        match B::ASYNC && head {
            true => Ok(Outcomes::Thread(TellerThread::spawn(teller)?)),
            false => Ok(Outcomes::Inline(teller)),
        }
    }

    /// Tells what a step came to. `false` if no later step is wanted.
    pub(super) fn tell(&self, step: Step, pending: Result<P>) -> bool {
        match self {
            Outcomes::Inline(teller) => teller.tell(&step, pending),
            Outcomes::Thread(thread) => thread.tell(step, pending),
        }
    }
}

impl<P> Teller<P> {
    fn tell(&self, step: &Step, pending: Result<P>) -> bool {
        let collect = |pending| guard(self.stage, || (self.collect)(pending, &step.batch));
        let outcome = pending.and_then(collect);
        let failed = outcome.is_err();
        // After a failure the numbers of later steps cannot be trusted: it is the last to be told.
        self.results.send((step.step, outcome)).is_ok() && !failed
    }
}

impl<P: Send + 'static> TellerThread<P> {
    fn spawn(teller: Teller<P>) -> Result<Self> {
        let (sender, pending) = channel::unbounded();
        let name = format!("stage {} results", teller.stage);
        let tell_all = move || {
            for (step, pending) in pending {
                if !teller.tell(&step, pending) {
                    return;
                }
            }
        };
        let thread = thread::Builder::new()
            .name(name.clone())
            .spawn(tell_all)
            .map_err(|e| Error::Engine(format!("{name}: no thread: {e}")))?;
        Ok(TellerThread { pending: Some(sender), thread: Some(thread) })
    }

    fn tell(&self, step: Step, pending: Result<P>) -> bool {
        let failed = pending.is_err();
        let sender = self.pending.as_ref().expect("a step after the end; this is a bug");
        sender.send((step, pending)).is_ok() && !failed
    }
}

impl<P> Drop for TellerThread<P> {
    fn drop(&mut self) {
        drop(self.pending.take());
        if let Some(thread) = self.thread.take() {
            // It catches what panics in it.
            let _ = thread.join();
        }
    }
}

/// Turns a panic into an error that names the stage.
pub(super) fn guard<T>(stage: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    quiet_panic(work).unwrap_or_else(|panic| {
        Err(Error::Engine(format!("stage {stage} panicked: {}", panic_text(&*panic))))
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::batch::SeqId;

    fn step(step: u64) -> Step {
        Step { step, after: None, batch: Arc::new(MicroBatch::default()) }
    }

    fn token(id: u32) -> Vec<Sampled> {
        vec![Sampled { seq: SeqId(0), id, logprobs: None }]
    }

    /// A device whose tokens come when they are sent: a pending token is the channel that it comes by.
    fn started(results: channel::Sender<Outcome>) -> Outcomes<channel::Receiver<u32>> {
        let collect: Collect<channel::Receiver<u32>> = Box::new(|pending, _| match pending.recv() {
            Ok(7) => panic!("made to panic"),
            Ok(id) => Ok(token(id)),
            Err(_) => Err(Error::Device { device: "cuda:0".into(), why: "made to fail".into() }),
        });
        Outcomes::Thread(TellerThread::spawn(Teller { stage: 3, collect, results }).unwrap())
    }

    #[test]
    fn the_stage_goes_on_while_tokens_are_waited_for_and_they_come_in_order() {
        let (results, told) = channel::unbounded();
        let outcomes = started(results);
        let devices: Vec<_> = (0..4u64)
            .map(|i| {
                let (device, pending) = channel::bounded(1);
                assert!(outcomes.tell(step(i), Ok(pending)));
                device
            })
            .collect();
        // The later ones are done first.
        for (i, device) in devices.iter().enumerate().rev() {
            assert!(told.is_empty());
            device.send(20 + i as u32).unwrap();
        }
        for i in 0..4 {
            assert_eq!(told.recv().unwrap(), (i, Ok(token(20 + i as u32))));
        }
        drop(outcomes);
        assert!(told.recv().is_err(), "the thread has ended with the stage");
    }

    #[test]
    fn dropping_it_waits_for_what_is_pending() {
        let (results, told) = channel::unbounded();
        let outcomes = started(results);
        let (device, pending) = channel::bounded(1);
        assert!(outcomes.tell(step(0), Ok(pending)));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(10));
                device.send(1).unwrap();
            });
            drop(outcomes);
        });
        assert_eq!(told.try_recv().unwrap(), (0, Ok(token(1))));
    }

    /// Sends a step that fails, and one after it; gives what was told.
    fn failure(fail: impl FnOnce(channel::Sender<u32>)) -> Error {
        let (results, told) = channel::unbounded();
        let outcomes = started(results);
        let (device, pending) = channel::bounded(1);
        assert!(outcomes.tell(step(0), Ok(pending)));
        fail(device);
        let (number, outcome) = told.recv().unwrap();
        assert_eq!(number, 0);
        let (_device, pending) = channel::bounded(1);
        // Whether it is still taken is a race; it is never told.
        outcomes.tell(step(1), Ok(pending));
        drop(outcomes);
        assert!(told.recv().is_err(), "it is said once");
        outcome.unwrap_err()
    }

    #[test]
    fn an_error_or_a_panic_is_the_steps_outcome_and_the_last() {
        assert!(matches!(failure(drop), Error::Device { .. }));
        let panic = failure(|device| device.send(7).unwrap());
        assert_eq!(panic, Error::Engine("stage 3 panicked: made to panic".into()));
    }

    #[test]
    fn a_stages_own_error_comes_after_the_tokens_of_the_steps_before_it() {
        let (results, told) = channel::unbounded();
        let outcomes = started(results);
        let (device, pending) = channel::bounded(1);
        assert!(outcomes.tell(step(0), Ok(pending)));
        let error = Error::Engine("made to fail".into());
        assert!(!outcomes.tell(step(1), Err(error.clone())));
        device.send(5).unwrap();
        assert_eq!(told.iter().take(2).collect::<Vec<_>>(), [(0, Ok(token(5))), (1, Err(error))]);
    }
}
