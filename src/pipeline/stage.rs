//! A stage's thread: receive, forward, send.

use std::{
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Instant,
};

use crossbeam_channel as channel;

use super::{
    AwaitEnqueued, Enqueued, Outcome, StageMetrics,
    metrics::Spent,
    outcome::{Outcomes, guard},
};
use crate::{
    backend::Backend,
    batch::Step,
    error::{Error, Result},
    model::decoder::Decoder,
    transport::{Closed, Receiver, Sender},
};

/// Where a stage's micro-batches come from.
pub enum Input<B: Backend> {
    /// The scheduler: token ids, for the stage that holds the embedding; and word of the tokens that the host does
    /// not know.
    Steps(channel::Receiver<Step>, AwaitEnqueued),
    /// The stage before.
    Boundary(Box<dyn Receiver<B>>),
}

/// Where a stage's results go.
pub enum Output<B: Backend> {
    /// The stage after.
    Boundary(Box<dyn Sender<B>>),
    /// The scheduler: chosen tokens, from the stage that holds the head; and word of them to the embedding's stage.
    Results(Enqueued),
}

/// Loads a stage's units onto its device.
pub type Load<B> = Box<dyn FnOnce(&B) -> Result<Decoder<B>> + Send>;

/// A stage about to start.
pub struct Stage<B: Backend> {
    /// Its place in the pipeline.
    pub index: usize,
    /// Its device.
    pub backend: Arc<B>,
    /// Loads its units. It runs on the stage's own thread, so that all stages load at once.
    pub load: Load<B>,
    /// Where micro-batches come from.
    pub input: Input<B>,
    /// Where they go.
    pub output: Output<B>,
    /// Where tokens and failures go.
    pub results: channel::Sender<Outcome>,
    /// Held for a pass by stages that share a device whose every core one pass can use.
    pub turn: Arc<Mutex<()>>,
    /// What it does with its time.
    pub metrics: Arc<StageMetrics>,
}

/// A stage that has been started.
pub struct StageHandle {
    /// Its thread; it ends when its input closes.
    pub thread: JoinHandle<()>,
    /// Whether it could be loaded, and the bytes of its weights.
    pub loaded: channel::Receiver<Result<usize>>,
}

/// Starts a stage's thread.
pub fn spawn<B: Backend>(stage: Stage<B>) -> Result<StageHandle> {
    let (loaded_in, loaded) = channel::bounded(1);
    let name = format!("stage {}", stage.index);
    let thread = std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || run(stage, &loaded_in))
        .map_err(|e| Error::Engine(format!("{name}: no thread: {e}")))?;
    Ok(StageHandle { thread, loaded })
}

fn run<B: Backend>(stage: Stage<B>, loaded: &channel::Sender<Result<usize>>) {
    let Stage { index, backend, load, input, output, results, turn, metrics } = stage;
    let head = matches!(output, Output::Results(_));
    let ready = guard(index, || Ok((load(&backend)?, Outcomes::new(index, &backend, head, results)?)));
    let (decoder, outcomes) = match ready {
        Ok((decoder, outcomes)) => {
            // Nobody listens any more if another stage could not be loaded.
            let _ = loaded.send(Ok(decoder.weight_bytes()));
            (decoder, outcomes)
        }
        Err(e) => {
            let _ = loaded.send(Err(e));
            return;
        }
    };
    let mut running = Running { backend, decoder, input, output, turn, metrics, since: Instant::now() };
    while let Ok(step) = running.receive() {
        // After a failure the numbers of later packets cannot be trusted: the stage ends.
        if let Some(pending) = guard(index, || running.step(&step)).transpose()
            && !outcomes.tell(step, pending)
        {
            return;
        }
    }
}

struct Running<B: Backend> {
    backend: Arc<B>,
    decoder: Decoder<B>,
    input: Input<B>,
    output: Output<B>,
    turn: Arc<Mutex<()>>,
    metrics: Arc<StageMetrics>,
    since: Instant,
}

impl<B: Backend> Running<B> {
    fn receive(&mut self) -> Result<Step, Closed> {
        let step = match &mut self.input {
            Input::Steps(steps, tokens) => {
                let step = steps.recv().map_err(|_| Closed);
                // If the last stage has ended, it has said why, or stages before it have.
                step.and_then(|step| tokens.wait(step.after).map(|()| step))
            }
            Input::Boundary(boundary) => boundary.wait(),
        };
        self.metrics.add(Spent::WaitInput, &mut self.since);
        step
    }

    /// One micro-batch; its tokens if this stage holds the head, `None` if it has been passed on.
    fn step(&mut self, step: &Step) -> Result<Option<B::Pending>> {
        if let Input::Boundary(boundary) = &mut self.input {
            boundary.take(self.decoder.hidden_mut())?;
            self.metrics.add(Spent::Copy, &mut self.since);
        }
        let pending = {
            let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            self.metrics.add(Spent::WaitDevice, &mut self.since);
            if let (Input::Steps(..), Some(after)) = (&self.input, step.after) {
                self.backend.await_tokens(after)?;
            }
            self.decoder.forward(&*self.backend, &step.batch)?;
            match &self.output {
                Output::Results(enqueued) => {
                    let pending = self.decoder.sample(&*self.backend, step)?;
                    enqueued.tell(step.step);
                    Some(pending)
                }
                Output::Boundary(_) => None,
            }
        };
        self.metrics.add(Spent::Busy, &mut self.since);
        self.metrics.count(step.batch.rows());
        if let Output::Boundary(boundary) = &mut self.output {
            let gone = |Closed| Error::Engine("the next stage is gone".into());
            boundary.wait_for_room().map_err(gone)?;
            self.metrics.add(Spent::WaitOutput, &mut self.since);
            let (hidden, len) = self.decoder.hidden(step.batch.rows());
            boundary.send(step.clone(), hidden, len)?;
            self.metrics.add(Spent::Copy, &mut self.since);
        }
        Ok(pending)
    }
}
