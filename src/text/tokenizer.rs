//! Text to token ids and back, as the model folder's `tokenizer.json` says.

use std::{
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::Value;

use crate::{
    error::{Error, Result},
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
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(e.to_string()),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(format!("the tokenizer failed: {said}"))
        }
    }
}
