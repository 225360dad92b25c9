//! Clients, a scheduler, and a device that hands tokens on by itself, simulated: it carries steps out in their order, from
//! its own tables alone, and every number that it reads is checked.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use pipeline_infer::{
    SamplingParams,
    batch::{KV_BLOCK, MicroBatch, ON_DEVICE, OutputRow, Sampled, SeqId, SeqRows, Step},
    schedule::{BlockPool, NewSequence, Scheduler, SchedulerConfig},
};

/// A toy model: a token follows from the seed, all tokens before it, and how many the sampler has chosen. A token below
/// `stops` ends an answer.
fn model(seed: u64, answered: usize, tokens: impl Iterator<Item = u32>) -> u32 {
    let mix = |hash: u64, x: u64| (hash ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    (tokens.fold(mix(seed, answered as u64), |hash, token| mix(hash, u64::from(token))) >> 7) as u32 % 40
}

/// What a client wants: a prompt, and an answer up to a stop or to so many tokens.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) seed: u64,
    pub(crate) prompt: Vec<u32>,
    pub(crate) answer_max: usize,
    pub(crate) stops: u32,
    pub(crate) priority: i32,
}

impl Wanted {
    pub(crate) fn new(seed: u64, prompt: usize, answer_max: usize, stops: u32) -> Self {
        let prompt = (0..prompt as u32).map(|i| i + seed as u32).collect();
        Wanted { seed, prompt, answer_max, stops, priority: 0 }
    }

    /// After `len` tokens that all of this `group` begin with.
    pub(crate) fn after(mut self, group: u32, len: usize) -> Self {
        self.prompt.splice(0..0, (0..len as u32).map(|i| 1_000_000 * (1 + group) + i));
        self
    }

    /// The prompt and the answer that it leads to.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        let mut tokens = self.prompt.clone();
        for answered in 0.. {
            let next = model(self.seed, answered, tokens.iter().copied());
            tokens.push(next);
            if next < self.stops || answered + 1 == self.answer_max {
                break;
            }
        }
        tokens
    }
}

/// What a device keeps at a seat.
#[derive(Clone)]
struct Seat {
    seq: SeqId,
    seed: u64,
    answered: usize,
    /// The last token, and the step that brought it.
    last: Option<(u32, u64)>,
}

struct Device {
    kv: Vec<u32>, // [blocks, KV_BLOCK]
    seats: Vec<Option<Seat>>,
}

impl Device {
    fn run(&mut self, step: &Step) -> Vec<Sampled> {
        let batch = &step.batch;
        for ended in &batch.ends {
            for seat in &mut self.seats {
                seat.take_if(|seat| seat.seq == *ended);
            }
        }
        for start in &batch.starts {
            let seat = Seat { seq: start.seq, seed: start.seed, answered: start.generated.len(), last: None };
            let before = self.seats[start.seat as usize].replace(seat);
            assert!(before.is_none(), "a seat is taken that has not been left");
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
                self.kv[place(part, batch.positions[row] as usize)] = token;
            }
        }
        assert_eq!(step.after, needed, "the step that brings the tokens");
        batch.outputs.iter().map(|output| self.sample(step, output)).collect()
    }

    fn sample(&mut self, step: &Step, output: &OutputRow) -> Sampled {
        let batch = &step.batch;
        let part = batch.seqs.iter().find(|part| part.seq == output.seq).expect("an output of nobody");
        let seat = self.seats[output.seat as usize].as_mut().expect("a seat of nobody");
        let places = (0..=batch.positions[output.row] as usize).map(|position| place(part, position));
        let id = model(seat.seed, seat.answered, places.map(|place| self.kv[place]));
        seat.last = Some((id, step.step));
        seat.answered += 1;
        Sampled { seq: output.seq, id, logprobs: None }
    }
}

/// Where a token's keys and values lie.
fn place(part: &SeqRows, position: usize) -> usize {
    part.blocks.at(position / KV_BLOCK) as usize * KV_BLOCK + position % KV_BLOCK
}

pub(crate) struct Client {
    /// The prompt and all of the answer.
    tokens: Vec<u32>,
    prompt: usize,
    stops: u32,
    answer_max: usize,
    pub(crate) got: usize,
    /// Tokens in the KV cache, and those from which on each row gives a token; none before it starts.
    fed: Option<(usize, usize)>,
}

pub(crate) struct World {
    pub(crate) config: SchedulerConfig,
    pub(crate) scheduler: Scheduler,
    device: Device,
    pub(crate) clients: HashMap<SeqId, Client>,
    /// Not carried out yet.
    pub(crate) queued: VecDeque<Step>,
    /// Carried out, and not read by the host.
    pub(crate) done: VecDeque<(Step, Vec<Sampled>)>,
    /// Answers that are whole, in the order of their ends.
    pub(crate) ended: Vec<u64>,
    /// Sequences in the order in which they got their first rows.
    pub(crate) started: Vec<u64>,
    /// The next step is the first one on other devices.
    changed: bool,
}

impl World {
    pub(crate) fn new(config: SchedulerConfig, blocks: usize) -> Self {
        World {
            config,
            scheduler: Scheduler::new(config, BlockPool::new(blocks)),
            device: Device { kv: vec![0; blocks * KV_BLOCK], seats: vec![None; config.running_max] },
            clients: HashMap::new(),
            queued: VecDeque::new(),
            done: VecDeque::new(),
            ended: Vec::new(),
            started: Vec::new(),
            changed: false,
        }
    }

    pub(crate) fn add(&mut self, id: u64, wanted: &Wanted) {
        let Wanted { seed, ref prompt, answer_max, stops, priority } = *wanted;
        self.scheduler.add(NewSequence {
            seq: SeqId(id),
            prompt: prompt.as_slice().into(),
            images: None,
            tokens_max: prompt.len() + answer_max - 1,
            sampling: Arc::new(SamplingParams::default()),
            seed,
            priority,
        });
        let tokens = wanted.tokens();
        let client = Client { tokens, prompt: prompt.len(), stops, answer_max, got: 0, fed: None };
        self.clients.insert(SeqId(id), client);
    }

    pub(crate) fn in_flight(&self) -> impl Iterator<Item = &Step> {
        self.done.iter().map(|(step, _)| step).chain(&self.queued)
    }

    pub(crate) fn plan(&mut self) {
        while let Some(step) = self.scheduler.plan() {
            self.check_rows(&step.batch);
            check_blocks(&step.batch);
            self.queued.push_back(step);
            self.check_flight();
        }
    }

    /// The rows are those that come next for clients that still want something.
    fn check_rows(&mut self, batch: &MicroBatch) {
        assert!(batch.rows() > 0 && batch.rows() <= Scheduler::rows_max(self.config));
        assert!(batch.seqs.len() <= self.config.running_max);
        for start in &batch.starts {
            let client = self.clients.get_mut(&start.seq).expect("an ended sequence starts");
            assert_eq!(start.generated[..], client.tokens[client.prompt..client.prompt + client.got]);
            // Those that go on after a change of devices go on where they were.
            let elsewhere = |fed: (usize, usize)| {
                batch.seqs.iter().any(|part| part.seq == start.seq && part.cached != fed.0)
            };
            if !self.changed || client.fed.is_some_and(elsewhere) {
                client.fed = None;
            }
            if !self.started.contains(&start.seq.0) {
                self.started.push(start.seq.0);
            }
        }
        self.changed = false;
        let mut row = 0;
        for part in &batch.seqs {
            assert_eq!(part.row, row, "rows without gap");
            row += part.len;
            let client = self.clients.get_mut(&part.seq).expect("an ended sequence is planned");
            let goal = client.prompt + client.got;
            let (fed, goal) = client.fed.unwrap_or_else(|| {
                assert!(batch.starts.iter().any(|start| start.seq == part.seq), "nobody has said who it is");
                assert!(part.cached % KV_BLOCK == 0 && part.cached < goal, "its last token is computed");
                (part.cached, goal)
            });
            assert_eq!(part.cached, fed, "fed in order");
            assert!(part.blocks.len() * KV_BLOCK >= part.cached + part.len, "room for its tokens");
            for (i, position) in (fed..fed + part.len).enumerate() {
                assert_eq!(batch.positions[part.row + i] as usize, position);
                let (id, known) = (batch.ids[part.row + i], position < client.prompt + client.got);
                assert!(if known { id == client.tokens[position] } else { id == ON_DEVICE });
            }
            client.fed = Some((fed + part.len, goal));
            let outputs = batch.outputs.iter().filter(|o| o.seq == part.seq);
            let rows: Vec<_> = outputs.map(|o| (o.row, o.seat)).collect();
            let wanted = fed + part.len >= goal;
            assert_eq!(rows, if wanted { vec![(part.row + part.len - 1, part.seat)] } else { vec![] });
        }
        assert_eq!((row, row), (batch.rows(), batch.positions.len()));
    }

    /// Few steps are in flight, and few of one sequence.
    fn check_flight(&self) {
        assert!(self.in_flight().count() <= self.config.in_flight_max());
        let (mut seats, mut unknown) = (HashMap::new(), HashMap::new());
        for step in self.in_flight() {
            for part in &step.batch.seqs {
                assert!((part.seat as usize) < self.config.running_max);
                assert_eq!(*seats.entry(part.seat).or_insert(part.seq), part.seq, "a seat of two sequences");
            }
            for output in &step.batch.outputs {
                let count = unknown.entry(output.seq).or_insert(0);
                *count += 1;
                assert!(*count <= 1 + usize::from(self.config.ahead), "too far ahead");
            }
        }
    }

    /// Everything in flight comes back, and another device goes on, with so many slots. It knows nobody, and has what the
    /// scheduler says is of use of the blocks.
    pub(crate) fn change_device(&mut self, slots: usize, ahead: bool) {
        while self.in_flight().next().is_some() {
            self.run();
            self.read();
        }
        let mut kv = vec![u32::MAX - 1; self.device.kv.len()];
        for run in self.scheduler.blocks_in_use(2) {
            let places = run.start * KV_BLOCK..run.end * KV_BLOCK;
            kv[places.clone()].copy_from_slice(&self.device.kv[places]);
        }
        self.device = Device { kv, seats: vec![None; self.config.running_max] };
        (self.config.slots, self.config.ahead) = (slots, ahead);
        self.scheduler.change_stages(slots, ahead, None);
        self.changed = true;
    }

    /// The device carries out the oldest step.
    pub(crate) fn run(&mut self) {
        let Some(step) = self.queued.pop_front() else { return };
        let sampled = self.device.run(&step);
        self.done.push_back((step, sampled));
    }

    /// The host reads what the oldest step brought.
    pub(crate) fn read(&mut self) -> usize {
        let Some((step, sampled)) = self.done.pop_front() else { return 0 };
        let told = self.scheduler.apply(step.step, sampled);
        let count = told.len();
        for token in told {
            let client = self.clients.get_mut(&token.seq).expect("a token after the end");
            assert_eq!(token.id, client.tokens[client.prompt + client.got], "a wrong token");
            client.got += 1;
            if token.id < client.stops || client.got == client.answer_max {
                self.clients.remove(&token.seq);
                self.ended.push(token.seq.0);
                self.scheduler.end(token.seq);
            }
        }
        count
    }

    pub(crate) fn cancel(&mut self, id: u64) {
        if self.clients.remove(&SeqId(id)).is_some() {
            self.scheduler.end(SeqId(id));
        }
    }

    /// Goes on until every client has its answer; in how many steps.
    pub(crate) fn finish(&mut self) -> usize {
        let mut steps = 0;
        while !self.clients.is_empty() || self.in_flight().next().is_some() {
            self.plan();
            assert!(self.in_flight().next().is_some(), "{} wait for ever", self.clients.len());
            self.run();
            self.read();
            steps += 1;
            assert!(steps < 50_000, "{} never end", self.clients.len());
        }
        let stats = self.scheduler.stats();
        assert_eq!(stats.kv_blocks_free + stats.kv_blocks_cached, stats.kv_blocks_total, "{stats:?}");
        assert_eq!((stats.running, stats.waiting, stats.in_flight), (0, 0, 0));
        steps
    }
}

/// In a step each block has one writer, and nobody else reads what is written: kernels may fetch cached tokens before
/// the step's own have been written.
fn check_blocks(batch: &MicroBatch) {
    let used = |part: &SeqRows| (part.cached + part.len).div_ceil(KV_BLOCK);
    let mut written = HashSet::new();
    for part in &batch.seqs {
        for block in part.blocks.range(part.cached / KV_BLOCK..used(part)) {
            assert!(written.insert(block), "a block with two writers");
        }
    }
    for part in &batch.seqs {
        let mut read = part.blocks.range(0..part.cached / KV_BLOCK);
        assert!(read.all(|block| !written.contains(&block)), "a block is read while it is written");
    }
}
