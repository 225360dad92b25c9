//! The engine's thread and its layout: from one to another.

use std::{sync::PoisonError, time::Instant};

use crossbeam_channel as channel;

use super::{Stages, Worker};
use crate::{
    engine::{
        rebuild::Old,
        recipe::Recipe,
        relayout::{Change, Failed, GAP, Prepared, Relayout, State, Switch, parts, tell},
    },
    error::{Error, Result},
    layout::Layout,
};

impl Worker {
    /// Another layout is wanted: one at a time.
    pub(super) fn relayout(&mut self, layout: Layout, reply: Option<channel::Sender<Result<Relayout>>>) {
        let refused = |why: String| Err(Error::Engine(format!("layout {layout}: {why}")));
        let busy = self.change.is_some() || matches!(self.stages, Stages::Switching(_));
        let running = match &self.stages {
            Stages::Failed(error, _) => return tell(reply, Err(error.clone())),
            _ if layout == self.recipe.layout => return tell(reply, Ok(Relayout::nothing(&layout))),
            _ if busy => return tell(reply, refused("the layout is being changed already".into())),
            Stages::Up(running) => running,
            _ => return tell(reply, refused("the stages are being built anew".into())),
        };
        match Change::start(&self.recipe, running, layout, reply.clone()) {
            Ok(change) => self.change = Some(change),
            Err(error) => tell(reply, Err(error)),
        }
    }

    /// Stages of another layout have been made ready, or cannot be.
    pub(super) fn prepared(&mut self, prepared: Result<Box<Prepared>>) {
        let change = self.change.as_mut().expect("nobody wanted another layout; this is a bug");
        match prepared {
            Ok(prepared) => change.state = State::Draining(prepared, Instant::now()),
            Err(error) => {
                let Change { reply, layout, .. } = self.change.take().expect("it was there; this is a bug");
                self.balancer.iter_mut().for_each(|balancer| balancer.refused(&layout));
                tell(reply, Err(error));
            }
        }
    }

    /// Goes on with a change where it can: its stages take over when the last step has come back, and the balancer may want
    /// one.
    pub(super) fn change_stages(&mut self) {
        if self.change.is_none() && matches!(self.stages, Stages::Up(_)) {
            let wanted = self.balancer.as_mut().and_then(|balancer| balancer.wanted(Instant::now()));
            if let Some(layout) = wanted {
                tracing::info!(%layout, "a stage is slower than the others: a layer moves");
                self.relayout(layout, None);
            }
        }
        let stats = self.scheduler.stats();
        let in_flight = stats.in_flight + stats.images.map_or(0, |images| images.in_flight);
        let drained = in_flight == 0 && matches!(self.stages, Stages::Up(_));
        let Some(change) = self.change.take_if(|change| change.drains() && drained) else { return };
        let stays = Stages::Failed(Error::Engine("it is not known why; this is a bug".into()), None);
        let (Stages::Up(old), State::Draining(prepared, since)) =
            (std::mem::replace(&mut self.stages, stays), change.state)
        else {
            unreachable!("just asked; this is a bug")
        };
        let (runs, lost) = (self.scheduler.blocks_in_use(GAP), old.lost);
        match Switch::start(old, (prepared, since), change.reply.clone(), runs) {
            Ok(switch) => self.stages = Stages::Switching(switch),
            Err(error) => self.lose(change.reply, Failed { error, hopeless: lost() }),
        }
    }

    /// The new stages have all that they need, or nothing is left.
    pub(super) fn switched(&mut self, outcome: Result<Box<Prepared>, Failed>) {
        let stays = Stages::Failed(Error::Engine("it is not known why; this is a bug".into()), None);
        let Stages::Switching(switch) = std::mem::replace(&mut self.stages, stays) else {
            unreachable!("no stages are being changed; this is a bug")
        };
        match outcome {
            Ok(prepared) => self.install(*prepared, switch),
            Err(failed) => self.lose(switch.reply, failed),
        }
    }

    fn install(&mut self, prepared: Prepared, switch: Switch) {
        let old = std::mem::replace(&mut self.recipe, prepared.recipe.clone()).layout;
        let layout = &self.recipe.layout;
        self.meter.relaid(layout);
        let cost = self.scheduler.cost_model().of_parts(&parts(&old, layout));
        self.scheduler.set_cost_model(cost);
        let Recipe { scheduling, images, .. } = &self.recipe;
        self.scheduler.change_stages(scheduling.slots, scheduling.ahead, *images);
        self.balancer.iter_mut().for_each(|balancer| balancer.changed(layout));
        *self.layout.lock().unwrap_or_else(PoisonError::into_inner) = layout.clone();
        let report = prepared.report(switch.since);
        *self.facts.lock().unwrap_or_else(PoisonError::into_inner) = prepared.facts;
        self.stages = Stages::Up(prepared.wired);
        self.counts.relaid();
        self.plan();
        let (moved, stall_ms) = (report.moved.len(), report.stall.as_secs_f64() * 1e3);
        tracing::info!(from = %report.from, to = %report.to, moved, stall_ms, "the layout has changed");
        tell(switch.reply, Ok(report));
    }

    /// A change has failed half way: a fault like any other, in the layout of before.
    fn lose(&mut self, reply: Option<channel::Sender<Result<Relayout>>>, failed: Failed) {
        let Failed { error, hopeless } = failed;
        tracing::warn!(%error, "changing the layout has failed: requests that had started end here");
        tell(reply, Err(error.clone()));
        let old = Old { running: None, change: None, patience: self.recipe.patience };
        match hopeless {
            true => self.fail(error, None),
            false => self.begin_anew(error, old, false),
        }
    }
}
