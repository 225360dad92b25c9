//! What goes in and what comes out of the engine: plain data.

use std::{fmt, sync::Arc};

use serde::Serialize;

use crate::error::{Error, Result};

/// The most `logprobs` that a request can ask for.
pub const LOGPROBS_MAX: u32 = 20;
/// The most stop strings of a request.
pub const STOP_STRINGS_MAX: usize = 64;
/// The most bytes of a stop string.
pub const STOP_BYTES_MAX: usize = 1024;
/// Presence and frequency penalties lie in `-PENALTY_MAX ..= PENALTY_MAX`.
const PENALTY_MAX: f32 = 100.0;

/// What to complete.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Text as it is, with the special tokens that the tokenizer adds by itself.
    Text(String),
    /// A conversation, rendered by the model's chat template.
    Chat(Vec<Message>),
    /// Token ids, used unchanged.
    Ids(Vec<u32>),
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
    /// Images and videos within it, in their order.
    #[serde(skip)]
    pub media: Vec<Inset>,
}

impl Message {
    /// A message of the given role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into(), media: Vec::new() }
    }

    /// A message of text, images and videos, in this order.
    pub fn of_parts(role: impl Into<String>, parts: impl IntoIterator<Item = Part>) -> Self {
        let mut message = Message::new(role, "");
        for part in parts {
            match part {
                Part::Text(text) => message.content.push_str(&text),
                Part::Media(media) => message.media.push(Inset { at: message.content.len(), media }),
            }
        }
        message
    }
}

/// An image, or the frames of a video, decoded and at the size at which they are cut into patches.
///
/// 8-bit pixels are a tenth of the patches that become of them, which are cut when their turn comes. Copies share them.
#[derive(Clone, PartialEq)]
pub struct Media {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Three numbers a pixel, row by row, of each frame; an image is one frame.
    pub frames: Arc<[Vec<u8>]>,
    /// For videos: seconds from one patch's frames to the next one's.
    pub seconds: Option<f64>,
}

impl fmt::Debug for Media {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Media { width, height, frames, seconds } = self;
        write!(f, "Media {{ {width}x{height}, {} frames, seconds: {seconds:?} }}", frames.len())
    }
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text.
    Text(String),
    /// An image or a video.
    Media(Media),
}

/// An image or a video within a message's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Inset {
    /// Bytes of the text before it.
    pub at: usize,
    /// It.
    pub media: Media,
}

/// The most samples of one request.
pub const SAMPLES_MAX: u32 = 128;

/// A prompt, how to sample from it, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What to complete.
    pub prompt: Prompt,
    /// Images and videos of a prompt that is no conversation: one for each placeholder in it, in their order.
    pub media: Vec<Media>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopParams,
    /// How many independent samples to draw; sample `i` uses seed + `i`.
    pub n: u32,
    /// Requests of higher priority come first; those of one priority in the order of submission.
    pub priority: i32,
}

impl Request {
    /// An error names what cannot be asked of a model with a vocabulary of `vocab` tokens; `text`: it has a tokenizer.
    pub(crate) fn check(&self, vocab: usize, text: bool) -> Result<()> {
        if self.n == 0 || self.n > SAMPLES_MAX {
            return refuse(format!("n is {}; it must be 1 to {SAMPLES_MAX}", self.n));
        }
        self.sampling.check(vocab)?;
        self.stop.check()?;
        if !text && !self.stop.strings.is_empty() {
            return refuse("stop strings need a tokenizer, and the model folder has none".into());
        }
        Ok(())
    }

    /// A request with default sampling (greedy) and stopping.
    pub fn new(prompt: Prompt) -> Self {
        let (sampling, stop) = Default::default();
        Request { prompt, media: Vec::new(), sampling, stop, n: 1, priority: 0 }
    }
}

/// How to choose the next token from the logits.
///
/// The order: logit bias, penalties, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most likely token (the lowest id of equals).
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the most likely one's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt and answer; 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens already in the answer; 0 is none.
    pub presence_penalty: f32,
    /// Subtracted once for each time that a token is already in the answer; 0 is none.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same tokens whatever else is in the batch; `None` draws one.
    pub seed: Option<u64>,
    /// `Some(k)` reports each token's log-probability and the k most likely ones (before bias,
    /// penalties and temperature).
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether tokens of the prompt or the answer change what comes next.
    pub(crate) fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// An error names the first parameter that cannot be used with a vocabulary of `vocab` tokens.
    pub fn check(&self, vocab: usize) -> Result<()> {
        check_range("temperature", self.temperature, 0.0..=f32::MAX, "a number from 0 up")?;
        check_range("top_p", self.top_p, f32::MIN_POSITIVE..=1.0, "above 0 and at most 1")?;
        check_range("min_p", self.min_p, 0.0..=1.0, "from 0 to 1")?;
        let positive = f32::MIN_POSITIVE..=f32::MAX;
        check_range("repetition_penalty", self.repetition_penalty, positive, "a number above 0")?;
        let penalty = -PENALTY_MAX..=PENALTY_MAX;
        check_range("presence_penalty", self.presence_penalty, penalty.clone(), "from -100 to 100")?;
        check_range("frequency_penalty", self.frequency_penalty, penalty, "from -100 to 100")?;
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab {
                return refuse(format!("logit_bias: token {id} is beyond the vocabulary of {vocab} tokens"));
            }
            if bias.is_nan() || bias == f32::INFINITY {
                return refuse(format!(
                    "logit_bias: {bias} for token {id} is neither a finite number nor -inf, which bans it"
                ));
            }
        }
        match self.logprobs {
            Some(k) if k > LOGPROBS_MAX => refuse(format!("logprobs: {k} is more than {LOGPROBS_MAX}")),
            _ => Ok(()),
        }
    }
}

/// When to stop.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StopParams {
    /// At most this many new tokens; `None` goes on to the context's end. Where prompt and answer together would be longer than
    /// the longest sequence, the request is refused.
    pub max_tokens: Option<u32>,
    /// Takes fewer than `max_tokens` then, as many as there is room for.
    pub shorten: bool,
    /// Ends before the first of these in the answer's text.
    pub strings: Vec<String>,
    /// Goes on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
}

impl StopParams {
    /// An error names the first parameter that cannot be used.
    pub fn check(&self) -> Result<()> {
        if self.max_tokens == Some(0) {
            return refuse("max_tokens: 0 asks for nothing; it must be at least 1".into());
        }
        if self.strings.len() > STOP_STRINGS_MAX {
            let n = self.strings.len();
            return refuse(format!("stop: {n} strings are more than {STOP_STRINGS_MAX}"));
        }
        for (i, string) in self.strings.iter().enumerate() {
            if string.is_empty() {
                return refuse(format!("stop: string {i} is empty"));
            }
            if string.len() > STOP_BYTES_MAX {
                let n = string.len();
                return refuse(format!("stop: string {i} has {n} bytes, more than {STOP_BYTES_MAX}"));
            }
        }
        Ok(())
    }
}

fn refuse(why: String) -> Result<()> {
    Err(Error::Request(why))
}

fn check_range(name: &str, value: f32, range: std::ops::RangeInclusive<f32>, want: &str) -> Result<()> {
    // A NaN is in no range.
    if range.contains(&value) { Ok(()) } else { refuse(format!("{name}: {value} is not {want}")) }
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// The client went away or asked to stop.
    Cancelled,
}

impl FinishReason {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// A chosen token's log-probability, and those of the most likely tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The most likely tokens, best first: id and log-probability.
    pub top: Vec<(u32, f32)>,
}

/// Something that happened to a request, in order.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A token was chosen. `text` is what can be shown since the last event: it may be empty while a
    /// character or a possible stop string is incomplete.
    Token {
        /// Which of the n samples.
        sample: u32,
        /// The token.
        id: u32,
        /// Text that is certain now.
        text: String,
        /// If asked for.
        logprobs: Option<Logprobs>,
    },
    /// A sample ended.
    Finished {
        /// Which of the n samples.
        sample: u32,
        /// Why.
        reason: FinishReason,
        /// Text that was held back and is certain now.
        text: String,
        /// What it took.
        usage: Usage,
    },
    /// The request failed; nothing follows.
    Error(crate::Error),
}

/// Counts and times of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens chosen, an end-of-sequence token included.
    pub completion_tokens: u32,
    /// Seconds from submission to the first step that held this sample.
    pub queued_s: f64,
    /// Seconds from submission to the first token.
    pub first_token_s: f64,
    /// Seconds from submission to the end.
    pub total_s: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl Fn(&mut SamplingParams)) -> String {
        let mut params = SamplingParams::default();
        change(&mut params);
        params.check(100).expect_err("must be refused").to_string()
    }

    #[test]
    fn default_parameters_are_accepted() {
        SamplingParams::default().check(1).unwrap();
        StopParams::default().check().unwrap();
        let all = SamplingParams {
            temperature: 0.7,
            top_k: u32::MAX,
            top_p: 0.001,
            min_p: 1.0,
            repetition_penalty: 0.5,
            presence_penalty: -2.0,
            frequency_penalty: 100.0,
            logit_bias: vec![(99, f32::NEG_INFINITY), (0, 1e30)],
            seed: Some(1),
            logprobs: Some(LOGPROBS_MAX),
        };
        all.check(100).unwrap();
    }

    #[test]
    fn each_bad_sampling_parameter_is_named() {
        for bad in [f32::NAN, f32::INFINITY, -0.1] {
            assert!(refused(|p| p.temperature = bad).starts_with("request: temperature: "));
            assert!(refused(|p| p.top_p = bad).starts_with("request: top_p: "));
            assert!(refused(|p| p.min_p = bad).starts_with("request: min_p: "));
            assert!(refused(|p| p.repetition_penalty = bad).starts_with("request: repetition_penalty: "));
        }
        for bad in [f32::NAN, f32::NEG_INFINITY, 100.5, -101.0] {
            assert!(refused(|p| p.presence_penalty = bad).starts_with("request: presence_penalty: "));
            assert!(refused(|p| p.frequency_penalty = bad).starts_with("request: frequency_penalty: "));
        }
        assert_eq!(refused(|p| p.top_p = 0.0), "request: top_p: 0 is not above 0 and at most 1");
        assert_eq!(refused(|p| p.top_p = 1.5), "request: top_p: 1.5 is not above 0 and at most 1");
        assert_eq!(refused(|p| p.min_p = 1.5), "request: min_p: 1.5 is not from 0 to 1");
        assert!(refused(|p| p.repetition_penalty = 0.0).contains("repetition_penalty"));
        assert_eq!(
            refused(|p| p.logit_bias = vec![(1, 0.0), (100, 1.0)]),
            "request: logit_bias: token 100 is beyond the vocabulary of 100 tokens"
        );
        assert!(refused(|p| p.logit_bias = vec![(1, f32::NAN)]).contains("logit_bias"));
        assert!(refused(|p| p.logit_bias = vec![(1, f32::INFINITY)]).contains("token 1"));
        assert_eq!(refused(|p| p.logprobs = Some(21)), "request: logprobs: 21 is more than 20");
    }

    #[test]
    fn each_bad_stop_parameter_is_named() {
        let refused = |stop: StopParams| stop.check().expect_err("must be refused").to_string();
        let strings = |strings: Vec<String>| StopParams { strings, ..StopParams::default() };
        assert!(refused(StopParams { max_tokens: Some(0), ..Default::default() }).contains("max_tokens"));
        assert_eq!(refused(strings(vec!["a".into(), String::new()])), "request: stop: string 1 is empty");
        assert!(refused(strings(vec!["a".into(); 65])).contains("65 strings are more than 64"));
        assert!(refused(strings(vec!["a".repeat(1025)])).contains("1025 bytes"));
        strings(vec!["a".repeat(1024); 64]).check().unwrap();
    }
}
