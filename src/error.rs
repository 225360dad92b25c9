//! One error type: what went wrong, with the file, tensor, flag or request it happened in.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    thread,
};

/// A `Result` whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a user can do wrong, or what can be wrong with what they were given.
///
/// A broken invariant of the program itself is a panic instead, whose message says that it is a bug.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A flag, layout or builder value that cannot be used.
    #[error("{what}: {why}")]
    Usage {
        /// The flag or value, as the user wrote it.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file that could not be read.
    #[error("{}: {why}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        why: String,
    },
    /// A file whose contents are wrong.
    #[error("{}: {why}", .path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A tensor that the model needs and no file has.
    #[error("{}: tensor {name} is missing", .path.display())]
    MissingTensor {
        /// The model folder, or the file that should hold it.
        path: PathBuf,
        /// The tensor's name.
        name: String,
    },
    /// A tensor of the wrong type or shape.
    #[error("{}: tensor {name}: {why}", .path.display())]
    Tensor {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A request that cannot be served as it is.
    #[error("request: {0}")]
    Request(String),
    /// A prompt that has no room, with one token of an answer, in the longest sequence.
    #[error(
        "request: the prompt has {tokens} tokens{}; prompt and answer together have room for {max}",
        of_images(*images)
    )]
    TooLong {
        /// Its tokens.
        tokens: usize,
        /// Of them, those of images.
        images: usize,
        /// Of the longest sequence.
        max: usize,
    },
    /// A request that came when as many waited as may; later there may be room.
    #[error("request: {max} requests wait already, and no more may")]
    Busy {
        /// Requests that may wait.
        max: usize,
    },
    /// A request whose prompt, with those of all that waited when it came, is longer than prompts that wait may be together;
    /// later there may be room.
    #[error("request: the prompts that wait have {waiting} tokens, and with its {tokens} more than {max}")]
    BusyTokens {
        /// Its own.
        tokens: usize,
        /// Of the prompts that wait already.
        waiting: usize,
        /// Tokens that may wait.
        max: usize,
    },
    /// A device that is absent, too small or failed.
    #[error("device {device}: {why}")]
    Device {
        /// The device, as in a layout (`cpu`, `cuda:1`).
        device: String,
        /// What went wrong.
        why: String,
    },
    /// The engine is shutting down, or a stage of it has failed.
    #[error("engine: {0}")]
    Engine(String),
}

impl Error {
    /// A [`Error::Usage`] for the named flag or value.
    pub fn usage(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Usage { what: what.into(), why: why.into() }
    }

    /// A [`Error::Data`] for the named file.
    pub fn data(path: impl AsRef<Path>, why: impl Into<String>) -> Self {
        Error::Data { path: path.as_ref().to_path_buf(), why: one_line(why.into()) }
    }

    /// A [`Error::Io`] for the named file.
    pub fn io(path: impl AsRef<Path>, why: impl std::fmt::Display) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), why: one_line(why.to_string()) }
    }

    /// The same error with more to be said of it.
    pub(crate) fn and(self, more: &str) -> Self {
        match self {
            Error::Device { device, why } => Error::Device { device, why: format!("{why}; {more}") },
            Error::Engine(why) => Error::Engine(format!("{why}; {more}")),
            other => Error::Engine(format!("{other}; {more}")),
        }
    }

    /// The process's exit code for this error: 2 for usage, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage { .. } | Error::Request(_) | Error::TooLong { .. } => 2,
            _ => 1,
        }
    }
}

thread_local! {
    /// Whether a panic of this thread becomes an error.
    static PANICS_ARE_EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Runs what may panic. The panic becomes an error of the caller's, which says it once: a panic hook should
/// print nothing.
pub(crate) fn quiet_panic<T>(run: impl FnOnce() -> T) -> thread::Result<T> {
    let before = PANICS_ARE_EXPECTED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(run));
    PANICS_ARE_EXPECTED.set(before);
    outcome
}

/// Whether this thread is within [`quiet_panic`].
pub(crate) fn panics_are_expected() -> bool {
    // Where the thread is ending, it is not.
    PANICS_ARE_EXPECTED.try_with(Cell::get).unwrap_or(false)
}

/// Text out of a file as an error may show it: one line, not long, nothing that a terminal obeys.
pub(crate) fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 200;
    let mut line = String::new();
    for c in text.chars().take(CHARS_MAX) {
        match c {
            '"' | '\'' | '\\' => line.push(c),
            _ => line.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(CHARS_MAX).is_some() {
        line.push('…');
    }
    line
}

/// Messages of libraries can span lines; an error here is one line.
/// What may make a prompt shorter.
fn of_images(tokens: usize) -> String {
    match tokens {
        0 => String::new(),
        _ => format!(", {tokens} of them of images, which --max-pixels makes smaller"),
    }
}

fn one_line(text: String) -> String {
    if text.contains(['\n', '\r']) { text.split_whitespace().collect::<Vec<_>>().join(" ") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_expected_within_alone() {
        assert!(!panics_are_expected());
        let inner = quiet_panic(|| {
            quiet_panic(|| panic!("expected")).unwrap_err();
            panics_are_expected()
        });
        assert!(inner.unwrap());
        assert!(!panics_are_expected());
    }
}
