//! Clients and inspectors: every step that is planned and every token that comes is looked at.

use std::{collections::VecDeque, sync::Arc};

use pipeline_infer::{
    batch::{KV_BLOCK, ON_DEVICE, Sampled, SeqRows, Step},
    schedule::{BlockPool, Scheduler, SchedulerConfig},
    simulate::{Arrival, End, Nanos, World},
};

use super::model::{Stages, reference, starts, written_blocks};

/// A request, as the outside knows it.
struct Client {
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
    blocks: Arc<[u32]>,
    started: usize,
}

/// All requests, and the stages that answer them.
pub(super) struct Checks {
    config: SchedulerConfig,
    blocks: usize,
    stages: Stages,
    clients: Vec<Client>,
    /// Requests in the order in which the scheduler gets them.
    order: Vec<usize>,
    in_flight: VecDeque<u64>,
    /// The step and the request that wrote to a block last.
    writers: Vec<(u64, u64)>, // [blocks]
    /// A step to be made wrong on its way to the stages, and how.
    pub(super) tamper: Option<fn(&mut Step) -> bool>,
    pub(super) tampered: bool,
}

impl Checks {
    pub(super) fn new(config: SchedulerConfig, blocks: usize, work: &[Arrival]) -> Self {
        let client = |arrival: &Arrival| Client {
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
        };
        let mut order: Vec<usize> = (0..work.len()).collect();
        order.sort_by_key(|&i| work[i].at);
        Checks {
            config,
            blocks,
            stages: Stages::new(blocks, config.running_max),
            clients: work.iter().map(client).collect(),
            order,
            in_flight: VecDeque::new(),
            writers: vec![(0, u64::MAX); blocks],
            tamper: None,
            tampered: false,
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
        let mut distinct = part.blocks.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), part.blocks.len(), "{part:?}: a block twice");
        if starts(batch, part.seq) {
            assert!(end <= client.prompt.len() + client.asked, "{part:?}: tokens that are not there");
            client.started += 1;
        } else {
            assert!(client.started > 0, "{part:?}: not started");
            assert_eq!(part.cached, client.fed, "{part:?}: fed in order");
            assert!(part.blocks.starts_with(&client.blocks), "{part:?}: had {:?}", client.blocks);
            for &block in &part.blocks[..part.cached.div_ceil(KV_BLOCK)] {
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
        client.blocks = part.blocks.clone();
    }

    /// Among equals, first tokens come in the order of arrival.
    fn first_tokens(&self, step: &Step) {
        let first = |seq: u64| self.clients[seq as usize].asked == 1 && self.clients[seq as usize].told == 0;
        let Some(latest) = step
            .batch
            .outputs
            .iter()
            .map(|o| o.seq.0)
            .filter(|&seq| first(seq))
            .max_by_key(|&seq| self.order.iter().position(|&i| i as u64 == seq))
        else {
            return;
        };
        for &i in self.order.iter().take_while(|&&i| i as u64 != latest) {
            let client = &self.clients[i];
            assert!(client.ended || client.asked > 0, "request {latest} overtakes request {i}");
        }
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

    fn planned(&mut self, _: Nanos, step: &Step, scheduler: &Scheduler) {
        let batch = &step.batch;
        assert!(batch.rows() > 0 && batch.rows() <= Scheduler::rows_max(self.config));
        assert_eq!(batch.rows(), batch.positions.len());
        self.in_flight.push_back(step.step);
        assert!(self.in_flight.len() <= self.config.in_flight_max());
        assert!(scheduler.running() <= self.config.running_max);
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
        self.first_tokens(step);
    }

    fn told(&mut self, _: Nanos, request: usize, token: &Sampled) {
        let client = &mut self.clients[request];
        assert!(!client.ended, "request {request}: a token after its end");
        let expected = client.expected[client.told];
        assert_eq!(token.id, expected, "request {request}: token {}", client.told);
        client.told += 1;
        assert!(client.told <= client.asked, "request {request}: a token that nobody asked for");
    }

    fn ended(&mut self, _: Nanos, request: usize, why: End) {
        let client = &mut self.clients[request];
        assert!(!client.ended, "request {request} ends twice");
        client.ended = true;
        assert!(why == End::Cancelled || client.told == client.expected.len());
    }

    fn returned(&mut self, _: Nanos, step: u64, _: &Scheduler) {
        assert_eq!(self.in_flight.pop_front(), Some(step), "steps come back in order, once");
    }

    fn over(&mut self, scheduler: &Scheduler, pool: &BlockPool) {
        let open: Vec<usize> = (0..self.clients.len()).filter(|&i| !self.clients[i].ended).collect();
        assert!(open.is_empty(), "requests {open:?} never end");
        assert!(self.in_flight.is_empty(), "steps {:?} never come back", self.in_flight);
        assert_eq!((scheduler.running(), scheduler.waiting()), (0, 0));
        assert_eq!(pool.free(), self.blocks, "blocks are leaked");
    }
}
