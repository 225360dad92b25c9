//! How prompts are cut, simulated with a clock and stages whose costs are known: chunks of about equal time, small ones
//! where few tokens wait, and few beside sequences that decode.

mod common;

use std::collections::VecDeque;

use common::world::{Wanted, World};
use pipeline_infer::{
    batch::Observation,
    schedule::{CostModel, PassShape, SchedulerConfig, StageCost},
};

/// Of a stage with a quarter of a model of 7b on a large GPU.
const COST: StageCost = StageCost { base: 8e-4, row: 5.4e-6, attended: 1.9e-10, read: 3.2e-9, output: 0.0 };

fn config(slots: usize) -> SchedulerConfig {
    SchedulerConfig { slots, chunk: 2048, chunk_min: 128, running_max: 256, ahead: true, prefix_reuse: true }
}

/// A step as it went.
struct Ran {
    shape: PassShape,
    prompt_rows: usize,
    /// When it left the last stage, in seconds.
    end: f64,
    /// Sequences that got a token.
    outputs: Vec<u64>,
}

/// Stages in a row, as many as slots; the host answers at once.
struct Line {
    world: World,
    /// When each stage is done with the steps that it has.
    free: Vec<f64>,
    now: f64,
    in_flight: VecDeque<u64>,
    ran: Vec<Ran>,
}

impl Line {
    fn new(config: SchedulerConfig) -> Self {
        let world = World::new(config, 40_000);
        Line { world, free: vec![0.0; config.slots], now: 0.0, in_flight: VecDeque::new(), ran: Vec::new() }
    }

    /// Everything that can be planned now is, and comes to its end.
    fn plan(&mut self) {
        self.world.plan();
        while let Some(step) = self.world.queued.front() {
            let shape = PassShape::of(&step.batch);
            let seconds = COST.seconds(&shape);
            let token = step.after.map_or(0.0, |after| self.ran[after as usize].end);
            let mut at = self.now.max(token);
            for free in &mut self.free {
                *free = free.max(at) + seconds;
                at = *free;
            }
            let singles = step.batch.seqs.iter().filter(|part| part.len == 1).count();
            self.ran.push(Ran {
                shape,
                prompt_rows: shape.rows - singles,
                end: at,
                outputs: step.batch.outputs.iter().map(|output| output.seq.0).collect(),
            });
            self.in_flight.push_back(step.step);
            self.world.run();
        }
    }

    /// The oldest step's tokens are read when they are there. False if there is none.
    fn step(&mut self) -> bool {
        self.plan();
        let Some(step) = self.in_flight.pop_front() else { return false };
        let ran = &self.ran[step as usize];
        self.now = ran.end;
        for stage in 0..self.free.len() {
            let busy = std::time::Duration::from_secs_f64(COST.seconds(&ran.shape));
            self.world.scheduler.observe(Observation { stage, step, busy });
        }
        self.world.read();
        true
    }

    /// Times between successive tokens of a sequence, from a time on.
    fn gaps(&self, seq: u64, from: f64) -> Vec<f64> {
        let ends: Vec<f64> = self.ran.iter().filter(|r| r.outputs.contains(&seq)).map(|r| r.end).collect();
        ends.windows(2).filter(|pair| pair[1] > from).map(|pair| pair[1] - pair[0]).collect()
    }
}

/// Sequences that decode, and have for some time.
fn decoding(sequences: u64) -> Line {
    let mut line = Line::new(config(4));
    (0..sequences).for_each(|id| line.world.add(id, &Wanted::new(1000 * id, 512, 700, 0)));
    while line.world.clients.values().any(|client| client.got < 100) {
        assert!(line.step());
    }
    line
}

#[test]
fn a_long_prompt_delays_no_step_of_those_that_decode_by_more_than_twice_the_median() {
    let mut line = decoding(128);
    let came = line.now;
    line.world.add(999, &Wanted::new(7_000_000, 8192, 8, 0));
    while line.world.clients.contains_key(&pipeline_infer::batch::SeqId(999)) {
        assert!(line.step());
    }
    let (took, before) = (line.now - came, line.gaps(0, 0.0));
    let mut calm: Vec<f64> = before[before.len() / 4..before.len() / 2].to_vec();
    calm.sort_by(f64::total_cmp);
    let median = calm[calm.len() / 2];
    for seq in 0..128 {
        let worst = line.gaps(seq, came).into_iter().fold(0.0, f64::max);
        assert!(worst <= 2.0 * median, "sequence {seq} waited {worst:.5} s, as a rule {median:.5} s");
    }
    // 64 chunks at least, of a micro-batch each.
    assert!(took < 0.25, "the prompt took {took:.3} s");
}

#[test]
fn before_anything_is_known_prompts_beside_decoding_are_small_chunks() {
    let mut world = World::new(config(2), 4096);
    (0..32).for_each(|id| world.add(id, &Wanted::new(100 * id, 64, 300, 0)));
    for _ in 0..40 {
        world.plan();
        world.run();
        world.read();
    }
    world.add(99, &Wanted::new(99_000, 5000, 4, 0));
    for _ in 0..20 {
        world.plan();
        let prompts = world.queued.iter().flat_map(|step| &step.batch.seqs).filter(|part| part.len > 1);
        assert!(prompts.clone().all(|part| part.len <= 128));
        world.run();
        world.read();
    }
    world.finish();
}

#[test]
fn many_prompts_at_once_go_in_large_chunks() {
    let mut line = Line::new(config(4));
    (0..256).for_each(|id| line.world.add(id, &Wanted::new(1000 * id, 512, 256, 0)));
    while line.step() {}
    let prompts: Vec<usize> = line.ran.iter().map(|ran| ran.prompt_rows).filter(|&rows| rows > 0).collect();
    assert!(prompts.len() <= 80, "{} micro-batches with prompts: {prompts:?}", prompts.len());
    // Every stage has all the work to do; the rest is its idle time.
    let busy: f64 = line.ran.iter().map(|ran| COST.seconds(&ran.shape)).sum();
    let took = line.ran.last().unwrap().end;
    assert!(took < 1.03 * busy, "{took:.3} s for {busy:.3} s of work");
}

#[test]
fn chunks_take_about_as_long_although_late_ones_attend_to_more() {
    let mut line = Line::new(config(4));
    let costly = StageCost { attended: 4e-9, ..COST };
    line.world.scheduler.set_cost_model(CostModel::new(vec![COST, costly]));
    line.world.add(0, &Wanted::new(0, 30_000, 2, 0));
    line.plan();
    let first = costly.seconds(&PassShape::default().with_rows(0, 2048));
    loop {
        let (step, _) = line.world.done.pop_front().expect("a step of the prompt");
        let shape = PassShape::of(&step.batch);
        if shape.outputs > 0 {
            break;
        }
        let share = costly.seconds(&shape) / first;
        // Large ones may be cut to whole tiles.
        assert!(share > 1.23 || shape.rows >= 1024 && shape.rows.is_multiple_of(256), "{shape:?}");
        assert!((0.98..1.26).contains(&share), "{shape:?} takes {share:.3} of the first one's time");
        line.world.scheduler.apply(step.step, Vec::new());
        line.plan();
    }
    assert!(line.ran.len() > 20, "{} chunks", line.ran.len());
}

/// Prompts of 4,096 tokens are in halves, though the second ones take longer, and begin where the one before ends.
#[test]
fn prompts_of_a_few_thousand_tokens_go_in_whole_chunks() {
    let mut line = Line::new(config(4));
    let attending = StageCost { attended: 3e-10, ..COST };
    line.world.scheduler.set_cost_model(CostModel::new(vec![attending; 4]));
    (0..32).for_each(|id| line.world.add(id, &Wanted::new(5000 * id, 4096, 1, 0)));
    while line.step() {}
    let rows: Vec<usize> = line.ran.iter().map(|ran| ran.shape.rows).collect();
    assert_eq!(rows, [2048; 64]);
}

#[test]
fn few_prompt_tokens_are_spread_over_the_pipeline() {
    let chunks = |prompt: usize| {
        let mut line = Line::new(config(4));
        line.world.add(0, &Wanted::new(0, prompt, 1, 0));
        while line.step() {}
        line.ran.iter().map(|ran| ran.shape.rows).collect::<Vec<_>>()
    };
    assert_eq!(chunks(100), [100]);
    assert_eq!(chunks(512), [128; 4]);
    assert_eq!(chunks(2048), [256; 8]);
    assert_eq!(chunks(40_000).iter().max(), Some(&2048));
}
