//! Text of tokens that come one by one.

use std::sync::Arc;

use crate::{error::Result, text::Tokenizer};

/// What an incomplete character is decoded as.
const REPLACEMENT: char = '\u{fffd}';
/// Tokens that are decoded together at most: an incomplete character has at most three tokens, and one before
/// them is context.
const WINDOW_MAX: usize = 4;

/// Turns tokens into text as they come, and holds back characters that are incomplete.
///
/// All text together is what [`Tokenizer::decode`] makes of all tokens together. The one exception: where a
/// vocabulary spells unknown characters in bytes, and a run of byte tokens is not UTF-8, `decode` replaces
/// every byte of the run; this keeps the characters of the run that are whole.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The last tokens: what is held back, and at least one before it, since a decoder may treat the
    /// first token of a text in its own way.
    window: Vec<u32>,
    /// Bytes of the window's text that are out already.
    sent: usize,
    bytes: Utf8,
}

impl Detokenizer {
    /// For a text that begins now. `skip_special` leaves special tokens out.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Detokenizer { tokenizer, skip_special, window: Vec::new(), sent: 0, bytes: Utf8::default() }
    }

    /// Takes a token, and returns the text that is certain now and was not before.
    pub fn push(&mut self, id: u32) -> Result<String> {
        if !self.tokenizer.is_token(id) || (self.skip_special && self.tokenizer.is_special(id)) {
            return Ok(String::new());
        }
        match self.tokenizer.fallback_byte(id) {
            // An ASCII byte at the very beginning may be a space that the decoder takes away.
            Some(byte) if !(self.window.is_empty() && byte.is_ascii()) => self.push_byte(id, byte),
            _ => self.push_token(id),
        }
    }

    /// The tokens have ended: returns the text that was held back.
    pub fn finish(&mut self) -> Result<String> {
        let mut text = self.bytes.flush();
        let whole = self.decode(&self.window)?;
        text.push_str(whole.get(self.sent..).unwrap_or_default());
        self.window.clear();
        self.sent = 0;
        Ok(text)
    }

    fn push_byte(&mut self, id: u32, byte: u8) -> Result<String> {
        let mut text = String::new();
        if self.bytes.pending.is_empty() {
            // Text held back before a run of bytes cannot become complete any more.
            text.push_str(self.decode(&self.window)?.get(self.sent..).unwrap_or_default());
        }
        self.bytes.push(byte, &mut text);
        self.restart(id)?;
        Ok(text)
    }

    fn push_token(&mut self, id: u32) -> Result<String> {
        let mut text = self.bytes.flush();
        self.window.push(id);
        let whole = self.decode(&self.window)?;
        // The end of the text may be an incomplete character; what stands before the end is certain.
        let certain = whole.strip_suffix(REPLACEMENT).unwrap_or(&whole).len();
        text.push_str(whole.get(self.sent..certain).unwrap_or_default());
        let held = whole.len() - certain;
        if held == 0 {
            self.restart(id)?;
        } else {
            self.sent = self.sent.max(certain);
            if self.window.len() > WINDOW_MAX {
                let excess = self.window.len() - WINDOW_MAX;
                self.window.drain(..excess);
                self.sent = self.decode(&self.window)?.len().saturating_sub(held);
            }
        }
        Ok(text)
    }

    /// Everything is out; the last token stays as the context of the next one.
    fn restart(&mut self, id: u32) -> Result<()> {
        self.window.clear();
        self.window.push(id);
        self.sent = self.decode(&self.window)?.len();
        Ok(())
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        // Special tokens that are left out never come into the window.
        if ids.is_empty() { Ok(String::new()) } else { self.tokenizer.decode(ids, false) }
    }
}

/// Characters from single bytes.
#[derive(Debug, Default)]
struct Utf8 {
    /// The beginning of a character.
    pending: Vec<u8>, // at most 3
}

impl Utf8 {
    fn push(&mut self, byte: u8, text: &mut String) {
        self.pending.push(byte);
        match std::str::from_utf8(&self.pending) {
            Ok(whole) => {
                text.push_str(whole);
                self.pending.clear();
            }
            // Incomplete: wait for more.
            Err(e) if e.error_len().is_none() => {}
            Err(_) => {
                // The bytes before this one will never be a character; this one may begin another.
                self.pending.pop();
                let alone = self.pending.is_empty();
                text.push_str(&self.flush());
                if alone {
                    text.push(REPLACEMENT);
                } else {
                    self.push(byte, text);
                }
            }
        }
    }

    /// One replacement a byte, as decoders do it.
    fn flush(&mut self) -> String {
        let text = self.pending.iter().map(|_| REPLACEMENT).collect();
        self.pending.clear();
        text
    }
}
