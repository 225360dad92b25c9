//! Another layout while requests run.
//!
//! Stages of the new layout are made ready beside those that run, on a thread of its own: what they need of the model comes
//! to their devices, or is there, and everything that is tried or recorded before the first step has been. Then the engine
//! plans nothing until the steps in flight have come back, the old stages end, keys and values follow the layers that have
//! moved, and the new stages go on.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use crossbeam_channel as channel;
use serde::{Serialize, Serializer};

use super::{
    StageFacts,
    progress::Progress,
    rebuild::{LOAD_MIN, build},
    recipe::Recipe,
    stock::Move,
    wire::Wired,
};
use crate::{
    error::{Error, Result, quiet_panic},
    layout::{Device, Layout},
    model::units::Unit,
};

/// Blocks between two that are in use go with them where they are fewer: starting a copy takes as long as copying these.
pub(super) const GAP: usize = 32;

/// What a relayout did.
///
/// ```
/// # use pipeline_infer::{Engine, layout::Device};
/// let engine = Engine::builder().model("tests/data/chat-llama").device(Device::Cpu).build()?;
/// let told = engine.relayout("0-1@cpu,2-3@cpu".parse()?)?;
/// assert_eq!((told.from.to_string(), told.to), ("0-3@cpu".into(), engine.layout()));
/// // Nothing came to a device that had it already.
/// assert_eq!((told.moved.len(), told.weight_bytes, told.kv_bytes), (0, 0, 0));
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Relayout {
    /// The layout before.
    #[serde(serialize_with = "shown")]
    pub from: Layout,
    /// The layout now.
    #[serde(serialize_with = "shown")]
    pub to: Layout,
    /// Units that are on another device now.
    pub moved: Vec<MovedUnit>,
    /// Bytes of their weights, which came while requests ran.
    pub weight_bytes: usize,
    /// Bytes of their keys and values, for which requests waited.
    pub kv_bytes: usize,
    /// Making the new stages ready, beside those that ran.
    pub ready: Duration,
    /// From the last step that was planned for the old stages to the first one for the new ones.
    pub stall: Duration,
}

/// A unit that has moved.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MovedUnit {
    /// Which.
    pub unit: Unit,
    /// The device that it was on.
    #[serde(serialize_with = "shown")]
    pub from: Device,
    /// The device that it is on.
    #[serde(serialize_with = "shown")]
    pub to: Device,
}

fn shown<T: std::fmt::Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

/// A relayout before the old stages have ended.
pub(super) struct Change {
    /// What is wanted.
    pub(super) layout: Layout,
    /// Whom to tell; nobody if the engine itself wants it.
    pub(super) reply: Option<channel::Sender<Result<Relayout>>>,
    pub(super) state: State,
}

/// How far it is.
pub(super) enum State {
    Preparing(channel::Receiver<Result<Box<Prepared>>>),
    /// Nothing is planned since then.
    Draining(Box<Prepared>, Instant),
}

/// Stages that are ready to go on.
pub(super) struct Prepared {
    pub(super) recipe: Recipe,
    pub(super) wired: Wired,
    pub(super) facts: Vec<StageFacts>,
    moves: Vec<Move>,
    report: Relayout,
}

/// The old stages end, and the new ones are brought what belongs to them.
pub(super) struct Switch {
    pub(super) reply: Option<channel::Sender<Result<Relayout>>>,
    pub(super) done: channel::Receiver<Result<Box<Prepared>, Failed>>,
    /// Comes when it has taken too long.
    pub(super) late: channel::Receiver<Instant>,
    /// Since when nothing is planned.
    pub(super) since: Instant,
}

/// Neither the old stages nor the new ones are there any more.
pub(super) struct Failed {
    pub(super) error: Error,
    /// Whether building them anew is of no use: the old ones may still be there in part, or a device is lost.
    pub(super) hopeless: bool,
}

impl Change {
    /// Starts to make stages of this layout ready beside those that run.
    pub(super) fn start(
        now: &Recipe,
        running: &Wired,
        layout: Layout,
        reply: Option<channel::Sender<Result<Relayout>>>,
    ) -> Result<Change> {
        let (done, prepared) = channel::bounded(1);
        let (now, before, wanted) = (now.clone(), running.stock.clone(), layout.clone());
        let began = Instant::now();
        let prepare = move || -> Result<Box<Prepared>> {
            let recipe = (now.redraw)(&layout)?;
            let (wired, facts) = build(&*recipe.start, Some(before.clone()), Progress::untold())?;
            let moves = wired.stock.moves(&before, layout.layers());
            wired.stock.find_ways(&before, &moves)?;
            let report = report(&now, &layout, &moves, began.elapsed());
            Ok(Box::new(Prepared { recipe, wired, facts, moves, report }))
        };
        let panicked = |_| Err(Error::Engine("making stages ready panicked; this is a bug".into()));
        // One that nobody waits for any more is dropped, which takes its stages down.
        let run = move || _ = done.send(quiet_panic(prepare).unwrap_or_else(panicked));
        let failed = |e| Error::Engine(format!("relayout: no thread: {e}"));
        std::thread::Builder::new().name("relayout".into()).spawn(run).map_err(failed)?;
        Ok(Change { layout: wanted, reply, state: State::Preparing(prepared) })
    }

    /// What is waited for until the new stages are ready.
    pub(super) fn to_come(&self) -> Option<&channel::Receiver<Result<Box<Prepared>>>> {
        match &self.state {
            State::Preparing(prepared) => Some(prepared),
            State::Draining(..) => None,
        }
    }

    /// Whether the old stages are given nothing more.
    pub(super) fn drains(&self) -> bool {
        matches!(self.state, State::Draining(..))
    }

    /// It does not come to pass: `why` is told, and what has been made ready is taken down. An error if that takes too long.
    pub(super) fn abandon(self, why: &Error, patience: Duration) -> Result<()> {
        tell(self.reply, Err(why.clone()));
        match self.state {
            State::Draining(prepared, _) => prepared.wired.end(),
            State::Preparing(prepared) => match prepared.recv_timeout(patience) {
                Ok(Ok(prepared)) => prepared.wired.end(),
                Ok(Err(_)) | Err(channel::RecvTimeoutError::Disconnected) => Ok(()),
                Err(channel::RecvTimeoutError::Timeout) => {
                    Err(Error::Engine("stages of another layout that are being made ready do not end".into()))
                }
            },
        }
    }
}

impl Switch {
    /// Starts a thread that ends the old stages and brings these runs of blocks to where layers have moved. No step is in
    /// flight.
    pub(super) fn start(
        old: Wired,
        change: (Box<Prepared>, Instant),
        reply: Option<channel::Sender<Result<Relayout>>>,
        runs: Vec<Range<usize>>,
    ) -> Result<Switch> {
        let (done_in, done) = channel::bounded(1);
        let (mut prepared, since) = change;
        let patience = old.patience;
        let lost = prepared.wired.lost;
        let work = move || -> Result<Box<Prepared>, Failed> {
            let before = old.stock.clone();
            old.end().map_err(|error| Failed { error, hopeless: true })?;
            let fetched = prepared.wired.stock.fetch(&before, &prepared.moves, &runs);
            fetched.map_err(|error| Failed { error, hopeless: lost() })?;
            let blocks: usize = runs.iter().map(Range::len).sum();
            let each = prepared.moves.iter().map(|moved| (prepared.recipe.weigh)(moved.unit).1);
            prepared.report.kv_bytes = blocks * each.sum::<usize>();
            Ok(prepared)
        };
        let panicked = |_| {
            let error = Error::Engine("moving keys and values panicked; this is a bug".into());
            Err(Failed { error, hopeless: false })
        };
        let run = move || _ = done_in.send(quiet_panic(work).unwrap_or_else(panicked));
        let failed = |e| Error::Engine(format!("relayout: no thread: {e}"));
        std::thread::Builder::new().name("relayout".into()).spawn(run).map_err(failed)?;
        Ok(Switch { reply, done, late: channel::after(patience + LOAD_MIN), since })
    }

    /// The engine ends: so do the stages, if they come in time.
    pub(super) fn abandon(self, patience: Duration) {
        match self.done.recv_timeout(patience) {
            Ok(Ok(prepared)) => _ = prepared.wired.end(),
            Ok(Err(_)) | Err(channel::RecvTimeoutError::Disconnected) => (),
            Err(channel::RecvTimeoutError::Timeout) => {
                tracing::warn!("stages are still being changed, and are left behind");
            }
        }
    }
}

impl Prepared {
    /// What is told when the new stages go on.
    pub(super) fn report(&self, since: Instant) -> Relayout {
        Relayout { stall: since.elapsed(), ..self.report.clone() }
    }
}

impl Relayout {
    /// To the layout that there is.
    pub(super) fn nothing(layout: &Layout) -> Relayout {
        Relayout {
            from: layout.clone(),
            to: layout.clone(),
            moved: Vec::new(),
            weight_bytes: 0,
            kv_bytes: 0,
            ready: Duration::ZERO,
            stall: Duration::ZERO,
        }
    }
}

fn report(now: &Recipe, to: &Layout, moves: &[Move], ready: Duration) -> Relayout {
    let moved = |moved: &Move| MovedUnit { unit: moved.unit, from: moved.from, to: moved.to };
    Relayout {
        to: to.clone(),
        moved: moves.iter().map(moved).collect(),
        weight_bytes: moves.iter().map(|moved| (now.weigh)(moved.unit).0).sum(),
        ready,
        ..Relayout::nothing(&now.layout)
    }
}

/// Who asked may have gone.
pub(super) fn tell(reply: Option<channel::Sender<Result<Relayout>>>, outcome: Result<Relayout>) {
    match (reply, outcome) {
        (Some(reply), outcome) => _ = reply.send(outcome),
        (None, Err(error)) => tracing::warn!(%error, "the layout stays as it is"),
        (None, Ok(_)) => (),
    }
}

/// Of which old stages, and of what share of their layers, each new stage is made.
pub(super) fn parts(old: &Layout, new: &Layout) -> Vec<Vec<(usize, f64)>> {
    let common = |a: &Range<usize>, b: &Range<usize>| a.end.min(b.end).saturating_sub(a.start.max(b.start));
    let of = |new: &Range<usize>| {
        let stages = old.stages().iter().enumerate();
        let shares = stages.map(|(i, old)| (i, common(&old.layers, new) as f64 / old.layers.len() as f64));
        shares.filter(|(_, share)| *share > 0.0).collect()
    };
    new.stages().iter().map(|stage| of(&stage.layers)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_made_of_parts_of_others() {
        let of = |old: &str, new: &str| parts(&old.parse().unwrap(), &new.parse().unwrap());
        assert_eq!(of("0-3,4-5", "0-1,2-5"), [vec![(0, 0.5)], vec![(0, 0.5), (1, 1.0)]]);
        assert_eq!(of("0-3", "0,1-3"), [vec![(0, 0.25)], vec![(0, 0.75)]]);
        assert_eq!(of("0,1,2", "0-2"), [vec![(0, 1.0), (1, 1.0), (2, 1.0)]]);
    }
}
