//! One step ahead: a device that hands tokens on by itself, simulated. Clients get what they get from a schedule that
//! waits for every token, nothing is held by two sequences at once, and the pipeline stays full.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use pipeline_infer::{
    SamplingParams,
    batch::{KV_BLOCK, ON_DEVICE, Sampled, SeqId, Step},
    schedule::{BlockPool, NewSequence, Scheduler, SchedulerConfig},
};
use proptest::prelude::*;

/// A toy model: a token follows from the seed and all tokens before it. A token below `STOPS` ends an answer.
fn model(seed: u64, tokens: impl Iterator<Item = u32>) -> u32 {
    let mix = |hash: u64, x: u64| (hash ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    (tokens.fold(mix(seed, 1), |hash, token| mix(hash, u64::from(token))) >> 7) as u32 % 40
}

/// What a client wants: a prompt, and an answer up to a stop or to so many tokens.
#[derive(Debug, Clone)]
struct Wanted {
    seed: u64,
    prompt: Vec<u32>,
    answer_max: usize,
    stops: u32,
}

impl Wanted {
    fn new(seed: u64, prompt: usize, answer_max: usize, stops: u32) -> Self {
        Wanted { seed, prompt: (0..prompt as u32).map(|i| i + seed as u32).collect(), answer_max, stops }
    }

    fn answer(&self) -> Vec<u32> {
        let mut tokens = self.prompt.clone();
        loop {
            let next = model(self.seed, tokens.iter().copied());
            tokens.push(next);
            if next < self.stops || tokens.len() == self.prompt.len() + self.answer_max {
                return tokens.split_off(self.prompt.len());
            }
        }
    }
}

/// What a device keeps at a seat.
#[derive(Clone)]
struct Seat {
    seq: SeqId,
    seed: u64,
    /// The last token, and the step that brought it.
    last: Option<(u32, u64)>,
}

/// Carries steps out in their order, from its own tables alone.
struct Device {
    kv: Vec<u32>, // [blocks, KV_BLOCK]
    seats: Vec<Option<Seat>>,
}

impl Device {
    fn run(&mut self, step: &Step) -> Vec<Sampled> {
        let batch = &step.batch;
        for start in &batch.starts {
            self.seats[start.seat as usize] = Some(Seat { seq: start.seq, seed: start.seed, last: None });
        }
        let mut needed = None;
        for part in &batch.seqs {
            let seat = self.seats[part.seat as usize].as_ref().expect("a seat of nobody");
            assert_eq!(seat.seq, part.seq, "a seat of two sequences");
            for row in part.row..part.row + part.len {
                let token = match batch.ids[row] {
                    ON_DEVICE => {
                        let (token, brought) = seat.last.expect("a token that nothing has brought");
                        needed = needed.max(Some(brought));
                        token
                    }
                    id => id,
                };
                let position = batch.positions[row] as usize;
                self.kv[part.blocks[position / KV_BLOCK] as usize * KV_BLOCK + position % KV_BLOCK] = token;
            }
        }
        assert_eq!(step.after, needed, "the step that brings the tokens");
        let sample = |output: &pipeline_infer::batch::OutputRow| {
            let part = batch.seqs.iter().find(|part| part.seq == output.seq).expect("an output of nobody");
            let cached = (0..=batch.positions[output.row] as usize)
                .map(|p| (part.blocks[p / KV_BLOCK] as usize, p % KV_BLOCK));
            let seat = self.seats[output.seat as usize].as_mut().expect("a seat of nobody");
            let id = model(seat.seed, cached.map(|(block, place)| self.kv[block * KV_BLOCK + place]));
            seat.last = Some((id, step.step));
            Sampled { seq: output.seq, id, logprobs: None }
        };
        batch.outputs.iter().map(sample).collect()
    }
}

struct Client {
    expected: Vec<u32>,
    stops: u32,
    answer_max: usize,
    got: Vec<u32>,
}

/// Clients, scheduler and device.
struct World {
    config: SchedulerConfig,
    scheduler: Scheduler,
    pool: BlockPool,
    device: Device,
    clients: HashMap<SeqId, Client>,
    /// Not carried out yet.
    queued: VecDeque<Step>,
    /// Carried out, and not read by the host.
    done: VecDeque<(Step, Vec<Sampled>)>,
}

impl World {
    fn new(config: SchedulerConfig, blocks: usize) -> Self {
        let pool = BlockPool::new(blocks);
        World {
            config,
            scheduler: Scheduler::new(config, pool.clone()),
            pool,
            device: Device { kv: vec![0; blocks * KV_BLOCK], seats: vec![None; config.running_max] },
            clients: HashMap::new(),
            queued: VecDeque::new(),
            done: VecDeque::new(),
        }
    }

    fn add(&mut self, id: u64, wanted: &Wanted) {
        let seq = SeqId(id);
        self.scheduler.add(NewSequence {
            seq,
            prompt: wanted.prompt.as_slice().into(),
            tokens_max: wanted.prompt.len() + wanted.answer_max - 1,
            sampling: Arc::new(SamplingParams::default()),
            seed: wanted.seed,
        });
        let Wanted { stops, answer_max, .. } = *wanted;
        let client = Client { expected: wanted.answer(), stops, answer_max, got: Vec::new() };
        self.clients.insert(seq, client);
    }

    fn in_flight(&self) -> impl Iterator<Item = &Step> {
        self.done.iter().map(|(step, _)| step).chain(&self.queued)
    }

    fn plan(&mut self) {
        while let Some(step) = self.scheduler.plan() {
            for part in &step.batch.seqs {
                assert!(self.clients.contains_key(&part.seq), "an ended sequence is planned");
            }
            self.queued.push_back(step);
            self.check();
        }
    }

    /// Steps in flight hold nothing twice, and few of them are one sequence's.
    fn check(&self) {
        assert!(self.in_flight().count() <= self.config.in_flight_max());
        let (mut seats, mut blocks, mut unknown) = (HashMap::new(), HashMap::new(), HashMap::new());
        for step in self.in_flight() {
            for part in &step.batch.seqs {
                assert!((part.seat as usize) < self.config.running_max);
                assert_eq!(*seats.entry(part.seat).or_insert(part.seq), part.seq, "a seat of two sequences");
                for &block in part.blocks.iter() {
                    assert_eq!(
                        *blocks.entry(block).or_insert(part.seq),
                        part.seq,
                        "a block of two sequences"
                    );
                }
            }
            for output in &step.batch.outputs {
                let count = unknown.entry(output.seq).or_insert(0);
                *count += 1;
                assert!(*count <= 1 + usize::from(self.config.ahead), "too far ahead");
            }
        }
    }

    /// The device carries out the oldest step.
    fn run(&mut self) {
        let Some(step) = self.queued.pop_front() else { return };
        let sampled = self.device.run(&step);
        self.done.push_back((step, sampled));
    }

    /// The host reads what the oldest step brought.
    fn read(&mut self) -> usize {
        let Some((step, sampled)) = self.done.pop_front() else { return 0 };
        let told = self.scheduler.apply(step.step, sampled);
        let count = told.len();
        for token in told {
            let client = self.clients.get_mut(&token.seq).expect("a token after the end");
            client.got.push(token.id);
            assert_eq!(client.expected[..client.got.len()], client.got);
            if token.id < client.stops || client.got.len() == client.answer_max {
                assert_eq!(client.got, client.expected);
                self.clients.remove(&token.seq);
                self.scheduler.end(token.seq);
            }
        }
        count
    }

    fn cancel(&mut self, id: u64) {
        if self.clients.remove(&SeqId(id)).is_some() {
            self.scheduler.end(SeqId(id));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_client_gets_the_tokens_that_its_prompt_leads_to(
        ahead: bool,
        slots in 1usize..6,
        chunk in 1usize..50,
        running_max in 1usize..9,
        blocks in 8usize..30,
        sequences in prop::collection::vec((1usize..90, 1usize..30, 0u32..5), 1..20),
        events in prop::collection::vec((0u8..8, 0u64..20), 0..300),
    ) {
        let mut world = World::new(SchedulerConfig { slots, chunk, running_max, ahead }, blocks);
        let mut new = sequences.iter().enumerate().map(|(id, &(prompt, answer_max, stops))| {
            (id as u64, Wanted::new(id as u64, prompt, answer_max, stops))
        });
        for (kind, which) in events {
            match kind {
                0 => drop(new.next().map(|(id, wanted)| world.add(id, &wanted))),
                1 => world.cancel(which),
                2 | 3 => world.plan(),
                4 | 5 => world.run(),
                _ => drop(world.read()),
            }
        }
        new.for_each(|(id, wanted)| world.add(id, &wanted));
        let mut steps = 0;
        while !world.clients.is_empty() {
            world.plan();
            prop_assert!(world.in_flight().next().is_some(), "{} wait for ever", world.clients.len());
            world.run();
            world.read();
            steps += 1;
            prop_assert!(steps < 20_000);
        }
        while world.in_flight().next().is_some() {
            world.run();
            world.read();
        }
        prop_assert_eq!(world.pool.free(), blocks);
        prop_assert_eq!((world.scheduler.running(), world.scheduler.waiting()), (0, 0));
    }
}

/// When things happen, in units of one stage's time for a step. There are as many stages as slots.
struct Clock {
    world: World,
    /// From the end of the last stage until the host has read the tokens and planned.
    host: u64,
    now: u64,
    /// When each step in flight leaves the last stage.
    ends: BTreeMap<u64, u64>,
    /// Times that the first stage had nothing to begin.
    idle: u64,
    /// Read by the host.
    tokens: usize,
    /// Carried out by the device.
    rows: usize,
}

impl Clock {
    fn new(config: SchedulerConfig, host: u64) -> Self {
        let world = World::new(config, 4096);
        Clock { world, host, now: 0, ends: BTreeMap::new(), idle: 0, tokens: 0, rows: 0 }
    }

    /// One stage's time.
    fn tick(&mut self) {
        while self.world.done.front().is_some_and(|(step, _)| self.ends[&step.step] + self.host <= self.now) {
            self.tokens += self.world.read();
            self.world.plan();
        }
        self.world.plan();
        let come = |after: u64| self.ends.get(&after).is_some_and(|&end| end <= self.now);
        match self.world.queued.front() {
            Some(step) if step.after.is_none_or(come) => {
                self.ends.insert(step.step, self.now + self.world.config.slots as u64);
                self.rows += step.batch.rows();
                self.world.run();
            }
            _ => self.idle += 1,
        }
        self.now += 1;
    }
}

/// How long some work takes: each piece comes at its time. And the rows that the device has carried out.
fn time(config: SchedulerConfig, host: u64, work: &[(u64, Wanted)]) -> (u64, usize) {
    let mut clock = Clock::new(config, host);
    let mut coming = work.iter().enumerate().peekable();
    while coming.peek().is_some() || !clock.world.clients.is_empty() {
        while let Some((id, (_, wanted))) = coming.next_if(|(_, (at, _))| *at <= clock.now) {
            clock.world.add(id as u64, wanted);
        }
        clock.tick();
    }
    (clock.now, clock.rows)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever comes when: a host that needs a stage's time to answer costs next to nothing, against one that
    /// needs none and waits for every token. And no row is for nothing where only counts end answers.
    #[test]
    fn the_host_is_hidden(
        slots in 1usize..7,
        chunk in 8usize..200,
        work in prop::collection::vec((0u64..15, 1usize..200, 1usize..100), 1..40),
    ) {
        let work: Vec<(u64, Wanted)> = work
            .iter()
            .enumerate()
            .scan(0, |now, (id, &(pause, prompt, answer))| {
                *now += pause;
                Some((*now, Wanted::new(id as u64, prompt, answer, 0)))
            })
            .collect();
        let config = SchedulerConfig { slots, chunk, running_max: 64, ahead: false };
        let (waiting, rows) = time(config, 0, &work);
        let needed: usize = work.iter().map(|(_, w)| w.prompt.len() + w.answer_max - 1).sum();
        prop_assert_eq!(rows, needed);
        let (ahead, rows) = time(SchedulerConfig { ahead: true, ..config }, 1, &work);
        prop_assert_eq!(rows, needed);
        prop_assert!(ahead <= waiting + waiting / 20 + 2 * slots as u64, "{} against {}", ahead, waiting);
    }
}

/// The sequences of each step in flight that has not begun, and whether the device fills in all its rows.
fn queued(world: &World) -> Vec<(Vec<u64>, bool)> {
    let on_device = |step: &Step| step.batch.ids.iter().all(|&id| id == ON_DEVICE);
    world.queued.iter().map(|s| (s.batch.seqs.iter().map(|p| p.seq.0).collect(), on_device(s))).collect()
}

#[test]
fn as_many_groups_as_slots_take_turns_each_a_step_ahead() {
    // Prompts that come in one step, in many, and one after another: the groups are the same size in the end.
    for (prompt, chunk, pause) in [(1, 256, 0), (40, 100, 0), (3, 16, 5)] {
        let config = SchedulerConfig { slots: 4, chunk, running_max: 64, ahead: true };
        let mut clock = Clock::new(config, 1);
        for id in 0..64 {
            clock.world.add(id, &Wanted::new(id, prompt, 400, 0));
            (0..pause).for_each(|_| clock.tick());
        }
        (0..400).for_each(|_| clock.tick());
        let (idle, tokens) = (clock.idle, clock.tokens);
        for _ in 0..40 {
            let before = queued(&clock.world);
            clock.tick();
            let after = queued(&clock.world);
            assert!(before.iter().all(|(group, on_device)| group.len() == 16 && *on_device), "{before:?}");
            assert_eq!(after[..after.len() - 1], before[1..], "in turn");
            assert_eq!(clock.world.in_flight().count(), 8);
        }
        assert_eq!((clock.idle - idle, clock.tokens - tokens), (0, 40 * 16));
        let groups = |clock: &Clock| clock.world.in_flight().map(|s| s.batch.seqs.len()).collect::<Vec<_>>();
        assert_eq!(groups(&clock), [16; 8]);
    }
}

#[test]
fn a_single_sequence_always_has_a_step_behind_the_running_one() {
    let config = SchedulerConfig { slots: 4, chunk: 64, running_max: 4, ahead: true };
    let mut world = World::new(config, 64);
    world.add(0, &Wanted::new(0, 100, 30, 0));
    world.plan();
    let after: Vec<_> = world.queued.iter().map(|step| step.after).collect();
    assert_eq!(after, [None, None, Some(1)], "two chunks, and the first token is fed where it is chosen");
    world.run();
    world.read();
    world.plan();
    for left in (0..30usize).rev() {
        assert_eq!(world.queued.len(), (left + 1).min(2), "none past the last token");
        assert!(queued(&world)[1..].iter().all(|(_, on_device)| *on_device));
        world.run();
        world.read();
        world.plan();
    }
    assert!(world.clients.is_empty() && world.queued.is_empty());
}

#[test]
fn a_prompt_is_not_held_up_by_a_step_that_waits_for_its_token() {
    let config = SchedulerConfig { slots: 4, chunk: 10, running_max: 4, ahead: true };
    let mut world = World::new(config, 64);
    world.add(0, &Wanted::new(0, 10, 30, 0));
    world.add(1, &Wanted::new(1, 100, 30, 0));
    world.plan();
    let first: Vec<_> = world.queued.iter().map(|step| step.batch.seqs[0].seq.0).collect();
    assert_eq!(first, [0, 1, 1, 1, 0, 1, 1, 1], "a row of the first among every {}", config.slots);
}
