//! A stage on its thread: receive, forward, send.

use std::{collections::VecDeque, sync::Arc, time::Instant};

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
    backend: Arc<B>,
    decoder: Decoder<B>,
    input: Input<B>,
    output: Output<B>,
    turn: Arc<Mutex<()>>,
    metrics: Arc<StageMetrics>,
    since: Instant,
    passes: Passes<B>,
}

/// When a device that works on its own began and ended passes.
struct Passes<B: Backend> {
    count: u64,
    /// Of the last measured pass that is over.
    last_end: Option<B::Mark>,
    /// Measured passes that may not be over: their numbers, beginnings and ends.
    open: VecDeque<(u64, B::Mark, B::Mark)>,
}

/// A mark delays the device by some microseconds. So after the first passes, two neighbours of so many are measured, and
/// stand for the others.
const MEASURED_FIRST: u64 = 32;
const MEASURED_EVERY: u64 = 16;

impl<B: Backend> Passes<B> {
    fn new() -> Self {
        Passes { count: 0, last_end: None, open: VecDeque::new() }
    }

    /// Counts a pass, and gives its number if it is to be measured.
    fn next(&mut self) -> Option<u64> {
        let number = self.count;
        self.count += 1;
        (B::ASYNC && (number < MEASURED_FIRST || number % MEASURED_EVERY < 2)).then_some(number)
    }

    /// How many passes' time a measured one stands for, and how many waits the one before it.
    fn weights(number: u64) -> (u32, u32) {
        match number % MEASURED_EVERY {
            _ if number < MEASURED_FIRST => (1, 1),
            0 => (MEASURED_EVERY as u32 / 2, 0),
            _ => (MEASURED_EVERY as u32 / 2, MEASURED_EVERY as u32),
        }
    }
}

impl<B: Backend> Running<B> {
    fn load(stage: Stage<B>) -> Result<Self> {
        let Stage { index, backend, load, input, output, results, turn, metrics } = stage;
        let head = matches!(output, Output::Results(_));
        let decoder = guard(index, || load(&backend))?;
        let outcomes = Outcomes::new(index, &backend, head, results)?;
        let (since, passes) = (Instant::now(), Passes::new());
        Ok(Running { index, backend, decoder, input, output, outcomes, turn, metrics, since, passes })
    }

    /// Receives a step and carries it out; false when there is no more to do.
    fn serve(&mut self) -> bool {
        let Ok(step) = self.receive() else { return false };
        // After a failure the numbers of later packets cannot be trusted: the stage ends.
        match guard(self.index, || self.step(&step)).transpose() {
            Some(pending) => self.outcomes.tell(step, pending),
            None => true,
        }
    }

    fn receive(&mut self) -> Result<Step, Closed> {
        let step = match &mut self.input {
            Input::Steps(steps, tokens) => {
                let step = steps.recv().map_err(|_| Closed);
                // If the last stage has ended, it has said why, or stages before it have.
                step.and_then(|step| tokens.wait(step.after).map(|()| step))
            }
            Input::Boundary(boundary) => boundary.wait(),
        };
        self.spent(Spent::WaitInput);
        step
    }

    /// One micro-batch; its tokens if this stage holds the head, `None` if it has been passed on.
    ///
    /// What does not depend on the stage before is given to the device first: it is done while that one still works.
    fn step(&mut self, step: &Step) -> Result<Option<B::Pending>> {
        let turn = self.turn.clone();
        let turn = turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.spent(Spent::WaitDevice);
        self.decoder.prepare(&*self.backend, &step.batch)?;
        self.spent(Spent::Busy);
        match &mut self.input {
            Input::Boundary(boundary) => boundary.take(self.decoder.hidden_mut())?,
            Input::Steps(..) => step.after.map_or(Ok(()), |after| self.backend.await_tokens(after))?,
        }
        self.spent(Spent::Copy);
        let measured = self.passes.next().map(|n| Ok((n, self.backend.mark()?))).transpose()?;
        self.decoder.forward(&*self.backend)?;
        let pending = match &self.output {
            Output::Results(enqueued) => {
                let pending = self.decoder.sample(&*self.backend, step)?;
                enqueued.tell(step.step);
                Some(pending)
            }
            Output::Boundary(_) => None,
        };
        drop(turn);
        self.spent(Spent::Busy);
        self.metrics.count(step.batch.rows());
        self.send(step)?;
        if let Input::Boundary(boundary) = &mut self.input {
            boundary.give_back()?;
        }
        if let Some((number, start)) = measured {
            self.passes.open.push_back((number, start, self.backend.mark()?));
            self.settle()?;
        }
        Ok(pending)
    }

    fn send(&mut self, step: &Step) -> Result<()> {
        let Output::Boundary(boundary) = &mut self.output else { return Ok(()) };
        let gone = |Closed| Error::Engine("the next stage is gone".into());
        boundary.wait_for_room().map_err(gone)?;
        self.metrics.spent::<B>(Spent::WaitOutput, &mut self.since);
        let (hidden, len) = self.decoder.hidden(step.batch.rows());
        boundary.send(step.clone(), hidden, len)?;
        self.spent(Spent::Copy);
        Ok(())
    }

    fn spent(&mut self, kind: Spent) {
        self.metrics.spent::<B>(kind, &mut self.since);
    }

    /// Counts the measured passes that are over, by the device's own clock.
    fn settle(&mut self) -> Result<()> {
        while let Some((number, start, end)) = self.passes.open.front() {
            let Some(busy) = self.backend.between(start, end)? else { break };
            let (passes, waits) = Passes::<B>::weights(*number);
            self.metrics.add(Spent::Busy, busy * passes);
            if let Some(last) = &self.passes.last_end
                && let Some(idle) = self.backend.between(last, start)?
            {
                self.metrics.add(Spent::WaitInput, idle * waits);
            }
            self.passes.last_end = self.passes.open.pop_front().map(|(_, _, end)| end);
        }
        Ok(())
    }
}
