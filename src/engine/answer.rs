//! One sample's way from tokens to events: text, stop strings, the reason to end.

use std::{sync::Arc, time::Instant};

use crate::{
    batch::Sampled,
    error::Result,
    request::{Event, FinishReason, Request, Usage},
    text::{Detokenizer, StopStrings, Tokenizer},
};

/// What ends a sample by its tokens alone.
#[derive(Debug, Clone)]
pub(super) struct Ending {
    /// Tokens after which it ends.
    pub(super) eos: Arc<[u32]>,
    /// So many tokens at most.
    pub(super) tokens_max: usize,
}

/// A sample that is being made.
pub(super) struct Answer {
    sample: u32,
    /// `None` without a tokenizer: events carry ids alone.
    text: Option<Text>,
    ending: Ending,
    usage: Usage,
    submitted: Instant,
}

struct Text {
    detokenizer: Detokenizer,
    stops: StopStrings,
}

/// What a token led to.
pub(super) struct Told {
    /// For the client, in order.
    pub(super) events: Vec<Event>,
    /// Nothing more is wanted.
    pub(super) ended: bool,
}

impl Ending {
    /// Why a sample ends with this token, its `count`th.
    pub(super) fn reason(&self, id: u32, count: usize) -> Option<FinishReason> {
        match (self.eos.contains(&id), count >= self.tokens_max) {
            (true, _) => Some(FinishReason::Stop),
            (false, true) => Some(FinishReason::Length),
            (false, false) => None,
        }
    }
}

impl Answer {
    pub(super) fn new(
        sample: u32,
        request: &Request,
        tokenizer: Option<&Arc<Tokenizer>>,
        ending: Ending,
        prompt_tokens: usize,
    ) -> Result<Self> {
        let text = match tokenizer {
            Some(tokenizer) => Some(Text {
                detokenizer: Detokenizer::new(tokenizer.clone(), true),
                stops: StopStrings::new(request.stop.strings.clone())?,
            }),
            None => None,
        };
        let usage = Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() };
        Ok(Answer { sample, text, ending, usage, submitted: Instant::now() })
    }

    /// The first step that holds it has been planned.
    pub(super) fn started(&mut self, at: Instant) {
        self.usage.queued_s = self.since_submitted(at);
    }

    /// Takes the next token, which has come at this time.
    pub(super) fn push(&mut self, token: Sampled, at: Instant) -> Result<Told> {
        self.usage.completion_tokens += 1;
        self.usage.total_s = self.since_submitted(at);
        if self.usage.completion_tokens == 1 {
            self.usage.first_token_s = self.usage.total_s;
        }
        let Sampled { id, logprobs, .. } = token;
        let known = self.ending.reason(id, self.usage.completion_tokens as usize);
        let eos = known == Some(FinishReason::Stop);
        let (mut text, mut stopped) = (String::new(), eos);
        if let Some(part) = self.text.as_mut().filter(|_| !eos) {
            let step = part.stops.push(&part.detokenizer.push(id)?);
            (text, stopped) = (step.text, step.hit);
        }
        let mut events = vec![Event::Token { sample: self.sample, id, text, logprobs }];
        let reason = if stopped { Some(FinishReason::Stop) } else { known };
        if let Some(reason) = reason {
            // After a stop string nothing of the text is wanted any more.
            let (rest, hit) = if stopped && !eos { (String::new(), true) } else { self.rest()? };
            let reason = if hit { FinishReason::Stop } else { reason };
            events.push(self.finished(reason, rest));
        }
        Ok(Told { events, ended: reason.is_some() })
    }

    /// Ends it from outside.
    pub(super) fn cancel(&mut self) -> Event {
        self.usage.total_s = self.since_submitted(Instant::now());
        match self.rest() {
            Ok((rest, _)) => self.finished(FinishReason::Cancelled, rest),
            Err(error) => Event::Error(error),
        }
    }

    /// Text that was held back, and whether it completes a stop string.
    fn rest(&mut self) -> Result<(String, bool)> {
        let Some(part) = &mut self.text else { return Ok((String::new(), false)) };
        let step = part.stops.push(&part.detokenizer.finish()?);
        let rest = if step.hit { String::new() } else { part.stops.finish() };
        Ok((step.text + &rest, step.hit))
    }

    fn finished(&self, reason: FinishReason, text: String) -> Event {
        Event::Finished { sample: self.sample, reason, text, usage: self.usage }
    }

    fn since_submitted(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.submitted).as_secs_f64()
    }
}
