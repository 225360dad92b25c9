//! What goes in and what comes out of the engine: plain data.

use serde::Serialize;

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
}

impl Message {
    /// A message of the given role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// A prompt, how to sample from it, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What to complete.
    pub prompt: Prompt,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopParams,
    /// How many independent samples to draw; sample `i` uses seed + `i`.
    pub n: u32,
}

impl Request {
    /// A request with default sampling (greedy) and stopping.
    pub fn new(prompt: Prompt) -> Self {
        Request { prompt, sampling: SamplingParams::default(), stop: StopParams::default(), n: 1 }
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

/// When to stop.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StopParams {
    /// At most this many new tokens; `None` goes on to the context's end.
    pub max_tokens: Option<u32>,
    /// Ends before the first of these in the answer's text.
    pub strings: Vec<String>,
    /// Goes on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
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
    /// The engine failed; the error was in the event before.
    Error,
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
