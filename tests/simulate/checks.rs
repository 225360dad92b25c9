//! Clients and inspectors: every step that is planned and every token that comes is looked at.

use std::{collections::VecDeque, sync::Arc};

use pipeline_infer::{
    batch::{KV_BLOCK, ON_DEVICE, Sampled, SeqRows, Step},
    schedule::{Scheduler, SchedulerConfig},
    simulate::{Arrival, End, Nanos, World},
};

use super::model::{Stages, reference, written_blocks};

/// After so many starts of others a request may come before higher priorities.
const PASSED_MAX: u64 = 64;

/// A request, as the outside knows it.
struct Client {
    priority: i32,
    prompt: Arc<[u32]>,
    tokens_max: usize,
    /// Its answer, up to the token that ends it.
    expected: Vec<u32>,
    told: usize,
    ended: bool,
    /// Tokens whose rows have been planned, since its last start.
    fed: usize,
    /// Tokens that have been asked for.
    asked: usize,
    /// The step that its latest rows are in.
    last: u64,
    blocks: Vec<u32>,
    started: usize,
    /// How many had started when it came.
    starts_before: u64,
}

/// All requests, and the stages that answer them.
pub(super) struct Checks {
    config: SchedulerConfig,
    blocks: usize,
    stages: Stages,
    clients: Vec<Client>,
    /// Requests in the order in which the scheduler has got them.
    order: Vec<usize>,
    in_flight: VecDeque<u64>,
    /// Of sequences, those that began again included.
    starts: u64,
    /// The step and the request that wrote to a block last.
    writers: Vec<(u64, u64)>, // [blocks]
    /// A step to be made wrong on its way to the stages, and how.
    pub(super) tamper: Option<fn(&mut Step) -> bool>,
    pub(super) tampered: bool,
    pub(super) seen: Seen,
}

/// What has happened, to see that a run is worth its time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    pub(super) steps: u64,
    pub(super) tokens: u64,
    pub(super) cancelled: u64,
    /// Tokens of which only the device knew when they were fed.
    pub(super) on_device: u64,
    pub(super) preemptions: u64,
    /// Sequences that began again, with the tokens that they had.
    pub(super) again: u64,
    /// Tokens that were not computed again.
    pub(super) shared: u64,
}

impl std::ops::AddAssign for Seen {
    fn add_assign(&mut self, other: Seen) {
        self.steps += other.steps;
        self.tokens += other.tokens;
        self.cancelled += other.cancelled;
        self.on_device += other.on_device;
        self.preemptions += other.preemptions;
        self.again += other.again;
        self.shared += other.shared;
    }
}

impl Checks {
    pub(super) fn new(config: SchedulerConfig, blocks: usize, work: &[Arrival]) -> Self {
        let client = |arrival: &Arrival| Client {
            priority: arrival.priority,
            prompt: arrival.prompt.clone(),
            tokens_max: arrival.prompt.len() + arrival.answer_max - 1,
            expected: reference(arrival.seed, &arrival.prompt, arrival.answer),
            told: 0,
            ended: false,
            fed: 0,
            asked: 0,
            last: 0,
            blocks: [].into(),
            started: 0,
            starts_before: 0,
        };
        Checks {
            config,
            blocks,
            stages: Stages::new(blocks, config.running_max),
            clients: work.iter().map(client).collect(),
            order: Vec::new(),
            in_flight: VecDeque::new(),
            starts: 0,
            writers: vec![(0, u64::MAX); blocks],
            tamper: None,
            tampered: false,
            seen: Seen::default(),
        }
    }

    /// Rows of one sequence.
    fn rows(&mut self, step: &Step, part: &SeqRows) {
        let batch = &step.batch;
        let client = &mut self.clients[part.seq.0 as usize];
        assert!(!client.ended, "{part:?} of a request that has ended");
        let end = part.cached + part.len;
        assert!(part.len > 0 && end <= client.tokens_max, "{part:?}: {} tokens at most", client.tokens_max);
        assert!(part.blocks.len() * KV_BLOCK >= end, "{part:?}: blocks for {end} tokens");
        let mut distinct: Vec<u32> = part.blocks.iter().collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), part.blocks.len(), "{part:?}: a block twice");
        if let Some(start) = batch.starts.iter().find(|start| start.seq == part.seq) {
            let told = &client.expected[..client.told];
            assert!(start.prompt == client.prompt && *start.generated == *told, "{start:?}: {told:?}");
            assert!(client.asked == client.told && end <= client.prompt.len() + client.told, "{part:?}");
            self.seen.again += u64::from(client.started > 0);
            self.seen.shared += part.cached as u64;
            client.started += 1;
        } else {
            assert!(client.started > 0, "{part:?}: not started");
            assert_eq!(part.cached, client.fed, "{part:?}: fed in order");
            let same = part.blocks.iter().take(client.blocks.len());
            assert!(same.eq(client.blocks.iter().copied()), "{part:?}: had {:?}", client.blocks);
            for block in part.blocks.range(0..part.cached.div_ceil(KV_BLOCK)) {
                let (when, who) = self.writers[block as usize];
                assert!(
                    when <= client.last || who == part.seq.0,
                    "{part:?}: request {who} wrote to block {block} in step {when}"
                );
            }
            let late = step.step - client.last;
            assert!(late <= gap_max(self.config), "{part:?}: {late} steps after its last one");
        }
        for i in 0..part.len {
            let (id, position) = (batch.ids[part.row + i], part.cached + i);
            let answer = position.checked_sub(client.prompt.len());
            match answer {
                None => assert_eq!(id, client.prompt[position], "{part:?}: position {position}"),
                Some(n) if id == ON_DEVICE => {
                    self.seen.on_device += 1;
                    assert!(self.config.ahead && n >= client.told, "{part:?}: the host knows token {n}");
                    assert!(n + 1 == client.asked, "{part:?}: token {n} of {}", client.asked);
                }
                Some(n) => {
                    assert!(n < client.told, "{part:?}: nobody knows token {n}");
                    assert_eq!(id, client.expected[n], "{part:?}: token {n}");
                }
            }
        }
        let output = batch.outputs.iter().filter(|output| output.seq == part.seq).count();
        let complete = end == client.prompt.len() + client.asked;
        assert_eq!(output, usize::from(complete), "{part:?}: a token where all are fed");
        client.asked += output;
        assert!(client.asked <= client.told + 1 + usize::from(self.config.ahead), "{part:?}: too far ahead");
        client.fed = end;
        client.last = step.step;
        client.blocks = part.blocks.iter().collect();
    }

    fn nothing_is_held(&self, scheduler: &Scheduler) {
        let stats = scheduler.stats();
        assert_eq!(
            stats.kv_blocks_free + stats.kv_blocks_cached,
            self.blocks,
            "blocks are leaked: {stats:?}"
        );
    }

    /// Who begins: higher priorities first, then in the order of arrival, in which first tokens come too. A prompt that has
    /// begun goes on, whatever comes. Those whose first block others have too may wait for these to compute it.
    fn in_order(&mut self, step: &Step) {
        self.starts += step.batch.starts.len() as u64;
        for seq in step.batch.starts.iter().map(|start| start.seq.0) {
            if self.clients[seq as usize].started == 1 {
                self.nobody_before(seq, "begins", |client, _| client.started > 0);
            }
        }
        for seq in step.batch.outputs.iter().map(|output| output.seq.0) {
            if self.clients[seq as usize].asked == 1 && self.clients[seq as usize].told == 0 {
                let has = |client: &Client, own| client.asked > 0 || client.priority > own;
                self.nobody_before(seq, "has its first token", has);
            }
        }
    }

    fn nobody_before(&self, seq: u64, what: &str, has: impl Fn(&Client, i32) -> bool) {
        let own = &self.clients[seq as usize];
        let this = self.order.iter().position(|&i| i as u64 == seq).expect("a request that has come");
        // One that many have passed may pass others.
        let passed = self.starts - own.starts_before >= PASSED_MAX;
        for (place, &i) in self.order.iter().enumerate() {
            let client = &self.clients[i];
            let before = client.priority > own.priority && !passed
                || (client.priority == own.priority && place < this);
            if before && !client.ended && !has(client, own.priority) && !self.shares_a_block(i) {
                panic!(
                    "request {seq} of priority {} {what} before request {i} of {}",
                    own.priority, client.priority
                );
            }
        }
    }

    fn shares_a_block(&self, request: usize) -> bool {
        let Some(block) = self.clients[request].prompt.get(..KV_BLOCK) else { return false };
        self.order.iter().any(|&i| i != request && self.clients[i].prompt.starts_with(block))
    }
}

/// How many steps may lie between a sequence's rows, once it has begun: all slots, twice if a step ahead, as many for those
/// whose turn comes before, and the rows of prompts that came before its own.
fn gap_max(config: SchedulerConfig) -> u64 {
    4 * config.in_flight_max() as u64
}

impl World for Checks {
    fn run(&mut self, step: &Step) -> Vec<Sampled> {
        if let Some(tamper) = self.tamper.filter(|_| !self.tampered) {
            let mut wrong = step.clone();
            self.tampered = tamper(&mut wrong);
            return self.stages.run(&wrong);
        }
        self.stages.run(step)
    }

    fn submitted(&mut self, _: Nanos, request: usize) {
        self.order.push(request);
        self.clients[request].starts_before = self.starts;
    }

    fn planned(&mut self, _: Nanos, step: &Step, scheduler: &Scheduler) {
        let batch = &step.batch;
        assert!(batch.rows() > 0 && batch.rows() <= Scheduler::rows_max(self.config));
        assert_eq!(batch.rows(), batch.positions.len());
        self.in_flight.push_back(step.step);
        self.seen.steps += 1;
        assert!(self.in_flight.len() <= self.config.in_flight_max());
        let stats = scheduler.stats();
        assert_eq!(stats.in_flight, self.in_flight.len());
        assert!(stats.running <= self.config.running_max);
        assert!(stats.kv_blocks_free + stats.kv_blocks_cached <= stats.kv_blocks_total);
        let mut row = 0;
        for part in &batch.seqs {
            assert_eq!(part.row, row, "rows without gap");
            row += part.len;
            self.rows(step, part);
        }
        assert_eq!(row, batch.rows());
        for part in &batch.seqs {
            for block in written_blocks(part) {
                self.writers[block] = (step.step, part.seq.0);
            }
        }
        for start in &batch.starts {
            assert!(batch.seqs.iter().any(|part| part.seq == start.seq), "a start without rows");
        }
        self.in_order(step);
    }

    fn told(&mut self, _: Nanos, request: usize, token: &Sampled) {
        let client = &mut self.clients[request];
        assert!(!client.ended, "request {request}: a token after its end");
        let expected = client.expected[client.told];
        assert_eq!(token.id, expected, "request {request}: token {}", client.told);
        client.told += 1;
        self.seen.tokens += 1;
        assert!(client.told <= client.asked, "request {request}: a token that nobody asked for");
    }

    fn ended(&mut self, _: Nanos, request: usize, why: End, scheduler: &Scheduler) {
        let client = &mut self.clients[request];
        assert!(!client.ended, "request {request} ends twice");
        client.ended = true;
        self.seen.cancelled += u64::from(why == End::Cancelled);
        assert!(why == End::Cancelled || client.told == client.expected.len());
        if self.order.iter().all(|&i| self.clients[i].ended) {
            // Whatever is in flight.
            self.nothing_is_held(scheduler);
        }
    }

    fn returned(&mut self, _: Nanos, step: u64, _: &Scheduler) {
        assert_eq!(self.in_flight.pop_front(), Some(step), "steps come back in order, once");
    }

    fn over(&mut self, scheduler: &Scheduler) {
        let open: Vec<usize> = (0..self.clients.len()).filter(|&i| !self.clients[i].ended).collect();
        assert!(open.is_empty(), "requests {open:?} never end");
        assert!(self.in_flight.is_empty(), "steps {:?} never come back", self.in_flight);
        let stats = scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.in_flight), (0, 0, 0));
        self.nothing_is_held(scheduler);
        self.seen.preemptions = stats.preemptions;
    }
}
