//! Stages on devices of up to two kinds, before their threads start: what each is connected to.

use std::{sync::Arc, thread::JoinHandle};

use crossbeam_channel as channel;

use super::{Shared, VisionOn};
use crate::{
    backend::{Backend, vision::VisionOps},
    batch::Step,
    error::Result,
    pipeline::{self, AwaitEnqueued, Collecting, Enqueued, Input, Output, Probe},
    transport::{EndsBetween, Transport},
};

/// One of two kinds.
#[derive(Debug, Clone)]
pub(in crate::engine) enum Either<A, B> {
    One(A),
    Two(B),
}

/// What stages run on.
pub(in crate::engine) struct On<'a, A: VisionOps, B: VisionOps> {
    /// One a stage.
    pub(in crate::engine) backends: Vec<Either<Arc<A>, Arc<B>>>,
    pub(in crate::engine) ways: Ways<'a, A, B>,
    /// Whether a device is lost to the process.
    pub(in crate::engine) lost: fn() -> bool,
    /// What the vision tower runs on, if there is one.
    pub(in crate::engine) vision: Option<VisionOn<A, B>>,
    /// What the parts of a split head run on: of the last stage's kind, one for each, in their order.
    pub(in crate::engine) asides: Vec<Either<Arc<A>, Arc<B>>>,
}

impl<A, B> Either<A, B> {
    pub(super) fn one(self) -> Option<A> {
        match self {
            Either::One(one) => Some(one),
            Either::Two(_) => None,
        }
    }

    pub(super) fn two(self) -> Option<B> {
        match self {
            Either::Two(two) => Some(two),
            Either::One(_) => None,
        }
    }
}

/// The ways across boundaries.
pub(in crate::engine) struct Ways<'a, A: Backend, B: Backend> {
    pub(in crate::engine) ones: &'a dyn Transport<A>,
    pub(in crate::engine) twos: &'a dyn Transport<B>,
    pub(in crate::engine) one_to_two: &'a dyn Transport<A, B>,
    pub(in crate::engine) two_to_one: &'a dyn Transport<B, A>,
}

/// A stage's device, and what goes in and out there.
pub(super) struct Site<B: Backend> {
    pub(super) index: usize,
    pub(super) backend: Arc<B>,
    /// Both are there once all sites are connected.
    pub(super) input: Option<Input<B>>,
    pub(super) output: Option<Output<B>>,
    pub(super) probe: Probe<B>,
}

/// A site on either kind of device.
pub(super) type AnySite<A, B> = Either<Site<A>, Site<B>>;

/// The pipeline's two ends.
pub(super) struct Ends {
    pub(super) steps: (channel::Receiver<Step>, AwaitEnqueued),
    pub(super) results: Enqueued,
}

/// A boundary's size.
#[derive(Clone, Copy)]
pub(super) struct Size {
    /// Packets that have room.
    pub(super) depth: usize,
    /// Numbers of a packet at most.
    pub(super) len_max: usize,
}

/// All of a pipeline's.
pub(super) struct Sites<A: Backend, B: Backend> {
    pub(super) all: Vec<AnySite<A, B>>,
    /// The threads that read what they measure.
    pub(super) collectors: Vec<JoinHandle<()>>,
}

/// A site for each stage, connected to its neighbours and to the pipeline's ends.
pub(super) fn sites<A: VisionOps, B: VisionOps>(
    on: On<'_, A, B>,
    ends: Ends,
    size: Size,
    shared: &Shared,
) -> Result<Sites<A, B>> {
    let (mut ones, mut twos) = (Vec::new(), Vec::new());
    for (i, backend) in on.backends.iter().enumerate() {
        match backend {
            Either::One(backend) => ones.push((i, backend.clone())),
            Either::Two(backend) => twos.push((i, backend.clone())),
        }
    }
    let ((mut ones, collector), (mut twos, other)) = (measured(ones, shared)?, measured(twos, shared)?);
    let site = |kind: &Either<_, _>| match kind {
        Either::One(_) => ones.next().map(Either::One),
        Either::Two(_) => twos.next().map(Either::Two),
    };
    let mut all: Vec<AnySite<A, B>> = on.backends.iter().filter_map(site).collect();
    connect(&mut all, on.ways, size)?;
    let Ends { steps: (steps, enqueued), results } = ends;
    match all.first_mut() {
        Some(Either::One(site)) => site.input = Some(Input::Steps(steps, enqueued)),
        Some(Either::Two(site)) => site.input = Some(Input::Steps(steps, enqueued)),
        None => (),
    }
    match all.last_mut() {
        Some(Either::One(site)) => site.output = Some(Output::Results(results)),
        Some(Either::Two(site)) => site.output = Some(Output::Results(results)),
        None => (),
    }
    Ok(Sites { all, collectors: collector.into_iter().chain(other).collect() })
}

/// Makes the boundaries.
fn connect<A: Backend, B: Backend>(
    sites: &mut [AnySite<A, B>],
    Ways { ones, twos, one_to_two, two_to_one }: Ways<'_, A, B>,
    Size { depth, len_max }: Size,
) -> Result<()> {
    for next in 1..sites.len() {
        let (before, after) = sites.split_at_mut(next);
        match (&mut before[next - 1], &mut after[0]) {
            (Either::One(a), Either::One(b)) => {
                join(a, b, ones.connect(a.backend.clone(), b.backend.clone(), depth, len_max)?);
            }
            (Either::Two(a), Either::Two(b)) => {
                join(a, b, twos.connect(a.backend.clone(), b.backend.clone(), depth, len_max)?);
            }
            (Either::One(a), Either::Two(b)) => {
                join(a, b, one_to_two.connect(a.backend.clone(), b.backend.clone(), depth, len_max)?);
            }
            (Either::Two(a), Either::One(b)) => {
                join(a, b, two_to_one.connect(a.backend.clone(), b.backend.clone(), depth, len_max)?);
            }
        }
    }
    Ok(())
}

fn join<A: Backend, B: Backend>(from: &mut Site<A>, to: &mut Site<B>, ends: EndsBetween<A, B>) {
    from.output = Some(Output::Boundary(ends.0));
    to.input = Some(Input::Boundary(ends.1));
}

/// Sites that are measured, and the thread that tells of it, if there are any.
fn measured<B: Backend>(
    backends: Vec<(usize, Arc<B>)>,
    shared: &Shared,
) -> Result<(impl Iterator<Item = Site<B>>, Option<JoinHandle<()>>)> {
    let meter = shared.meter.clone();
    let stages: Vec<_> =
        backends.iter().map(|(i, backend)| (*i, backend.clone(), shared.metrics[*i].clone())).collect();
    let (probes, collector) = match stages.is_empty() {
        true => (Vec::new(), None),
        false => {
            let (probes, collector) = pipeline::collect(Collecting {
                stages,
                start: meter.start(),
                every: meter.every(),
                dropped: meter.dropped().clone(),
                tell: Box::new(move |span| meter.span(span)),
            })?;
            (probes, Some(collector))
        }
    };
    let site = |((index, backend), probe)| Site { index, backend, input: None, output: None, probe };
    Ok((backends.into_iter().zip(probes).map(site), collector))
}
