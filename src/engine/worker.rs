//! The engine's own thread: commands and results in, steps out.
//!
//! It waits for nothing but its channels. What takes time is done elsewhere: text and events by `text`, taking stages
//! down and building them anew by `rebuild`.

mod change;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::{
    StageFacts,
    answer::{Answer, Ending},
    balance::Balancer,
    counts::{Counts, Waiting},
    meter::Meter,
    rebuild::{Built, Faults, Old, Rebuild, take_down},
    recipe::Recipe,
    relayout::{Change, Failed, Prepared, Relayout, Switch},
    stall::Stall,
    text::Say,
    vision::Work,
    wire::Wired,
};
use crate::{
    batch::{Sampled, SeqId, Step},
    error::{Error, Result},
    layout::Layout,
    pipeline::Outcome,
    request::{Event, Media, Request},
    schedule::{ImagePass, NewSequence, PassImage, PromptImages, PromptKeys, Scheduler},
};

/// Commands that are read before stages are given something to do again, at most.
const COMMANDS_AT_ONCE: usize = 1024;

/// From the clients, but for one.
pub(super) enum Command {
    Submit(Vec<Submission>),
    Cancel(u64),
    /// From the thread that makes text: nothing more of a sample is wanted.
    Ended(SeqId),
    /// Another layout is wanted; whom to tell what came of it.
    Relayout(Layout, channel::Sender<Result<Relayout>>),
    End,
}

/// A request that has been checked.
pub(super) struct Submission {
    pub(super) request: u64,
    pub(super) prompt: Arc<[u32]>,
    pub(super) images: Option<Arc<PromptImages>>,
    /// Their pixels.
    pub(super) media: Arc<[Media]>,
    pub(super) keys: PromptKeys,
    pub(super) params: Request,
    pub(super) ending: Ending,
    /// One a sample.
    pub(super) answers: Vec<Answer>,
    pub(super) events: channel::Sender<Event>,
    pub(super) place: Waiting,
}

/// The thread's state.
pub(super) struct Worker {
    pub(super) recipe: Recipe,
    pub(super) scheduler: Scheduler,
    pub(super) commands: channel::Receiver<Command>,
    pub(super) text: channel::Sender<Say>,
    pub(super) stages: Stages,
    /// What the stages are, for all to see.
    pub(super) facts: Arc<Mutex<Vec<StageFacts>>>,
    pub(super) counts: Arc<Counts>,
    pub(super) meter: Arc<Meter>,
    pub(super) open: Open,
    pub(super) faults: Faults,
    /// How long loading took the first time.
    pub(super) loading: Duration,
    /// Another layout, from when it is wanted until the stages that run are ended for it.
    pub(super) change: Option<Change>,
    /// Wants one, if it is to.
    pub(super) balancer: Option<Balancer>,
    /// When something has last come of what is in flight.
    pub(super) stall: Stall,
    /// The layout, for all to see.
    pub(super) layout: Arc<Mutex<Layout>>,
}

/// How the stages are.
pub(super) enum Stages {
    Up(Wired),
    /// To those of another layout.
    Switching(Switch),
    Rebuilding(Rebuild),
    /// For good. What is left of them may still be on its way down: the channel closes then.
    Failed(Error, Option<channel::Receiver<()>>),
}

/// What is not finished.
#[derive(Default)]
pub(super) struct Open {
    sequences: HashMap<SeqId, Sequence>,
    /// In the order of submission.
    requests: BTreeMap<u64, Pending>,
    next_seq: u64,
    seeds: RandomState,
}

/// A request.
struct Pending {
    seqs: Vec<SeqId>,
    /// Until the first of them starts.
    place: Option<Waiting>,
}

/// A sample of a request.
struct Sequence {
    request: u64,
    /// Until it starts: it can be begun again.
    new: Option<(NewSequence, PromptKeys)>,
    /// The pixels of its images: they may have to be encoded again.
    media: Arc<[Media]>,
    ending: Ending,
    tokens: usize,
}

/// What the thread has waited for.
enum Came {
    Command(Command),
    Outcome(Outcome),
    Images(Result<u64>),
    Built(Result<Built>),
    Prepared(Result<Box<Prepared>>),
    Switched(Result<Box<Prepared>, Failed>),
    /// Nothing, for too long.
    Nothing,
}

impl Worker {
    /// Runs until the engine is dropped.
    pub(super) fn run(mut self) {
        'run: loop {
            let came = self.wait();
            if let Came::Outcome(_) | Came::Images(_) = came {
                self.stall.progress();
            }
            match came {
                Came::Command(Command::End) => break 'run,
                Came::Command(command) => self.command(command),
                Came::Outcome((step, Ok(sampled))) => self.tokens(step, sampled),
                Came::Outcome((_, Err(error))) | Came::Images(Err(error)) => self.fault(error),
                Came::Images(Ok(pass)) => self.scheduler.apply_images(pass),
                Came::Built(built) => self.built(built),
                Came::Prepared(prepared) => self.prepared(prepared),
                Came::Switched(outcome) => self.switched(outcome),
                Came::Nothing => self.fault(self.stall.error(&self.facts)),
            }
            // What is planned next should know of all requests that have come: the first of many, planned alone, would keep the
            // others waiting for a round.
            let others: Vec<Command> = self.commands.try_iter().take(COMMANDS_AT_ONCE).collect();
            for command in others {
                match command {
                    Command::End => break 'run,
                    command => self.command(command),
                }
            }
            // What stages have been observed to take.
            for observation in self.meter.observations() {
                self.scheduler.observe(observation);
                self.balancer.iter_mut().for_each(|balancer| balancer.observe(observation));
            }
            self.change_stages();
            self.plan();
            self.meter.set_queues(self.scheduler.stats());
        }
        let ended = Error::Engine("it has ended".into());
        self.open.fail_all(&ended, &self.text);
        let patience = self.recipe.patience;
        // What does not end is left behind with what hangs.
        self.change.take().map(|change| change.abandon(&ended, patience));
        match self.stages {
            // Threads that hang have been warned of.
            Stages::Up(stages) => _ = stages.end(),
            Stages::Switching(switch) => switch.abandon(patience),
            Stages::Rebuilding(rebuild) => rebuild.abandon(patience),
            // It takes as long as it has patience, and a moment.
            Stages::Failed(_, Some(ending)) => _ = ending.recv_timeout(2 * patience),
            Stages::Failed(_, None) => (),
        }
    }

    fn wait(&self) -> Came {
        let (never, no_outcome, no_built) = (channel::never(), channel::never(), channel::never());
        let (not_prepared, not_done) = (channel::never(), channel::never());
        let (mut results, mut built, mut late, mut done) = (&no_outcome, &no_built, &never, &not_done);
        match &self.stages {
            Stages::Up(stages) => results = &stages.results,
            Stages::Switching(switch) => (done, late) = (&switch.done, &switch.late),
            Stages::Rebuilding(rebuild) => (built, late) = (&rebuild.built, &rebuild.late),
            Stages::Failed(..) => (),
        }
        let prepared = self.change.as_ref().and_then(Change::to_come).unwrap_or(&not_prepared);
        let no_images = channel::never();
        let images = match &self.stages {
            Stages::Up(Wired { vision: Some(vision), .. }) => &vision.arrived,
            _ => &no_images,
        };
        let nothing = self.stall.late(self.recipe.stall.filter(|_| self.works()));
        let gone = |what: &str| Error::Engine(format!("{what}; this is a bug"));
        let too_long = || Error::Engine("it takes too long".into());
        channel::select! {
            recv(self.commands) -> command => Came::Command(command.unwrap_or(Command::End)),
            recv(results) -> outcome => {
                Came::Outcome(outcome.unwrap_or_else(|_| (0, Err(gone("all stages have ended")))))
            }
            recv(images) -> pass => {
                Came::Images(pass.unwrap_or_else(|_| Err(gone("the vision tower has ended"))))
            }
            recv(built) -> built => Came::Built(built.unwrap_or_else(|_| Err(gone("nobody builds them")))),
            recv(prepared) -> prepared => {
                Came::Prepared(prepared.unwrap_or_else(|_| Err(gone("nobody makes them ready"))))
            }
            recv(done) -> done => {
                let failed = |_| Err(Failed { error: gone("nobody changes them"), hopeless: false });
                Came::Switched(done.unwrap_or_else(failed))
            }
            recv(nothing) -> _ => Came::Nothing,
            recv(late) -> _ => match &self.stages {
                Stages::Switching(_) => Came::Switched(Err(Failed { error: too_long(), hopeless: true })),
                _ => Came::Built(Err(too_long())),
            }
        }
    }

    /// Whether stages have something to do.
    fn works(&self) -> bool {
        matches!(self.stages, Stages::Up(_)) && self.scheduler.in_flight() > 0
    }

    /// Gives the stages what they have room for.
    fn plan(&mut self) {
        if self.change.as_ref().is_some_and(Change::drains) {
            return;
        }
        if !self.works() {
            self.stall.progress();
        }
        self.plan_images();
        self.plan_steps();
        self.plan_images();
    }

    /// The same, of the vision tower.
    fn plan_images(&mut self) {
        let Stages::Up(Wired { vision: Some(vision), .. }) = &self.stages else { return };
        while let Some(pass) = self.scheduler.plan_images() {
            let work = self.open.work(pass);
            if vision.works.as_ref().is_none_or(|works| works.send(work).is_err()) {
                // It tells why it ended.
                return;
            }
        }
    }

    fn plan_steps(&mut self) {
        let Stages::Up(Wired { steps: Some(steps), .. }) = &self.stages else { return };
        while let Some(step) = self.scheduler.plan() {
            self.meter.planned(&step, &self.scheduler);
            let started = self.open.started(&step);
            if !started.is_empty() {
                say(&self.text, Say::Started(started, Instant::now()));
            }
            if steps.send(step).is_err() {
                // The first stage tells why it ended through the results.
                return;
            }
        }
    }

    fn command(&mut self, command: Command) {
        match (command, &self.stages) {
            (Command::Submit(all), Stages::Failed(error, _)) => {
                // Clients may have gone already.
                all.iter().for_each(|one| drop(one.events.send(Event::Error(error.clone()))));
            }
            (Command::Submit(all), _) => {
                all.into_iter().for_each(|one| self.open.submit(one, &mut self.scheduler, &self.text));
            }
            (Command::Cancel(request), _) => {
                self.open.forget(request, &mut self.scheduler);
                say(&self.text, Say::Cancelled(request));
            }
            (Command::Ended(seq), _) => self.open.ended(seq, &mut self.scheduler),
            (Command::Relayout(layout, reply), _) => self.relayout(layout, Some(reply)),
            (Command::End, _) => unreachable!("handled by the caller; this is a bug"),
        }
    }

    fn tokens(&mut self, step: u64, sampled: Vec<Sampled>) {
        let tokens = self.scheduler.apply(step, sampled);
        let before = self.open.sequences.len();
        for token in &tokens {
            let sequence =
                self.open.sequences.get_mut(&token.seq).expect("a token after the end; this is a bug");
            sequence.tokens += 1;
            if sequence.ending.reason(token.id, sequence.tokens).is_some() {
                self.open.ended(token.seq, &mut self.scheduler);
            }
        }
        self.meter.applied(step, before - self.open.sequences.len(), &self.scheduler);
        if !tokens.is_empty() {
            say(&self.text, Say::Tokens(tokens, Instant::now()));
        }
    }

    /// A stage has failed: what has been in the stages is lost, the rest waits until they have been built anew.
    fn fault(&mut self, error: Error) {
        tracing::warn!(%error, "a stage has failed: requests that had started end here");
        let failed = Stages::Failed(error.clone(), None);
        let Stages::Up(old) = std::mem::replace(&mut self.stages, failed) else {
            unreachable!("stages that are not up have failed; this is a bug")
        };
        let lost = (old.lost)();
        let old = Old { running: Some(old), change: self.change.take(), patience: self.recipe.patience };
        self.begin_anew(error, old, lost);
    }

    /// What had started ends, and stages are built again when those that are left have been taken down. `lost`: a device is.
    fn begin_anew(&mut self, error: Error, old: Old, lost: bool) {
        self.open.fail_started(&error, &self.text);
        self.scheduler = self.recipe.scheduler();
        self.open.begin_again(&mut self.scheduler);
        self.balancer.iter_mut().for_each(Balancer::forget);
        // Meanwhile, and if nothing comes of it.
        self.stages = Stages::Failed(error.clone(), None);
        let hopeless = match lost {
            true => Err("a device is lost to this process, which has to be started again".into()),
            false => self.faults.count(Instant::now()),
        };
        if let Err(why) = hopeless {
            let ending = take_down(old, &error);
            return self.fail(error.and(&why), Some(ending));
        }
        match Rebuild::start(&self.recipe, old, error.clone(), self.loading) {
            Ok(rebuild) => self.stages = Stages::Rebuilding(rebuild),
            Err(why) => self.fail(error.and(&why.to_string()), None),
        }
    }

    fn built(&mut self, built: Result<Built>) {
        let failed = Stages::Failed(Error::Engine("it is not known why; this is a bug".into()), None);
        let Stages::Rebuilding(rebuild) = std::mem::replace(&mut self.stages, failed) else {
            unreachable!("nobody has built stages; this is a bug")
        };
        match built {
            Ok((stages, facts)) => {
                // Steps count from 0 again.
                self.meter.observations().for_each(drop);
                *self.facts.lock().unwrap_or_else(PoisonError::into_inner) = facts;
                self.stages = Stages::Up(stages);
                self.counts.rebuilt();
                let rebuilds = self.counts.rebuilds();
                tracing::warn!(rebuilds, "the stages have been built anew");
            }
            Err(why) => {
                let why = format!("the stages could not be built anew: {why}");
                self.fail(rebuild.fault.and(&why), None);
            }
        }
    }

    /// For good: clients that wait and those that submit later are told why.
    fn fail(&mut self, error: Error, ending: Option<channel::Receiver<()>>) {
        tracing::warn!(%error, "the pipeline has failed");
        self.open.fail_all(&error, &self.text);
        self.scheduler = self.recipe.scheduler();
        self.stages = Stages::Failed(error, ending);
    }
}

impl Open {
    fn submit(&mut self, submission: Submission, scheduler: &mut Scheduler, text: &channel::Sender<Say>) {
        let Submission { request, prompt, keys, images, media, params, ending, answers, events, place } =
            submission;
        let seed = params.sampling.seed.unwrap_or_else(|| self.seeds.hash_one(request));
        let sampling = Arc::new(params.sampling);
        let mut told = Vec::with_capacity(answers.len());
        for (sample, answer) in answers.into_iter().enumerate() {
            let seq = SeqId(self.next_seq);
            self.next_seq += 1;
            told.push((seq, answer));
            let new = NewSequence {
                seq,
                prompt: prompt.clone(),
                images: images.clone(),
                // The last token is never fed, so it needs no room.
                tokens_max: prompt.len() + ending.tokens_max - 1,
                sampling: sampling.clone(),
                seed: seed.wrapping_add(sample as u64),
                priority: params.priority,
            };
            scheduler.add_hashed(new.clone(), &keys);
            let (new, media, ending) = (Some((new, keys.clone())), media.clone(), ending.clone());
            self.sequences.insert(seq, Sequence { request, new, media, ending, tokens: 0 });
        }
        let seqs = told.iter().map(|(seq, _)| *seq).collect();
        self.requests.insert(request, Pending { seqs, place: Some(place) });
        say(text, Say::New { request, events, answers: told });
    }

    /// What the tower has to know of a pass.
    fn work(&self, pass: ImagePass) -> Work {
        let mut work = Work { pass: pass.pass, images: Vec::new(), rows: Vec::new() };
        for PassImage { of: (seq, i), row, .. } in pass.images {
            let sequence = self.sequences.get(&seq).expect("an image of no sequence; this is a bug");
            work.images.push(sequence.media[i].clone());
            work.rows.push(row);
        }
        work
    }

    /// Takes note of sequences that have their first rows in this step, and says which.
    fn started(&mut self, step: &Step) -> Vec<SeqId> {
        let mut started = Vec::new();
        for seq in step.batch.starts.iter().map(|start| start.seq) {
            let sequence = self.sequences.get_mut(&seq).expect("a step of no sequence; this is a bug");
            if sequence.new.take().is_some() {
                started.push(seq);
            }
            let request = self.requests.get_mut(&sequence.request);
            request.expect("a sample without its request; this is a bug").place = None;
        }
        started
    }

    /// Nothing more of a sample is wanted, which may have been known.
    fn ended(&mut self, seq: SeqId, scheduler: &mut Scheduler) {
        let Some(sequence) = self.sequences.remove(&seq) else { return };
        scheduler.end(seq);
        let request = self.requests.get_mut(&sequence.request);
        let request = request.expect("a sample without its request; this is a bug");
        request.seqs.retain(|&s| s != seq);
        if request.seqs.is_empty() {
            self.requests.remove(&sequence.request);
        }
    }

    /// Ends what is left of a request.
    fn forget(&mut self, request: u64, scheduler: &mut Scheduler) {
        let Some(request) = self.requests.remove(&request) else { return };
        for seq in request.seqs {
            scheduler.end(seq);
            self.sequences.remove(&seq);
        }
    }

    /// Fails the requests of which a sample has started.
    fn fail_started(&mut self, error: &Error, text: &channel::Sender<Say>) {
        let sequences = &mut self.sequences;
        self.requests.retain(|&request, pending| {
            let waits = pending.seqs.iter().all(|seq| sequences[seq].new.is_some());
            if !waits {
                pending.seqs.iter().for_each(|seq| _ = sequences.remove(seq));
                say(text, Say::Failed(request, error.clone()));
            }
            waits
        });
    }

    fn fail_all(&mut self, error: &Error, text: &channel::Sender<Say>) {
        for request in std::mem::take(&mut self.requests).into_keys() {
            say(text, Say::Failed(request, error.clone()));
        }
        self.sequences.clear();
    }

    /// Queues what there is, in the order in which it came.
    fn begin_again(&self, scheduler: &mut Scheduler) {
        let mut waiting: Vec<_> = self.sequences.values().filter_map(|s| s.new.as_ref()).collect();
        waiting.sort_unstable_by_key(|(new, _)| new.seq);
        waiting.into_iter().for_each(|(new, keys)| scheduler.add_hashed(new.clone(), keys));
    }
}

/// Where the thread that listens has gone, so have its clients' events, which tell them.
fn say(text: &channel::Sender<Say>, what: Say) {
    let _ = text.send(what);
}
