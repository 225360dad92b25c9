//! What several test files share.

#![allow(dead_code)] // Each test file uses a part of it.

use std::path::PathBuf;

use pipeline_infer::{Event, Events, Prompt, Request};

/// A file or folder of tests/data.
pub(crate) fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
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
