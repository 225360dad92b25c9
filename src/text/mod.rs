//! Text to tokens and back: tokenizer, chat template, incremental detokenizer, stop strings.

/// A tokenizer.
pub struct Tokenizer {}
/// A chat template.
pub struct Template {}
