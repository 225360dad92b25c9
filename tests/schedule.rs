//! The scheduler's promises, over many random schedules: no block leaked or leased twice, every sequence fed in
//! order without gap, steps bounded, nobody waits for ever.

use std::{collections::HashMap, sync::Arc};

use pipeline_infer::{
    SamplingParams,
    batch::{KV_BLOCK, MicroBatch, Sampled, SeqId, Step},
    schedule::{BlockPool, NewSequence, Scheduler, SchedulerConfig},
};
use proptest::prelude::*;

/// What a sequence should do, and how far it is.
#[derive(Debug)]
struct Wanted {
    prompt: Arc<[u32]>,
    answer: usize,
    fed: usize,
    got: usize,
    blocks: Option<Arc<[u32]>>,
    cancelled: bool,
}

/// Stages and clients in one: checks every step and answers it.
struct World {
    scheduler: Scheduler,
    pool: BlockPool,
    config: SchedulerConfig,
    wanted: HashMap<SeqId, Wanted>,
    flying: std::collections::VecDeque<Step>,
    ended: usize,
}

impl World {
    fn new(config: SchedulerConfig, blocks: usize) -> Self {
        let pool = BlockPool::new(blocks);
        let scheduler = Scheduler::new(config, pool.clone());
        World { scheduler, pool, config, wanted: HashMap::new(), flying: Default::default(), ended: 0 }
    }

    fn add(&mut self, id: u64, prompt: usize, answer: usize) {
        let prompt: Arc<[u32]> = (0..prompt as u32).map(|t| t * 7 + id as u32).collect();
        let tokens_max = prompt.len() + answer - 1;
        let sampling = Arc::new(SamplingParams::default());
        let new = NewSequence { seq: SeqId(id), prompt: prompt.clone(), tokens_max, sampling, seed: id };
        self.scheduler.add(new);
        let wanted = Wanted { prompt, answer, fed: 0, got: 0, blocks: None, cancelled: false };
        self.wanted.insert(SeqId(id), wanted);
    }

    fn plan_all(&mut self) {
        while let Some(plan) = self.scheduler.plan() {
            self.check(&plan.batch);
            self.flying.push_back(plan);
            assert!(self.flying.len() <= self.config.slots);
        }
    }

    fn check(&mut self, batch: &MicroBatch) {
        assert!(batch.rows() > 0 && batch.rows() <= Scheduler::rows_max(self.config));
        assert_eq!(batch.rows(), batch.positions.len());
        let mut row = 0;
        for part in &batch.seqs {
            assert_eq!(part.row, row, "rows without gap");
            row += part.len;
            let wanted = self.wanted.get_mut(&part.seq).expect("an ended sequence is planned");
            assert!(!wanted.cancelled, "a cancelled sequence is planned");
            assert_eq!(part.cached, wanted.fed, "fed in order");
            assert!(part.blocks.len() * KV_BLOCK >= part.cached + part.len, "room for its tokens");
            let first = batch.starts.iter().any(|s| s.seq == part.seq);
            assert_eq!(first, wanted.fed == 0, "started once");
            for i in 0..part.len {
                assert_eq!(batch.positions[part.row + i] as usize, part.cached + i);
                if let Some(&token) = wanted.prompt.get(part.cached + i) {
                    assert_eq!(batch.ids[part.row + i], token);
                } else {
                    assert_eq!(batch.ids[part.row + i] as usize, 1000 + wanted.got, "the last token is fed");
                }
            }
            wanted.fed += part.len;
            wanted.blocks = Some(part.blocks.clone());
            let output = batch.outputs.iter().any(|o| o.seq == part.seq && o.row == part.row + part.len - 1);
            assert_eq!(output, wanted.fed >= wanted.prompt.len(), "an output where the prompt is complete");
        }
        assert_eq!(row, batch.rows());
        self.no_block_twice();
    }

    /// Blocks of running sequences are distinct.
    fn no_block_twice(&self) {
        let mut all: Vec<u32> =
            self.wanted.values().filter_map(|w| w.blocks.as_ref()).flat_map(|b| b.to_vec()).collect();
        let held = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), held, "a block is in two sequences");
    }

    /// The oldest step comes back.
    fn finish_step(&mut self) {
        let Some(plan) = self.flying.pop_front() else { return };
        let token = |seq: SeqId| Sampled { seq, id: 1001 + self.wanted[&seq].got as u32, logprobs: None };
        let sampled = plan.batch.outputs.iter().map(|o| token(o.seq)).collect();
        for token in self.scheduler.apply(plan.step, sampled) {
            let wanted = self.wanted.get_mut(&token.seq).expect("a token of nobody");
            assert!(!wanted.cancelled, "a token after the end");
            wanted.got += 1;
            if wanted.got == wanted.answer {
                self.scheduler.end(token.seq);
                self.wanted.remove(&token.seq);
                self.ended += 1;
            }
        }
        let flying: Vec<SeqId> =
            self.flying.iter().flat_map(|p| p.batch.seqs.iter().map(|s| s.seq)).collect();
        self.wanted.retain(|seq, w| !w.cancelled || flying.contains(seq));
    }

    fn cancel(&mut self, id: u64) {
        let flying = self.flying.iter().any(|p| p.batch.seqs.iter().any(|s| s.seq == SeqId(id)));
        if let Some(wanted) = self.wanted.get_mut(&SeqId(id)).filter(|w| !w.cancelled) {
            wanted.cancelled = true;
            self.ended += 1;
            self.scheduler.end(SeqId(id));
            if !flying {
                self.wanted.remove(&SeqId(id));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_schedule_ends_every_sequence_once_and_gives_all_blocks_back(
        slots in 1usize..6,
        chunk in 1usize..50,
        running_max in 1usize..9,
        blocks in 8usize..30,
        sequences in prop::collection::vec((1usize..90, 1usize..12), 1..20),
        events in prop::collection::vec((0u8..4, 0u64..20), 0..120),
    ) {
        let mut world = World::new(SchedulerConfig { slots, chunk, running_max, ahead: false }, blocks);
        let mut next = 0;
        for (kind, which) in events {
            match kind {
                0 if next < sequences.len() => {
                    let (prompt, answer) = sequences[next];
                    world.add(next as u64, prompt, answer);
                    next += 1;
                }
                1 => world.cancel(which),
                2 => world.plan_all(),
                _ => world.finish_step(),
            }
        }
        for (i, &(prompt, answer)) in sequences.iter().enumerate().skip(next) {
            world.add(i as u64, prompt, answer);
        }
        let mut steps = 0;
        while world.ended < sequences.len() {
            world.plan_all();
            prop_assert!(!world.flying.is_empty(), "nothing runs and {} have not ended", world.wanted.len());
            world.finish_step();
            steps += 1;
            prop_assert!(steps < 20_000);
        }
        while !world.flying.is_empty() {
            world.finish_step();
        }
        prop_assert_eq!(world.pool.free(), blocks);
        prop_assert_eq!((world.scheduler.running(), world.scheduler.waiting()), (0, 0));
    }
}

#[test]
fn decoding_sequences_are_shared_out_over_the_slots() {
    let config = SchedulerConfig { slots: 4, chunk: 64, running_max: 16, ahead: false };
    let mut world = World::new(config, 64);
    for id in 0..8 {
        world.add(id, 1, 50);
    }
    for _ in 0..8 {
        world.plan_all();
        world.finish_step();
    }
    world.plan_all();
    let rows: Vec<usize> = world.flying.iter().map(|p| p.batch.rows()).collect();
    assert_eq!(rows, [2, 2, 2, 2], "never all of them in the first step");
}

#[test]
fn a_long_prompt_fills_the_pipeline_by_itself() {
    let mut world = World::new(SchedulerConfig { slots: 3, chunk: 10, running_max: 4, ahead: false }, 16);
    world.add(0, 35, 2);
    world.plan_all();
    let rows: Vec<usize> = world.flying.iter().map(|p| p.batch.rows()).collect();
    assert_eq!(rows, [10, 10, 10]);
}

#[test]
fn single_steps_and_prompt_chunks_share_a_micro_batch() {
    let mut world = World::new(SchedulerConfig { slots: 1, chunk: 8, running_max: 4, ahead: false }, 16);
    world.add(0, 3, 20);
    world.plan_all();
    world.finish_step();
    world.add(1, 20, 2);
    world.plan_all();
    let batch = &world.flying[0].batch;
    assert_eq!(batch.seqs.iter().map(|s| (s.seq.0, s.len)).collect::<Vec<_>>(), [(0, 1), (1, 8)]);
    assert_eq!(batch.outputs.len(), 1);
}
