//! One run: requests are submitted when they are due, and their events read until all have ended.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::{
    pictures::{Picture, Prepared, prepare},
    record::Recorder,
};
use crate::{
    engine::{
        Engine, Events,
        side_by_side::{side_by_side, threads},
    },
    error::{Error, Result},
    request::{Event, Request, Usage},
};

/// How often what the engine tells is read while nothing comes.
const PATIENCE: Duration = Duration::from_millis(50);

/// What a run submits.
pub(super) struct Work {
    /// In the order in which they come.
    pub(super) requests: Vec<Timed>,
    /// Each request's images, if requests have some.
    pub(super) files: Vec<Vec<Picture>>,
    /// Whether these are prepared before the clock starts, and not by threads that then submit their requests.
    pub(super) prepared: bool,
    /// One more, after so many turns of which each brings each of the others a token.
    pub(super) then: Option<(u32, Request)>,
}

/// A request and when it comes, from the run's beginning.
pub(super) struct Timed {
    pub(super) at: Duration,
    pub(super) request: Request,
}

/// What came of it.
pub(super) struct Driven {
    /// From submitting the first request to the end of the last.
    pub(super) seconds: f64,
    /// What each request took, in the order of their ends.
    pub(super) usages: Vec<Usage>,
    /// And the one that came later.
    pub(super) late: Option<Usage>,
    /// What preparing images took.
    pub(super) prepared: Prepared,
}

/// Runs it.
pub(super) fn drive(engine: &Engine, mut work: Work, recorder: Option<&mut Recorder>) -> Result<Driven> {
    let mut prepared = if work.prepared { work.prepare(engine)? } else { Prepared::default() };
    let at_once = work.requests.partition_point(|timed| timed.at.is_zero());
    let later = work.requests.split_off(at_once);
    let mut reader = Reader::new(recorder);
    if let Some(recorder) = &mut reader.recorder {
        recorder.begin(at_once + later.len());
    }
    let pictured = match work.files.is_empty() {
        true => Vec::new(),
        false => work.requests.drain(..).zip(work.files).collect(),
    };
    let (threads, timed) = (threads(pictured.len()), !(later.is_empty() && pictured.is_empty()));
    let (sender, coming) = channel::unbounded();
    let (stop, pictured) = (&AtomicBool::new(false), &Mutex::new(pictured.into_iter()));
    let started = Instant::now();
    reader.open = Open::submit_all(engine, work.requests)?;
    thread::scope(|scope| {
        let mut preparing = Vec::new();
        if timed {
            let submit = |sender| move || submit_pictured(engine, started, pictured, sender, stop);
            let named = || thread::Builder::new().name("images".into());
            let spawn = |_| named().spawn_scoped(scope, submit(sender.clone()));
            let spawned = (0..threads).map(spawn).collect::<Result<Vec<_>, _>>();
            preparing = spawned.map_err(|e| Error::Engine(format!("images: no thread: {e}")))?;
            scope.spawn(move || submit_later(engine, started, later, sender, stop));
        } else {
            drop(sender);
        }
        let read = reader.read_all(engine, &coming, work.then);
        stop.store(true, Ordering::Relaxed);
        for thread in preparing {
            prepared = prepared.and(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        let late = read?;
        // Where requests come one by one, the reader is not done the moment that the last one is.
        let seconds = if timed { reader.ended_s } else { started.elapsed().as_secs_f64() };
        Ok(Driven { seconds, usages: reader.usages, late, prepared })
    })
}

impl Work {
    /// Gives requests their images.
    fn prepare(&mut self, engine: &Engine) -> Result<Prepared> {
        let files = std::mem::take(&mut self.files);
        let threads = threads(files.len());
        let mut prepared = Prepared { threads, ..Prepared::default() };
        let all = side_by_side(files.len(), |i| prepare(engine, &files[i]));
        for (timed, media) in self.requests.iter_mut().zip(all) {
            let (media, one) = media?;
            timed.request.media = media;
            prepared = prepared.and(one);
        }
        Ok(prepared)
    }
}

/// Requests that nobody has taken yet, with their images.
type Pictured = Mutex<std::vec::IntoIter<(Timed, Vec<Picture>)>>;

/// One of several threads that each prepare a request's images and submit it, one after another. What preparing took.
fn submit_pictured(
    engine: &Engine,
    started: Instant,
    requests: &Pictured,
    coming: channel::Sender<Result<Open>>,
    stop: &AtomicBool,
) -> Prepared {
    let mut prepared = Prepared { threads: 1, ..Prepared::default() };
    let next = || requests.lock().unwrap_or_else(PoisonError::into_inner).next();
    while let Some((Timed { mut request, .. }, files)) = next().filter(|_| !stop.load(Ordering::Relaxed)) {
        let opened = prepare(engine, &files).and_then(|(media, one)| {
            prepared = prepared.and(one);
            request.media = media;
            Open::submit(engine, started, request)
        });
        let failed = opened.is_err();
        if coming.send(opened).is_err() || failed {
            break;
        }
    }
    prepared
}

/// Submits each when it is due, whatever the others do.
fn submit_later(
    engine: &Engine,
    started: Instant,
    requests: Vec<Timed>,
    coming: channel::Sender<Result<Open>>,
    stop: &AtomicBool,
) {
    for Timed { at, request } in requests {
        loop {
            let left = at.saturating_sub(started.elapsed());
            if left.is_zero() || stop.load(Ordering::Relaxed) {
                break;
            }
            thread::sleep(left.min(PATIENCE));
        }
        let opened = Open::submit(engine, started, request);
        let failed = opened.is_err();
        if stop.load(Ordering::Relaxed) || coming.send(opened).is_err() || failed {
            return;
        }
    }
}

/// A request that has not ended.
struct Open {
    events: Events,
    /// When it was submitted, in seconds from the run's beginning.
    at: f64,
    /// The tokens that it will have, if nothing but their number ends it.
    tokens: Option<u32>,
}

impl Open {
    fn submit(engine: &Engine, started: Instant, request: Request) -> Result<Open> {
        let (tokens, at) = (tokens_of(&request), started.elapsed().as_secs_f64());
        Ok(Open { events: engine.submit(request)?, at, tokens })
    }

    /// Requests that come together, at a run's beginning: none begins before all are known.
    fn submit_all(engine: &Engine, requests: Vec<Timed>) -> Result<Vec<Open>> {
        let requests: Vec<Request> = requests.into_iter().map(|timed| timed.request).collect();
        let tokens: Vec<Option<u32>> = requests.iter().map(tokens_of).collect();
        let open = engine.submit_all(requests)?.into_iter().zip(tokens);
        Ok(open.map(|(events, tokens)| Open { events, at: 0.0, tokens }).collect())
    }
}

/// The tokens that a request will have, if nothing but their number ends it.
fn tokens_of(request: &Request) -> Option<u32> {
    let counted = request.stop.ignore_eos && request.stop.strings.is_empty();
    request.stop.max_tokens.filter(|_| counted)
}

struct Reader<'a> {
    recorder: Option<&'a mut Recorder>,
    open: Vec<Open>,
    usages: Vec<Usage>,
    /// When the last one that has been read of ended, in seconds from the run's beginning.
    ended_s: f64,
    failed: Option<Error>,
}

impl<'a> Reader<'a> {
    fn new(recorder: Option<&'a mut Recorder>) -> Self {
        Reader { recorder, open: Vec::new(), usages: Vec::new(), ended_s: 0.0, failed: None }
    }

    /// Until all requests have ended, those that are coming among them. What the one took that came after the others.
    fn read_all(
        &mut self,
        engine: &Engine,
        coming: &channel::Receiver<Result<Open>>,
        mut then: Option<(u32, Request)>,
    ) -> Result<Option<Usage>> {
        let (mut turns, mut late) = (0, None);
        while self.failed.is_none() {
            coming.try_iter().for_each(|opened| self.add(opened));
            if self.open.is_empty() {
                match coming.recv_timeout(PATIENCE) {
                    Ok(opened) => self.add(opened),
                    Err(channel::RecvTimeoutError::Timeout) => self.note(),
                    Err(channel::RecvTimeoutError::Disconnected) => break,
                }
                continue;
            }
            self.turn();
            turns += 1;
            if let Some((_, request)) = then.take_if(|(after, _)| *after == turns) {
                late = Some(engine.submit(request)?);
            }
        }
        let mut usage = None;
        while let Some(event) = late.as_mut().and_then(|events| next(events, &mut self.recorder)) {
            match event {
                Event::Finished { usage: took, .. } => usage = Some(took),
                Event::Error(error) => self.failed = self.failed.take().or(Some(error)),
                Event::Token { .. } => (),
            }
        }
        self.failed.take().map_or(Ok(usage), Err)
    }

    fn add(&mut self, opened: Result<Open>) {
        match opened {
            Ok(open) => self.open.push(open),
            Err(error) => self.failed = self.failed.take().or(Some(error)),
        }
    }

    fn note(&mut self) {
        if let Some(recorder) = &mut self.recorder {
            recorder.read();
        }
    }

    /// The next event of each: in turns, so that when the last request ends, no heap of other ones' events is left to be read.
    fn turn(&mut self) {
        let Reader { recorder, open, usages, ended_s, failed } = self;
        open.retain_mut(|open| match next(&mut open.events, recorder) {
            Some(Event::Token { .. }) => true,
            Some(Event::Finished { usage, .. }) => {
                let whole = open.tokens.is_none_or(|tokens| tokens == usage.completion_tokens);
                assert!(whole, "a request ended before its last token; this is a bug");
                usages.push(usage);
                *ended_s = ended_s.max(open.at + usage.total_s);
                false
            }
            Some(Event::Error(error)) => {
                failed.get_or_insert(error);
                false
            }
            None => false,
        });
    }
}

/// A request's next event. What the engine tells meanwhile is read.
pub(super) fn next(events: &mut Events, recorder: &mut Option<&mut Recorder>) -> Option<Event> {
    loop {
        if let Some(recorder) = recorder {
            recorder.read();
        }
        if let Ok(event) = events.next_timeout(PATIENCE) {
            return event;
        }
    }
}
