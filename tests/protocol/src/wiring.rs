//! In place of `src/engine/wire.rs`: stages on threads, with boundaries between them.

use std::sync::Arc;

use crate::{
    Setup, Way, Wired,
    backend::{Backend, Device},
    model::decoder::Decoder,
    pipeline::{self, Input, Output, Probe, Stage, token_edge},
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
        stages.push(Stage {
            index,
            backend: backend.clone(),
            load: Box::new(Decoder::load),
            input,
            output,
            results: results_in.clone(),
            turn: if B::ASYNC { Arc::default() } else { turn.clone() },
            metrics: Arc::default(),
            probe: Probe::off(),
        });
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
