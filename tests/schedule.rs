//! The scheduler's promises: whatever comes when, every client gets the tokens that its prompt leads to, no block is lost or
//! written by two, nobody waits for ever, whichever devices they go on with; prompts that begin the same are computed once;
//! those who lose their blocks go on.

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::world::{Wanted, World};
use pipeline_infer::{
    batch::{KV_BLOCK, Observation, Sampled, SeqId, Step},
    schedule::{BlockPool, Keys, NewSequence, Scheduler, SchedulerConfig},
};
use proptest::prelude::*;

fn config(slots: usize, chunk: usize, running_max: usize) -> SchedulerConfig {
    SchedulerConfig { slots, chunk, chunk_min: chunk, running_max, ..SchedulerConfig::default() }
}

fn rows(world: &World) -> Vec<usize> {
    world.queued.iter().map(|step| step.batch.rows()).collect()
}

/// Random requests: tokens of a common beginning and of its own, an answer, how likely it stops, a group, a priority.
fn requests() -> impl Strategy<Value = Vec<(usize, usize, usize, u32, u32, i32)>> {
    prop::collection::vec((0usize..80, 1usize..50, 1usize..30, 0u32..5, 0u32..3, 0i32..3), 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_client_gets_the_tokens_that_its_prompt_leads_to(
        (ahead, prefix_reuse) in any::<(bool, bool)>(),
        slots in 1usize..6,
        chunk in 1usize..50,
        chunk_min in 1usize..50,
        running_max in 1usize..9,
        blocks in 10usize..40,
        requests in requests(),
        events in prop::collection::vec((0u8..10, 0u64..24), 0..300),
    ) {
        let config = SchedulerConfig { slots, chunk, chunk_min, running_max, ahead, prefix_reuse };
        let mut world = World::new(config, blocks);
        let mut new = requests.iter().enumerate().map(|(id, &(common, own, answer, stops, group, priority))| {
            let wanted = Wanted::new(id as u64, own, answer, stops).after(group, common);
            (id as u64, Wanted { priority, ..wanted })
        });
        for (kind, which) in events {
            match kind {
                0 => drop(new.next().map(|(id, wanted)| world.add(id, &wanted))),
                1 => world.cancel(which),
                2 | 3 => world.plan(),
                4 | 5 => world.run(),
                // Another layout; seldom, since it lets everything come back.
                9 if which < 6 => world.change_device(1 + which as usize % 4, which % 2 == 0),
                6 => world.scheduler.observe(Observation {
                    stage: which as usize % 3,
                    step: which,
                    busy: std::time::Duration::from_micros(50 + 7 * which),
                }),
                _ => drop(world.read()),
            }
        }
        new.for_each(|(id, wanted)| world.add(id, &wanted));
        world.finish();
    }
}

#[test]
fn decoding_sequences_are_shared_out_over_the_slots() {
    let mut world = World::new(config(4, 64, 16), 64);
    for id in 0..8 {
        world.add(id, &Wanted::new(id, 1, 50, 0));
    }
    for _ in 0..8 {
        world.plan();
        world.run();
        world.read();
    }
    world.plan();
    assert_eq!(rows(&world), [2, 2, 2, 2], "never all of them in the first step");
    (0..4).for_each(|id| world.cancel(2 * id));
    for _ in 0..12 {
        world.run();
        world.read();
        world.plan();
    }
    assert_eq!(rows(&world), [1, 1, 1, 1], "and evenly again when some have ended");
    world.finish();
}

#[test]
fn a_long_prompt_fills_the_pipeline_by_itself() {
    let mut world = World::new(config(3, 10, 4), 16);
    world.add(0, &Wanted::new(0, 35, 2, 0));
    world.plan();
    assert_eq!(rows(&world), [10, 10, 10]);
}

#[test]
fn single_steps_and_prompt_chunks_share_a_micro_batch() {
    let mut world = World::new(config(1, 8, 4), 16);
    world.add(0, &Wanted::new(0, 3, 20, 0));
    world.plan();
    world.run();
    world.read();
    world.add(1, &Wanted::new(1, 20, 2, 0));
    world.plan();
    let batch = &world.queued[0].batch;
    assert_eq!(batch.seqs.iter().map(|s| (s.seq.0, s.len)).collect::<Vec<_>>(), [(0, 1), (1, 8)]);
    assert_eq!(batch.outputs.len(), 1);
}

/// Rows that it takes to serve all, and the steps.
fn served(config: SchedulerConfig, blocks: usize, all: &[Wanted]) -> (usize, usize, World) {
    let mut world = World::new(config, blocks);
    all.iter().zip(0..).for_each(|(wanted, id)| world.add(id, wanted));
    let (mut rows, mut steps) = (0, 0);
    while !world.clients.is_empty() {
        let planned = world.queued.len();
        world.plan();
        rows += world.queued.iter().skip(planned).map(|step| step.batch.rows()).sum::<usize>();
        world.run();
        world.read();
        steps += 1;
    }
    world.finish();
    (rows, steps, world)
}

#[test]
fn a_prefix_of_many_that_come_at_once_is_computed_once() {
    let all: Vec<Wanted> = (0..64).map(|i| Wanted::new(i, 30, 4, 0).after(0, 2048)).collect();
    for (slots, chunk, ahead) in [(1, 2048, false), (4, 512, true), (4, 100, true), (3, 7000, false)] {
        let config = SchedulerConfig { ahead, ..config(slots, chunk, 64) };
        let (rows, _, world) = served(config, 1024, &all);
        let needed = 2048 + 64 * (30 + 3);
        assert_eq!(rows, needed, "{slots} slots, chunks of {chunk}");
        let stats = world.scheduler.stats();
        assert_eq!((stats.prefix_hit_tokens, stats.preemptions), (63 * 2048, 0));
        assert_eq!(stats.prefix_lookup_tokens, 64 * 2078);
        let without = SchedulerConfig { prefix_reuse: false, ..config };
        let (rows, _, world) = served(without, 10_000, &all);
        assert_eq!((rows, world.scheduler.stats().prefix_hit_tokens), (64 * (2078 + 3), 0));
        assert_eq!(world.scheduler.stats().kv_blocks_free, 10_000);
    }
}

#[test]
fn samples_share_their_prompt_and_a_later_turn_finds_the_answer_too() {
    let mut world = World::new(config(2, 64, 8), 64);
    let first = Wanted::new(1, 100, 60, 0);
    for id in 0..4 {
        world.add(id, &Wanted { seed: id, ..first.clone() });
    }
    world.finish();
    assert_eq!(world.scheduler.stats().prefix_hit_tokens, 3 * 96, "all but the block that is not full");
    let before = world.scheduler.stats().prefix_hit_tokens;
    // The conversation goes on: prompt, answer, and another question.
    let answer = Wanted { seed: 2, ..first.clone() }.tokens();
    let prompt = [answer, vec![7; 20]].concat();
    world.add(9, &Wanted { prompt, ..Wanted::new(9, 1, 5, 0) });
    world.finish();
    // The answer's last token has never been fed.
    assert_eq!(world.scheduler.stats().prefix_hit_tokens - before, (159 / KV_BLOCK * KV_BLOCK) as u64);
}

#[test]
fn blocks_are_kept_free_for_those_alone_that_may_need_more() {
    // One block is all that each ever holds, and there are as many as sequences.
    let all: Vec<Wanted> = (0..8).map(|i| Wanted::new(i, KV_BLOCK, 1, 0)).collect();
    let (_, steps, _) = served(config(1, 8 * KV_BLOCK, 8), 8, &all);
    assert_eq!(steps, 1, "all at once");
}

#[test]
fn cached_blocks_go_when_others_need_them() {
    let mut world = World::new(config(1, 64, 4), 20);
    for id in 0..30 {
        // Three kinds of prompts, of which two fit.
        world.add(id, &Wanted::new(id, 10, 3, 0).after(id as u32 % 3, 100));
        world.finish();
    }
    let stats = world.scheduler.stats();
    assert!(stats.kv_blocks_cached > 10 && stats.preemptions == 0, "{stats:?}");
}

#[test]
fn a_cancelled_sequence_gives_its_blocks_back_at_once_wherever_it_is() {
    let mut world = World::new(SchedulerConfig { ahead: true, ..config(2, 32, 4) }, 16);
    let free = |world: &World| {
        let stats = world.scheduler.stats();
        stats.kv_blocks_free + stats.kv_blocks_cached
    };
    world.add(0, &Wanted::new(0, 100, 30, 0));
    world.plan();
    assert!(free(&world) < 16 && world.in_flight().count() == 4);
    world.cancel(0);
    assert_eq!(free(&world), 16, "in the middle of the prompt, with steps in flight");
    // Another one writes to them behind those steps.
    world.add(1, &Wanted::new(1, 60, 100, 0));
    world.add(2, &Wanted::new(2, 200, 2, 0));
    for _ in 0..20 {
        world.plan();
        world.run();
        world.read();
    }
    assert!(free(&world) < 16 && world.scheduler.waiting() == 1);
    world.cancel(2);
    world.cancel(1);
    assert_eq!((free(&world), world.scheduler.waiting()), (16, 0));
    world.finish();
}

#[test]
fn the_oldest_goes_on_when_blocks_run_out_and_the_others_end_later() {
    for ahead in [false, true] {
        for prefix_reuse in [false, true] {
            let all: Vec<Wanted> = (0..6).map(|i| Wanted::new(i, 20, 100, 0)).collect();
            let config = SchedulerConfig { ahead, prefix_reuse, ..config(2, 64, 6) };
            let (_, steps, world) = served(config, 20, &all);
            let stats = world.scheduler.stats();
            assert!(stats.preemptions > 0, "{stats:?}");
            assert_eq!(world.ended, [0, 1, 2, 3, 4, 5]);
            assert!(steps < 1500, "{steps} steps: {stats:?}");
        }
    }
}

#[test]
fn higher_priorities_begin_first_and_lose_their_blocks_last() {
    let mut world = World::new(config(1, 16, 1), 8);
    for (id, priority) in [(0, 0), (1, 0), (2, 5), (3, -5), (4, 5)] {
        world.add(id, &Wanted { priority, ..Wanted::new(id, 10, 3, 0) });
    }
    world.finish();
    assert_eq!(world.started, [2, 4, 0, 1, 3]);
    // Room for one and a half: the first, and lower, gives its blocks to the second.
    let mut world = World::new(config(1, 16, 2), 8);
    world.add(0, &Wanted { priority: 0, ..Wanted::new(0, 60, 20, 0) });
    for _ in 0..8 {
        world.plan();
        world.run();
        world.read();
    }
    world.add(1, &Wanted { priority: 1, ..Wanted::new(1, 60, 20, 0) });
    world.finish();
    assert_eq!((world.ended.clone(), world.scheduler.stats().preemptions), (vec![1, 0], 1));
}

#[test]
fn a_low_priority_ends_although_higher_ones_keep_coming() {
    for blocks in [6, 12] {
        let mut world = World::new(config(2, 16, 2), blocks);
        world.add(0, &Wanted { priority: -7, ..Wanted::new(0, 40, 30, 0) });
        let mut id = 0;
        while !world.ended.contains(&0) {
            while world.scheduler.waiting() < 3 {
                id += 1;
                world.add(id, &Wanted::new(id, 20, 10, 0));
            }
            world.plan();
            world.run();
            world.read();
            assert!(id < 2000, "it starves");
        }
        assert!(id > 50, "{id}: it comes last as long as it need not come first");
    }
}

fn new(seq: u64, prompt: impl IntoIterator<Item = u32>, answer: usize) -> NewSequence {
    let prompt: Arc<[u32]> = prompt.into_iter().collect();
    let tokens_max = prompt.len() + answer - 1;
    NewSequence {
        seq: SeqId(seq),
        prompt,
        tokens_max,
        sampling: Arc::default(),
        seed: 0,
        priority: 0,
        images: None,
    }
}

fn apply(scheduler: &mut Scheduler, step: &Step) {
    let token = |seq| Sampled { seq, id: 5, logprobs: None };
    scheduler.apply(step.step, step.batch.outputs.iter().map(|output| token(output.seq)).collect());
}

/// The shortest time for a step of one sequence that decodes, while a prompt waits for room that begins with so many tokens of an
/// earlier one.
fn while_a_prompt_waits(context: u32) -> Duration {
    let blocks = context as usize / KV_BLOCK + 64;
    let mut scheduler = Scheduler::new(config(1, 1 << 20, 4), BlockPool::new(blocks));
    scheduler.add(new(0, 0..context, 1));
    let step = scheduler.plan().expect("the earlier prompt");
    apply(&mut scheduler, &step);
    scheduler.end(SeqId(0));
    scheduler.add(new(1, 1 << 20..(1 << 20) + 32 * KV_BLOCK as u32, 300));
    scheduler.add(new(2, 0..context + 40 * KV_BLOCK as u32, 1));
    let mut shortest = Duration::MAX;
    for _ in 0..200 {
        let began = Instant::now();
        let step = scheduler.plan().expect("the one that decodes");
        shortest = shortest.min(began.elapsed());
        assert_eq!(scheduler.waiting(), 1);
        apply(&mut scheduler, &step);
    }
    scheduler.end(SeqId(1));
    assert_eq!(scheduler.plan().expect("the one that waited").batch.rows(), 40 * KV_BLOCK);
    assert_eq!(scheduler.stats().prefix_hit_tokens, u64::from(context));
    shortest
}

#[test]
fn a_prompt_that_waits_takes_no_time_however_long_it_is() {
    let (short, long) = (while_a_prompt_waits(1024), while_a_prompt_waits(131_072));
    assert!(long < 5 * short + Duration::from_micros(10), "{long:?}, and {short:?} for a short one");
}

#[test]
fn prompts_are_found_by_the_keys_that_are_given() {
    let keys = Keys::default();
    let mut scheduler = Scheduler::new(config(1, 1024, 4), BlockPool::new(64)).with_keys(keys.clone());
    let prompts = [0..100, 0..200].map(|ids| ids.collect::<Vec<u32>>());
    scheduler.add_hashed(new(0, prompts[0].clone(), 1), &keys.of_prompt(&prompts[0], None));
    let step = scheduler.plan().expect("a prompt");
    apply(&mut scheduler, &step);
    scheduler.end(SeqId(0));
    // Those of another prompt: nobody looks at the tokens again.
    scheduler.add_hashed(new(1, 500..700, 1), &keys.of_prompt(&prompts[1], None));
    let step = scheduler.plan().expect("a prompt");
    assert_eq!(step.batch.rows(), 200 - 96);
    apply(&mut scheduler, &step);
    scheduler.end(SeqId(1));
    // And the same keys are made where none are given.
    scheduler.add(new(2, prompts[1].clone(), 1));
    assert_eq!(scheduler.plan().expect("a prompt").batch.rows(), 200 - 192);
}
