//! Small tokenizers of the two common kinds, for tests.

use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::text::Tokenizer;

/// A model folder with these files.
pub(super) fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

pub(super) fn open(dir: &Path) -> Tokenizer {
    Tokenizer::open(dir).unwrap().unwrap()
}

/// Byte-level BPE, as GPT-2's and its heirs': the 256 bytes, merges of which some cut characters, two special
/// tokens, and one added token that is text.
pub(super) fn byte_level() -> Value {
    let letter = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as char,
        // The other bytes follow 255, in order.
        0..=0x20 => char::from_u32(0x100 + byte as u32).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x100 + byte as u32 - 0x7f + 0x21).unwrap(),
        0xad => '\u{143}',
    };
    let mut vocab: Map<String, Value> = (0..=255).map(|b| (letter(b).to_string(), json!(b))).collect();
    let mut merges = Vec::new();
    // " a", "he", "hel", half of an emoji, é, the end of one character with the beginning of another.
    for (a, b) in [(" ", "a"), ("h", "e"), ("he", "l")] {
        add_merge(&mut vocab, &mut merges, &a.bytes().map(letter).collect::<String>(), b);
    }
    for (a, b) in
        [(&[0xf0][..], 0x9f), (&[0xc3], 0xa9), (&[0x98], 0x80), (&[0xa9], 0xc3), (&[0xf0, 0x9f], 0x98)]
    {
        let a: String = a.iter().map(|&b| letter(b)).collect();
        add_merge(&mut vocab, &mut merges, &a, &letter(b).to_string());
    }
    let next = vocab.len() as u32;
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [
            added(next, "<|end|>", true), added(next + 1, "<|start|>", true), added(next + 2, "<think>", false),
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "vocab": vocab, "merges": merges},
    })
}

/// As SentencePiece's BPE for Llama 2: spaces are ▁, unknown characters are spelled in bytes, and the
/// decoder takes the first space away.
pub(super) fn sentence_piece() -> Value {
    let mut vocab: Map<String, Value> = Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.into(), json!(vocab.len()));
    }
    (0..=255).for_each(|byte| _ = vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len())));
    for c in "▁helo wrdaé\u{fffd}".chars().filter(|&c| c != ' ') {
        vocab.insert(c.to_string(), json!(vocab.len()));
    }
    let mut merges = Vec::new();
    for (a, b) in [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁", "▁"), ("▁", "a")] {
        add_merge(&mut vocab, &mut merges, a, b);
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab, "merges": merges},
    })
}

fn add_merge(vocab: &mut Map<String, Value>, merges: &mut Vec<String>, a: &str, b: &str) {
    merges.push(format!("{a} {b}"));
    let id = vocab.len();
    vocab.insert(format!("{a}{b}"), json!(id));
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "special": special,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}
