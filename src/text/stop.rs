//! Stop strings across the borders of tokens.

use crate::{error::Result, request::StopParams};

/// Looks for stop strings in a text that comes in pieces, and holds back what may be the beginning of one.
///
/// The text ends before the stop string that is complete first; of several that are complete at the same
/// character, before the longest. So it does not matter how the text is cut into pieces.
#[derive(Debug, Clone)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    held: String,
    hit: bool,
}

/// What is certain after a piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopStep {
    /// Text that belongs to no stop string.
    pub text: String,
    /// A stop string is complete: nothing comes after `text`.
    pub hit: bool,
}

/// One stop string, sought by the method of Knuth, Morris and Pratt: constant work a byte.
#[derive(Debug, Clone)]
struct Pattern {
    bytes: Box<[u8]>,
    /// For each length of a beginning, the longest shorter beginning that it ends with.
    shorter: Box<[u16]>, // [bytes.len() + 1]
    /// The length of the longest beginning that the text ends with.
    matched: usize,
}

impl StopStrings {
    /// Refuses what [`StopParams::check`] refuses: empty, too long or too many strings.
    pub fn new(strings: Vec<String>) -> Result<Self> {
        let params = StopParams { strings, ..StopParams::default() };
        params.check()?;
        let patterns = params.strings.into_iter().map(Pattern::new).collect();
        Ok(StopStrings { patterns, held: String::new(), hit: false })
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.hit {
            return StopStep { text: String::new(), hit: true };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (place, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for pattern in &mut self.patterns {
                if pattern.step(byte) {
                    longest = longest.max(pattern.bytes.len());
                }
            }
            if longest > 0 {
                self.hit = true;
                self.held.truncate(before + place + 1 - longest);
                return StopStep { text: std::mem::take(&mut self.held), hit: true };
            }
        }
        // A beginning starts where a character starts, so this cuts between characters.
        let keep = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        StopStep { text: std::mem::replace(&mut self.held, held), hit: false }
    }

    /// The text has ended: what was held back is certain now.
    pub fn finish(&mut self) -> String {
        for pattern in &mut self.patterns {
            pattern.matched = 0;
        }
        std::mem::take(&mut self.held)
    }
}

impl Pattern {
    fn new(string: String) -> Self {
        let bytes = string.into_bytes().into_boxed_slice();
        let mut shorter = vec![0u16; bytes.len() + 1].into_boxed_slice();
        let mut len = 0;
        for end in 1..bytes.len() {
            while len > 0 && bytes[end] != bytes[len] {
                len = shorter[len] as usize;
            }
            len += usize::from(bytes[end] == bytes[len]);
            shorter[end + 1] = len as u16;
        }
        Pattern { bytes, shorter, matched: 0 }
    }

    /// Takes a byte; whether the string is complete with it.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.shorter[self.matched] as usize;
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stops(strings: &[&str]) -> StopStrings {
        StopStrings::new(strings.iter().map(|s| s.to_string()).collect()).unwrap()
    }

    fn step(text: &str, hit: bool) -> StopStep {
        StopStep { text: text.into(), hit }
    }

    /// Everything that comes out for a text in pieces, and whether a stop string was found.
    fn run<'a>(stops: &mut StopStrings, pieces: impl IntoIterator<Item = &'a str>) -> (String, bool) {
        let mut out = String::new();
        for piece in pieces {
            let step = stops.push(piece);
            out += &step.text;
            if step.hit {
                return (out, true);
            }
        }
        (out + &stops.finish(), false)
    }

    #[test]
    fn holds_back_what_may_begin_a_stop_string() {
        let mut s = stops(&["\n\nUser:"]);
        assert_eq!(s.push("Hello\n"), step("Hello", false));
        assert_eq!(s.push("\n"), step("", false));
        assert_eq!(s.push("\nUse"), step("\n", false));
        assert_eq!(s.push("d"), step("\n\nUsed", false));
        assert_eq!(s.push("\n\nUser: more"), step("", true));
        assert_eq!(s.push("ignored"), step("", true));
        assert_eq!(s.finish(), "");
    }

    #[test]
    fn the_string_complete_first_wins() {
        assert_eq!(run(&mut stops(&["abcde", "cd"]), ["xabcde"]), ("xab".into(), true));
        assert_eq!(run(&mut stops(&["abcde", "cd"]), ["xabc", "x"]), ("xabcx".into(), false));
        assert_eq!(run(&mut stops(&["cd", "bcd"]), ["abcd"]), ("a".into(), true));
    }

    #[test]
    fn a_failed_beginning_can_hold_another() {
        assert_eq!(run(&mut stops(&["aab"]), ["aaa", "ab"]), ("aa".into(), true));
        assert_eq!(run(&mut stops(&["abab!"]), ["aba", "bab", "!"]), ("ab".into(), true));
    }

    #[test]
    fn characters_of_several_bytes_stay_whole() {
        // é is c3 a9 and ê is c3 aa: a held first byte would cut a character.
        let mut s = stops(&["é", "日本"]);
        assert_eq!(s.push("ê"), step("ê", false));
        assert_eq!(s.push("日"), step("", false));
        assert_eq!(s.push("曜"), step("日曜", false));
        assert_eq!(s.push("x日本"), step("x", true));
    }

    #[test]
    fn nothing_is_held_without_strings() {
        assert_eq!(stops(&[]).push("text"), step("text", false));
        assert!(StopStrings::new(vec![String::new()]).is_err());
    }

    #[test]
    fn held_text_is_bounded() {
        let mut s = stops(&[&"a".repeat(1024)]);
        let mut out = 0;
        for _ in 0..100 {
            out += s.push(&format!("{}b", "a".repeat(1023))).text.len();
        }
        assert_eq!(out, 100 * 1024);
        assert!(s.held.is_empty());
    }

    /// The stop string that is complete first in the whole text, by looking everywhere.
    fn naive(text: &str, strings: &[String]) -> Option<usize> {
        let all =
            strings.iter().flat_map(|s| text.match_indices(s.as_str()).map(|(at, s)| (at + s.len(), at)));
        // `match_indices` skips overlapping matches, which are never the first.
        all.min().map(|(_, at)| at)
    }

    proptest! {
        #[test]
        fn all_cuts_give_the_naive_result(
            text in "[abé日]{0,12}",
            strings in prop::collection::vec("[abé日]{1,4}", 0..4),
            cuts in any::<u16>(),
        ) {
            let mut pieces = vec![];
            let mut from = 0;
            for (n, (at, _)) in text.char_indices().enumerate().skip(1) {
                if cuts >> (n % 16) & 1 == 1 {
                    pieces.push(&text[from..at]);
                    from = at;
                }
            }
            pieces.push(&text[from..]);
            let got = run(&mut StopStrings::new(strings.clone()).unwrap(), pieces.iter().copied());
            let want = naive(&text, &strings);
            prop_assert_eq!(got, (text[..want.unwrap_or(text.len())].to_string(), want.is_some()));
        }

        /// What is out at any time is the longest text that is certain then.
        #[test]
        fn all_that_is_certain_comes_out(text in "[ab]{0,30}", stop in "[ab]{1,6}") {
            let mut s = StopStrings::new(vec![stop.clone()]).unwrap();
            let mut out = String::new();
            for end in 1..=text.len() {
                out += &s.push(&text[end - 1..end]).text;
                let seen = &text[..end];
                let held = (1..stop.len()).rev().find(|&n| seen.ends_with(&stop[..n])).unwrap_or(0);
                let certain = seen.find(&stop).unwrap_or(end - held);
                prop_assert_eq!(out.as_str(), &text[..certain]);
            }
        }
    }
}
