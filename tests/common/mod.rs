//! What several test files share.

#![allow(dead_code)] // Each test file uses a part of it.

pub(crate) mod crossing;
pub(crate) mod golden;
pub(crate) mod seen;
pub(crate) mod tower;
pub(crate) mod world;

use std::path::{Path, PathBuf};

use pipeline_infer::{Event, Events, Prompt, Request};

/// The project's folder: PIPELINE_INFER_ROOT, where tests run on another machine than the one they were built on; else
/// the one they were built in; else the working directory.
pub(crate) fn root() -> PathBuf {
    if let Some(given) = std::env::var_os("PIPELINE_INFER_ROOT") {
        return given.into();
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    if built.exists() { built.into() } else { PathBuf::from(".") }
}

/// A file or folder of tests/data.
pub(crate) fn data(name: &str) -> PathBuf {
    root().join("tests/data").join(name)
}

/// Numbers between -1 and 1, the same for the same seed.
pub(crate) fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    std::iter::repeat_with(|| random.number()).take(len).collect()
}

/// A few random choices, the same for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Between -1 and 1.
    pub(crate) fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        ((self.next() >> 33) as usize * end) >> 31
    }
}

/// A small model with a tokenizer and a chat template.
pub(crate) fn chat_llama() -> PathBuf {
    data("chat-llama")
}

/// A greedy request for exactly `answer` tokens, where the context has room.
pub(crate) fn request(ids: &[u32], answer: u32) -> Request {
    let mut request = Request::new(Prompt::Ids(ids.to_vec()));
    request.stop.max_tokens = Some(answer);
    request.stop.ignore_eos = true;
    request
}

/// All events; an error among them fails the test.
pub(crate) fn collect(events: Events) -> Vec<Event> {
    let events: Vec<Event> = events.collect();
    if let Some(Event::Error(error)) = events.last() {
        panic!("the request failed: {error}");
    }
    events
}

/// The tokens, and the bits of the log-probabilities of them and of the most likely ones.
pub(crate) fn logprob_bits(events: &[Event]) -> (Vec<u32>, Vec<u32>) {
    let (mut ids, mut bits) = (Vec::new(), Vec::new());
    for event in events {
        if let Event::Token { id, logprobs, .. } = event {
            ids.push(*id);
            if let Some(logprobs) = logprobs {
                bits.push(logprobs.chosen.to_bits());
                bits.extend(logprobs.top.iter().flat_map(|&(id, p)| [id, p.to_bits()]));
            }
        }
    }
    (ids, bits)
}
