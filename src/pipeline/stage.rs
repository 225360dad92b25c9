//! A stage on its thread: receive, forward, send.

use std::{sync::Arc, time::Instant};

use super::{
    AwaitEnqueued, Enqueued, Outcome, Probe, StageMetrics,
    fault::{self, Point},
    metrics::Spent,
    outcome::{Outcomes, guard},
    spans::{Moment, Pass},
};
use crate::{
    backend::Backend,
    batch::Step,
    error::{Error, Result},
    model::decoder::Decoder,
    sync::{Mutex, channel, thread},
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
    /// Loads its units. It runs on the stage's thread, so that stages of different threads load at once.
    pub load: Load<B>,
    /// Where micro-batches come from.
    pub input: Input<B>,
    /// Where they go.
    pub output: Output<B>,
    /// Where tokens and failures go.
    pub results: channel::Sender<Outcome>,
    /// Held for a pass by stages of several threads that share a device whose every core one pass can use.
    pub turn: Arc<Mutex<()>>,
    /// What it does with its time.
    pub metrics: Arc<StageMetrics>,
    /// When it did what.
    pub probe: Probe<B>,
}

/// Stages that have been started on one thread.
pub struct StagesHandle {
    /// Their thread; it ends when the first one's input closes.
    pub thread: thread::JoinHandle<()>,
    /// For each stage, whether it could be loaded, and the bytes of its weights.
    pub loaded: channel::Receiver<Result<usize>>,
}

/// Starts a thread for stages that follow each other: a step goes through all of them, then the next step.
///
/// Stages whose passes could not overlap anyway, since each uses the whole device, lose nothing by it, and no
/// step waits for a thread to wake between two of them.
pub fn spawn<B: Backend>(stages: Vec<Stage<B>>) -> Result<StagesHandle> {
    let (loaded_in, loaded) = channel::bounded(stages.len());
    let name = match &stages[..] {
        [] => panic!("a thread without a stage; this is a bug"),
        [only] => format!("stage {}", only.index),
        [first, .., last] => format!("stages {}-{}", first.index, last.index),
    };
    let thread = thread::Builder::new()
        .name(name.clone())
        .spawn(move || run(stages, &loaded_in))
        .map_err(|e| Error::Engine(format!("{name}: no thread: {e}")))?;
    Ok(StagesHandle { thread, loaded })
}

fn run<B: Backend>(stages: Vec<Stage<B>>, loaded: &channel::Sender<Result<usize>>) {
    let mut running = Vec::new();
    for stage in stages {
        let stage = Running::load(stage);
        let told = stage.as_ref().map(|stage| stage.decoder.weight_bytes()).map_err(Error::clone);
        // Nobody listens any more if another stage could not be loaded.
        let _ = loaded.send(told);
        let Ok(stage) = stage else { return };
        running.push(stage);
    }
    // What one stage has sent is there for the next to receive.
    while running.iter_mut().all(Running::serve) {}
}

/// Fields are dropped in this order: what the stage's own steps came to is told before its neighbours notice its end; and
/// the decoder's buffers, for which the driver waits until the device is done, before boundaries that it may be using.
struct Running<B: Backend> {
    index: usize,
    outcomes: Outcomes<B::Pending>,
    results: channel::Sender<Outcome>,
    backend: Arc<B>,
    decoder: Decoder<B>,
    input: Input<B>,
    output: Output<B>,
    turn: Arc<Mutex<()>>,
    metrics: Arc<StageMetrics>,
    since: Instant,
    probe: Probe<B>,
}

impl<B: Backend> Running<B> {
    fn load(stage: Stage<B>) -> Result<Self> {
        let Stage { index, backend, load, input, output, results, turn, metrics, mut probe } = stage;
        let head = matches!(output, Output::Results(_));
        let decoder = guard(index, || load(&backend))?;
        let outcomes = Outcomes::new(index, &backend, head, results.clone())?;
        probe.start(&backend)?;
        let since = Instant::now();
        Ok(Running { index, outcomes, results, backend, decoder, input, output, turn, metrics, since, probe })
    }

    /// Receives a step and carries it out; false when there is no more to do.
    fn serve(&mut self) -> bool {
        let step = match guard(self.index, || self.receive()) {
            Ok(Ok(step)) => step,
            Ok(Err(Closed)) => return false,
            Err(error) => {
                // Of no step that anyone could name. Nobody listens any more if the pipeline is ending.
                let _ = self.results.send((u64::MAX, Err(error)));
                return false;
            }
        };
        // After a failure the numbers of later packets cannot be trusted: the stage ends.
        match guard(self.index, || self.step(&step)).transpose() {
            Some(pending) => self.outcomes.tell(step, pending),
            None => true,
        }
    }

    fn receive(&mut self) -> Result<Result<Step, Closed>> {
        self.metrics.begins(Spent::WaitInput);
        fault::at(Point::BeforeReceive, self.index)?;
        let step = match &mut self.input {
            Input::Steps(steps, tokens) => {
                let step = steps.recv().map_err(|_| Closed);
                // If the last stage has ended, it has said why, or stages before it have.
                step.and_then(|step| tokens.wait(step.after).map(|()| step))
            }
            Input::Boundary(boundary) => boundary.wait(),
        };
        self.spent(Spent::WaitInput);
        fault::at(Point::AfterReceive, self.index)?;
        Ok(step)
    }

    /// One micro-batch; its tokens if this stage holds the head, `None` if it has been passed on.
    ///
    /// What does not depend on the stage before is given to the device first: it is done while that one still works.
    fn step(&mut self, step: &Step) -> Result<Option<B::Pending>> {
        self.metrics.begins(Spent::WaitDevice);
        let turn = self.turn.clone();
        let turn = turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.spent(Spent::WaitDevice);
        self.metrics.begins(Spent::Busy);
        self.decoder.prepare(&*self.backend, &step.batch)?;
        self.spent(Spent::Busy);
        let mut pass = self.probe.begin();
        self.receive_rows(step, &mut pass)?;
        self.spent(Spent::Copy);
        self.decoder.forward(&*self.backend)?;
        let pending = match &self.output {
            Output::Results(enqueued) => {
                let pending = self.decoder.sample(&*self.backend, step)?;
                fault::at(Point::Enqueue, self.index)?;
                enqueued.tell(step.step);
                Some(pending)
            }
            Output::Boundary(_) => None,
        };
        drop(turn);
        self.spent(Spent::Busy);
        self.metrics.count(step.batch.rows());
        self.send(step, &mut pass)?;
        if let Input::Boundary(boundary) = &mut self.input {
            boundary.give_back()?;
        }
        if let Some(mut pass) = pass {
            pass.mark(Moment::Ended, &self.backend)?;
            self.probe.end(pass, step);
        }
        Ok(pending)
    }

    /// Makes the device wait for what the pass begins with, and copy it.
    fn receive_rows(&mut self, step: &Step, pass: &mut Option<Pass<B>>) -> Result<()> {
        match &mut self.input {
            Input::Boundary(boundary) => boundary.arrive()?,
            Input::Steps(..) => step.after.map_or(Ok(()), |after| self.backend.await_tokens(after))?,
        }
        mark(pass, Moment::Arrived, &self.backend)?;
        let Input::Boundary(boundary) = &mut self.input else { return Ok(()) };
        boundary.take(self.decoder.hidden_mut())?;
        mark(pass, Moment::Started, &self.backend)
    }

    fn send(&mut self, step: &Step, pass: &mut Option<Pass<B>>) -> Result<()> {
        let Output::Boundary(boundary) = &mut self.output else { return Ok(()) };
        mark(pass, Moment::Computed, &self.backend)?;
        let gone = |Closed| Error::Engine("the next stage is gone".into());
        self.metrics.begins(Spent::WaitOutput);
        boundary.wait_for_room().map_err(gone)?;
        self.metrics.begins(Spent::Copy);
        boundary.clear()?;
        mark(pass, Moment::Room, &self.backend)?;
        self.metrics.spent::<B>(Spent::WaitOutput, &mut self.since);
        let (hidden, len) = self.decoder.hidden(step.batch.rows());
        boundary.send(step.clone(), hidden, len)?;
        self.spent(Spent::Copy);
        Ok(())
    }

    fn spent(&mut self, kind: Spent) {
        self.metrics.spent::<B>(kind, &mut self.since);
    }
}

/// Marks a moment of a pass that is measured.
fn mark<B: Backend>(pass: &mut Option<Pass<B>>, moment: Moment, backend: &B) -> Result<()> {
    pass.as_mut().map_or(Ok(()), |pass| pass.mark(moment, backend))
}
