//! What has come of a request so far.

use std::{io, time::Duration};

use super::interrupt::Interrupt;
use crate::{
    engine::{Events, TimedOut},
    error::{Error, Result},
    request::{Event, FinishReason, Logprobs, Usage},
};

/// How long a signal may wait for the next event.
pub(super) const PATIENCE: Duration = Duration::from_millis(50);

/// Where events come from: [`Events`], but for tests.
pub(super) trait Stream {
    /// The next event, `None` after the last; `Err` if nothing came in time.
    fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, TimedOut>;
    /// Ends the request. The last events are still to be read.
    fn cancel(&mut self);
}

impl Stream for Events {
    fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, TimedOut> {
        Events::next_timeout(self, timeout)
    }

    fn cancel(&mut self) {
        Events::cancel(self);
    }
}

/// How an answer, or a run, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// By itself.
    Done,
    /// By a signal.
    Interrupted,
}

/// What keeps an answer from being shown to its end.
pub(super) enum Halt {
    /// Stdout takes no more.
    Stdout(io::Error),
    /// The request has failed.
    Wrong(Error),
}

impl From<io::Error> for Halt {
    fn from(e: io::Error) -> Self {
        Halt::Stdout(e)
    }
}

/// A request's answer, growing.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Answer {
    /// The tokens that were asked with.
    pub(super) prompt_ids: Vec<u32>,
    /// One entry a sample.
    pub(super) samples: Vec<Sample>,
}

/// One sample of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample {
    pub(super) text: String,
    pub(super) ids: Vec<u32>,
    pub(super) logprobs: Vec<Logprobs>,
    /// Why it ended and what it took; `None` while it grows.
    pub(super) end: Option<(FinishReason, Usage)>,
}

impl Answer {
    pub(super) fn new(prompt_ids: Vec<u32>, samples: u32) -> Self {
        Answer { prompt_ids, samples: vec![Sample::default(); samples as usize] }
    }

    /// Takes all events, and shows the answer each time that it has grown. A signal cancels the request, and
    /// what there is of the answer is kept.
    pub(super) fn read(
        &mut self,
        events: &mut dyn Stream,
        interrupt: &Interrupt,
        grown: &mut dyn FnMut(&Answer) -> io::Result<()>,
    ) -> Result<End, Halt> {
        let mut end = End::Done;
        loop {
            if end == End::Done && interrupt.signalled() {
                end = End::Interrupted;
                events.cancel();
            }
            match events.next_timeout(PATIENCE) {
                Ok(Some(event)) => self.take(event).map_err(Halt::Wrong)?,
                Ok(None) => return Ok(end),
                Err(TimedOut) => continue,
            }
            grown(self)?;
        }
    }

    /// Takes note of an event; an error is the request's.
    pub(super) fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Token { sample, id, text, logprobs } => {
                let sample = self.sample(sample);
                sample.text.push_str(&text);
                sample.ids.push(id);
                sample.logprobs.extend(logprobs);
            }
            Event::Finished { sample, reason, text, usage } => {
                let sample = self.sample(sample);
                sample.text.push_str(&text);
                sample.end = Some((reason, usage));
            }
            Event::Error(e) => return Err(e),
        }
        Ok(())
    }

    fn sample(&mut self, i: u32) -> &mut Sample {
        self.samples
            .get_mut(i as usize)
            .expect("an event names a sample that was not asked for; this is a bug")
    }
}
