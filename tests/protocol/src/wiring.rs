//! In place of `src/engine/wire.rs`: stages on threads, with boundaries between them.

use std::sync::Arc;

use crate::{
    Setup, Way, Wired,
    backend::{Backend, Device, cpu::Cpu, cuda::Cuda},
    model::decoder::Decoder,
    pipeline::{self, Input, Outcome, Output, Probe, Stage, token_edge},
    sync::{Mutex, channel},
    transport::{Host, Peer, Staged, Transport},
    world::World,
};

/// Starts the stages' threads.
pub fn wire(setup: &Setup, world: &World) -> Wired {
    match setup.way {
        Way::Peer => wire_on::<Device<true>>(&Peer::default(), setup, world),
        Way::Staged => wire_on::<Device<true>>(&Staged, setup, world),
        Way::Host => wire_on::<Device<true>>(&Host, setup, world),
        Way::Processor { .. } => wire_on::<Device<false>>(&Host, setup, world),
        Way::Mixed { gpus } => wire_mixed(gpus, setup, world),
    }
}

/// A stage's ends, where they are known.
type Ends<B> = (Arc<B>, Option<Input<B>>, Option<Output<B>>);

/// A stage on either kind of device.
enum Either {
    Gpu(Ends<Cuda>),
    Cpu(Ends<Cpu>),
}

fn join<A: Backend, B: Backend>(
    from: &mut Ends<A>,
    to: &mut Ends<B>,
    by: &dyn Transport<A, B>,
    setup: &Setup,
) {
    let ends = by.connect(from.0.clone(), to.0.clone(), setup.ring, 1);
    let (sender, receiver) = ends.expect("nothing fails before the stages run");
    (from.2, to.1) = (Some(Output::Boundary(sender)), Some(Input::Boundary(receiver)));
}

/// As `src/engine/wire` does it, each stage on a thread of its own.
fn wire_mixed(gpus: usize, setup: &Setup, world: &World) -> Wired {
    let last = setup.stages - 1;
    let site = |stage: usize| match gpus >> stage & 1 {
        1 => Either::Gpu((Arc::new(Device::of(stage, world, stage == last)), None, None)),
        _ => Either::Cpu((Arc::new(Device::of(stage, world, stage == last)), None, None)),
    };
    let mut sites: Vec<Either> = (0..setup.stages).map(site).collect();
    for next in 1..setup.stages {
        let (before, after) = sites.split_at_mut(next);
        match (&mut before[next - 1], &mut after[0]) {
            (Either::Gpu(a), Either::Gpu(b)) => join(a, b, &Peer::default(), setup),
            (Either::Cpu(a), Either::Cpu(b)) => join(a, b, &Host, setup),
            (Either::Gpu(a), Either::Cpu(b)) => join(a, b, &Staged, setup),
            (Either::Cpu(a), Either::Gpu(b)) => join(a, b, &Staged, setup),
        }
    }
    let (steps, steps_out) = channel::bounded(setup.steps_room);
    let (enqueued, await_enqueued) = token_edge();
    match &mut sites[0] {
        Either::Gpu(site) => site.1 = Some(Input::Steps(steps_out, await_enqueued)),
        Either::Cpu(site) => site.1 = Some(Input::Steps(steps_out, await_enqueued)),
    }
    match &mut sites[last] {
        Either::Gpu(site) => site.2 = Some(Output::Results(enqueued)),
        Either::Cpu(site) => site.2 = Some(Output::Results(enqueued)),
    }
    let (results_in, results) = channel::unbounded();
    let turn = Arc::new(Mutex::new(()));
    let start = |(index, site)| {
        let handle = match site {
            Either::Gpu(site) => pipeline::spawn(vec![stage(index, site, &results_in, &turn)]),
            Either::Cpu(site) => pipeline::spawn(vec![stage(index, site, &results_in, &turn)]),
        };
        let handle = handle.expect("there are threads");
        (1, handle.loaded, handle.thread)
    };
    let threads = sites.into_iter().enumerate().map(start).collect();
    Wired { threads, steps, results }
}

fn stage<B: Backend>(
    index: usize,
    (backend, input, output): Ends<B>,
    results: &channel::Sender<Outcome>,
    turn: &Arc<Mutex<()>>,
) -> Stage<B> {
    Stage {
        index,
        backend,
        load: Box::new(Decoder::load),
        input: input.expect("every site is joined"),
        output: output.expect("every site is joined"),
        results: results.clone(),
        turn: if B::ASYNC { Arc::default() } else { turn.clone() },
        metrics: Arc::default(),
        probe: Probe::off(),
    }
}

fn wire_on<B: Backend>(transport: &dyn Transport<B>, setup: &Setup, world: &World) -> Wired {
    let devices: Vec<Arc<B>> =
        (0..setup.stages).map(|stage| Arc::new(B::of(stage, world, stage + 1 == setup.stages))).collect();
    let (steps, steps_out) = channel::bounded(setup.steps_room);
    let (enqueued, await_enqueued) = token_edge();
    let (results_in, results) = channel::unbounded();
    let (mut inputs, mut outputs) = (vec![Input::Steps(steps_out, await_enqueued)], Vec::new());
    for pair in devices.windows(2) {
        let ends = transport.connect(pair[0].clone(), pair[1].clone(), setup.ring, 1);
        let (sender, receiver) = ends.expect("nothing fails before the stages run");
        outputs.push(Output::Boundary(sender));
        inputs.push(Input::Boundary(receiver));
    }
    outputs.push(Output::Results(enqueued));
    let turn = Arc::new(Mutex::new(()));
    let mut stages = Vec::new();
    for (index, ((input, output), backend)) in inputs.into_iter().zip(outputs).zip(&devices).enumerate() {
        stages.push(stage(index, (backend.clone(), Some(input), Some(output)), &results_in, &turn));
    }
    let runs: Vec<Vec<Stage<B>>> = match setup.way {
        Way::Processor { one_thread: true } => vec![stages],
        _ => stages.into_iter().map(|stage| vec![stage]).collect(),
    };
    let start = |run: Vec<Stage<B>>| {
        let len = run.len();
        let handle = pipeline::spawn(run).expect("there are threads");
        (len, handle.loaded, handle.thread)
    };
    Wired { threads: runs.into_iter().map(start).collect(), steps, results }
}
