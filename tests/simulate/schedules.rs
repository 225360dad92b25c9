//! Random schedules: a number is all it takes to have one again.

use std::sync::Arc;

use pipeline_infer::{
    batch::KV_BLOCK,
    schedule::{SchedulerConfig, StageCost},
    simulate::{Arrival, Machine, Nanos, Simulation, Stage, Trace},
};

use super::checks::{Checks, Seen};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From `low` to `high`, both included.
    fn within(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    /// As `within`, but small numbers are as likely as large ones.
    fn scale(&mut self, high: usize) -> usize {
        let top = 1 << self.within(0, high.ilog2() as usize);
        self.within(1, (2 * top).min(high))
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.within(1, 100) <= percent
    }
}

/// A machine, its scheduler and its work.
#[derive(Debug)]
pub(super) struct Schedule {
    pub(super) simulation: Simulation,
    pub(super) work: Vec<Arrival>,
}

impl Schedule {
    pub(super) fn random(seed: u64) -> Schedule {
        let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95));
        // Most are small, which is quicker and fails in fewer steps.
        let (stages_max, slots_max) = if random.chance(3) { (64, 64) } else { (8, 6) };
        let machine = machine(&mut random, stages_max);
        let chunk = random.scale(200);
        let config = SchedulerConfig {
            slots: random.within(1, slots_max),
            chunk,
            chunk_min: random.within(1, chunk),
            prefix_reuse: random.chance(80),
            running_max: random.scale(20),
            ahead: random.chance(60),
        };
        let pass: f64 = machine.stages.iter().map(|s| s.cost.base + s.cost.row).sum();
        let work = work(&mut random, (1e9 * pass) as Nanos);
        let least = work.iter().map(tokens_max).max().expect("work").div_ceil(KV_BLOCK);
        let spare = [0, random.within(0, 3), random.within(0, 40)][random.within(0, 2)];
        let mut simulation = Simulation::new(machine, config, least + spare);
        simulation.observed = random.chance(3);
        simulation.until = patience(&simulation.machine, &work);
        Schedule { simulation, work }
    }

    /// Runs it, with checks of everything.
    pub(super) fn run(&self) -> Seen {
        let Simulation { config, blocks, .. } = self.simulation;
        let mut checks = Checks::new(config, blocks, &self.work);
        let trace = self.simulation.run(&self.work, &mut checks);
        self.never_idle(&trace);
        checks.seen
    }

    /// From a request's coming to its end, steps are under way all the time: all of them one after another would take longer.
    fn never_idle(&self, trace: &Trace) {
        let machine = &self.simulation.machine;
        let ways = ways(machine);
        for (i, answer) in trace.answers.iter().enumerate() {
            let end = answer.end.expect("every request ends").0;
            let meanwhile = trace
                .steps
                .iter()
                .filter(|s| s.passes[0].0 <= end && s.passes.last().unwrap().1 + ways >= answer.came);
            let passes = |step: &pipeline_infer::simulate::StepTrace| {
                step.passes.iter().map(|(b, e)| e - b).sum::<u64>()
            };
            let most: Nanos = meanwhile.map(|step| passes(step) + ways).sum();
            let took = end - answer.came;
            assert!(took <= most, "request {i} took {took} ns, of which {} nothing happens", took - most);
        }
    }
}

/// What a step takes beside its passes.
fn ways(machine: &Machine) -> Nanos {
    let Machine { boundary, gathering, planning, results, .. } = *machine;
    machine.stages.len() as Nanos * boundary + gathering + planning + results
}

fn machine(random: &mut Random, stages_max: usize) -> Machine {
    let stages = random.within(1, stages_max);
    let devices = if random.chance(70) { stages } else { random.within(1, stages) };
    let even = random.chance(40);
    let mut cost = StageCost::default();
    let stage = |i: usize| {
        if i == 0 || !even {
            cost = StageCost {
                base: random.within(1, 1000) as f64 * 1e-9,
                row: random.scale(200) as f64 * 1e-9,
                attended: random.within(0, 20) as f64 * 1e-10,
                read: random.within(0, 20) as f64 * 1e-10,
                output: random.within(0, 30) as f64 * 1e-9,
            };
        }
        // Each device has a stage: the first ones in turn, then any.
        let device = if i < devices { i } else { random.within(0, devices - 1) };
        Stage { cost, device }
    };
    let stages = (0..stages).map(stage).collect();
    let mut delay = || [0, random.scale(100) as Nanos, random.scale(5000) as Nanos][random.within(0, 2)];
    Machine { stages, boundary: delay(), gathering: delay(), planning: delay(), results: delay() }
}

/// Requests that share beginnings, come in bursts and are cancelled at any moment. A pass takes about so long.
fn work(random: &mut Random, pass: Nanos) -> Vec<Arrival> {
    let texts: Vec<Vec<u32>> =
        (0..2).map(|_| (0..300).map(|_| random.next() as u32 >> 8).collect()).collect();
    let pause = [0, 0, pass, 20 * pass][random.within(0, 3)];
    let (cancels, stops) = ([0, 25, 60][random.within(0, 2)], [0, 50, 100][random.within(0, 2)]);
    let (prompt_max, answer_max) = (random.scale(300), random.scale(120));
    let priorities = [0, 0, 1, 3][random.within(0, 3)];
    let mut at = 0;
    let mut work: Vec<Arrival> = Vec::new();
    for _ in 0..random.scale(40) {
        at += random.within(0, pause as usize) as Nanos;
        let mut arrival = match work.last() {
            // The same again, as samples of one request or a client that asks twice.
            Some(last) if random.chance(15) => last.clone(),
            _ => arrival(random, &texts, prompt_max, answer_max),
        };
        if random.chance(stops) {
            arrival.answer = random.within(1, arrival.answer_max);
        }
        let long = (pass as usize * arrival.answer_max * 4).max(1);
        arrival.cancelled = random.chance(cancels).then(|| at + random.within(0, long) as Nanos);
        arrival.at = at;
        arrival.priority = random.within(0, priorities) as i32;
        work.push(arrival);
    }
    work
}

fn arrival(random: &mut Random, texts: &[Vec<u32>], prompt_max: usize, answer_max: usize) -> Arrival {
    let len = random.within(1, prompt_max);
    let prompt: Arc<[u32]> = if random.chance(25) {
        // The same few blocks, in any order: what a block holds follows from those before it.
        let order = random.next();
        let piece = |place: usize| (order >> (place % 32)) as usize % 3 * KV_BLOCK;
        (0..len).map(|i| texts[0][piece(i / KV_BLOCK) + i % KV_BLOCK]).collect()
    } else {
        let shared = if random.chance(60) { random.within(0, len) } else { 0 };
        let text = &texts[random.within(0, texts.len() - 1)];
        let own = (shared..len).map(|_| random.next() as u32 >> 8);
        text[..shared].iter().copied().chain(own).collect()
    };
    let answer_max = random.within(1, answer_max);
    Arrival {
        at: 0,
        prompt,
        answer_max,
        answer: answer_max,
        cancelled: None,
        seed: random.next() % 3,
        priority: 0,
    }
}

fn tokens_max(arrival: &Arrival) -> usize {
    arrival.prompt.len() + arrival.answer_max - 1
}

/// Longer than all work takes, a row a step, all of it `AGAIN` times over, and every step as dear as the dearest.
fn patience(machine: &Machine, work: &[Arrival]) -> Nanos {
    const AGAIN: u64 = 8;
    let rows: usize = work.iter().map(tokens_max).sum();
    let attended = work.iter().map(tokens_max).max().unwrap_or(0) as f64;
    let pass = |c: StageCost| c.base + c.row + attended * (c.attended + c.read) + c.output;
    let step: f64 = machine.stages.iter().map(|s| pass(s.cost)).sum();
    let ways = ways(machine);
    let last = work.iter().map(|a| a.at).max().unwrap_or(0);
    last + AGAIN * rows as u64 * ((1e9 * step) as u64 + 1 + ways) + 1
}
