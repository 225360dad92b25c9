//! A stage on its thread: receive, forward, send.

use std::{
    any::Any,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Instant,
};

use crossbeam_channel as channel;

use super::{StageMetrics, metrics::Spent};
use crate::{
    backend::Backend,
    batch::{Sampled, Step},
    error::{Error, Result, quiet_panic},
    model::decoder::Decoder,
    transport::{Closed, Receiver, Sender},
};

/// Where a stage's micro-batches come from.
pub enum Input<B: Backend> {
    /// The scheduler: token ids, for the stage that holds the embedding.
    Steps(channel::Receiver<Step>),
    /// The stage before.
    Boundary(Box<dyn Receiver<B>>),
}

/// Where a stage's results go.
pub enum Output<B: Backend> {
    /// The stage after.
    Boundary(Box<dyn Sender<B>>),
    /// The scheduler: chosen tokens, from the stage that holds the head.
    Results,
}

/// What a step came to.
pub type Outcome = (u64, Result<Vec<Sampled>>);

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
    pub thread: JoinHandle<()>,
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
    let thread = std::thread::Builder::new()
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

/// Turns a panic into an error that names the stage.
fn guard<T>(stage: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    quiet_panic(work).unwrap_or_else(|panic| {
        Err(Error::Engine(format!("stage {stage} panicked: {}", panic_text(&*panic))))
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

struct Running<B: Backend> {
    index: usize,
    backend: Arc<B>,
    decoder: Decoder<B>,
    input: Input<B>,
    output: Output<B>,
    results: channel::Sender<Outcome>,
    turn: Arc<Mutex<()>>,
    metrics: Arc<StageMetrics>,
    since: Instant,
}

impl<B: Backend> Running<B> {
    fn load(stage: Stage<B>) -> Result<Self> {
        let Stage { index, backend, load, input, output, results, turn, metrics } = stage;
        let decoder = guard(index, || load(&backend))?;
        let since = Instant::now();
        Ok(Running { index, backend, decoder, input, output, results, turn, metrics, since })
    }

    /// Receives a step and carries it out; false when there is no more to do.
    fn serve(&mut self) -> bool {
        let Ok(step) = self.receive() else { return false };
        let outcome = match guard(self.index, || self.step(&step)) {
            Ok(None) => return true,
            Ok(Some(sampled)) => Ok(sampled),
            Err(e) => Err(e),
        };
        // After a failure the numbers of later packets cannot be trusted: the stage ends.
        let failed = outcome.is_err();
        self.results.send((step.step, outcome)).is_ok() && !failed
    }

    fn receive(&mut self) -> Result<Step, Closed> {
        let step = match &mut self.input {
            Input::Steps(steps) => steps.recv().map_err(|_| Closed),
            Input::Boundary(boundary) => boundary.wait(),
        };
        self.metrics.add(Spent::WaitInput, &mut self.since);
        step
    }

    /// One micro-batch; the chosen tokens if this stage holds the head, `None` if it has been passed on.
    fn step(&mut self, step: &Step) -> Result<Option<Vec<Sampled>>> {
        if let Input::Boundary(boundary) = &mut self.input {
            boundary.take(self.decoder.hidden_mut())?;
            self.metrics.add(Spent::Copy, &mut self.since);
        }
        let sampled = {
            let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            self.metrics.add(Spent::WaitDevice, &mut self.since);
            self.decoder.forward(&*self.backend, &step.batch)?;
            match self.output {
                Output::Results => Some(self.decoder.sample(&*self.backend, &step.batch)?),
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
        Ok(sampled)
    }
}
