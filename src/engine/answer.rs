//! One sample's way from tokens to events: text, stop strings, the reason to end.

use std::{sync::Arc, time::Instant};

use crate::{
    batch::Sampled,
    error::Result,
    request::{Event, FinishReason, Request, Usage},
    text::{Detokenizer, StopStrings, Tokenizer},
};

/// A sample that is being made.
pub(super) struct Answer {
    sample: u32,
    /// `None` without a tokenizer: events carry ids alone.
    text: Option<Text>,
    /// Tokens after which it ends.
    eos: Arc<[u32]>,
    tokens_max: usize,
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

impl Answer {
    pub(super) fn new(
        sample: u32,
        request: &Request,
        tokenizer: Option<&Arc<Tokenizer>>,
        eos: Arc<[u32]>,
        prompt_tokens: usize,
        tokens_max: usize,
    ) -> Result<Self> {
        let text = match tokenizer {
            Some(tokenizer) => Some(Text {
                detokenizer: Detokenizer::new(tokenizer.clone(), true),
                stops: StopStrings::new(request.stop.strings.clone())?,
            }),
            None => None,
        };
        let eos = if request.stop.ignore_eos { Arc::from([]) } else { eos };
        let usage = Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() };
        Ok(Answer { sample, text, eos, tokens_max, usage, submitted: Instant::now() })
    }

    /// The first step that holds it has been planned, or it begins again.
    pub(super) fn started(&mut self) {
        if self.usage.queued_s == 0.0 {
            self.usage.queued_s = self.submitted.elapsed().as_secs_f64();
        }
    }

    /// Takes the next token.
    pub(super) fn push(&mut self, token: Sampled) -> Result<Told> {
        self.usage.completion_tokens += 1;
        if self.usage.completion_tokens == 1 {
            self.usage.first_token_s = self.submitted.elapsed().as_secs_f64();
        }
        let Sampled { id, logprobs, .. } = token;
        let eos = self.eos.contains(&id);
        let (mut text, mut stopped) = (String::new(), eos);
        if let Some(part) = self.text.as_mut().filter(|_| !eos) {
            let step = part.stops.push(&part.detokenizer.push(id)?);
            (text, stopped) = (step.text, step.hit);
        }
        let mut events = vec![Event::Token { sample: self.sample, id, text, logprobs }];
        let reason = match (stopped, self.usage.completion_tokens as usize >= self.tokens_max) {
            (true, _) => Some(FinishReason::Stop),
            (false, true) => Some(FinishReason::Length),
            (false, false) => None,
        };
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

    fn finished(&mut self, reason: FinishReason, text: String) -> Event {
        self.usage.total_s = self.submitted.elapsed().as_secs_f64();
        Event::Finished { sample: self.sample, reason, text, usage: self.usage }
    }
}
