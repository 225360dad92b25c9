//! config.json and generation_config.json.
//!
//! Getters name the file and the key in their errors. A key that is `null` counts as absent.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{
    backend::DType,
    error::{Error, Result, shown},
    request::SamplingParams,
};

/// A config.json is a few KiB; parsed, hostile JSON takes some thirty times its size.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// A JSON object of a model folder, or an object in one.
#[derive(Debug, Clone)]
pub struct Config {
    path: PathBuf,
    /// The keys that lead to this object, each with a dot.
    within: String,
    values: Map<String, Value>,
}

impl Config {
    /// Reads the folder's config.json.
    pub fn read(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        let bytes = read_small(&path, CONFIG_BYTES_MAX)?;
        Config::parse(path, &bytes)
    }

    /// Parses an object; `path` is for messages.
    pub fn parse(path: impl Into<PathBuf>, bytes: &[u8]) -> Result<Config> {
        let path = path.into();
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(values)) => Ok(Config { path, within: String::new(), values }),
            Ok(_) => Err(Error::data(path, "it is not a JSON object")),
            Err(e) => Err(Error::data(path, format!("it is not JSON: {}", shown(&e.to_string())))),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error that names the file and the key.
    pub fn error(&self, key: &str, why: impl AsRef<str>) -> Error {
        Error::data(&self.path, format!("{}{key}: {}", self.within, why.as_ref()))
    }

    /// The value of a key that has to be there.
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(key, "it is missing"))
    }

    /// Whether the key is there and not `null`.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether the key is there and `null`, where that is not the same as absent.
    pub fn is_null(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(Value::is_null)
    }

    /// Whether the object has no keys.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// `true` or `false`.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A whole number from 0 to `max`.
    pub fn count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.whole(key, 0, max)
    }

    /// A whole number from 1 to `max`.
    pub fn size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.whole(key, 1, max)
    }

    /// A number that an f32 can hold.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number of ordinary size", |v| v.as_f64().filter(|x| (*x as f32).is_finite()))
    }

    /// A number above 0 that an f32 can hold.
    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0 and of ordinary size", |v| {
            v.as_f64().filter(|x| (*x as f32).is_normal() && *x > 0.0)
        })
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.typed(key, "a list of strings", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }

    /// A token id, or a list of them.
    pub fn ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        self.typed(key, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|n| vec![n]),
        })
    }

    /// An object within.
    pub fn object(&self, key: &str) -> Result<Option<Config>> {
        let values = self.typed(key, "an object", Value::as_object)?;
        Ok(values.map(|values| Config { values: values.clone(), ..self.empty(key) }))
    }

    /// What newer files say of the language model of a model that has other parts too.
    pub fn text_config(&self) -> Result<Option<Config>> {
        self.object("text_config")
    }

    /// What [`Config::object`] would give for an object without keys.
    pub fn empty(&self, key: &str) -> Config {
        Config { path: self.path.clone(), within: format!("{}{key}.", self.within), values: Map::new() }
    }

    /// The checkpoint's type, under either of its names.
    pub fn dtype(&self) -> Result<Option<DType>> {
        let key = if self.has("dtype") { "dtype" } else { "torch_dtype" };
        let Some(name) = self.text(key)? else { return Ok(None) };
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" => Ok(Some(DType::F32)),
            "float16" => Ok(Some(DType::F16)),
            "bfloat16" => Ok(Some(DType::BF16)),
            _ => {
                let why = format!("\"{}\" is not known (known: float32, float16, bfloat16)", shown(name));
                Err(self.error(key, why))
            }
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(key, format!("{} is not {what}", brief(value)))),
        }
    }

    fn whole(&self, key: &str, min: u64, max: usize) -> Result<Option<usize>> {
        let what = format!("a whole number from {min} to {max}");
        self.typed(key, &what, |v| {
            let n = v.as_u64().filter(|&n| n >= min)?;
            usize::try_from(n).ok().filter(|&n| n <= max)
        })
    }
}

/// What a folder says about generation: end-of-sequence ids and default sampling.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// `false` asks for greedy decoding, whose only parameter is the repetition penalty.
    pub do_sample: bool,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub temperature: Option<f32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub top_k: Option<u32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub top_p: Option<f32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub min_p: Option<f32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the folder's generation_config.json, if there is one. What it does not say about token ids,
    /// config.json says.
    pub fn read(dir: &Path, config: &Config) -> Result<GenerationConfig> {
        let path = dir.join("generation_config.json");
        if !path.try_exists().map_err(|e| Error::io(&path, e))? {
            return GenerationConfig::from_configs(None, config);
        }
        let bytes = read_small(&path, CONFIG_BYTES_MAX)?;
        GenerationConfig::from_configs(Some(&Config::parse(path, &bytes)?), config)
    }

    /// The same from parsed files; `own` is generation_config.json.
    pub fn from_configs(own: Option<&Config>, config: &Config) -> Result<GenerationConfig> {
        let text = config.text_config()?;
        let ids = |key: &str| {
            for place in [own, Some(config), text.as_ref()].into_iter().flatten() {
                if let Some(ids) = place.ids(key)? {
                    return Ok::<_, Error>(ids);
                }
            }
            Ok(Vec::new())
        };
        let mut out = GenerationConfig {
            bos: ids("bos_token_id")?.first().copied(),
            eos: ids("eos_token_id")?,
            ..GenerationConfig::default()
        };
        let Some(own) = own else { return Ok(out) };
        let number = |key: &str| Ok::<_, Error>(own.number(key)?.map(|x| x as f32));
        out.do_sample = own.flag("do_sample")?.unwrap_or(false);
        out.temperature = number("temperature")?;
        out.top_k = own.count("top_k", u32::MAX as usize)?.map(|k| k as u32);
        out.top_p = number("top_p")?;
        out.min_p = number("min_p")?;
        out.repetition_penalty = number("repetition_penalty")?;
        out.check(own)?;
        Ok(out)
    }

    /// What a request may not ask for, the file may not either.
    fn check(&self, own: &Config) -> Result<()> {
        let mut sampling = SamplingParams::default();
        for (to, from) in [
            (&mut sampling.temperature, self.temperature),
            (&mut sampling.top_p, self.top_p),
            (&mut sampling.min_p, self.min_p),
            (&mut sampling.repetition_penalty, self.repetition_penalty),
        ] {
            *to = from.unwrap_or(*to);
        }
        sampling.check(usize::MAX).map_err(|e| match e {
            Error::Request(why) => Error::data(own.path(), why),
            other => other,
        })
    }
}

/// Reads a file that should be small.
pub(super) fn read_small(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > bytes_max {
        return Err(Error::data(path, format!("it is larger than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Opens a file, and nothing that would block (a pipe) or never end (a device).
pub(super) fn open_regular(path: &Path) -> Result<File> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::io(path, "it is not a file"));
    }
    File::open(path).map_err(|e| Error::io(path, e))
}

/// A JSON value as an error may show it.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        other => shown(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse("config.json", text.as_bytes()).unwrap()
    }

    #[test]
    fn null_is_absent_and_the_wrong_type_is_named() {
        let config = config(
            r#"{"a": null, "n": 3, "zero": 0, "minus": -1, "part": 1.5, "big": 1e30, "s": "x\ny", "l": [1, "x"]}"#,
        );
        assert_eq!((config.size("a", 9).unwrap(), config.flag("a").unwrap()), (None, None));
        assert!(config.is_null("a") && !config.is_null("b") && !config.has("a") && config.has("n"));
        assert_eq!(config.size("n", 3).unwrap(), Some(3));
        assert_eq!(config.count("zero", 3).unwrap(), Some(0));
        for (key, said) in
            [("n", "3"), ("zero", "0"), ("minus", "-1"), ("part", "1.5"), ("big", "1e+30"), ("l", "a list")]
        {
            let message = config.size(key, 2).unwrap_err().to_string();
            assert_eq!(message, format!("config.json: {key}: {said} is not a whole number from 1 to 2"));
        }
        assert!(config.texts("l").is_err() && config.ids("l").is_err() && config.object("l").is_err());
        assert!(!config.flag("s").unwrap_err().to_string().contains('\n'));
        assert_eq!(
            config.required::<()>("k", None).unwrap_err().to_string(),
            "config.json: k: it is missing"
        );
    }

    #[test]
    fn both_spellings_of_the_type() {
        let dtype = |text: &str| config(text).dtype();
        assert_eq!(dtype("{}").unwrap(), None);
        assert_eq!(dtype(r#"{"dtype": "bfloat16"}"#).unwrap(), Some(DType::BF16));
        assert_eq!(dtype(r#"{"torch_dtype": "float16"}"#).unwrap(), Some(DType::F16));
        assert_eq!(dtype(r#"{"dtype": null, "torch_dtype": "torch.float32"}"#).unwrap(), Some(DType::F32));
        let message = dtype(r#"{"torch_dtype": "int8"}"#).unwrap_err().to_string();
        assert!(message.starts_with("config.json: torch_dtype: \"int8\" is not known"), "{message}");
    }

    #[test]
    fn token_ids_are_those_of_generation_config_or_else_of_config() {
        let read = |own: Option<&str>, text: &str| {
            GenerationConfig::from_configs(own.map(config).as_ref(), &config(text)).unwrap()
        };
        let base = r#"{"eos_token_id": 2, "bos_token_id": 1}"#;
        let none = read(None, base);
        assert_eq!((none.bos, none.eos, none.do_sample), (Some(1), vec![2], false));
        let own = read(
            Some(r#"{"eos_token_id": [5, 6], "do_sample": true, "temperature": 0.6, "top_k": 20}"#),
            base,
        );
        assert_eq!((own.bos, own.eos, own.do_sample), (Some(1), vec![5, 6], true));
        assert_eq!((own.temperature, own.top_k, own.top_p), (Some(0.6), Some(20), None));
        assert_eq!(read(Some("{}"), "{}"), GenerationConfig::default());
    }

    #[test]
    fn sampling_out_of_range_is_named() {
        for key in
            ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "bos_token_id"]
        {
            for value in ["-1", "\"x\"", "1e300", "{}"] {
                let own = config(&format!("{{\"{key}\": {value}}}"));
                let message =
                    GenerationConfig::from_configs(Some(&own), &config("{}")).unwrap_err().to_string();
                assert!(message.starts_with(&format!("config.json: {key}: ")), "{message}");
            }
        }
        let read = |text: &str| {
            let own = Config::parse("generation_config.json", text.as_bytes()).unwrap();
            GenerationConfig::from_configs(Some(&own), &config("{}"))
        };
        for (key, value) in [
            ("top_p", "0.0"),
            ("top_p", "1.1"),
            ("min_p", "1.5"),
            ("repetition_penalty", "0"),
            ("repetition_penalty", "1e-60"),
        ] {
            let e = read(&format!("{{\"{key}\": {value}}}")).unwrap_err();
            assert!(matches!(e, Error::Data { .. }), "{e:?}");
            assert!(e.to_string().starts_with(&format!("generation_config.json: {key}: ")), "{e}");
        }
        read(r#"{"temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1.05}"#).unwrap();
    }
}
