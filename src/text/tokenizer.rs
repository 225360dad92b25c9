//! Text to token ids and back, as the model folder's `tokenizer.json` says.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::Value;

use crate::{
    error::{Error, Result, quiet_panic},
    text::read_file,
};

const FILE_BYTES_MAX: u64 = 256 << 20;
/// More than any model has; a larger id is damage, and buffers are sized by it.
const VOCAB_MAX: usize = 1 << 24;

/// A tokenizer. Turns what goes wrong in the library it is made of, panics included, into errors.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    vocab_size: usize,
    special: HashSet<u32>,
    byte_fallback: bool,
    config: TokenizerConfig,
}

/// What `tokenizer_config.json` says.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TokenizerConfig {
    #[serde(default, deserialize_with = "token_content")]
    pub(super) bos_token: Option<String>,
    #[serde(default, deserialize_with = "token_content")]
    pub(super) eos_token: Option<String>,
    #[serde(default, deserialize_with = "token_content")]
    pub(super) pad_token: Option<String>,
    #[serde(default, deserialize_with = "token_content")]
    pub(super) unk_token: Option<String>,
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    pub(super) chat_template: Option<Value>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).field("vocab_size", &self.vocab_size).finish()
    }
}

impl Tokenizer {
    /// Opens a model folder's tokenizer; `None` if it has no `tokenizer.json`.
    pub fn open(model_dir: &Path) -> Result<Option<Tokenizer>> {
        let path = model_dir.join("tokenizer.json");
        let Some(bytes) = read_file(&path, FILE_BYTES_MAX)? else { return Ok(None) };
        let config = TokenizerConfig::open(model_dir)?;
        let made =
            guard(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(|why| Error::data(&path, why))?;
        let mut tokenizer = Tokenizer {
            inner: made,
            path,
            vocab_size: 0,
            special: HashSet::new(),
            byte_fallback: false,
            config,
        };
        tokenizer.check(&bytes)?;
        Ok(Some(tokenizer))
    }

    /// The text's token ids. `add_special` adds what the model expects around a text, such as a
    /// beginning-of-sequence token.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encode = |special| guard(|| Ok(self.inner.encode_fast(text, special)?.get_ids().to_vec()));
        let mut ids = encode(add_special).map_err(|why| Error::data(&self.path, why))?;
        // Some files leave the beginning-of-sequence token to tokenizer_config.json.
        if add_special && self.config.add_bos_token == Some(true) {
            let bos = self.bos_id();
            if let Some(bos) = bos.filter(|_| ids.first() != bos.as_ref()) {
                ids.insert(0, bos);
            }
        }
        Ok(ids)
    }

    /// The ids' text; ids that the tokenizer does not know have none. `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guard(|| self.inner.decode(ids, skip_special)).map_err(|why| Error::data(&self.path, why))
    }

    /// The id of a token as it is written in `tokenizer.json`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// A token's text, to be shown: that of a token of a part of a character is as in `tokenizer.json`.
    pub fn token_text(&self, id: u32) -> Option<String> {
        let raw = self.inner.id_to_token(id)?;
        let text = self.decode(&[id], false).ok().filter(|text| !text.contains('\u{fffd}'));
        match text {
            // Decoders take the first word's leading space away.
            Some(text) if raw.starts_with('▁') && !text.starts_with(' ') => Some(format!(" {text}")),
            Some(text) => Some(text),
            None => Some(raw),
        }
    }

    /// Whether a token is a mark rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Whether the tokenizer has a token of this id.
    pub fn is_token(&self, id: u32) -> bool {
        self.inner.id_to_token(id).is_some()
    }

    /// The beginning-of-sequence token that `tokenizer_config.json` names.
    pub fn bos_id(&self) -> Option<u32> {
        self.token_id(self.config.bos_token.as_ref()?)
    }

    /// The end-of-sequence token that `tokenizer_config.json` names.
    pub fn eos_id(&self) -> Option<u32> {
        self.token_id(self.config.eos_token.as_ref()?)
    }

    /// The byte that a token stands for where characters unknown to the vocabulary are spelled in bytes.
    pub(super) fn fallback_byte(&self, id: u32) -> Option<u8> {
        if !self.byte_fallback {
            return None;
        }
        let token = self.inner.id_to_token(id)?;
        let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
        if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
    }

    pub(super) fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// Finds what the library takes without complaint, and what is asked of the file later.
    fn check(&mut self, bytes: &[u8]) -> Result<()> {
        let damaged = |why: String| Err(Error::data(&self.path, why));
        let file: File = match serde_json::from_slice(bytes) {
            Ok(file) => file,
            Err(e) => return damaged(e.to_string()),
        };
        // The library numbers added tokens by itself and only warns if that is not what the file says.
        for AddedToken { id, content } in &file.added_tokens {
            match self.inner.token_to_id(content) {
                _ if content.is_empty() => return damaged(format!("added token {id} is empty")),
                Some(real) if real == *id => {}
                Some(real) => {
                    return damaged(format!("added token {content:?} has id {id}, but its place is {real}"));
                }
                None => return damaged(format!("added token {content:?} with id {id} could not be added")),
            }
        }
        let ids = guard(|| Ok(self.inner.get_vocab(true))).map_err(|why| Error::data(&self.path, why))?;
        let Some(&last) = ids.values().max() else { return damaged("has no tokens".into()) };
        if last as usize >= VOCAB_MAX {
            return damaged(format!("token id {last} is not below {VOCAB_MAX}"));
        }
        self.vocab_size = last as usize + 1;
        let added = self.inner.get_added_tokens_decoder();
        self.special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        self.byte_fallback = file.decoder.is_some_and(|decoder| decoder.has("ByteFallback"));
        // A prompt is neither cut nor filled up, whatever a training run has left in the file.
        self.inner.with_padding(None);
        match self.inner.with_truncation(None) {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::data(&self.path, e.to_string())),
        }
    }
}

impl TokenizerConfig {
    /// A folder's `tokenizer_config.json`; the default if there is none.
    pub(super) fn open(model_dir: &Path) -> Result<TokenizerConfig> {
        let path = model_dir.join("tokenizer_config.json");
        match read_file(&path, FILE_BYTES_MAX)? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::data(&path, e.to_string())),
            None => Ok(TokenizerConfig::default()),
        }
    }
}

/// The parts of `tokenizer.json` that the library does not show.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    decoder: Option<DecoderKind>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

/// A decoder, or a chain of them.
#[derive(Deserialize)]
struct DecoderKind {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    decoders: Vec<DecoderKind>,
}

impl DecoderKind {
    fn has(&self, kind: &str) -> bool {
        self.kind == kind || self.decoders.iter().any(|d| d.has(kind))
    }
}

/// A token is written as a string, or as an object with its content; anything else counts as none.
fn token_content<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Token {
        Text(String),
        Object { content: String },
        Other(IgnoredAny),
    }
    Ok(match Token::deserialize(from)? {
        Token::Text(content) | Token::Object { content } => Some(content),
        Token::Other(_) => None,
    })
}

/// Runs the library's code, which panics on some hostile files.
fn guard<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match quiet_panic(run) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(e.to_string()),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(format!("the tokenizer failed: {said}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixtures::{byte_level, folder, open, sentence_piece};

    fn error(json: &str) -> String {
        let dir = folder(&[("tokenizer.json", json)]);
        let error = Tokenizer::open(dir.path()).expect_err("must be refused").to_string();
        let path = dir.path().join("tokenizer.json");
        assert!(!error.contains('\n'), "{error}");
        error.strip_prefix(&format!("{}: ", path.display())).expect("the file is named first").to_owned()
    }

    fn changed(change: impl Fn(&mut Value)) -> String {
        let mut json = byte_level();
        change(&mut json);
        error(&json.to_string())
    }

    #[test]
    fn no_file_is_no_tokenizer() {
        assert!(Tokenizer::open(folder(&[]).path()).unwrap().is_none());
        assert!(Tokenizer::open(&folder(&[]).path().join("absent")).unwrap().is_none());
    }

    #[test]
    fn text_goes_to_ids_and_back() {
        for json in [byte_level(), sentence_piece()] {
            let dir = folder(&[("tokenizer.json", &json.to_string())]);
            let t = open(dir.path());
            for text in ["hello world", " hello", "é日本😀", "", "a\n\n b"] {
                let ids = t.encode(text, true).unwrap();
                assert!(ids.iter().all(|&id| (id as usize) < t.vocab_size()));
                assert_eq!(t.decode(&ids, false).unwrap(), text, "{ids:?}");
            }
        }
    }

    #[test]
    fn special_tokens_are_known_and_can_be_left_out() {
        let dir = folder(&[("tokenizer.json", &byte_level().to_string())]);
        let t = open(dir.path());
        let (end, think) = (t.token_id("<|end|>").unwrap(), t.token_id("<think>").unwrap());
        assert_eq!(t.vocab_size(), think as usize + 1);
        assert!(t.is_special(end) && !t.is_special(think) && !t.is_special(0));
        let ids = t.encode("a<|end|><think>b", false).unwrap();
        assert_eq!(ids, [b'a' as u32, end, think, b'b' as u32]);
        assert_eq!(t.decode(&ids, true).unwrap(), "a<think>b");
        assert_eq!(t.decode(&ids, false).unwrap(), "a<|end|><think>b");
        assert_eq!(t.decode(&[9999], false).unwrap(), "");
        assert_eq!(t.token_id("absent"), None);
    }

    #[test]
    fn token_text_is_readable() {
        let dir = folder(&[("tokenizer.json", &byte_level().to_string())]);
        let t = open(dir.path());
        let texts = |ids: &[u32]| ids.iter().map(|&id| t.token_text(id)).collect::<Vec<_>>();
        assert_eq!(texts(&t.encode("hel a", false).unwrap()), [Some("hel".into()), Some(" a".into())]);
        assert_eq!(texts(&[0xf0, 9999]), [Some("ð".into()), None]);
        let dir = folder(&[("tokenizer.json", &sentence_piece().to_string())]);
        let t = open(dir.path());
        assert_eq!(t.token_text(t.token_id("▁he").unwrap()), Some(" he".into()));
        assert_eq!(t.token_text(t.token_id("ll").unwrap()), Some("ll".into()));
    }

    #[test]
    fn tokenizer_config_adds_a_beginning() {
        let with = |config: &str| {
            let dir = folder(&[
                ("tokenizer.json", &sentence_piece().to_string()),
                ("tokenizer_config.json", config),
            ]);
            let t = open(dir.path());
            (t.encode("a", true).unwrap()[0], t.encode("a", false).unwrap()[0], t.bos_id(), t.eos_id())
        };
        let (with_bos, without, bos, eos) = with(
            r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "add_bos_token": true}"#,
        );
        assert_eq!((with_bos, bos, eos), (1, Some(1), Some(2)));
        assert_ne!(without, 1);
        let (with_bos, _, bos, eos) =
            with(r#"{"bos_token": "<s>", "eos_token": null, "add_bos_token": false, "x": [1]}"#);
        assert_eq!((with_bos == 1, bos, eos), (false, Some(1), None));
        assert_eq!(with(r#"{"bos_token": 7}"#).2, None);
    }

    #[test]
    fn damaged_files_are_named() {
        for text in ["", "{", "[]", "{}", "\u{0}", "{\"model\": 1}", "null"] {
            error(text);
        }
        let whole = byte_level().to_string();
        for cut in (0..whole.len()).step_by(whole.len() / 50) {
            if whole.is_char_boundary(cut) {
                error(&whole[..cut]);
            }
        }
        let dir = folder(&[("tokenizer.json", &whole), ("tokenizer_config.json", "{\"bos_token\":")]);
        let said = Tokenizer::open(dir.path()).unwrap_err().to_string();
        assert!(said.contains("tokenizer_config.json: "), "{said}");
        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        std::fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
        assert!(
            Tokenizer::open(dir.path()).unwrap_err().to_string().ends_with("tokenizer.json: is not a file")
        );
    }

    #[test]
    fn impossible_tokens_are_refused() {
        let far = changed(|t| t["added_tokens"][2]["id"] = 4_000_000_000u32.into());
        assert!(far.starts_with("added token \"<think>\" has id 4000000000, but its place is"), "{far}");
        assert!(changed(|t| t["added_tokens"][0]["id"] = 1.into()).contains("has id 1, but"));
        assert!(changed(|t| t["added_tokens"][0]["content"] = "".into()).contains("is empty"));
        changed(|t| t["added_tokens"][0]["id"] = (-1).into());
        let large = changed(|t| {
            t["added_tokens"] = serde_json::json!([]);
            t["model"]["vocab"]["far away"] = 4_294_967_295u32.into();
        });
        assert!(large.contains("token id 4294967295 is not below"), "{large}");
        changed(|t| t["model"]["merges"][0] = "x nothing".into());
        changed(|t| t["model"]["merges"][0] = "one".into());
        changed(|t| t["model"]["vocab"] = serde_json::json!({}));
        changed(|t| t["model"]["type"] = "Unknown".into());
        changed(
            |t| t["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
        );
        changed(|t| t["decoder"]["type"] = "Nothing".into());
    }

    #[test]
    fn what_the_library_panics_at_is_an_error() {
        assert_eq!(
            guard(|| -> tokenizers::Result<()> { panic!("no {}", 1) }),
            Err("the tokenizer failed: no 1".into())
        );
        assert_eq!(
            guard(|| -> tokenizers::Result<()> { panic!("no") }),
            Err("the tokenizer failed: no".into())
        );
    }

    #[test]
    fn a_regex_that_never_ends_is_an_error_or_a_result() {
        let mut json = byte_level();
        json["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": "(a*)*\\1b"}, "behavior": "Isolated", "invert": false});
        let dir = folder(&[("tokenizer.json", &json.to_string())]);
        let t = open(dir.path());
        let _ = t.encode(&"a".repeat(200), false);
    }
}
