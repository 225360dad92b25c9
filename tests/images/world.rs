//! Clients, a scheduler, and devices that notice what they read: a token follows from all that its row sees, image rows
//! from the store as they are when the step is carried out.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use pipeline_infer::{
    SamplingParams,
    batch::{KV_BLOCK, ON_DEVICE, Sampled, SeqId, SeqRows, Step, image_row},
    grid::{Grid, Positions, Spacing, Span, positions},
    schedule::{
        BlockPool, ImageConfig, ImageId, ImagePass, NewSequence, PromptImage, PromptImages, Scheduler,
        SchedulerConfig,
    },
};

/// What stands for images in prompts.
const PAD: u32 = 7;
/// What is in rows that nothing has been brought to.
const NOTHING: u64 = u64::MAX;

fn mix(hash: u64, x: u64) -> u64 {
    let x = (hash.rotate_left(7) ^ x ^ (x >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^ (x >> 29)
}

/// A part of a prompt.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part {
    Text { kind: u32, len: usize },
    Image { image: u32, grid: Grid, seconds: f64 },
}

#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) seed: u64,
    pub(super) parts: Vec<Part>,
    pub(super) answer: usize,
    pub(super) priority: i32,
}

impl Wanted {
    /// Its tokens, and its images if it has any.
    pub(super) fn prompt(&self) -> (Vec<u32>, Option<PromptImages>) {
        let (mut ids, mut spans, mut images) = (Vec::new(), Vec::new(), Vec::new());
        for part in &self.parts {
            match *part {
                Part::Text { kind, len } => {
                    ids.extend((0..len as u32).map(|i| 1000 * (1 + kind) + i));
                    spans.push(Span::Text(len));
                }
                Part::Image { image, grid, seconds } => {
                    let (first, len) = (ids.len(), grid.tokens(2));
                    ids.extend(std::iter::repeat_n(PAD, len));
                    spans.push(if grid.t > 1 { Span::Video { grid, seconds } } else { Span::Image(grid) });
                    let (image, tokens) = (ImageId(u128::from(image)), first..first + len);
                    images.push(PromptImage { image, tokens, patches: grid.patches() });
                }
            }
        }
        let spacing = Spacing { merge: 2, tokens_per_second: 2 };
        let Positions { rows: turns, delta } = positions(&spans, spacing).expect("positions");
        let images = (!images.is_empty()).then_some(PromptImages { images, turns, delta });
        (ids, images)
    }

    /// All tokens of prompt and answer, without blocks, steps or a store.
    fn answer(&self) -> Vec<u32> {
        let (ids, images) = self.prompt();
        let mut seen = Vec::new();
        for (place, &id) in ids.iter().enumerate() {
            let image = images.iter().flat_map(|of| &of.images).find(|image| image.tokens.contains(&place));
            let content =
                image.map_or(u64::from(id), |image| content(image.image, place - image.tokens.start));
            seen.push(slot(content, turn(images.as_ref(), place)));
        }
        let mut answer = Vec::new();
        for n in 0..self.answer {
            answer.push(next(self.seed, n, seen.iter().copied()));
            seen.push(slot(u64::from(answer[n]), turn(images.as_ref(), ids.len() + n)));
        }
        answer
    }
}

fn turn(images: Option<&PromptImages>, place: usize) -> [u32; 3] {
    images.map_or([place as u32; 3], |images| images.turn(place))
}

/// What the tower makes of a part of an image.
fn content(image: ImageId, token: usize) -> u64 {
    mix(image.0 as u64 + 1, token as u64 + 1) | 1 << 40
}

/// What the cache holds of a token.
fn slot(content: u64, turn: [u32; 3]) -> u64 {
    turn.into_iter().fold(content, |hash, n| mix(hash, u64::from(n)))
}

fn next(seed: u64, answered: usize, seen: impl Iterator<Item = u64>) -> u32 {
    (seen.fold(mix(seed, answered as u64), mix) % (1 << 20)) as u32
}

#[derive(Clone)]
struct Seat {
    seq: SeqId,
    seed: u64,
    answered: usize,
    last: Option<u32>,
}

struct Client {
    answer: Vec<u32>,
    got: usize,
}

pub(super) struct World {
    pub(super) scheduler: Scheduler,
    kv: Vec<u64>,
    seats: Vec<Option<Seat>>,
    store: Vec<u64>,
    /// Of every image that has been asked for.
    grids: HashMap<(SeqId, usize), (ImageId, usize)>,
    clients: HashMap<SeqId, Client>,
    pub(super) queued: VecDeque<Step>,
    done: VecDeque<(Step, Vec<Sampled>)>,
    pub(super) planned_passes: VecDeque<ImagePass>,
    encoded: VecDeque<u64>,
    pub(super) ended: Vec<u64>,
    /// Rows of images that steps have read.
    pub(super) image_rows: u64,
}

impl World {
    pub(super) fn new(config: SchedulerConfig, images: ImageConfig, blocks: usize) -> Self {
        World {
            scheduler: Scheduler::new(config, BlockPool::new(blocks)).with_images(images),
            kv: vec![0; blocks * KV_BLOCK],
            seats: vec![None; config.running_max],
            store: vec![NOTHING; images.rows],
            grids: HashMap::new(),
            clients: HashMap::new(),
            queued: VecDeque::new(),
            done: VecDeque::new(),
            planned_passes: VecDeque::new(),
            encoded: VecDeque::new(),
            ended: Vec::new(),
            image_rows: 0,
        }
    }

    pub(super) fn add(&mut self, id: u64, wanted: Wanted) {
        let (prompt, images) = wanted.prompt();
        for (i, image) in images.iter().flat_map(|of| &of.images).enumerate() {
            self.grids.insert((SeqId(id), i), (image.image, image.tokens.len()));
        }
        let client = Client { answer: wanted.answer(), got: 0 };
        self.clients.insert(SeqId(id), client);
        self.scheduler.add(NewSequence {
            seq: SeqId(id),
            tokens_max: prompt.len() + wanted.answer - 1,
            prompt: prompt.into(),
            images: images.map(Arc::new),
            sampling: Arc::new(SamplingParams::default()),
            seed: wanted.seed,
            priority: wanted.priority,
        });
    }

    pub(super) fn cancel(&mut self, id: u64) {
        if self.clients.remove(&SeqId(id)).is_some() {
            self.scheduler.end(SeqId(id));
        }
    }

    /// From now on the tower may write to the rows, so nothing that is planned may read what was there.
    pub(super) fn plan_images(&mut self) {
        while let Some(pass) = self.scheduler.plan_images() {
            assert!(!pass.images.is_empty());
            for image in &pass.images {
                let (id, rows) = self.grids[&image.of];
                assert_eq!(id, image.image);
                self.store[image.row as usize..][..rows].fill(NOTHING);
            }
            self.planned_passes.push_back(pass);
        }
    }

    /// The tower brings the oldest pass to the store.
    pub(super) fn encode(&mut self) {
        let Some(pass) = self.planned_passes.pop_front() else { return };
        for image in &pass.images {
            let (id, rows) = self.grids[&image.of];
            for (token, row) in self.store[image.row as usize..][..rows].iter_mut().enumerate() {
                *row = content(id, token);
            }
        }
        self.encoded.push_back(pass.pass);
    }

    pub(super) fn apply_images(&mut self) {
        if let Some(pass) = self.encoded.pop_front() {
            self.scheduler.apply_images(pass);
        }
    }

    pub(super) fn plan(&mut self) {
        while let Some(step) = self.scheduler.plan() {
            let turns = step.batch.turns.len();
            assert!(turns == 0 || turns == step.batch.rows());
            let mut seqs: Vec<SeqId> = step.batch.seqs.iter().map(|part| part.seq).collect();
            seqs.sort_unstable();
            seqs.dedup();
            assert_eq!(seqs.len(), step.batch.seqs.len(), "a sequence twice in a step");
            self.queued.push_back(step);
        }
    }

    pub(super) fn run(&mut self) {
        let Some(step) = self.queued.pop_front() else { return };
        let batch = &step.batch;
        for ended in &batch.ends {
            self.seats.iter_mut().for_each(|seat| _ = seat.take_if(|seat| seat.seq == *ended));
        }
        for start in &batch.starts {
            let (seq, seed) = (start.seq, start.seed);
            let seat = Seat { seq, seed, answered: start.generated.len(), last: None };
            assert!(self.seats[start.seat as usize].replace(seat).is_none());
        }
        for part in &batch.seqs {
            for row in part.row..part.row + part.len {
                let place = batch.positions[row] as usize;
                let content = match batch.ids[row] {
                    ON_DEVICE => {
                        let seat = self.seats[part.seat as usize].as_ref().expect("a seat");
                        u64::from(seat.last.expect("a token"))
                    }
                    id => image_row(id).map_or(u64::from(id), |row| {
                        self.image_rows += 1;
                        self.store[row]
                    }),
                };
                let turn = batch.turns.get(row).copied().unwrap_or([place as u32; 3]);
                self.kv[at(part, place)] = slot(content, turn);
            }
        }
        let mut sampled = Vec::new();
        for output in &batch.outputs {
            let part = batch.seqs.iter().find(|part| part.seq == output.seq).expect("rows");
            let seat = self.seats[output.seat as usize].as_mut().expect("a seat");
            assert_eq!(seat.seq, output.seq);
            let places = 0..=batch.positions[output.row] as usize;
            let id = next(seat.seed, seat.answered, places.map(|place| self.kv[at(part, place)]));
            (seat.last, seat.answered) = (Some(id), seat.answered + 1);
            sampled.push(Sampled { seq: output.seq, id, logprobs: None });
        }
        self.done.push_back((step, sampled));
    }

    pub(super) fn read(&mut self) {
        let Some((step, sampled)) = self.done.pop_front() else { return };
        for token in self.scheduler.apply(step.step, sampled) {
            let client = self.clients.get_mut(&token.seq).expect("a token after the end");
            assert_eq!(token.id, client.answer[client.got], "{:?}: token {}", token.seq, client.got);
            client.got += 1;
            if client.got == client.answer.len() {
                self.clients.remove(&token.seq);
                self.ended.push(token.seq.0);
                self.scheduler.end(token.seq);
            }
        }
    }

    /// Goes on until every client has its answer.
    pub(super) fn finish(&mut self) {
        let mut rounds = 0;
        while !self.clients.is_empty() || self.busy() {
            self.plan_images();
            self.plan();
            self.plan_images();
            assert!(self.busy(), "{:?} wait for ever", self.clients.keys());
            // Each at its own pace.
            if rounds % 3 == 0 || (self.queued.is_empty() && self.done.is_empty()) {
                self.encode();
                self.apply_images();
            }
            self.run();
            self.read();
            rounds += 1;
            assert!(rounds < 20_000, "{:?} never end", self.clients.keys());
        }
        let stats = self.scheduler.stats();
        assert_eq!(stats.kv_blocks_free + stats.kv_blocks_cached, stats.kv_blocks_total, "{stats:?}");
        assert_eq!((stats.running, stats.waiting, stats.in_flight), (0, 0, 0));
        assert_eq!(stats.images.map(|images| images.in_flight), Some(0));
    }

    fn busy(&self) -> bool {
        let steps = !self.queued.is_empty() || !self.done.is_empty();
        steps || !self.planned_passes.is_empty() || !self.encoded.is_empty()
    }
}

fn at(part: &SeqRows, place: usize) -> usize {
    part.blocks.at(place / KV_BLOCK) as usize * KV_BLOCK + place % KV_BLOCK
}
