//! Answers on stdout: text as it comes, or JSON lines.

use std::{
    io::{self, Write},
    sync::Arc,
};

use serde::Serialize;

use super::{
    answer::{Answer, Sample},
    complain,
    table::rate,
};
use crate::{
    error::Error,
    request::{FinishReason, Logprobs, Usage},
    text::Tokenizer,
};

/// Shows answers one after another. What it returns is stdout's failure.
pub(super) trait Printer {
    /// The answer to prompt number `which` (from 0) begins.
    fn begin(&mut self, which: usize, samples: u32) -> io::Result<()>;
    /// It has grown.
    fn grown(&mut self, answer: &Answer) -> io::Result<()>;
    /// All its samples have ended.
    fn ended(&mut self, answer: &Answer) -> io::Result<()>;
    /// It, or its prompt, is wrong, and the others go on.
    fn failed(&mut self, why: &Error) -> io::Result<()>;
}

/// Text as it comes. Of several samples one at a time is live; the others catch up after it.
pub(super) struct Text<W> {
    out: W,
    many_prompts: bool,
    /// The model has no tokenizer: its tokens are shown as numbers.
    ids_only: bool,
    which: usize,
    live: usize,
    shown: usize,
}

impl<W: Write> Text<W> {
    /// Headings name the prompt if there are `many_prompts`, and the sample if there are several.
    pub(super) fn new(out: W, many_prompts: bool, ids_only: bool) -> Self {
        Text { out, many_prompts, ids_only, which: 0, live: 0, shown: 0 }
    }

    fn heading(&mut self, samples: usize) -> io::Result<()> {
        let prompt = self.many_prompts.then(|| format!("prompt {}", self.which + 1));
        let sample = (samples > 1).then(|| format!("sample {}", self.live + 1));
        let names: Vec<String> = prompt.into_iter().chain(sample).collect();
        if !names.is_empty() {
            writeln!(self.out, "=== {} ===", names.join(", "))?;
        }
        self.out.flush()
    }

    fn show(&mut self, sample: &Sample) -> io::Result<()> {
        if self.ids_only {
            for id in &sample.ids[self.shown..] {
                let space = if self.shown == 0 { "" } else { " " };
                write!(self.out, "{space}{id}")?;
                self.shown += 1;
            }
        } else {
            self.out.write_all(&sample.text.as_bytes()[self.shown..])?;
            self.shown = sample.text.len();
        }
        self.out.flush()
    }
}

impl<W: Write> Printer for Text<W> {
    fn begin(&mut self, which: usize, samples: u32) -> io::Result<()> {
        (self.which, self.live, self.shown) = (which, 0, 0);
        self.heading(samples as usize)
    }

    fn grown(&mut self, answer: &Answer) -> io::Result<()> {
        while let Some(sample) = answer.samples.get(self.live) {
            self.show(sample)?;
            if sample.end.is_none() {
                break;
            }
            writeln!(self.out)?;
            (self.live, self.shown) = (self.live + 1, 0);
            if self.live < answer.samples.len() {
                self.heading(answer.samples.len())?;
            }
        }
        self.out.flush()
    }

    fn ended(&mut self, _: &Answer) -> io::Result<()> {
        Ok(())
    }

    fn failed(&mut self, why: &Error) -> io::Result<()> {
        if self.shown > 0 {
            writeln!(self.out)?;
        }
        self.out.flush()?;
        complain(&why.to_string());
        Ok(())
    }
}

/// One JSON object a prompt.
pub(super) struct Json<W> {
    out: W,
    tokenizer: Option<Arc<Tokenizer>>,
}

#[derive(Serialize)]
struct FailedLine {
    error: String,
}

/// One sample: the line itself, or an entry of a line's `samples`.
#[derive(Serialize)]
struct SampleLine<'a> {
    text: &'a str,
    token_ids: &'a [u32],
    #[serde(flatten)]
    prompt: Option<PromptLine<'a>>,
    completion_tokens: usize,
    finish_reason: FinishReason,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<TokenLine>,
    timings: Option<Timings>,
}

#[derive(Serialize)]
struct PromptLine<'a> {
    prompt_ids: &'a [u32],
    prompt_tokens: usize,
}

#[derive(Serialize)]
struct SamplesLine<'a> {
    #[serde(flatten)]
    prompt: PromptLine<'a>,
    samples: Vec<SampleLine<'a>>,
}

/// A token with its log-probability, and the most likely ones.
#[derive(Serialize)]
pub(super) struct TokenLine {
    #[serde(flatten)]
    chosen: TopLine,
    top: Vec<TopLine>,
}

#[derive(Serialize)]
struct TopLine {
    id: u32,
    token: Option<String>,
    logprob: f32,
}

#[derive(Serialize)]
struct Timings {
    queued_s: f64,
    first_token_s: f64,
    total_s: f64,
    prompt_tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
}

impl<W: Write> Json<W> {
    /// The tokenizer names the tokens of log-probabilities.
    pub(super) fn new(out: W, tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Json { out, tokenizer }
    }

    fn line(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.out.write_all(&text)?;
        self.out.flush()
    }

    fn sample<'a>(&self, sample: &'a Sample, prompt: Option<PromptLine<'a>>) -> SampleLine<'a> {
        SampleLine {
            text: &sample.text,
            token_ids: &sample.ids,
            prompt,
            completion_tokens: sample.ids.len(),
            finish_reason: sample.end.map_or(FinishReason::Cancelled, |(reason, _)| reason),
            logprobs: token_lines(sample, self.tokenizer.as_deref()),
            timings: sample.end.map(|(_, usage)| timings(&usage)),
        }
    }
}

/// A sample's log-probabilities. The tokenizer names tokens.
pub(super) fn token_lines(sample: &Sample, tokenizer: Option<&Tokenizer>) -> Vec<TokenLine> {
    let top = |id: u32, logprob: f32| {
        let token = tokenizer.and_then(|t| t.token_text(id));
        TopLine { id, token, logprob }
    };
    let line = |(&id, logprobs): (&u32, &Logprobs)| TokenLine {
        chosen: top(id, logprobs.chosen),
        top: logprobs.top.iter().map(|&(id, logprob)| top(id, logprob)).collect(),
    };
    sample.ids.iter().zip(&sample.logprobs).map(line).collect()
}

impl<W: Write> Printer for Json<W> {
    fn begin(&mut self, _: usize, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn grown(&mut self, _: &Answer) -> io::Result<()> {
        Ok(())
    }

    fn ended(&mut self, answer: &Answer) -> io::Result<()> {
        let prompt = PromptLine { prompt_ids: &answer.prompt_ids, prompt_tokens: answer.prompt_ids.len() };
        match &answer.samples[..] {
            [sample] => {
                let line = self.sample(sample, Some(prompt));
                self.line(&line)
            }
            samples => {
                let samples = samples.iter().map(|s| self.sample(s, None)).collect();
                self.line(&SamplesLine { prompt, samples })
            }
        }
    }

    fn failed(&mut self, why: &Error) -> io::Result<()> {
        self.line(&FailedLine { error: why.to_string() })
    }
}

fn timings(usage: &Usage) -> Timings {
    let decoded = u64::from(usage.completion_tokens).saturating_sub(1);
    Timings {
        queued_s: usage.queued_s,
        first_token_s: usage.first_token_s,
        total_s: usage.total_s,
        prompt_tokens_per_s: rate(usage.prompt_tokens.into(), usage.first_token_s - usage.queued_s),
        decode_tokens_per_s: rate(decoded, usage.total_s - usage.first_token_s),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::request::Event;

    fn token(sample: u32, id: u32, text: &str) -> Event {
        Event::Token { sample, id, text: text.into(), logprobs: None }
    }

    fn finished(sample: u32, text: &str) -> Event {
        Event::Finished { sample, reason: FinishReason::Stop, text: text.into(), usage: Usage::default() }
    }

    /// Prints the events of one prompt.
    fn printed(printer: &mut dyn Printer, which: usize, samples: u32, events: Vec<Event>) {
        let mut answer = Answer::new(vec![7, 8], samples);
        printer.begin(which, samples).unwrap();
        for event in events {
            answer.take(event).unwrap();
            printer.grown(&answer).unwrap();
        }
        printer.ended(&answer).unwrap();
    }

    fn text(many: bool, ids_only: bool, samples: u32, events: Vec<Event>) -> String {
        let mut out = Vec::new();
        printed(&mut Text::new(&mut out, many, ids_only), 1, samples, events);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_comes_in_the_order_of_the_samples() {
        let one = || vec![token(0, 1, "he"), token(0, 2, "l"), finished(0, "lo")];
        assert_eq!(text(false, false, 1, one()), "hello\n");
        assert_eq!(text(true, false, 1, one()), "=== prompt 2 ===\nhello\n");
        assert_eq!(text(false, true, 1, one()), "1 2\n");
        let two =
            || vec![token(1, 5, "b"), token(0, 1, "a"), finished(1, "!"), token(0, 2, "A"), finished(0, "")];
        let want = "=== sample 1 ===\naA\n=== sample 2 ===\nb!\n";
        assert_eq!(text(false, false, 2, two()), want);
        assert!(text(true, false, 2, two()).starts_with("=== prompt 2, sample 1 ===\n"));
    }

    fn json(samples: u32, events: Vec<Event>) -> Value {
        let mut out = Vec::new();
        printed(&mut Json::new(&mut out, None), 0, samples, events);
        assert_eq!(out.iter().filter(|b| **b == b'\n').count(), 1);
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn json_is_one_object_a_prompt() {
        let one = json(1, vec![token(0, 1, "a"), token(0, 2, "\n"), finished(0, "b")]);
        assert_eq!(one["text"], "a\nb");
        assert_eq!(one["token_ids"], json!([1, 2]));
        assert_eq!(one["prompt_ids"], json!([7, 8]));
        assert_eq!((&one["prompt_tokens"], &one["completion_tokens"]), (&json!(2), &json!(2)));
        assert_eq!(one["finish_reason"], "stop");
        assert!(one.get("logprobs").is_none() && one["timings"]["total_s"].is_number());
        let two = json(2, vec![token(1, 5, "b"), token(0, 1, "a"), finished(0, "")]);
        assert_eq!(two["samples"][0]["finish_reason"], "stop");
        assert_eq!(two["samples"][1]["text"], "b");
        assert_eq!(two["samples"][1]["finish_reason"], "cancelled");
        assert_eq!(two["prompt_tokens"], 2);
        assert!(two["samples"][0].get("prompt_ids").is_none() && two.get("text").is_none());
    }

    #[test]
    fn json_logprobs_are_one_object_a_token() {
        let logprobs = Some(Logprobs { chosen: -0.1, top: vec![(3, -0.1), (4, -2.5)] });
        let event = Event::Token { sample: 0, id: 3, text: "x".into(), logprobs };
        let line = json(1, vec![event, finished(0, "")]);
        assert_eq!(line["logprobs"][0]["id"], 3);
        assert_eq!(line["logprobs"][0]["logprob"].to_string(), "-0.1");
        assert_eq!(line["logprobs"][0]["top"][1], json!({"id": 4, "token": null, "logprob": -2.5}));
    }

    #[test]
    fn a_failed_prompt_is_a_line_of_its_own() {
        let mut out = Vec::new();
        Json::new(&mut out, None).failed(&Error::Request("too \"long\"".into())).unwrap();
        let line: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(line, json!({"error": "request: too \"long\""}));
    }
}
