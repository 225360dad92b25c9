//! Text to tokens and back: tokenizer, chat template, incremental detokenizer, stop strings.

pub mod detokenizer;
#[cfg(test)]
mod fixtures;
mod jinja;
mod jinja_guard;
mod jinja_limits;
pub mod stop;
pub mod template;
pub mod tokenizer;

pub use detokenizer::Detokenizer;
pub use stop::{StopStep, StopStrings};
pub use template::Template;
pub use tokenizer::Tokenizer;

use std::{fs::File, io::Read, path::Path};

use crate::error::{Error, Result};

/// The bytes of a file; `None` if there is none. Larger files than `bytes_max`, and what is no file, are errors.
fn read_file(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    if !meta.is_file() {
        return Err(Error::io(path, "is not a file"));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // One byte more than allowed shows a file that has grown since.
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > bytes_max {
        return Err(Error::data(path, format!("is larger than {} MiB", bytes_max >> 20)));
    }
    Ok(Some(bytes))
}
