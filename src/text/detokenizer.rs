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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixtures::{byte_level, folder, open, sentence_piece};
    use proptest::prelude::*;
    use std::sync::OnceLock;

    fn tokenizer(json: serde_json::Value) -> Arc<Tokenizer> {
        Arc::new(open(folder(&[("tokenizer.json", &json.to_string())]).path()))
    }

    fn bytes() -> Arc<Tokenizer> {
        static MADE: OnceLock<Arc<Tokenizer>> = OnceLock::new();
        MADE.get_or_init(|| tokenizer(byte_level())).clone()
    }

    fn pieces() -> Arc<Tokenizer> {
        static MADE: OnceLock<Arc<Tokenizer>> = OnceLock::new();
        MADE.get_or_init(|| tokenizer(sentence_piece())).clone()
    }

    /// The text after each token, and what is left at the end.
    fn steps(t: &Arc<Tokenizer>, skip: bool, ids: &[u32]) -> Vec<String> {
        let mut d = Detokenizer::new(t.clone(), skip);
        let mut out: Vec<String> = ids.iter().map(|&id| d.push(id).unwrap()).collect();
        out.push(d.finish().unwrap());
        out
    }

    #[test]
    fn a_character_comes_when_it_is_whole() {
        // 😀 is f0 9f 98 80, é is c3 a9.
        assert_eq!(steps(&bytes(), false, &[0xf0, 0x9f, 0x98, 0x80, 0x61]), ["", "", "", "😀", "a", ""]);
        assert_eq!(steps(&bytes(), false, &[0xc3, 0xa9, 0xc3]), ["", "é", "", "\u{fffd}"]);
        assert_eq!(steps(&bytes(), false, &[0xc3, 0x61]), ["", "\u{fffd}a", ""]);
        let byte = |b: u8| pieces().token_id(&format!("<0x{b:02X}>")).unwrap();
        let euro = [byte(0xe2), byte(0x82), byte(0xac), pieces().token_id("a").unwrap()];
        assert_eq!(steps(&pieces(), false, &euro), ["", "", "€", "a", ""]);
        assert_eq!(steps(&pieces(), false, &euro[1..]), ["\u{fffd}", "\u{fffd}", "a", ""]);
        assert_eq!(steps(&pieces(), false, &euro[..2]), ["", "", "\u{fffd}\u{fffd}"]);
    }

    #[test]
    fn only_the_first_space_is_taken_away() {
        let id = |token: &str| pieces().token_id(token).unwrap();
        let ids = [id("▁he"), id("ll"), id("o"), id("▁"), id("w"), id("</s>"), id("▁a")];
        assert_eq!(steps(&pieces(), true, &ids), ["he", "ll", "o", " ", "w", "", " a", ""]);
        assert_eq!(steps(&pieces(), true, &[id("<s>"), id("▁a"), id("▁a")]), ["", "a", " a", ""]);
        assert_eq!(steps(&pieces(), false, &[id("<s>"), id("▁a")]), ["<s>", " a", ""]);
    }

    #[test]
    fn unknown_ids_have_no_text() {
        assert_eq!(steps(&bytes(), false, &[97, 99_999, 98]), ["a", "", "b", ""]);
    }

    #[test]
    fn an_endless_run_of_broken_bytes_is_not_kept() {
        let byte = pieces().token_id("<0xF0>").unwrap();
        for (tokenizer, id) in [(bytes(), 0xf0), (pieces(), byte)] {
            let mut d = Detokenizer::new(tokenizer, false);
            let mut chars = 0;
            for n in 1..1000 {
                chars += d.push(id).unwrap().chars().count();
                assert!(n - chars <= 3 && d.window.len() <= WINDOW_MAX + 1 && d.bytes.pending.len() <= 3);
            }
            assert_eq!(chars + d.finish().unwrap().chars().count(), 999);
        }
    }

    /// Tokens for the property below: every run of byte tokens spells whole characters.
    fn piece_ids(picks: &[(u16, char)]) -> Vec<u32> {
        let t = pieces();
        let mut ids = vec![];
        for &(pick, c) in picks {
            if pick % 3 == 0 {
                let mut utf8 = [0; 4];
                let bytes = c.encode_utf8(&mut utf8).bytes();
                ids.extend(bytes.map(|b| t.token_id(&format!("<0x{b:02X}>")).unwrap()));
            } else {
                let plain: Vec<u32> =
                    (0..t.vocab_size() as u32).filter(|&id| t.fallback_byte(id).is_none()).collect();
                ids.push(plain[pick as usize % plain.len()]);
            }
        }
        ids
    }

    proptest! {
        #[test]
        fn all_text_together_is_decode_bytes(ids in prop::collection::vec(0u32..268, 0..40), skip: bool) {
            prop_assert_eq!(steps(&bytes(), skip, &ids).concat(), bytes().decode(&ids, skip).unwrap());
        }

        /// Mostly bytes that begin or continue characters, so that whole characters come up often.
        #[test]
        fn all_text_together_is_decode_characters(
            ids in prop::collection::vec(prop::sample::select(vec![0xf0u32, 0x9f, 0x98, 0x80, 0xc3, 0xa9, 0x61, 256, 259, 260, 261, 262, 263, 264]), 0..40),
        ) {
            prop_assert_eq!(steps(&bytes(), true, &ids).concat(), bytes().decode(&ids, true).unwrap());
        }

        #[test]
        fn all_text_together_is_decode_pieces(picks in prop::collection::vec((any::<u16>(), any::<char>()), 0..20), skip: bool) {
            let ids = piece_ids(&picks);
            prop_assert_eq!(steps(&pieces(), skip, &ids).concat(), pieces().decode(&ids, skip).unwrap());
        }

        /// No text comes early: a character that is incomplete is never shown as a replacement.
        #[test]
        fn nothing_is_taken_back(text in "\\PC{0,12}") {
            for t in [bytes(), pieces()] {
                let ids = t.encode(&text, false).unwrap();
                prop_assert_eq!(steps(&t, false, &ids).concat(), t.decode(&ids, false).unwrap());
                let early = steps(&t, false, &ids)[..ids.len()].concat();
                prop_assert!(!early.contains(REPLACEMENT) || text.contains(REPLACEMENT));
            }
        }

        #[test]
        fn broken_runs_of_byte_tokens_are_survived(ids in prop::collection::vec(0u32..280, 0..40)) {
            let whole = steps(&pieces(), false, &ids).concat();
            prop_assert!(whole.len() <= ids.len() * 8);
        }
    }
}
