//! The engine's own thread: commands and results in, steps and events out.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use crossbeam_channel as channel;

use super::{Facts, answer::Answer, meter::Meter};
use crate::{
    batch::{Sampled, SeqId, Step},
    error::{Error, Result},
    pipeline::Outcome,
    request::{Event, Request},
    schedule::{NewSequence, Scheduler},
};

/// From the clients.
pub(super) enum Command {
    Submit(Box<Submission>),
    Cancel(u64),
    End,
}

/// A request whose prompt has been checked.
pub(super) struct Submission {
    pub(super) request: u64,
    pub(super) prompt: Arc<[u32]>,
    pub(super) params: Request,
    pub(super) events: channel::Sender<Event>,
}

/// The thread's state.
pub(super) struct Worker {
    pub(super) facts: Arc<Facts>,
    pub(super) scheduler: Scheduler,
    pub(super) commands: channel::Receiver<Command>,
    /// To the first stage. It has room for every step that may be in flight.
    pub(super) steps: channel::Sender<Step>,
    pub(super) results: channel::Receiver<Outcome>,
    pub(super) running: Running,
    pub(super) meter: Arc<Meter>,
}

/// What clients wait for.
#[derive(Default)]
pub(super) struct Running {
    /// Samples by sequence, each with the request that it belongs to.
    answers: HashMap<SeqId, (u64, Answer)>,
    /// In the order of submission.
    requests: BTreeMap<u64, Client>,
    next_seq: u64,
    seeds: RandomState,
}

struct Client {
    events: channel::Sender<Event>,
    seqs: Vec<SeqId>,
}

impl Worker {
    /// Runs until the engine is dropped or a stage fails.
    pub(super) fn run(mut self) {
        let Some(error) = self.serve() else {
            return self.running.fail_all(&Error::Engine("it has ended".into()));
        };
        tracing::info!(%error, "the pipeline has failed");
        self.running.fail_all(&error);
        drop(self.steps);
        // Clients that submit now are told why.
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Submit(submission) => drop(submission.events.send(Event::Error(error.clone()))),
                Command::Cancel(_) => (),
                Command::End => return,
            }
        }
    }

    /// `None` when the engine is dropped, else why the stages failed.
    fn serve(&mut self) -> Option<Error> {
        loop {
            channel::select! {
                recv(self.commands) -> command => match command {
                    Ok(Command::End) | Err(_) => return None,
                    Ok(command) => self.command(command),
                },
                recv(self.results) -> outcome => {
                    let outcome = outcome.unwrap_or_else(|_| {
                        (0, Err(Error::Engine("all stages have ended; this is a bug".into())))
                    });
                    if let Err(error) = self.outcome(outcome) {
                        return Some(error);
                    }
                }
            }
            self.observe();
            while let Some(step) = self.scheduler.plan() {
                self.meter.planned(&step, &self.scheduler);
                for start in &step.batch.starts {
                    self.running.started(start.seq);
                }
                if self.steps.send(step).is_err() {
                    // The first stage tells why it ended through the results.
                    break;
                }
            }
            self.meter.set_queues(self.scheduler.stats());
        }
    }

    /// Tells the scheduler what stages have been observed to take.
    fn observe(&mut self) {
        for observation in self.meter.observations() {
            self.scheduler.observe(observation);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let events = submission.events.clone();
                if let Err(error) = self.running.submit(*submission, &self.facts, &mut self.scheduler) {
                    // The client may have gone already.
                    let _ = events.send(Event::Error(error));
                }
            }
            Command::Cancel(request) => self.running.cancel(request, &mut self.scheduler),
            Command::End => unreachable!("handled by the caller; this is a bug"),
        }
    }

    fn outcome(&mut self, (step, sampled): Outcome) -> Result<()> {
        let before = self.running.answers.len();
        for token in self.scheduler.apply(step, sampled?) {
            self.running.token(token, &mut self.scheduler);
        }
        self.meter.applied(step, before - self.running.answers.len(), &self.scheduler);
        Ok(())
    }
}

impl Running {
    fn submit(&mut self, submission: Submission, facts: &Facts, scheduler: &mut Scheduler) -> Result<()> {
        let Submission { request, prompt, params, events } = submission;
        let room = facts.context_max - prompt.len();
        let new_max = params.stop.max_tokens.map_or(room, |n| room.min(n as usize));
        let eos: Arc<[u32]> = facts.generation.eos.as_slice().into();
        let seed = params.sampling.seed.unwrap_or_else(|| self.seeds.hash_one(request));
        let sampling = Arc::new(params.sampling.clone());
        let mut client = Client { events, seqs: Vec::new() };
        for sample in 0..params.n {
            let tokenizer = facts.tokenizer.as_ref();
            let answer = Answer::new(sample, &params, tokenizer, eos.clone(), prompt.len(), new_max)?;
            let seq = SeqId(self.next_seq);
            self.next_seq += 1;
            client.seqs.push(seq);
            self.answers.insert(seq, (request, answer));
            scheduler.add(NewSequence {
                seq,
                prompt: prompt.clone(),
                // The last token is never fed, so it needs no room.
                tokens_max: prompt.len() + new_max - 1,
                sampling: sampling.clone(),
                seed: seed.wrapping_add(u64::from(sample)),
                priority: params.priority,
            });
        }
        self.requests.insert(request, client);
        Ok(())
    }

    fn started(&mut self, seq: SeqId) {
        if let Some((_, answer)) = self.answers.get_mut(&seq) {
            answer.started();
        }
    }

    fn token(&mut self, token: Sampled, scheduler: &mut Scheduler) {
        let seq = token.seq;
        // A step can bring tokens of several samples, and the first of them can end them all.
        let Some((request, answer)) = self.answers.get_mut(&seq) else { return };
        let request = *request;
        let client = self.requests.get_mut(&request).expect("an answer without its client; this is a bug");
        let told = match answer.push(token) {
            Ok(told) => told,
            Err(error) => {
                let _ = client.events.send(Event::Error(error));
                return self.forget(request, scheduler);
            }
        };
        let gone = told.events.into_iter().any(|event| client.events.send(event).is_err());
        if gone {
            return self.forget(request, scheduler);
        }
        if told.ended {
            scheduler.end(seq);
            self.answers.remove(&seq);
            client.seqs.retain(|&s| s != seq);
            if client.seqs.is_empty() {
                self.requests.remove(&request);
            }
        }
    }

    fn cancel(&mut self, request: u64, scheduler: &mut Scheduler) {
        let Some(client) = self.requests.get(&request) else { return };
        for seq in &client.seqs {
            let (_, answer) = self.answers.get_mut(seq).expect("a sample without its answer; this is a bug");
            // A client that has gone needs no last event.
            let _ = client.events.send(answer.cancel());
        }
        self.forget(request, scheduler);
    }

    fn forget(&mut self, request: u64, scheduler: &mut Scheduler) {
        let client = self.requests.remove(&request).expect("a request forgotten twice; this is a bug");
        for seq in client.seqs {
            scheduler.end(seq);
            self.answers.remove(&seq);
        }
    }

    fn fail_all(&mut self, error: &Error) {
        for client in std::mem::take(&mut self.requests).into_values() {
            let _ = client.events.send(Event::Error(error.clone()));
        }
        self.answers.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, thread::JoinHandle, time::Duration};

    use super::*;
    use crate::{
        batch::ON_DEVICE,
        layout::{Device, Layout},
        model::open_model,
        request::{FinishReason, Prompt},
        schedule::{BlockPool, SchedulerConfig},
    };

    const EOS: u32 = 3;

    /// A worker that runs, and the ends of its channels.
    struct Ends {
        commands: channel::Sender<Command>,
        steps: channel::Receiver<Step>,
        results: channel::Sender<Outcome>,
        thread: JoinHandle<()>,
    }

    fn start(config: SchedulerConfig, blocks: usize) -> Ends {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat-llama");
        let mut model = open_model(&dir, false).unwrap();
        model.generation.eos = vec![EOS];
        let facts = Facts {
            layout: Layout::even(1, model.spec.layers.len(), Device::Cpu).unwrap(),
            spec: Arc::new(model.spec),
            generation: model.generation,
            tokenizer: None,
            template: None,
            dtype: model.dtype,
            context_max: 32,
            kv_tokens: 32,
        };
        let (commands, commands_out) = channel::unbounded();
        let (steps_in, steps) = channel::bounded(config.in_flight_max());
        let (results, results_out) = channel::unbounded();
        let worker = Worker {
            facts: Arc::new(facts),
            scheduler: Scheduler::new(config, BlockPool::new(blocks)),
            commands: commands_out,
            steps: steps_in,
            results: results_out,
            running: Running::default(),
            meter: Meter::new(false),
        };
        Ends { commands, steps, results, thread: std::thread::spawn(|| worker.run()) }
    }

    fn submission(request: u64, n: u32) -> (Box<Submission>, channel::Receiver<Event>) {
        let (events, received) = channel::unbounded();
        let mut params = Request::new(Prompt::Ids(vec![1, 2]));
        params.n = n;
        params.stop.max_tokens = Some(10);
        (Box::new(Submission { request, prompt: [1, 2].into(), params, events }), received)
    }

    impl Ends {
        fn submit(&self, request: u64, n: u32) -> channel::Receiver<Event> {
            let (submission, events) = submission(request, n);
            self.commands.send(Command::Submit(submission)).unwrap();
            events
        }
    }

    /// Open requests get the stage's error, later ones get it at once, and the thread ends when told to.
    #[test]
    fn a_failed_stage_ends_open_requests_and_refuses_new_ones() {
        let ends = start(
            SchedulerConfig {
                slots: 1,
                chunk: 8,
                running_max: 1,
                ahead: false,
                ..SchedulerConfig::default()
            },
            2,
        );
        // One runs, one waits for its blocks.
        let open: Vec<_> = (0..2).map(|i| ends.submit(i, 1)).collect();
        let step: Step = ends.steps.recv().unwrap();
        let error = Error::Device { device: "cpu".into(), why: "made to fail".into() };
        ends.results.send((step.step, Err(error.clone()))).unwrap();
        for events in open {
            assert_eq!(events.iter().collect::<Vec<_>>(), [Event::Error(error.clone())]);
        }
        assert!(ends.steps.recv().is_err(), "the stages are let go");
        let events = ends.submit(2, 1);
        assert_eq!(events.iter().collect::<Vec<_>>(), [Event::Error(error)]);
        ends.commands.send(Command::End).unwrap();
        ends.thread.join().unwrap();
    }

    #[test]
    fn a_client_that_goes_ends_all_its_samples_and_nobody_elses() {
        let ends = start(
            SchedulerConfig {
                slots: 1,
                chunk: 8,
                running_max: 4,
                ahead: false,
                ..SchedulerConfig::default()
            },
            8,
        );
        drop(ends.submit(0, 2));
        let step = ends.steps.recv().unwrap();
        assert_eq!(step.batch.outputs.len(), 2);
        let events = ends.submit(1, 1);
        ends.results.send((step.step, Ok(tokens(&step, &mut HashMap::new())))).unwrap();
        let Ends { commands, steps, results, thread } = ends;
        let stages = std::thread::spawn(move || {
            let mut last = HashMap::new();
            for step in steps {
                let sampled = tokens(&step, &mut last);
                assert!(sampled.iter().all(|token| token.seq == SeqId(2)), "samples of nobody run");
                results.send((step.step, Ok(sampled))).unwrap();
            }
        });
        assert!(events.iter().any(|event| matches!(event, Event::Finished { .. })));
        commands.send(Command::End).unwrap();
        thread.join().unwrap();
        stages.join().unwrap();
    }

    /// What stages would choose: a token follows from the one before, its position and its sequence.
    fn tokens(step: &Step, last: &mut HashMap<u32, u32>) -> Vec<Sampled> {
        let sample = |output: &crate::batch::OutputRow| {
            let id = match step.batch.ids[output.row] {
                ON_DEVICE => last[&output.seat],
                id => id,
            };
            let id = (id * 31 + step.batch.positions[output.row] * 7 + output.seq.0 as u32) % 23;
            last.insert(output.seat, id);
            Sampled { seq: output.seq, id, logprobs: None }
        };
        step.batch.outputs.iter().map(sample).collect()
    }

    /// Stages that are `slow`: a result comes when so many later steps have come, or no more do.
    fn answers(ahead: bool, slow: usize) -> Vec<(Vec<u32>, FinishReason)> {
        let ends = start(
            SchedulerConfig { slots: 2, chunk: 8, running_max: 4, ahead, ..SchedulerConfig::default() },
            8,
        );
        let events: Vec<_> = (0..6).map(|i| ends.submit(i, 1)).collect();
        let Ends { commands, steps, results, thread } = ends;
        let stages = std::thread::spawn(move || {
            let (mut last, mut held) = (HashMap::new(), VecDeque::new());
            loop {
                // A step past the last stop may come back after the worker's end.
                match steps.recv_timeout(Duration::from_millis(2)) {
                    Ok(step) => held.push_back((step.step, Ok(tokens(&step, &mut last)))),
                    Err(channel::RecvTimeoutError::Timeout) => {
                        held.drain(..).for_each(|r| _ = results.send(r))
                    }
                    Err(channel::RecvTimeoutError::Disconnected) => return,
                }
                if held.len() > slow {
                    held.pop_front().map(|r| results.send(r));
                }
            }
        });
        let answer = |events: channel::Receiver<Event>| {
            let mut ids = Vec::new();
            for event in events {
                match event {
                    Event::Token { id, .. } => ids.push(id),
                    Event::Finished { reason, .. } => return (ids, reason),
                    other => panic!("{other:?}"),
                }
            }
            panic!("no end")
        };
        let answers = events.into_iter().map(answer).collect();
        commands.send(Command::End).unwrap();
        thread.join().unwrap();
        stages.join().unwrap();
        answers
    }

    #[test]
    fn a_step_ahead_gives_the_same_answers() {
        let waiting = answers(false, 0);
        let stopped = waiting.iter().filter(|(_, reason)| *reason == FinishReason::Stop).count();
        assert!(0 < stopped && stopped < waiting.len(), "{waiting:?}");
        assert_eq!(answers(true, 0), waiting);
        assert_eq!(answers(true, 3), waiting);
    }
}
