//! What is asked: one or a few prompts from flags, or many from a file of JSON lines.

mod parts;

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{choices::Choices, media::Wanted};
use crate::{
    error::{Error, Result},
    request::Message,
};

/// Bytes of a line, or of stdin as one prompt, at most; more is no prompt.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// A prompt, before it is known what the model can do with it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    /// For the chat template if there is one.
    Text(String),
    /// A conversation.
    Messages(Vec<Message>),
    /// Tokens.
    Ids(Vec<u32>),
}

/// One thing asked, with its images and its own choices.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) content: Content,
    /// In the order of their places.
    pub(super) media: Vec<Wanted>,
    pub(super) choices: Choices,
}

impl From<Content> for Asked {
    fn from(content: Content) -> Self {
        Asked { content, media: Vec::new(), choices: Choices::default() }
    }
}

/// Prompts, one after another. A wrong one is an error in its place; the others follow.
pub(super) type Prompts = Box<dyn Iterator<Item = Result<Asked>> + Send>;

/// The prompts of a file of JSON lines; `-` is stdin. Lines are read as they are asked for.
pub(super) fn file(path: &Path) -> Result<Prompts> {
    let dir = folder_of(path);
    let lines = Lines::open(path)?;
    let name = lines.name.clone();
    Ok(Box::new(lines.map(move |line| {
        let Line { number, text } = line?;
        parse(&text, &dir).map_err(|why| wrong(&name, number, &why))
    })))
}

/// The folder that names within a file of prompts are relative to.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    match path == Path::new("-") {
        true => PathBuf::new(),
        false => path.parent().unwrap_or(Path::new("")).to_path_buf(),
    }
}

/// All of stdin as one prompt, less the line end that `echo` adds.
pub(super) fn stdin() -> Result<Content> {
    whole(io::stdin().lock())
}

fn whole(from: impl Read) -> Result<Content> {
    let mut bytes = Vec::new();
    from.take(LINE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| Error::io("stdin", e))?;
    if bytes.len() as u64 > LINE_BYTES_MAX {
        return Err(Error::data("stdin", format!("it is longer than {} MiB", LINE_BYTES_MAX >> 20)));
    }
    let mut text = String::from_utf8(bytes).map_err(|_| Error::data("stdin", "it is not UTF-8"))?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    if text.is_empty() {
        return Err(Error::usage("--prompt", "there is none, and stdin is empty"));
    }
    Ok(Content::Text(text))
}

/// A line that is not blank.
#[derive(Debug)]
pub(super) struct Line {
    /// Its number, from 1 on.
    pub(super) number: usize,
    pub(super) text: String,
}

/// The lines of a file that are not blank. One that cannot be read is an error in its place.
pub(super) struct Lines {
    pub(super) name: String,
    reader: Box<dyn BufRead + Send>,
    number: usize,
    ended: bool,
}

impl Lines {
    /// Opens a file; `-` is stdin.
    pub(super) fn open(path: &Path) -> Result<Lines> {
        if path == Path::new("-") {
            return Ok(Lines::new("stdin".into(), BufReader::new(io::stdin())));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // A folder opens, but cannot be read.
        if file.metadata().map_err(|e| Error::io(path, e))?.is_dir() {
            return Err(Error::io(path, "it is a folder, not a file of prompts"));
        }
        Ok(Lines::new(path.display().to_string(), BufReader::new(file)))
    }

    fn new(name: String, reader: impl BufRead + Send + 'static) -> Self {
        Lines { name, reader: Box::new(reader), number: 0, ended: false }
    }

    /// The next line that is not blank; `None` at the end.
    fn line(&mut self) -> Result<Option<String>> {
        loop {
            let mut bytes = Vec::new();
            let read = self.reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes);
            self.number += 1;
            match read {
                Ok(0) => return Ok(None),
                Ok(read) if read as u64 == LINE_BYTES_MAX && bytes.last() != Some(&b'\n') => {
                    self.ended = true;
                    return Err(self.wrong(&format!("it is longer than {} MiB", LINE_BYTES_MAX >> 20)));
                }
                Ok(_) => {}
                Err(e) => {
                    self.ended = true;
                    return Err(Error::io(&self.name, e));
                }
            }
            let text = String::from_utf8(bytes).map_err(|_| self.wrong("it is not UTF-8"))?;
            if !text.trim().is_empty() {
                return Ok(Some(text));
            }
        }
    }

    fn wrong(&self, why: &str) -> Error {
        wrong(&self.name, self.number, why)
    }
}

impl Iterator for Lines {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Result<Line>> {
        if self.ended {
            return None;
        }
        let line = self.line().transpose()?;
        Some(line.map(|text| Line { number: self.number, text }))
    }
}

/// An error of a line.
pub(super) fn wrong(name: &str, number: usize, why: &str) -> Error {
    Error::data(name, format!("line {number}: {why}"))
}

/// A line: a string, or an object with one of `prompt`, `messages`, `prompt_ids`, with images and choices. Names of files are
/// relative to `dir`.
fn parse(line: &str, dir: &Path) -> Result<Asked, String> {
    match serde_json::from_str(line).map_err(|e| told(&e))? {
        Value::String(text) => Ok(Content::Text(text).into()),
        Value::Object(fields) => object(fields, dir),
        _ => Err("it is neither a string nor an object".into()),
    }
}

/// What an object asks.
pub(super) fn object(mut fields: Map<String, Value>, dir: &Path) -> Result<Asked, String> {
    let (content, media) = parts::take(&mut fields, dir)?;
    let choices: Choices = serde_json::from_value(Value::Object(fields)).map_err(|e| told(&e))?;
    choices.check(str::to_owned).map_err(|e| e.to_string())?;
    Ok(Asked { content, media, choices })
}

/// A message of serde_json's about text that is always one line.
pub(super) fn told(e: &serde_json::Error) -> String {
    e.to_string().replace(" at line 1 column ", " at column ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Result<Asked>> {
        let lines = Lines::new("p.jsonl".into(), io::Cursor::new(text.to_owned()));
        let parsed = |Line { number, text }| {
            parse(&text, Path::new("dir")).map_err(|why| wrong("p.jsonl", number, &why))
        };
        lines.map(|line| line.and_then(parsed)).collect()
    }

    fn message(text: &str) -> String {
        read(text).remove(0).unwrap_err().to_string()
    }

    #[test]
    fn lines_are_strings_or_objects() {
        let text = concat!(
            "\"one\"\n\n",
            r#"{"prompt": "two", "max_tokens": 3}"#,
            "\r\n  \n",
            r#"{"messages": [{"role": "user", "content": "three"}]}"#,
            "\n",
            r#"{"prompt_ids": [4, 5]}"#,
        );
        let asked: Vec<Asked> = read(text).into_iter().map(Result::unwrap).collect();
        assert_eq!(asked[0], Content::Text("one".into()).into());
        assert_eq!(asked[1].content, Content::Text("two".into()));
        assert_ne!(asked[1].choices, Choices::default());
        assert_eq!(asked[2], Content::Messages(vec![Message::new("user", "three")]).into());
        assert_eq!(asked[3], Content::Ids(vec![4, 5]).into());
        assert_eq!(asked.len(), 4);
    }

    #[test]
    fn a_wrong_line_is_named_and_the_others_follow() {
        let lines = read("\"a\"\n\nnonsense\n\"b\"\n");
        assert_eq!(lines.len(), 3);
        assert!(lines[0].is_ok() && lines[2].is_ok());
        let why = lines[1].as_ref().unwrap_err().to_string();
        assert!(why.starts_with("p.jsonl: line 3: ") && why.contains("at column 2"), "{why}");
        let lines = Lines::new("p".into(), &b"\"\xff\"\n\"b\""[..]).collect::<Vec<_>>();
        assert_eq!(lines[0].as_ref().unwrap_err().to_string(), "p: line 1: it is not UTF-8");
        assert!(lines[1].is_ok());
    }

    #[test]
    fn stdin_is_read_up_to_a_limit() {
        assert_eq!(whole(&b"a\nb\r\n"[..]).unwrap(), Content::Text("a\nb".into()));
        let why = whole(io::repeat(b'a')).unwrap_err().to_string();
        assert_eq!(why, "stdin: it is longer than 64 MiB");
    }

    #[test]
    fn wrong_lines_say_why() {
        assert!(message("3").contains("neither a string nor an object"));
        assert!(message("{}").contains("none of prompt, messages and prompt_ids"));
        assert!(message(r#"{"prompt": "a", "prompt_ids": [1]}"#).contains("both prompt and prompt_ids"));
        assert!(message(r#"{"prompt": 1}"#).contains("prompt: invalid type"));
        assert!(message(r#"{"messages": [{"role": "user"}]}"#).contains("missing field `content`"));
        assert!(message(r#"{"prompt_ids": [-1]}"#).contains("prompt_ids: "));
        assert!(message(r#"{"prompt": "a", "tempratur": 1}"#).contains("unknown field `tempratur`"));
        assert!(message(r#"{"prompt": "a", "temperature": -1}"#).contains("temperature: -1"));
        assert!(message(r#"{"prompt": "a""#).contains("at column"));
    }
}
