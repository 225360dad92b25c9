//! A model that notices: each KV slot holds a number that follows from the token, its position and all slots before it, as
//! they were read through the sequence's block list when it was written. A token follows from all slots that its row reads,
//! and from what the sampler has kept of its sequence. One slot, seat or draw that is not what it should be, ever, and
//! all later tokens are other ones.

use pipeline_infer::batch::{KV_BLOCK, ON_DEVICE, OutputRow, Sampled, SeqId, SeqRows, SeqStart, Step};

/// Tokens are below this.
const VOCAB: u64 = 1 << 24;

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^ (x >> 29)
}

/// What a row has read so far: an order of slots.
#[derive(Clone, Copy)]
struct Seen(u64);

impl Seen {
    fn nothing() -> Self {
        Seen(0x0123_4567_89ab_cdef)
    }

    fn slot(&mut self, slot: u64) {
        self.0 = mix(self.0.rotate_left(7) ^ slot);
    }

    /// What the slot of a token holds that comes after what has been seen.
    fn write(self, token: u32, position: usize) -> u64 {
        mix(self.0 ^ u64::from(token) << 20 ^ position as u64)
    }
}

/// What the last stage keeps of a sequence: random numbers by the token's number, and what penalties count.
#[derive(Debug, Clone)]
struct Sampler {
    seed: u64,
    drawn: u64,
    prompt: u64,
    penalties: u64,
}

impl Sampler {
    fn new(seed: u64, prompt: &[u32]) -> Self {
        let prompt = prompt.iter().fold(1, |sum, &token| mix(sum ^ u64::from(token)));
        Sampler { seed, drawn: 0, prompt, penalties: 0 }
    }

    fn draw(&mut self, seen: Seen) -> u32 {
        let random = mix(self.seed.wrapping_mul(31) + self.drawn);
        let token = (mix(seen.0 ^ random ^ self.prompt ^ self.penalties) % VOCAB) as u32;
        self.record(token);
        token
    }

    fn record(&mut self, token: u32) {
        self.drawn += 1;
        // Counts do not tell in which order tokens came.
        self.penalties = self.penalties.wrapping_add(mix(u64::from(token)));
    }
}

/// The first tokens of an answer, one after another, without blocks, steps or company.
pub(super) fn reference(seed: u64, prompt: &[u32], answer: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(seed, prompt);
    let (mut seen, mut tokens) = (Seen::nothing(), Vec::with_capacity(answer));
    let mut feed = |token: u32, position: usize| {
        seen.slot(seen.write(token, position));
        seen
    };
    let mut last = seen_after(prompt, &mut feed);
    loop {
        tokens.push(sampler.draw(last));
        if tokens.len() == answer {
            return tokens;
        }
        last = feed(tokens[tokens.len() - 1], prompt.len() + tokens.len() - 1);
    }
}

fn seen_after(prompt: &[u32], feed: &mut impl FnMut(u32, usize) -> Seen) -> Seen {
    let all = prompt.iter().enumerate().map(|(position, &token)| feed(token, position));
    all.last().expect("a prompt has a token")
}

/// What a device keeps at a seat.
#[derive(Debug, Clone)]
struct Seat {
    seq: SeqId,
    sampler: Sampler,
    /// The last token, and the step that brought it.
    last: Option<(u32, u64)>,
}

/// Stages that carry steps out in their order, from their own tables alone.
pub(super) struct Stages {
    kv: Vec<u64>, // [blocks, KV_BLOCK]
    seats: Vec<Option<Seat>>,
    /// The step that wrote to a block last, and for whom.
    written: Vec<(u64, SeqId)>, // [blocks]
}

impl Stages {
    pub(super) fn new(blocks: usize, seats: usize) -> Self {
        Stages {
            kv: vec![0; blocks * KV_BLOCK],
            seats: vec![None; seats],
            written: vec![(u64::MAX, SeqId(0)); blocks],
        }
    }

    pub(super) fn run(&mut self, step: &Step) -> Vec<Sampled> {
        let batch = &step.batch;
        for end in &batch.ends {
            let of_it = |seat: &&mut Option<Seat>| seat.as_ref().is_some_and(|s| s.seq == *end);
            *self.seats.iter_mut().find(of_it).expect("the end of a sequence that has no seat") = None;
        }
        batch.starts.iter().for_each(|start| self.start(start));
        self.mark(step);
        let mut needed = None;
        let seen: Vec<Seen> = batch.seqs.iter().map(|part| self.part(step, part, &mut needed)).collect();
        assert_eq!(step.after, needed, "the step that brings the tokens");
        batch.outputs.iter().map(|output| self.output(step, output, &seen)).collect()
    }

    fn start(&mut self, start: &SeqStart) {
        let seat = &mut self.seats[start.seat as usize];
        assert!(seat.is_none(), "{:?} takes the seat of {seat:?}", start.seq);
        let mut sampler = Sampler::new(start.seed, &start.prompt);
        start.generated.iter().for_each(|&token| sampler.record(token));
        *seat = Some(Seat { seq: start.seq, sampler, last: None });
    }

    /// Notes who writes where: no two write to one block, and nobody reads in a step what another one writes in it.
    fn mark(&mut self, step: &Step) {
        for part in &step.batch.seqs {
            for block in written_blocks(part) {
                let (last, by) = std::mem::replace(&mut self.written[block], (step.step, part.seq));
                assert!(last != step.step, "block {block}: {by:?} and {:?} write in one step", part.seq);
            }
        }
        for part in &step.batch.seqs {
            for block in part.blocks.range(0..part.cached.div_ceil(KV_BLOCK)) {
                let (last, by) = self.written[block as usize];
                assert!(
                    last != step.step || by == part.seq,
                    "block {block}: {by:?} writes as {:?} reads",
                    part.seq
                );
            }
        }
    }

    /// The rows of one sequence: what the last of them has seen.
    fn part(&mut self, step: &Step, part: &SeqRows, needed: &mut Option<u64>) -> Seen {
        let batch = &step.batch;
        let seat = self.seats[part.seat as usize].as_ref().expect("rows at a seat of nobody");
        assert_eq!(seat.seq, part.seq, "rows at another's seat");
        let slot = |position: usize| slot(part, position);
        let mut seen = Seen::nothing();
        (0..part.cached).for_each(|position| seen.slot(self.kv[slot(position)]));
        for row in part.row..part.row + part.len {
            let position = batch.positions[row] as usize;
            assert_eq!(position, part.cached + row - part.row, "rows are not in order");
            let token = match batch.ids[row] {
                ON_DEVICE => {
                    let (token, brought) = seat.last.expect("a token that nothing has brought");
                    *needed = (*needed).max(Some(brought));
                    token
                }
                id => id,
            };
            let number = seen.write(token, position);
            self.kv[slot(position)] = number;
            seen.slot(number);
        }
        seen
    }

    fn output(&mut self, step: &Step, output: &OutputRow, seen: &[Seen]) -> Sampled {
        let seqs = &step.batch.seqs;
        let part = seqs.iter().position(|part| part.seq == output.seq).expect("an output of no rows");
        assert_eq!(output.row + 1, seqs[part].row + seqs[part].len, "an output before the last row");
        assert_eq!(output.seat, seqs[part].seat);
        let seat = self.seats[output.seat as usize].as_mut().expect("an output at a seat of nobody");
        let id = seat.sampler.draw(seen[part]);
        seat.last = Some((id, step.step));
        Sampled { seq: output.seq, id, logprobs: None }
    }
}

/// Where a sequence's token lives.
fn slot(part: &SeqRows, position: usize) -> usize {
    part.blocks.at(position / KV_BLOCK) as usize * KV_BLOCK + position % KV_BLOCK
}

/// The blocks that rows of this sequence are written to.
pub(super) fn written_blocks(part: &SeqRows) -> impl Iterator<Item = usize> {
    let blocks = part.cached / KV_BLOCK..(part.cached + part.len).div_ceil(KV_BLOCK);
    part.blocks.range(blocks).map(|block| block as usize)
}
