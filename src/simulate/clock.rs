//! The virtual clock: a scheduler, a host that takes its time, and stages that pass steps on.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::{
    Nanos, Trace, nanos,
    trace::{Answer, End, StepTrace},
    work::Arrival,
};
use crate::{
    batch::{Observation, Sampled, SeqId, Step},
    request::SamplingParams,
    schedule::{BlockPool, NewSequence, PassShape, Scheduler, SchedulerConfig, StageCost},
};

/// What things take.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// The stages, in the order of the data.
    pub stages: Vec<Stage>,
    /// From a stage's end until the next device can begin with what it made, and for tokens from the last device to the
    /// first.
    pub boundary: Nanos,
    /// From the last stage's end until tokens are chosen, where parts of a split head do that beside the stages.
    pub gathering: Nanos,
    /// The host's time to plan a step and send it.
    pub planning: Nanos,
    /// From when tokens are chosen until the host has them.
    pub results: Nanos,
}

/// A stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// Its time for a pass.
    pub cost: StageCost,
    /// Where it runs. Stages of one device take turns: the one whose step is the oldest goes first.
    pub device: usize,
}

/// What stages compute, and who watches.
pub trait World {
    /// Carries a step out: the tokens of its output rows. Each stage carries steps out in their order, so this is called in
    /// their order, when the first stage begins.
    fn run(&mut self, step: &Step) -> Vec<Sampled>;

    /// The scheduler has got a request.
    fn submitted(&mut self, now: Nanos, request: usize) {
        let _ = (now, request);
    }

    /// A step has just been planned.
    fn planned(&mut self, now: Nanos, step: &Step, scheduler: &Scheduler) {
        let _ = (now, step, scheduler);
    }

    /// A request has got a token: the request's number, and the token.
    fn told(&mut self, now: Nanos, request: usize, token: &Sampled) {
        let _ = (now, request, token);
    }

    /// A request has ended.
    fn ended(&mut self, now: Nanos, request: usize, why: End, scheduler: &Scheduler) {
        let _ = (now, request, why, scheduler);
    }

    /// The host has read a step's results.
    fn returned(&mut self, now: Nanos, step: u64, scheduler: &Scheduler) {
        let _ = (now, step, scheduler);
    }

    /// Nothing more will happen.
    fn over(&mut self, scheduler: &Scheduler) {
        let _ = scheduler;
    }
}

/// Stages whose tokens are all the same.
#[derive(Debug, Clone, Copy, Default)]
pub struct Blank;

/// A machine, and how it is scheduled.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// What things take.
    pub machine: Machine,
    /// How much runs at once.
    pub config: SchedulerConfig,
    /// KV blocks.
    pub blocks: usize,
    /// The clock stops here, whatever is left.
    pub until: Nanos,
    /// Whether the scheduler learns how long passes took.
    pub observed: bool,
}

impl Machine {
    /// A device a stage, 14 µs for a boundary (a peer copy of a decode step's rows) and 20 µs for each of the host's parts.
    pub fn new(costs: Vec<StageCost>) -> Machine {
        let stage = |(device, cost)| Stage { cost, device };
        Machine {
            stages: costs.into_iter().enumerate().map(stage).collect(),
            boundary: 14_000,
            gathering: 0,
            planning: 20_000,
            results: 20_000,
        }
    }
}

impl World for Blank {
    fn run(&mut self, step: &Step) -> Vec<Sampled> {
        step.batch.outputs.iter().map(|o| Sampled { seq: o.seq, id: 0, logprobs: None }).collect()
    }
}

impl Simulation {
    /// A machine without a limit of time.
    pub fn new(machine: Machine, config: SchedulerConfig, blocks: usize) -> Simulation {
        assert!(!machine.stages.is_empty(), "a machine without stages; this is a bug");
        Simulation { machine, config, blocks, until: Nanos::MAX, observed: true }
    }

    /// Serves these requests, until all have ended and the last step has come back. Request `i` is the sequence `i`.
    pub fn run(&self, work: &[Arrival], world: &mut impl World) -> Trace {
        let mut run = Run::new(self, work, world);
        while let Some(Reverse((now, _, event))) = run.events.pop() {
            if now > self.until {
                break;
            }
            run.now = now;
            run.happens(event);
        }
        run.world.over(&run.scheduler);
        run.trace
    }
}

/// What happens at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// To the host comes:
    Message(Message),
    /// The host has sent the step that it planned.
    Sent(u64),
    /// A stage has its rows of a step.
    Input(usize, u64),
    /// A stage has ended a step.
    Pass(usize, u64),
    /// The first stage's device has the tokens of a step.
    Tokens(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Message {
    Request(usize),
    Cancel(usize),
    Result(u64),
}

/// A step between its planning and its return.
struct Flight {
    step: Step,
    shape: PassShape,
    sampled: Vec<Sampled>,
}

/// A simulation on its way.
struct Run<'a, W> {
    machine: &'a Machine,
    observed: bool,
    work: &'a [Arrival],
    world: &'a mut W,
    sampling: Arc<SamplingParams>,
    scheduler: Scheduler,
    now: Nanos,
    /// What will happen, earliest first; at one moment, in the order that it was foreseen in.
    events: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    foreseen: u64,
    /// Not read by the host.
    inbox: VecDeque<Message>,
    host_busy: bool,
    /// In their order; the first one's number is `flight_first`.
    flights: VecDeque<Flight>,
    flight_first: u64,
    /// Steps that each stage can begin, but for the tokens that the first stage needs.
    queues: Vec<VecDeque<u64>>, // [stages]
    device_busy: Vec<bool>, // [devices]
    /// Steps whose tokens the first stage's device has.
    tokens_of: u64,
    trace: Trace,
}

impl<'a, W: World> Run<'a, W> {
    fn new(simulation: &'a Simulation, work: &'a [Arrival], world: &'a mut W) -> Self {
        let Simulation { machine, config, blocks, .. } = simulation;
        let devices: Vec<usize> = machine.stages.iter().map(|s| s.device).collect();
        let answer = |a: &Arrival| Answer { came: a.at, prompt: a.prompt.len(), ..Answer::default() };
        let mut run = Run {
            machine,
            observed: simulation.observed,
            work,
            world,
            sampling: Arc::new(SamplingParams::default()),
            scheduler: Scheduler::new(*config, BlockPool::new(*blocks)),
            now: 0,
            events: BinaryHeap::new(),
            foreseen: 0,
            inbox: VecDeque::new(),
            host_busy: false,
            flights: VecDeque::new(),
            flight_first: 0,
            queues: vec![VecDeque::new(); devices.len()],
            device_busy: vec![false; 1 + devices.iter().max().expect("stages; this is a bug")],
            tokens_of: 0,
            trace: Trace {
                steps: Vec::new(),
                answers: work.iter().map(answer).collect(),
                devices,
                slots: config.slots,
            },
        };
        for (i, arrival) in work.iter().enumerate() {
            run.at(arrival.at, Event::Message(Message::Request(i)));
            if let Some(at) = arrival.cancelled {
                run.at(at.max(arrival.at), Event::Message(Message::Cancel(i)));
            }
        }
        run
    }

    /// The clock ends after 584 years and stays there: what outside things say may take longer.
    fn after(&mut self, time: Nanos, event: Event) {
        self.at(self.now.saturating_add(time), event);
    }

    fn at(&mut self, moment: Nanos, event: Event) {
        self.events.push(Reverse((moment, self.foreseen, event)));
        self.foreseen += 1;
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Message(message) => {
                self.inbox.push_back(message);
                if !self.host_busy {
                    self.host();
                }
            }
            Event::Sent(step) => {
                self.trace.steps[step as usize].sent = self.now;
                self.happens(Event::Input(0, step));
                self.host();
            }
            Event::Input(stage, step) => {
                self.queues[stage].push_back(step);
                self.begin(self.machine.stages[stage].device);
            }
            Event::Pass(stage, step) => self.ended(stage, step),
            Event::Tokens(step) => {
                self.tokens_of = step + 1;
                self.begin(self.machine.stages[0].device);
            }
        }
    }

    /// The host reads all requests that have come, plans what it can, else reads a result, as the engine's thread does.
    fn host(&mut self) {
        loop {
            let command = self.inbox.iter().position(|message| !matches!(message, Message::Result(_)));
            match command.and_then(|i| self.inbox.remove(i)) {
                Some(Message::Request(i)) => {
                    self.submit(i);
                    continue;
                }
                Some(Message::Cancel(i)) => {
                    self.end(i, End::Cancelled);
                    continue;
                }
                _ => (),
            }
            if let Some(step) = self.scheduler.plan() {
                self.world.planned(self.now, &step, &self.scheduler);
                let (number, shape) = (step.step, PassShape::of(&step.batch));
                assert_eq!(number as usize, self.trace.steps.len(), "a step out of turn; this is a bug");
                self.trace.steps.push(StepTrace { sent: 0, rows: shape.rows, passes: Vec::new() });
                self.flights.push_back(Flight { step, shape, sampled: Vec::new() });
                self.host_busy = true;
                return self.after(self.machine.planning, Event::Sent(number));
            }
            let Some(Message::Result(step)) = self.inbox.pop_front() else {
                self.host_busy = false;
                return;
            };
            self.result(step);
        }
    }

    fn submit(&mut self, request: usize) {
        let arrival = &self.work[request];
        self.scheduler.add(NewSequence {
            seq: SeqId(request as u64),
            prompt: arrival.prompt.clone(),
            images: None,
            // The last token is never fed.
            tokens_max: arrival.prompt.len() + arrival.answer_max - 1,
            sampling: self.sampling.clone(),
            seed: arrival.seed,
            priority: arrival.priority,
        });
        self.world.submitted(self.now, request);
    }

    fn end(&mut self, request: usize, why: End) {
        let answer = &mut self.trace.answers[request];
        if answer.end.is_none() {
            answer.end = Some((self.now, why));
            self.scheduler.end(SeqId(request as u64));
            self.world.ended(self.now, request, why, &self.scheduler);
        }
    }

    fn result(&mut self, step: u64) {
        let flight = self.flights.pop_front().expect("a step comes back twice; this is a bug");
        assert_eq!(step, self.flight_first, "steps come back in their order; this is a bug");
        self.flight_first += 1;
        if self.observed {
            for (stage, (began, ended)) in self.trace.steps[step as usize].passes.iter().enumerate() {
                let busy = Duration::from_nanos(ended - began);
                self.scheduler.observe(Observation { stage, step, busy });
            }
        }
        for token in self.scheduler.apply(step, flight.sampled) {
            let request = token.seq.0 as usize;
            self.world.told(self.now, request, &token);
            let answer = &mut self.trace.answers[request];
            answer.tokens.push(self.now);
            if answer.tokens.len() == self.work[request].answer {
                self.end(request, End::Done);
            }
        }
        self.world.returned(self.now, step, &self.scheduler);
    }

    /// A device that is free begins the oldest step that one of its stages has.
    fn begin(&mut self, device: usize) {
        if self.device_busy[device] {
            return;
        }
        let first = |(stage, queue): (usize, &VecDeque<u64>)| queue.front().map(|&step| (step, stage));
        let here = |&(_, stage): &(u64, usize)| self.machine.stages[stage].device == device;
        let ready = |&(step, stage): &(u64, usize)| stage > 0 || self.has_tokens(step);
        let queues = self.queues.iter().enumerate();
        let Some((step, stage)) = queues.filter_map(first).filter(here).filter(ready).min() else { return };
        self.queues[stage].pop_front();
        self.device_busy[device] = true;
        let flight = &mut self.flights[(step - self.flight_first) as usize];
        if stage == 0 {
            flight.sampled = self.world.run(&flight.step);
        }
        let end = self.now.saturating_add(nanos(self.machine.stages[stage].cost.seconds(&flight.shape)));
        self.trace.steps[step as usize].passes.push((self.now, end));
        self.at(end, Event::Pass(stage, step));
    }

    fn has_tokens(&self, step: u64) -> bool {
        let after = self.flights[(step - self.flight_first) as usize].step.after;
        after.is_none_or(|after| after < self.tokens_of)
    }

    fn ended(&mut self, stage: usize, step: u64) {
        let stages = &self.machine.stages;
        let next = (stage + 1) % stages.len();
        // What stays on its device needs no copy.
        let way = if stages[stage].device == stages[next].device { 0 } else { self.machine.boundary };
        if next > 0 {
            self.after(way, Event::Input(next, step));
        } else {
            let Machine { gathering, results, .. } = *self.machine;
            self.after(gathering.saturating_add(way), Event::Tokens(step));
            self.after(gathering.saturating_add(results), Event::Message(Message::Result(step)));
        }
        self.device_busy[stages[stage].device] = false;
        self.begin(self.machine.stages[stage].device);
    }
}
