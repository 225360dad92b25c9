//! Models from the Hugging Face hub: downloaded once into its standard cache, used from there ever after.

use std::{
    env,
    fmt::Display,
    fs,
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress,
        sync::{ApiBuilder, ApiError, ApiRepo},
    },
};
use indicatif::ProgressBar;

use crate::error::{Error, Result, quiet_panic};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What is fetched besides configuration and weights, if the repository has it.
const OPTIONAL: [&str; 6] = [
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
];
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The folder of a model: an existing folder, or `owner/name` or `owner/name@revision` on the hub, which is
/// downloaded unless it is in the cache.
///
/// `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to the hub's own tools.
pub fn resolve(model: &str) -> Result<PathBuf> {
    resolve_with(model, Hub::from_env)
}

/// `hub` is asked for only where a hub is needed.
fn resolve_with(model: &str, hub: impl FnOnce() -> Result<Hub>) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if path.exists() {
        return Err(Error::usage(model, "is a file; a model is a folder, or owner/name on the hub"));
    }
    let looks_like_path = model.starts_with(['/', '.', '~']) || model.contains('\\') || model.ends_with('/');
    if looks_like_path || model.split('@').next().unwrap_or_default().matches('/').count() != 1 {
        return Err(Error::usage(
            model,
            "no such folder, nor is it owner/name, as models on the hub are called",
        ));
    }
    let name = Name::parse(model)?;
    hub()?.resolve(&name)
}

/// Where models come from and where they are kept.
#[derive(Debug, Clone)]
struct Hub {
    cache: PathBuf,
    endpoint: Option<String>,
    token: Option<String>,
    offline: bool,
}

/// A model on the hub.
#[derive(Debug, Clone, PartialEq)]
struct Name {
    id: String,
    revision: String,
}

impl Name {
    fn parse(model: &str) -> Result<Name> {
        let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
        let part = |text: &str| is_plain(text) && text.len() <= 96;
        let good = id.split('/').all(part) && revision.len() <= 200 && revision.split('/').all(part);
        if !good {
            let why = "is not a model's name on the hub: owner/name or owner/name@revision, of letters, digits, '-', '_' and '.'";
            return Err(Error::usage(model, why));
        }
        Ok(Name { id: id.to_owned(), revision: revision.to_owned() })
    }

    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, revision.to_owned())
    }

    fn error(&self, why: impl Display) -> Error {
        Error::io(format!("model {}", self.id), why)
    }
}

/// Whether a name can stand in a path: no separators, not hidden, no `..`.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && name.chars().all(plain)
        && !name.contains("..")
}

impl Hub {
    fn from_env() -> Result<Hub> {
        let var = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let home = var("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            Some(cache.or_else(|| Some(env::home_dir()?.join(".cache")))?.join("huggingface"))
        });
        let cache = var("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")));
        let Some(cache) = cache else {
            return Err(Error::usage("HF_HOME", "is not set, and there is no home folder for the cache"));
        };
        let stored = || Cache::new(home?.join("hub")).token();
        let offline = var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
        Ok(Hub {
            cache,
            endpoint: var("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_owned()),
            token: var("HF_TOKEN").or_else(stored),
            offline: ["1", "true", "yes", "on"].contains(&offline.as_str()),
        })
    }

    fn resolve(&self, name: &Name) -> Result<PathBuf> {
        let cached = self.cached(name);
        let runs = cached.as_deref().filter(|dir| can_run(dir));
        if let Some(dir) = runs.filter(|dir| self.offline || dir.join(TOKENIZER).exists()) {
            return Ok(dir.to_path_buf());
        }
        let state = if cached.is_some() { "incomplete in the cache" } else { "not in the cache" };
        let missing = |why: String| name.error(format!("{state} ({}) and {why}", self.cache.display()));
        if self.offline {
            return Err(missing("HF_HUB_OFFLINE forbids to ask the hub".into()));
        }
        match self.download(name) {
            Ok(dir) => Ok(dir),
            // It may have no tokenizer at all; only the hub would know.
            Err(Failure::Unreachable(_)) if runs.is_some() => Ok(cached.expect("it runs; this is a bug")),
            Err(Failure::Unreachable(why)) => Err(missing(format!("the hub cannot be reached: {why}"))),
            Err(Failure::Refused(why)) => Err(missing(why)),
            Err(Failure::File(file, why)) => Err(name.error(format!("{file}: {why}"))),
        }
    }

    /// The folder of the revision that the cache last saw.
    fn cached(&self, name: &Name) -> Option<PathBuf> {
        let folder = self.cache.join(name.at(&name.revision).folder_name());
        let by_ref = fs::read_to_string(folder.join("refs").join(&name.revision)).ok();
        let commit = by_ref.map_or(name.revision.clone(), |text| text.trim().to_owned());
        let dir = folder.join("snapshots").join(&commit);
        (is_plain(&commit) && dir.is_dir()).then_some(dir)
    }

    fn download(&self, name: &Name) -> std::result::Result<PathBuf, Failure> {
        fs::create_dir_all(&self.cache)
            .map_err(|e| Failure::File(self.cache.display().to_string(), e.to_string()))?;
        let mut builder = ApiBuilder::from_cache(Cache::new(self.cache.clone()));
        builder = builder
            .with_token(self.token.clone())
            .with_user_agent("pipeline-infer", env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let api = builder.build().map_err(Failure::of_hub)?;
        let info = guard(|| api.repo(name.at(&name.revision)).info())?.map_err(Failure::of_hub)?;
        if !is_plain(&info.sha) {
            return Err(Failure::Refused(format!("the hub names an impossible commit: {:?}", info.sha)));
        }
        // All files of one commit, whatever is pushed meanwhile.
        let fetch = Fetch {
            repo: api.repo(name.at(&info.sha)),
            cache: Cache::new(self.cache.clone()).repo(name.at(&info.sha)),
        };
        let has = |file: &str| info.siblings.iter().any(|s| s.rfilename == file);
        if !has(CONFIG) {
            return Err(Failure::Refused(format!("the repository has no {CONFIG}")));
        }
        for file in [CONFIG].into_iter().chain(OPTIONAL.into_iter().filter(|file| has(file))) {
            fetch.file(file)?;
        }
        if has(WEIGHTS) {
            fetch.file(WEIGHTS)?;
        } else if has(INDEX) {
            let index = fetch.file(INDEX)?;
            for shard in shards(&index).map_err(|why| Failure::File(INDEX.into(), why))? {
                fetch.file(&shard)?;
            }
        } else {
            return Err(Failure::Refused(format!("the repository has neither {WEIGHTS} nor {INDEX}")));
        }
        let pinned = fetch.cache.pointer_path(&info.sha);
        // Only now: a revision that the cache knows is complete.
        let named = Cache::new(self.cache.clone()).repo(name.at(&name.revision)).create_ref(&info.sha);
        named.map_err(|e| Failure::File("refs".into(), e.to_string()))?;
        Ok(pinned)
    }
}

/// One commit's files.
struct Fetch {
    repo: ApiRepo,
    cache: hf_hub::CacheRepo,
}

impl Fetch {
    fn file(&self, name: &str) -> std::result::Result<PathBuf, Failure> {
        if let Some(path) = self.cache.get(name) {
            return Ok(path);
        }
        let mut size = 0;
        let bar = Bar { bar: ProgressBar::new(0), size: &mut size };
        let got = guard(|| self.repo.download_with_progress(name, bar))?;
        let path = got.map_err(|e| Failure::File(name.to_owned(), reason(&e)))?;
        let len = fs::metadata(&path).map_or(0, |meta| meta.len());
        if len != size as u64 {
            // A link into the cache's store, and what it links to: both would be taken for the whole file.
            let _ = fs::canonicalize(&path).and_then(fs::remove_file);
            let _ = fs::remove_file(&path);
            return Err(Failure::File(name.to_owned(), format!("has {len} bytes instead of {size}")));
        }
        Ok(path)
    }
}

/// The usual progress bar, which also remembers the size that was promised.
struct Bar<'a> {
    bar: ProgressBar,
    size: &'a mut usize,
}

impl Progress for Bar<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        *self.size = size;
        Progress::init(&mut self.bar, size, filename);
    }

    fn update(&mut self, size: usize) {
        Progress::update(&mut self.bar, size);
    }

    fn finish(&mut self) {
        Progress::finish(&mut self.bar);
    }
}

/// Why a model could not be downloaded.
enum Failure {
    /// No answer.
    Unreachable(String),
    /// An answer, but not a model that can run.
    Refused(String),
    /// This file could not be had.
    File(String, String),
}

impl Failure {
    fn of_hub(error: ApiError) -> Failure {
        let why = reason(&error);
        match why.strip_prefix("http status: ") {
            Some("404") => Failure::Refused("the hub has no such model or revision".into()),
            Some(code @ ("401" | "403")) => Failure::Refused(format!(
                "the hub refuses it (http status {code}): there is no such model, or it needs a token in HF_TOKEN"
            )),
            _ => Failure::Unreachable(why),
        }
    }
}

fn reason(error: &ApiError) -> String {
    match error {
        ApiError::RequestError(inner) => inner.to_string(),
        other => other.to_string(),
    }
}

/// The library panics at some answers that a hub would not give.
fn guard<T>(call: impl FnOnce() -> T) -> std::result::Result<T, Failure> {
    quiet_panic(call).map_err(|_| Failure::Unreachable("its answer makes no sense".into()))
}

/// Whether a folder has configuration and all weights.
fn can_run(dir: &Path) -> bool {
    let weights = || match shards(&dir.join(INDEX)) {
        Ok(files) => files.iter().all(|file| dir.join(file).exists()),
        Err(_) => false,
    };
    dir.join(CONFIG).exists() && (dir.join(WEIGHTS).exists() || weights())
}

/// The files that an index names, each once.
fn shards(index: &Path) -> std::result::Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let size = fs::metadata(index).map_err(|e| e.to_string())?.len();
    if size > INDEX_BYTES_MAX {
        return Err(format!("has {size} bytes, more than any index"));
    }
    let text = fs::read(index).map_err(|e| e.to_string())?;
    let parsed: Index = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    let mut files: Vec<String> = parsed.weight_map.into_values().collect();
    files.sort_unstable();
    files.dedup();
    match files.iter().find(|file| !is_plain(file)) {
        Some(file) => Err(format!("names an impossible file: {file:?}")),
        None if files.is_empty() => Err("names no files".into()),
        None => Ok(files),
    }
}

#[cfg(test)]
mod tests;
