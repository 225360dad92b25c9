//! The file of results: a JSON object a line, in the order of the items.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::items::{Item, Items};
use crate::{
    cli::{
        answer::{Answer, Sample},
        output::{TokenLine, token_lines},
    },
    error::{Error, Result, shown},
    request::FinishReason,
    text::Tokenizer,
};

/// What a line of results begins with.
const BEGINNING: &[u8] = b"{\"id\":";
/// How much may be lost if the machine itself goes down.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// What becomes of results that there are already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// They are an error.
    New,
    /// They are gone on with.
    Resume,
    /// They are replaced.
    Force,
}

/// Results of earlier runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) items: usize,
    /// Those with an error.
    pub(super) failed: usize,
}

/// The file, which no other run has.
pub(super) struct Results {
    path: PathBuf,
    file: File,
    mode: Mode,
    /// Bytes that stay.
    keep: u64,
    synced: Instant,
}

#[derive(Serialize)]
struct ResultLine<'a> {
    id: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    question: Option<&'a str>,
    #[serde(flatten)]
    outcome: Outcome<'a>,
    key: &'a str,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome<'a> {
    Failed {
        error: String,
    },
    One {
        #[serde(flatten)]
        sample: SampleLine<'a>,
        prompt_tokens: usize,
    },
    Several {
        samples: Vec<SampleLine<'a>>,
        prompt_tokens: usize,
    },
}

#[derive(Serialize)]
struct SampleLine<'a> {
    text: &'a str,
    /// Where the model has no tokenizer.
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    token_ids: &'a [u32],
    finish_reason: FinishReason,
    completion_tokens: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logprobs: Vec<TokenLine>,
}

/// What is read of a line again.
#[derive(Deserialize)]
struct Seen {
    id: Value,
    key: String,
    error: Option<String>,
}

impl Results {
    /// Opens it, or makes it. Nothing in it changes before [`Results::begin`].
    pub(super) fn open(path: &Path, mode: Mode) -> Result<Results> {
        let failed = |e: io::Error| Error::io(path, e);
        match std::fs::metadata(path) {
            Ok(meta) if !meta.is_file() => return Err(Error::io(path, "is not a file to write results to")),
            Ok(meta) if meta.len() > 0 && mode == Mode::New => {
                let why = "there are results already: --resume goes on with them, --force replaces them";
                return Err(Error::usage(format!("--output {}", path.display()), why));
            }
            _ => {}
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::io(path, "another run is writing to it"));
            }
            // Some network file systems have no locks.
            Err(TryLockError::Error(e)) => tracing::warn!(error = %e, "the results are not locked"),
        }
        Ok(Results { path: path.to_path_buf(), file, mode, keep: 0, synced: Instant::now() })
    }

    /// Reads what there is, and takes its items off. It must be of the same work; a last line that was not
    /// written to its end does not count.
    pub(super) fn read(&mut self, items: &mut Items) -> Result<Done> {
        let mut done = Done::default();
        if self.mode != Mode::Resume {
            return Ok(done);
        }
        let mut reader = BufReader::new(&self.file);
        loop {
            let mut line = Vec::new();
            reader.read_until(b'\n', &mut line).map_err(|e| Error::io(&self.path, e))?;
            if line.is_empty() {
                return Ok(done);
            }
            let bad = |why: &str| Error::data(&self.path, format!("line {}: {why}", done.items + 1));
            if line.last() != Some(&b'\n') {
                return match torn(&line) {
                    true => Ok(done),
                    false => Err(bad("it is no result of a batch")),
                };
            }
            let seen: Seen = serde_json::from_slice(&line).map_err(|_| bad("it is no result of a batch"))?;
            let id = |id: &Value| shown(&id.to_string());
            let Some(item) = items.next() else {
                return Err(bad("there are more results than items: it is of another input"));
            };
            if item.id != seen.id {
                let why = format!("it is of item {}, and this input has {}", id(&seen.id), id(&item.id));
                return Err(bad(&why));
            }
            if item.key != seen.key {
                let why = "was asked with another question, model or setting; --force begins anew";
                return Err(bad(&format!("item {} {why}", id(&seen.id))));
            }
            self.keep += line.len() as u64;
            done.items += 1;
            done.failed += usize::from(seen.error.is_some());
        }
    }

    /// Makes it ready for the next line, after those that stay.
    pub(super) fn begin(&mut self) -> Result<()> {
        let ready = self.file.set_len(self.keep).and_then(|()| self.file.seek(SeekFrom::Start(self.keep)));
        ready.map(drop).map_err(|e| Error::io(&self.path, e))
    }

    /// Writes an item's line at once. A run that is killed loses no line that was written.
    pub(super) fn write(
        &mut self,
        item: &Item,
        outcome: Result<&Answer, &Error>,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<()> {
        let line = ResultLine {
            id: &item.id,
            image: item.image.as_deref(),
            question: item.question.as_deref(),
            outcome: told(outcome, tokenizer),
            key: &item.key,
        };
        let failed = |e: io::Error| Error::io(&self.path, e);
        let mut text = serde_json::to_vec(&line).map_err(|e| failed(e.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(failed)?;
        if self.synced.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    /// Waits until the lines are where a machine that goes down does not lose them.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        self.file.sync_data().map_err(|e| Error::io(&self.path, e))
    }
}

fn told<'a>(outcome: Result<&'a Answer, &Error>, tokenizer: Option<&Tokenizer>) -> Outcome<'a> {
    let answer = match outcome {
        Ok(answer) => answer,
        Err(error) => return Outcome::Failed { error: error.to_string() },
    };
    let prompt_tokens = answer.prompt_ids.len();
    let line = |sample: &'a Sample| SampleLine {
        text: &sample.text,
        token_ids: if tokenizer.is_none() { &sample.ids } else { &[] },
        finish_reason: sample.end.map_or(FinishReason::Cancelled, |(reason, _)| reason),
        completion_tokens: sample.ids.len(),
        logprobs: token_lines(sample, tokenizer),
    };
    match &answer.samples[..] {
        [sample] => Outcome::One { sample: line(sample), prompt_tokens },
        samples => Outcome::Several { samples: samples.iter().map(line).collect(), prompt_tokens },
    }
}

/// Whether this is the beginning of a result, or what a machine that went down leaves of one.
fn torn(line: &[u8]) -> bool {
    let len = line.len().min(BEGINNING.len());
    line[..len] == BEGINNING[..len] || line.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_begins_like_a_result() {
        for line in [&b"{"[..], b"{\"id\":", b"{\"id\":\"a.png\",\"ima", b"\0\0\0\0\0\0\0\0\0\0"] {
            assert!(torn(line));
        }
        for line in [&b"x"[..], b"{\"name\": 1", b"\x89PNG\r"] {
            assert!(!torn(line));
        }
    }
}
