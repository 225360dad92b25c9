//! Stages that end nothing any more: a device hangs, or a driver keeps a thread. Nobody else would notice, since a stage that hangs
//! says nothing.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::StageFacts;
use crate::{error::Error, pipeline::StageMetrics};

/// How long GPUs may take from the end of a step to that of the next: the slowest need seconds. What the processor takes
/// for a large model may be longer, and it does not hang.
pub(super) const STALL: Duration = Duration::from_secs(120);
/// How long devices may take to say whether they have anything to do.
const ANSWER: Duration = Duration::from_secs(2);

/// Asks a stage's device whether it has done all that it was given; `None` if it has no mind of its own, or is gone.
pub(super) type AskIdle = Arc<dyn Fn() -> Option<bool> + Send + Sync>;

/// When something has last come of what is in flight.
#[derive(Debug)]
pub(super) struct Stall {
    since: Instant,
}

impl Stall {
    pub(super) fn new() -> Self {
        Stall { since: Instant::now() }
    }

    /// Something has ended, or nothing is in flight.
    pub(super) fn progress(&mut self) {
        self.since = Instant::now();
    }

    /// Is heard of when nothing has ended for too long; never without a limit.
    pub(super) fn late(&self, limit: Option<Duration>) -> channel::Receiver<Instant> {
        limit.map_or_else(channel::never, |limit| channel::at(self.since + limit))
    }

    /// What each stage does now.
    pub(super) fn error(&self, facts: &Mutex<Vec<StageFacts>>) -> Error {
        let facts = facts.lock().unwrap_or_else(PoisonError::into_inner);
        let stages: Vec<_> = facts
            .iter()
            .map(|f| (f.layers.clone(), f.device.clone(), f.metrics.clone(), f.idle.clone()))
            .collect();
        drop(facts);
        let idle = ask(stages.iter().map(|(.., idle)| idle.clone()).collect());
        let told = stages.iter().zip(idle).map(|((layers, device, metrics, _), idle)| {
            format!("{layers} on {device} {}", doing(metrics, idle))
        });
        let told: Vec<String> = told.collect();
        let seconds = self.since.elapsed().as_secs_f64();
        Error::Engine(format!("no step has ended for {seconds:.1} s: {}", told.join("; ")))
    }
}

/// `has begun 17 steps, waits for a micro-batch, its device is busy`.
fn doing(metrics: &StageMetrics, idle: Answer) -> String {
    let device = match idle {
        Answer::Told(None) => "",
        Answer::Told(Some(true)) => ", its device has nothing to do",
        Answer::Told(Some(false)) => ", its device is busy",
        Answer::Missing => ", its device does not answer",
    };
    format!("has passed on {} steps, {}{device}", metrics.times().batches, metrics.doing())
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Answer {
    Told(Option<bool>),
    Missing,
}

/// Asks all devices, each on a thread of its own: a driver that hangs keeps nobody.
fn ask(all: Vec<AskIdle>) -> Vec<Answer> {
    let until = Instant::now() + ANSWER;
    let asked: Vec<channel::Receiver<Option<bool>>> = all
        .into_iter()
        .map(|idle| {
            let (sender, answer) = channel::bounded(1);
            // Without a thread there is no answer.
            let _ = thread::Builder::new().name("idle".into()).spawn(move || sender.send(idle()));
            answer
        })
        .collect();
    asked.iter().map(|answer| answer.recv_deadline(until).map_or(Answer::Missing, Answer::Told)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_do_not_answer_keep_nobody() {
        let asks: Vec<AskIdle> = vec![
            Arc::new(|| Some(true)),
            Arc::new(|| {
                thread::sleep(4 * ANSWER);
                None
            }),
            Arc::new(|| None),
        ];
        let begun = Instant::now();
        assert_eq!(ask(asks), [Answer::Told(Some(true)), Answer::Missing, Answer::Told(None)]);
        assert!(begun.elapsed() < 2 * ANSWER);
    }
}
