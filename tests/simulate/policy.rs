//! What the scheduler should come to on stages like those of a 7b Qwen2 on H200s, cut into whole layers.

use std::sync::Arc;

use pipeline_infer::{
    schedule::{SchedulerConfig, StageCost},
    simulate::{Arrival, Blank, Machine, Nanos, Percentiles, Report, Simulation},
};

/// Seven layers a stage; the last one has the head, which weighs as much as two more.
fn stages(count: usize) -> Machine {
    let layers = StageCost { base: 644e-6, row: 5e-6, attended: 2e-10, read: 3.5e-9, output: 0.0 };
    let mut costs = vec![layers; count];
    costs[count - 1].base += 250e-6;
    costs[count - 1].output = 0.5e-6;
    Machine::new(costs)
}

fn simulation(stages_: usize, blocks: usize) -> Simulation {
    let config = SchedulerConfig {
        slots: stages_,
        chunk: 2048,
        chunk_min: 128,
        running_max: 256,
        ahead: true,
        prefix_reuse: true,
    };
    Simulation::new(stages(stages_), config, blocks)
}

fn arrival(at: Nanos, number: u32, shared: u32, own: u32, answer: usize) -> Arrival {
    let prompt: Arc<[u32]> = (0..shared).chain((0..own).map(|i| (number + 1) << 16 | i)).collect();
    Arrival { at, prompt, answer_max: answer, answer, cancelled: None, seed: 0, priority: 0 }
}

#[test]
fn stages_are_busy_and_four_do_more_than_twice_the_work_of_one() {
    let run = |stages, layers_of: usize| {
        let mut simulation = simulation(stages, 256 * 48);
        // All layers on one stage, if there is one.
        for stage in &mut simulation.machine.stages {
            let c = &mut stage.cost;
            let times = layers_of as f64 / 7.0;
            (c.base, c.row) = (c.base + (times - 1.0) * 644e-6, c.row * times);
            (c.attended, c.read) = (c.attended * times, c.read * times);
        }
        let work: Vec<Arrival> = (0..256).map(|i| arrival(0, i, 0, 512, 256)).collect();
        Report::of(&simulation.run(&work, &mut Blank))
    };
    let (one, four) = (run(1, 28), run(4, 7));
    assert!(one.bubble < 0.001 && four.bubble < 0.03, "{} {}", one.bubble, four.bubble);
    assert!(four.output_tokens_per_s > 2.4 * one.output_tokens_per_s, "{four:?}");
    for stages in [8, 16, 64] {
        let bubble = run(stages, 7).bubble;
        assert!(bubble < 0.08, "{stages} stages: {bubble}");
    }
}

/// Slots beyond the number of devices cost passes over the weights. Where passes are compute-bound (no weights to wait for, but some
/// microseconds a layer for its kernels' starts), they would cost little; but steps are planned ahead, so there is no bubble to fill.
#[test]
fn more_slots_than_devices_gain_nothing_even_where_passes_are_compute_bound() {
    for (base, running) in [(644e-6, 256), (70e-6, 256), (70e-6, 1024)] {
        let rate = |slots| {
            let mut simulation = simulation(4, running * 21);
            (simulation.config.slots, simulation.config.running_max) = (slots, running);
            simulation.machine.boundary = 25_000;
            simulation.machine.stages.iter_mut().for_each(|stage| stage.cost.base += base - 644e-6);
            let work: Vec<Arrival> = (0..running as u32).map(|i| arrival(0, i, 0, 64, 256)).collect();
            Report::of(&simulation.run(&work, &mut Blank)).output_tokens_per_s
        };
        let one_a_device = rate(4);
        for slots in [5, 6, 8] {
            let gain = rate(slots) / one_a_device - 1.0;
            assert!(gain < 0.001, "{slots} slots, {running} sequences, base {base}: {gain:+.3}");
        }
    }
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let ttft = |reuse| {
        let mut simulation = simulation(4, 64 * 140);
        simulation.config.prefix_reuse = reuse;
        let work: Vec<Arrival> = (0..64).map(|i| arrival(0, i, 2048, 64, 64)).collect();
        Report::of(&simulation.run(&work, &mut Blank)).ttft_ms.expect("tokens").mean
    };
    let (alone, shared) = (ttft(false), ttft(true));
    assert!(alone > 5.0 * shared, "{alone} ms, with reuse {shared} ms");
}

#[test]
fn a_long_prompt_hardly_delays_those_that_are_decoding() {
    let came = 1_200_000_000;
    let mut work: Vec<Arrival> = (0..128).map(|i| arrival(0, i, 0, 512, 512)).collect();
    work.push(arrival(came, 999, 0, 8192, 10));
    let trace = simulation(4, 8192).run(&work, &mut Blank);
    let first = trace.answers[128].tokens[0];
    let (mut before, mut during) = (Vec::new(), Vec::new());
    for gap in trace.answers[..128].iter().flat_map(|answer| answer.tokens.windows(2)) {
        let took = (gap[1] - gap[0]) as f64;
        match gap[1] <= came {
            true => before.push(took),
            false if gap[0] < first => during.push(took),
            false => (),
        }
    }
    let (before, during) = (Percentiles::of(before).expect("gaps"), Percentiles::of(during).expect("gaps"));
    let times = during.max / before.median;
    assert!(times < LONGEST && during.median < 2.0 * before.median, "{times}: {before:?} {during:?}");
}

/// Medians.
const LONGEST: f64 = 2.25;
