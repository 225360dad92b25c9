//! Chat templates: a conversation as the text that a model was trained to answer.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use serde_json::Value as Json;

use crate::{
    error::{Error, Result},
    request::Message,
    text::{Tokenizer, jinja, jinja_limits, read_file},
};

const FILE_BYTES_MAX: u64 = 4 << 20;
const NAME: &str = "chat_template";

/// A model's chat template.
///
/// Templates come with model folders and are not trusted: a render takes a bounded number of steps and makes a
/// bounded amount of text (see `jinja_limits`).
pub struct Template {
    env: Environment<'static>,
    path: PathBuf,
    /// `bos_token`, `eos_token` and their like, where the folder names them.
    tokens: Vec<(&'static str, String)>,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("path", &self.path).finish()
    }
}

impl Template {
    /// Opens a model folder's chat template: `chat_template.jinja`, else `chat_template.json`, else what
    /// `tokenizer_config.json` holds; `None` if there is none.
    pub fn open(model_dir: &Path, tokenizer: &Tokenizer) -> Result<Option<Template>> {
        let Some((path, source)) = find(model_dir, tokenizer)? else { return Ok(None) };
        let mut env = Environment::new();
        env.set_syntax(jinja::syntax());
        env.set_auto_escape_callback(|_| AutoEscape::None);
        jinja::add_to(&mut env);
        jinja_limits::add_to(&mut env);
        let added = env.add_template_owned(NAME, jinja_limits::guard_source(&source));
        added.map_err(|e| describe(&path, &e))?;
        let config = tokenizer.config();
        let tokens = [
            ("bos_token", &config.bos_token),
            ("eos_token", &config.eos_token),
            ("pad_token", &config.pad_token),
            ("unk_token", &config.unk_token),
        ];
        let tokens = tokens.into_iter().filter_map(|(name, token)| Some((name, token.clone()?))).collect();
        Ok(Some(Template { env, path, tokens }))
    }

    /// The conversation's text. `add_generation_prompt` ends it where the assistant's answer begins.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let failed = |e: minijinja::Error| describe(&self.path, &e);
        let template = self.env.get_template(NAME).map_err(failed)?;
        let messages = messages
            .iter()
            .map(|m| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]));
        let mut variables = vec![
            ("messages", messages.collect()),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        variables.extend(self.tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str()))));
        let mut out = Limited(Vec::new());
        jinja_limits::begin();
        template.render_captured_to(Value::from_pairs(variables), &mut out).map_err(failed)?;
        String::from_utf8(out.0).map_err(|e| Error::data(&self.path, e.to_string()))
    }
}

/// Where the template is, and its text.
fn find(model_dir: &Path, tokenizer: &Tokenizer) -> Result<Option<(PathBuf, String)>> {
    let path = model_dir.join("chat_template.jinja");
    if let Some(bytes) = read_file(&path, FILE_BYTES_MAX)? {
        let source = String::from_utf8(bytes).map_err(|e| Error::data(&path, e.to_string()))?;
        return Ok(Some((path, source)));
    }
    let path = model_dir.join("chat_template.json");
    if let Some(bytes) = read_file(&path, FILE_BYTES_MAX)? {
        let json: Json = serde_json::from_slice(&bytes).map_err(|e| Error::data(&path, e.to_string()))?;
        let source = choose(&path, json.get("chat_template"))?;
        return match source {
            Some(source) => Ok(Some((path, source))),
            None => Err(Error::data(&path, "has no chat_template")),
        };
    }
    let path = model_dir.join("tokenizer_config.json");
    Ok(choose(&path, tokenizer.config().chat_template.as_ref())?.map(|source| (path, source)))
}

/// A template is a string, or one of a list of `{name, template}`: the one named `default`, or the only one.
fn choose(path: &Path, template: Option<&Json>) -> Result<Option<String>> {
    let text = |json: &Json| json.as_str().map(str::to_owned);
    match template {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(source)) => Ok(Some(source.clone())),
        Some(Json::Array(list)) => {
            let default = list.iter().find(|t| t["name"] == "default");
            let only = list.first().filter(|_| list.len() == 1);
            match default.or(only).and_then(|t| text(&t["template"])) {
                Some(source) => Ok(Some(source)),
                None => Err(Error::data(path, "chat_template: the list has no template named \"default\"")),
            }
        }
        Some(_) => Err(Error::data(path, "chat_template is neither a string nor a list")),
    }
}

/// A template's error in one line. What the template itself raises is the request's fault, not the file's.
fn describe(path: &Path, error: &minijinja::Error) -> Error {
    if let Some(said) = jinja::raised(error) {
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        return Error::Request(format!("{}: the chat template refuses: {said}", path.display()));
    }
    let why = match error.kind() {
        ErrorKind::OutOfFuel => "the chat template takes too many steps".to_owned(),
        ErrorKind::WriteFailure => {
            format!("the chat template makes more than {} MiB of text", jinja_limits::OUTPUT_MAX >> 20)
        }
        kind => match error.detail() {
            Some(detail) => format!("chat template: {kind}: {detail}"),
            None => format!("chat template: {kind}"),
        },
    };
    match error.line() {
        Some(line) => Error::data(path, format!("{why} (line {line} of the template)")),
        None => Error::data(path, why),
    }
}

/// Takes at most `OUTPUT_MAX` bytes.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > jinja_limits::OUTPUT_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
