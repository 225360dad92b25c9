//! What has come of a request so far.

use std::thread;

use crossbeam_channel::{Receiver, bounded};

use crate::{
    error::{Error, Result},
    request::{Event, FinishReason, Logprobs, Usage},
};

/// Events that may wait for the one who prints them.
const EVENTS_WAITING: usize = 64;

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

    /// Whether every sample has ended.
    pub(super) fn done(&self) -> bool {
        self.samples.iter().all(|s| s.end.is_some())
    }

    /// What to say of an answer whose events end before its samples.
    pub(super) fn cut_short() -> Error {
        Error::Engine("it ended before the answer did".into())
    }

    fn sample(&mut self, i: u32) -> &mut Sample {
        self.samples
            .get_mut(i as usize)
            .expect("an event names a sample that was not asked for; this is a bug")
    }
}

/// Events on a channel, so that one can wait for a signal beside them. Dropping the receiver drops the
/// events, which cancels the request.
pub(super) fn follow(events: impl Iterator<Item = Event> + Send + 'static) -> Receiver<Event> {
    let (send, receive) = bounded(EVENTS_WAITING);
    thread::spawn(move || {
        for event in events {
            if send.send(event).is_err() {
                break;
            }
        }
    });
    receive
}
