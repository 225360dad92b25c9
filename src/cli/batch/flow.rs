//! Items on their way: images are decoded by several threads ahead of the engine, and answers are written in order.

use std::{
    collections::BTreeMap,
    iter::Enumerate,
    panic,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::{
    items::{Item, Items},
    progress::Progress,
    results::{Done, Results},
};
use crate::{
    cli::{
        answer::{Answer, PATIENCE, Stream},
        asker::Asker,
        gate::{Gate, Pass},
        interrupt::Interrupt,
        media::Source,
        prompts::Asked,
        say,
    },
    engine::TimedOut,
    error::{Error, Result},
    request::Media,
    text::Tokenizer,
};

/// Items between the input and the results.
const ITEMS_MAX: usize = 512;
/// Bytes that they and their images take before no more are decoded.
const IMAGE_BYTES: usize = 1 << 30;
/// Threads that decode: more gain nothing beside the fastest tower.
const DECODERS_MAX: usize = 16;
/// A fault of the engine's is no fault of the item, which is asked again.
const TRIES: usize = 3;

/// How it came to its end.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// Items in the results, earlier runs' included.
    pub(super) items: usize,
    pub(super) failed: usize,
    /// Why the first one of this run has.
    pub(super) first_failure: Option<String>,
    pub(super) interrupted: bool,
    /// By this run.
    pub(super) answered: usize,
    pub(super) new_tokens: usize,
}

/// Who opens images and answers.
pub(super) trait Answerer: Send + Sync {
    fn open(&self, source: &Source) -> Result<Media>;
    fn submit(&self, asked: Asked) -> Result<Underway>;
    /// Names tokens.
    fn tokenizer(&self) -> Option<&Tokenizer>;
}

/// A request that has been submitted.
pub(super) struct Underway {
    events: Box<dyn Stream + Send>,
    answer: Answer,
    /// Of its images.
    bytes: usize,
}

impl Answerer for Asker {
    fn open(&self, source: &Source) -> Result<Media> {
        source.open(&self.engine)
    }

    fn submit(&self, asked: Asked) -> Result<Underway> {
        let submitted = Asker::submit(self, asked)?;
        let answer = Answer::new(submitted.events.prompt_ids().to_vec(), submitted.samples);
        Ok(Underway { bytes: submitted.bytes, events: Box::new(submitted), answer })
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.engine.tokenizer().map(|tokenizer| &**tokenizer)
    }
}

/// The threads that decode and submit, and what comes from them.
pub(super) struct Flow<'a> {
    asker: Arc<dyn Answerer>,
    interrupt: &'a Interrupt,
    progress: Progress,
    gate: Arc<Gate>,
    jobs: Receiver<(usize, Job)>,
    /// Those that have come before their turn.
    early: BTreeMap<usize, Job>,
    /// The next item's number.
    next: usize,
    threads: Vec<JoinHandle<()>>,
    ended: Ended,
}

/// An item on its way, and its place among those.
struct Job {
    item: Item,
    state: State,
    tries: usize,
    _pass: Pass,
}

enum State {
    /// Its events are to come.
    Growing(Underway),
    Done(Answer),
    Failed(Error),
}

impl<'a> Flow<'a> {
    pub(super) fn start(
        asker: Arc<dyn Answerer>,
        items: Items,
        interrupt: &'a Interrupt,
        progress: Progress,
    ) -> Self {
        let gate = Gate::new(ITEMS_MAX, IMAGE_BYTES);
        let feed = Arc::new(Mutex::new(Feed { items: items.enumerate(), last: None }));
        let (send, jobs) = unbounded();
        let decoders = thread::available_parallelism().map_or(1, usize::from).min(DECODERS_MAX);
        let decoder = |_| {
            let (asker, gate, feed, send) = (asker.clone(), gate.clone(), feed.clone(), send.clone());
            thread::spawn(move || decode(&*asker, &gate, &feed, &send))
        };
        let threads = (0..decoders).map(decoder).collect();
        let (early, ended) = (BTreeMap::new(), Ended::default());
        Flow { asker, interrupt, progress, gate, jobs, early, next: 0, threads, ended }
    }

    /// Writes the items' results in their order, until all are written or a signal comes.
    pub(super) fn write_all(mut self, results: &mut Results) -> Result<Ended> {
        let written = self.write_until_end(results);
        self.gate.close();
        self.progress.end();
        let synced = results.sync();
        let Done { items, failed } = self.progress.done();
        written.and(synced).map_err(|e| match e {
            Error::Engine(_) | Error::Device { .. } => {
                e.and(&format!("{items} items are written, and --resume goes on with the rest"))
            }
            other => other,
        })?;
        // An interrupted one may still wait for stdin.
        if !self.ended.interrupted {
            for thread in self.threads.drain(..) {
                thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic));
            }
        }
        Ok(Ended { items, failed, ..self.ended })
    }

    fn write_until_end(&mut self, results: &mut Results) -> Result<()> {
        loop {
            if self.interrupt.signalled() {
                return self.write_finished(results);
            }
            if let Some(mut job) = self.early.remove(&self.next) {
                match self.poll(&mut job, PATIENCE)? {
                    true => self.write(job, results)?,
                    false => _ = self.early.insert(self.next, job),
                }
                self.progress.tick();
                continue;
            }
            match self.jobs.recv_timeout(PATIENCE) {
                Ok((number, job)) => _ = self.early.insert(number, job),
                Err(RecvTimeoutError::Timeout) => self.progress.tick(),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// After a signal: ends what comes after the last item that is finished, and waits for what comes before it.
    fn write_finished(&mut self, results: &mut Results) -> Result<()> {
        self.ended.interrupted = true;
        self.gate.close();
        self.early.extend(self.jobs.try_iter());
        let mut begun: Vec<Job> = Vec::new();
        let mut finished = 0;
        while let Some(mut job) = self.early.remove(&(self.next + begun.len())) {
            let ended = self.poll(&mut job, Duration::ZERO)?;
            begun.push(job);
            if ended {
                finished = begun.len();
            }
        }
        // Dropping the others cancels them.
        begun.truncate(finished);
        self.early.clear();
        let waiting = begun.iter().filter(|job| matches!(job.state, State::Growing(_))).count();
        self.progress.end();
        if waiting > 0 {
            say(&format!(
                "{waiting} more answers come before others that are finished; Ctrl-C again ends at once"
            ));
        }
        for mut job in begun {
            while !self.poll(&mut job, PATIENCE)? {}
            self.write(job, results)?;
        }
        Ok(())
    }

    /// Takes the events that there are; whether it has ended. It waits no longer than that for each.
    fn poll(&self, job: &mut Job, timeout: Duration) -> Result<bool> {
        loop {
            let State::Growing(Underway { events, answer, .. }) = &mut job.state else { return Ok(true) };
            let event = match events.next_timeout(timeout) {
                Ok(Some(event)) => event,
                Ok(None) => {
                    job.state = State::Done(std::mem::take(answer));
                    return Ok(true);
                }
                Err(TimedOut) => return Ok(false),
            };
            match answer.take(event) {
                Ok(()) => {}
                Err(e @ (Error::Engine(_) | Error::Device { .. })) => self.again(job, e)?,
                Err(e) => job.state = State::Failed(e),
            }
            if timeout > Duration::ZERO && self.interrupt.signalled() && !self.ended.interrupted {
                return Ok(false);
            }
        }
    }

    /// Asks again what the engine has failed at. It has been built anew, or it has ended.
    fn again(&self, job: &mut Job, why: Error) -> Result<()> {
        job.tries += 1;
        if job.tries >= TRIES {
            return Err(why.and(&format!("item {} was tried {TRIES} times", job.item.id)));
        }
        tracing::warn!(item = %job.item.id, error = %why, "asked again");
        job.state = submit(&*self.asker, job.item.asked.clone())?;
        Ok(())
    }

    fn write(&mut self, job: Job, results: &mut Results) -> Result<()> {
        let outcome = match &job.state {
            State::Done(answer) => Ok(answer),
            State::Failed(e @ (Error::Engine(_) | Error::Device { .. })) => return Err(e.clone()),
            State::Failed(e) => Err(e),
            State::Growing(_) => unreachable!("an item that has not ended; this is a bug"),
        };
        results.write(&job.item, outcome, self.asker.tokenizer())?;
        self.progress.written(outcome.is_err());
        match outcome {
            Ok(answer) => {
                self.ended.answered += 1;
                self.ended.new_tokens += answer.samples.iter().map(|sample| sample.ids.len()).sum::<usize>();
            }
            Err(e) => {
                let told = || format!("{}: {e}", job.item.id);
                self.ended.first_failure.get_or_insert_with(told);
            }
        }
        self.next += 1;
        Ok(())
    }
}

/// An image once somebody has opened it.
type Opened = Arc<OnceLock<Result<Media>>>;

/// Where items come from. Those about one image follow each other, and it is opened once.
struct Feed {
    items: Enumerate<Items>,
    last: Option<(String, Opened)>,
}

impl Feed {
    /// The next item, with its image where others may ask for the same.
    fn next(&mut self) -> Option<(usize, Item, Option<Opened>)> {
        let (number, item) = self.items.next()?;
        let opened = item.image.as_ref().map(|image| match &self.last {
            Some((last, opened)) if last == image => opened.clone(),
            _ => self.last.insert((image.clone(), Arc::default())).1.clone(),
        });
        Some((number, item, opened))
    }
}

/// Takes items, opens their images and submits them, until there are no more.
fn decode(asker: &dyn Answerer, gate: &Arc<Gate>, feed: &Mutex<Feed>, jobs: &Sender<(usize, Job)>) {
    /// Who waits for an item that a panic has taken along would wait for ever.
    struct Closes<'a>(&'a Gate);
    impl Drop for Closes<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.close();
            }
        }
    }
    let _closes = Closes(gate);
    while let Some(mut pass) = gate.enter() {
        let next = feed.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some((number, item, opened)) = next else { return };
        pass.hold(item.bytes);
        let asked = item.asked.clone().and_then(|asked| match opened {
            Some(opened) => with_opened(asker, asked, &opened),
            None => Ok(asked),
        });
        let state = submit(asker, asked).unwrap_or_else(State::Failed);
        if let State::Growing(underway) = &state {
            pass.hold(underway.bytes);
        }
        if jobs.send((number, Job { item, state, tries: 0, _pass: pass })).is_err() {
            return;
        }
    }
}

/// With the image as it has been opened, by this thread or by another one.
fn with_opened(asker: &dyn Answerer, mut asked: Asked, opened: &OnceLock<Result<Media>>) -> Result<Asked> {
    for wanted in &mut asked.media {
        let media = opened.get_or_init(|| asker.open(&wanted.source)).clone()?;
        wanted.source = Source::Ready(media);
    }
    Ok(asked)
}

/// An error is the engine's; the item's own is its state.
fn submit(asker: &dyn Answerer, asked: Result<Asked>) -> Result<State> {
    match asked.and_then(|asked| asker.submit(asked)) {
        Ok(underway) => Ok(State::Growing(underway)),
        Err(e @ (Error::Engine(_) | Error::Device { .. })) => Err(e),
        Err(e) => Ok(State::Failed(e)),
    }
}

#[cfg(test)]
mod tests;
