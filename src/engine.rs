//! Wires the threads together; the only file that knows every part; the public API.

mod answer;
mod balance;
mod builder;
mod counts;
#[cfg(test)]
mod fault_tests;
mod images;
mod measured;
mod meter;
mod place;
mod progress;
mod rebuild;
mod recipe;
mod relayout;
#[cfg(test)]
mod relayout_tests;
pub(crate) mod side_by_side;
mod stall;
mod start;
mod stock;
mod text;
mod timeline;
mod vision;
mod wire;
mod worker;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crossbeam_channel as channel;

pub use builder::{EngineBuilder, RUNNING_MAX, WeightSource};
pub use measured::{Comparison, Watch};
pub use meter::{Measurement, Measurements, VisionSpan};
pub use place::{cpu_scratch, device_specs, gpus, profiles, scratch, split_head};
pub use progress::LoadProgress;
pub use relayout::{MovedUnit, Relayout};

pub use crate::request::SAMPLES_MAX;

use self::{
    answer::{Answer, Ending},
    counts::Counts,
    images::{Images, Prepared, media_of},
    meter::Meter,
    worker::{Command, Submission},
};
use crate::{
    backend::{DType, DeviceMemory},
    error::{Error, Result},
    layout::Layout,
    model::{config::GenerationConfig, spec::ModelSpec},
    pipeline::{StageMetrics, StageTimes},
    request::{Event, Media, Prompt, Request},
    schedule::{Keys, PromptImages, SchedulerStats},
    text::{Template, Tokenizer},
};

/// A running pipeline. Dropping it ends its threads; requests that are not finished get an error.
///
/// A stage that fails ends the requests that had started, each with an [`Event::Error`]. The stages are then built
/// anew, and those that waited go on. Where that fails too, or faults repeat, all requests get an error at once.
pub struct Engine {
    facts: Facts,
    layout: Arc<Mutex<Layout>>,
    /// They change when the stages are built anew.
    stages: Arc<Mutex<Vec<StageFacts>>>,
    counts: Arc<Counts>,
    commands: channel::Sender<Command>,
    next_request: AtomicU64,
    threads: Vec<std::thread::JoinHandle<()>>,
    meter: Arc<Meter>,
    /// Writes the trace, if there is one.
    timeline: Option<std::thread::JoinHandle<Result<()>>>,
}

/// What does not change while an engine runs.
struct Facts {
    spec: Arc<ModelSpec>,
    generation: GenerationConfig,
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<Template>,
    dtype: DType,
    context_max: usize,
    kv_tokens: usize,
    images: Option<Images>,
    /// Whether what was measured in earlier runs is believed, and kept.
    profiles: bool,
    /// CPU threads, if it was said how many.
    threads: Option<usize>,
    /// What blocks are found by, where prompts may begin with others' blocks.
    keys: Option<Keys>,
}

struct StageFacts {
    device: String,
    layers: String,
    /// Whether it is one of the vision tower.
    vision: bool,
    weight_bytes: usize,
    kv_bytes: usize,
    memory: Box<dyn Fn() -> Option<DeviceMemory> + Send + Sync>,
    idle: stall::AskIdle,
    metrics: Arc<StageMetrics>,
}

/// What an engine did since it started.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct EngineStats {
    /// Its stages, in order.
    pub stages: Vec<StageStats>,
    /// Those of the vision tower.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vision: Vec<StageStats>,
    /// Queues and KV blocks now, and what was counted of them.
    pub scheduler: SchedulerStats,
    /// Measurements that found no room: what was too slow to read them has gaps.
    pub dropped: u64,
    /// Requests that have been submitted, and of which no sample has started.
    pub requests_waiting: usize,
    /// How often the stages have been built anew after a fault.
    pub rebuilds: u64,
    /// How often the layout has changed.
    pub relayouts: u64,
}

/// What one stage did since the engine started.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct StageStats {
    /// Its device.
    pub device: String,
    /// Its layers, as in `--layout`: `0-9`; or its blocks of the vision tower: `v0-15`.
    pub layers: String,
    /// Bytes of its weights.
    pub weight_bytes: usize,
    /// Bytes of its pages of keys and values.
    pub kv_bytes: usize,
    /// What is taken of its device's memory; `None` on the CPU.
    pub memory: Option<DeviceMemory>,
    /// What it did with its time.
    pub times: StageTimes,
}

impl StageStats {
    /// Bytes that were taken of its device's memory for neither weights nor pages: buffers, scratch, tables, the boundary
    /// before it. `None` on the CPU.
    pub fn buffer_bytes(&self) -> Option<usize> {
        self.memory.map(|memory| memory.taken.saturating_sub(self.weight_bytes + self.kv_bytes))
    }
}

/// What happens to a request, in order. Dropping it cancels the request.
pub struct Events {
    request: u64,
    prompt_ids: Arc<[u32]>,
    events: channel::Receiver<Event>,
    commands: channel::Sender<Command>,
    samples_left: u32,
}

impl Engine {
    /// Starts the description of an engine.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    /// Submits a request. What is wrong with it is said here; what goes wrong later is an [`Event::Error`].
    pub fn submit(&self, request: Request) -> Result<Events> {
        let all = self.submit_all(vec![request])?;
        Ok(all.into_iter().next().expect("one for each request; this is a bug"))
    }

    /// Submits requests together: none begins before all are known. An error says what is wrong with one; then none is submitted.
    /// What is asked is looked at first, then what there is to read, and last whether there is room.
    pub fn submit_all(&self, requests: Vec<Request>) -> Result<Vec<Events>> {
        let (vocab, text) = (self.facts.spec.vocab, self.facts.tokenizer.is_some());
        requests.iter().try_for_each(|request| request.check(vocab, text))?;
        let prepared = images::each(&requests, |request| self.facts.prepare(request));
        let all = requests.into_iter().zip(prepared);
        let checked =
            all.map(|(request, prepared)| self.take_in(request, prepared?)).collect::<Result<Vec<_>>>()?;
        let (submissions, events) = checked.into_iter().unzip();
        let ended = |_| Error::Engine("it has ended".into());
        self.commands.send(Command::Submit(submissions)).map_err(ended)?;
        Ok(events)
    }

    fn take_in(&self, mut request: Request, prepared: Prepared) -> Result<(Submission, Events)> {
        let (facts, (prompt, images, media)) = (&self.facts, prepared);
        // Images are for the tower now, and go when it is done with them.
        request.media.clear();
        let prompt: Arc<[u32]> = prompt.into();
        facts.check_prompt(&prompt, images.as_deref())?;
        let ending = facts.ending(&request, prompt.len())?;
        let place = self.counts.wait(prompt.len())?;
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = channel::unbounded();
        let samples_left = request.n;
        let tokenizer = facts.tokenizer.as_ref();
        let answer = |sample| Answer::new(sample, &request, tokenizer, ending.clone(), prompt.len());
        let answers = (0..request.n).map(answer).collect::<Result<_>>()?;
        let keys = facts.keys.as_ref().map(|keys| keys.of_prompt(&prompt, images.as_deref()));
        let submission = Submission {
            request: id,
            prompt: prompt.clone(),
            keys: keys.unwrap_or_default(),
            images,
            media: media.into(),
            params: request,
            ending,
            answers,
            events: sender,
            place,
        };
        let commands = self.commands.clone();
        Ok((submission, Events { request: id, prompt_ids: prompt, events, commands, samples_left }))
    }

    /// An image for a request, from a file.
    pub fn image_file(&self, path: &Path) -> Result<Media> {
        let images = self.images()?;
        images.image(path, &images.preprocessor.file(path)?)
    }

    /// An image for a request, from a file's bytes; `path` is for messages. What takes long is done here, on the caller's
    /// thread.
    pub fn image(&self, path: &Path, bytes: &[u8]) -> Result<Media> {
        self.images()?.image(path, bytes)
    }

    /// A video for a request, from the files of its frames, of which there are `fps` a second.
    pub fn video(&self, frames: &[PathBuf], fps: f64) -> Result<Media> {
        self.images()?.video(frames, fps)
    }

    fn images(&self) -> Result<&Images> {
        let why = "images are of no use to this model: it reads none";
        self.facts.images.as_ref().ok_or_else(|| Error::Request(why.into()))
    }

    /// The model.
    pub fn spec(&self) -> &ModelSpec {
        &self.facts.spec
    }

    /// The folder's generation_config.json (end-of-sequence ids, default sampling).
    pub fn generation(&self) -> &GenerationConfig {
        &self.facts.generation
    }

    /// The tokenizer; `None` if the folder has none (prompts are ids then).
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.facts.tokenizer.as_ref()
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&Template> {
        self.facts.template.as_ref()
    }

    /// The layout it runs in.
    pub fn layout(&self) -> Layout {
        self.layout.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Goes on in another layout of the same model: units move to where it says, and so do the keys and values of requests
    /// that run. No request ends, and no token changes where the micro-batches are the same.
    ///
    /// It returns when the engine runs in the new layout, and says what that took. Most of it is done while requests run:
    /// they wait for the last step of the old stages, and for keys and values that go to other devices. Where nobody said
    /// how many micro-batches are in flight, it is one a device, as ever. Both layouts' stages are there for a while, which
    /// takes memory: see [`EngineBuilder::movable`].
    ///
    /// A layout that is not possible is refused, as is a second one meanwhile, and the engine goes on as before. If it
    /// fails later, that is a fault like any other.
    ///
    /// ```
    /// # use pipeline_infer::{Engine, layout::Device};
    /// let builder = Engine::builder().model("tests/data/chat-llama").device(Device::Cpu);
    /// let engine = builder.stages(2).build()?;
    /// let report = engine.relayout("0@cpu,1-3@cpu".parse()?)?;
    /// // All units are on the device that they were on.
    /// assert_eq!((&report.to, report.moved.len()), (&engine.layout(), 0));
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn relayout(&self, layout: Layout) -> Result<Relayout> {
        let (reply, outcome) = channel::bounded(1);
        let ended = |_| Error::Engine("it has ended".into());
        self.commands.send(Command::Relayout(layout, reply)).map_err(|_| ended(channel::RecvError))?;
        outcome.recv().map_err(ended)?
    }

    /// The type that weights, keys and values are kept in.
    pub fn dtype(&self) -> DType {
        self.facts.dtype
    }

    /// Tokens of a sequence at most, prompt and answer together.
    pub fn context_max(&self) -> usize {
        self.facts.context_max
    }

    /// Tokens of all running sequences that the KV cache holds.
    pub fn kv_tokens(&self) -> usize {
        self.facts.kv_tokens
    }

    /// What it has done so far, and what is waiting.
    pub fn stats(&self) -> EngineStats {
        let stats = |stage: &StageFacts| StageStats {
            device: stage.device.clone(),
            layers: stage.layers.clone(),
            weight_bytes: stage.weight_bytes,
            kv_bytes: stage.kv_bytes,
            memory: (stage.memory)(),
            times: stage.metrics.times(),
        };
        let stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        EngineStats {
            stages: stages.iter().filter(|stage| !stage.vision).map(stats).collect(),
            vision: stages.iter().filter(|stage| stage.vision).map(stats).collect(),
            scheduler: self.meter.queues(),
            dropped: self.meter.dropped().load(Ordering::Relaxed),
            requests_waiting: self.counts.waiting(),
            rebuilds: self.counts.rebuilds(),
            relayouts: self.counts.relayouts(),
        }
    }

    /// Ends it, as dropping it does. An error says that the trace could not be written to its end.
    pub fn end(mut self) -> Result<()> {
        self.end_threads()
    }

    /// What it does from now on, step by step. Up to `room` measurements wait to be read; more are dropped.
    pub fn measurements(&self, room: usize) -> Measurements {
        self.meter.listen(room).into()
    }

    fn end_threads(&mut self) -> Result<()> {
        let _ = self.commands.send(Command::End);
        for thread in self.threads.drain(..) {
            // A panic has been reported by the panic hook already.
            let _ = thread.join();
        }
        self.meter.end();
        let timeline = self.timeline.take().map(std::thread::JoinHandle::join);
        let panicked = |_| Err(Error::Engine("writing the timeline panicked; this is a bug".into()));
        timeline.map_or(Ok(()), |written| written.unwrap_or_else(panicked))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Err(error) = self.end_threads() {
            tracing::warn!(%error, "the trace has no end");
        }
    }
}

impl Facts {
    /// A request's tokens and images.
    fn prepare(&self, request: &Request) -> Result<Prepared> {
        let media = media_of(request)?;
        let ids = self.prompt_ids(&request.prompt)?;
        match &self.images {
            Some(images) => images.place(&ids, media),
            None if media.is_empty() => Ok((ids, None, media)),
            None => Err(Error::Request(format!("{} images, and the model reads none", media.len()))),
        }
    }

    fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let tokenizer = || {
            let why = "text needs a tokenizer, and the model folder has no tokenizer.json";
            self.tokenizer.as_ref().ok_or_else(|| Error::Request(why.into()))
        };
        match prompt {
            Prompt::Ids(ids) => Ok(ids.clone()),
            Prompt::Text(text) => tokenizer()?.encode(text, true),
            Prompt::Chat(messages) => {
                let why = "a chat needs a chat template, and the model folder has none";
                let template = self.template.as_ref().ok_or_else(|| Error::Request(why.into()))?;
                tokenizer()?.encode(&template.render(messages, true)?, false)
            }
        }
    }

    fn check_prompt(&self, ids: &[u32], images: Option<&PromptImages>) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::Request("the prompt is empty".into()));
        }
        if let Some((i, id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= self.spec.vocab) {
            let vocab = self.spec.vocab;
            return Err(Error::Request(format!("token {i} of the prompt is {id}; the model has {vocab}")));
        }
        if ids.len() >= self.context_max {
            let images = images.map_or(0, PromptImages::tokens);
            return Err(Error::TooLong { tokens: ids.len(), images, max: self.context_max });
        }
        Ok(())
    }

    /// What ends samples of this request by their tokens alone.
    fn ending(&self, request: &Request, prompt_tokens: usize) -> Result<Ending> {
        let (max, stop) = (self.context_max, &request.stop);
        let room = max - prompt_tokens;
        let tokens_max = match stop.max_tokens.map(|n| n as usize) {
            Some(n) if n > room && !stop.shorten => {
                return Err(Error::Request(format!(
                    "the prompt has {prompt_tokens} tokens and max_tokens is {n}; prompt and answer together have room for {max}"
                )));
            }
            asked => asked.map_or(room, |n| room.min(n)),
        };
        let eos = if stop.ignore_eos { &[][..] } else { &self.generation.eos };
        Ok(Ending { eos: eos.into(), tokens_max })
    }
}

impl Events {
    /// The prompt's tokens.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
    }

    /// Ends the request; what it held is given back. The last events are still to be read.
    pub fn cancel(&self) {
        // An engine that has ended has cancelled everything.
        let _ = self.commands.send(Command::Cancel(self.request));
    }

    /// Like `next`, but waits for `timeout` at most: `Err` if nothing came.
    pub fn next_timeout(&mut self, timeout: std::time::Duration) -> Result<Option<Event>, TimedOut> {
        if self.samples_left == 0 {
            return Ok(None);
        }
        let event = match self.events.recv_timeout(timeout) {
            Ok(event) => event,
            Err(channel::RecvTimeoutError::Timeout) => return Err(TimedOut),
            Err(channel::RecvTimeoutError::Disconnected) => engine_gone(),
        };
        Ok(Some(self.note(event)))
    }

    fn note(&mut self, event: Event) -> Event {
        match event {
            Event::Finished { .. } => self.samples_left -= 1,
            Event::Error(_) => self.samples_left = 0,
            Event::Token { .. } => (),
        }
        event
    }
}

/// Nothing came in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimedOut;

fn engine_gone() -> Event {
    Event::Error(Error::Engine("it has ended".into()))
}

impl Iterator for Events {
    type Item = Event;

    /// Waits for the next event; `None` after the last.
    fn next(&mut self) -> Option<Event> {
        if self.samples_left == 0 {
            return None;
        }
        let event = self.events.recv().unwrap_or_else(|_| engine_gone());
        Some(self.note(event))
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if self.samples_left > 0 {
            self.cancel();
        }
    }
}
