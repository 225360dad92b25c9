//! A hub on the loopback interface.

use super::*;
use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};
use tempfile::TempDir;

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves one model, `owner/name`, and notes what was asked.
struct FakeHub {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct Answers {
    files: HashMap<&'static str, String>,
    /// Listed, but not there.
    lost: &'static str,
    /// A file that ends early.
    cut: &'static str,
    sha: &'static str,
}

impl Answers {
    fn new(files: &[(&'static str, &str)]) -> Answers {
        let files = files.iter().map(|(name, text)| (*name, text.to_string())).collect();
        Answers { files, lost: "", cut: "", sha: SHA }
    }
}

impl FakeHub {
    fn start(answers: Answers) -> FakeHub {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (notes, stopped) = (asked.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let _ = answer(stream.unwrap(), &answers, &notes);
            }
        });
        FakeHub { port, asked, stop, thread: Some(thread) }
    }

    fn hub(&self, cache: &TempDir) -> Hub {
        hub(self.port, cache)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        self.thread.take().unwrap().join().unwrap();
    }
}

fn hub(port: u16, cache: &TempDir) -> Hub {
    Hub {
        cache: cache.path().join("hub"),
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        token: None,
        offline: false,
    }
}

fn answer(stream: TcpStream, answers: &Answers, notes: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("range: bytes=") {
            let (from, to) = value.split_once('-').unwrap();
            range = Some((from.parse::<usize>().unwrap(), to.parse::<usize>().ok()));
        }
    }
    notes.lock().unwrap().push(path.clone());
    let mut out = stream;
    if path == "/api/models/owner/name/revision/main" || path == "/api/models/owner/name/revision/v1%2Fx" {
        let names = answers.files.keys().copied().chain([answers.lost, "README.md"]);
        let siblings: Vec<_> = names.map(|name| serde_json::json!({"rfilename": name})).collect();
        let body =
            serde_json::json!({"sha": answers.sha, "siblings": siblings, "id": "owner/name"}).to_string();
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}", body.len());
        return write!(out, "{head}\r\nConnection: close\r\n\r\n{body}");
    }
    let file = path.strip_prefix(&format!("/owner/name/resolve/{SHA}/")).unwrap_or_default();
    let Some(text) = answers.files.get(file) else {
        return write!(out, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let (from, to) = range.unwrap_or((0, None));
    let end = to.map_or(text.len(), |to| (to + 1).min(text.len()));
    let promised = if file == answers.cut { text.len() + 5 } else { text.len() };
    let body = &text[from..end];
    write!(
        out,
        "HTTP/1.1 206 Partial Content\r\nETag: \"etag-{file}\"\r\nX-Repo-Commit: {SHA}\r\nAccept-Ranges: bytes\r\n\
         Content-Range: bytes {from}-{}/{promised}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        end.max(1) - 1,
        body.len(),
    )
}

const CONFIG_TEXT: &str = "{\"model_type\": \"llama\"}";
const INDEX_TEXT: &str =
    r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;

fn small() -> Answers {
    Answers::new(&[
        (CONFIG, CONFIG_TEXT),
        (TOKENIZER, "{}"),
        ("chat_template.jinja", "{{ messages }}"),
        (WEIGHTS, "weights"),
        ("pytorch_model.bin", "never fetched"),
        ("tokenizer.model", "never fetched"),
    ])
}

fn sharded() -> Answers {
    Answers::new(&[
        (CONFIG, CONFIG_TEXT),
        (TOKENIZER, "{}"),
        (INDEX, INDEX_TEXT),
        ("model-1.safetensors", "one"),
        ("model-2.safetensors", "two"),
        ("other.safetensors", "never fetched"),
    ])
}

fn get(model: &str, hub: &Hub) -> std::result::Result<PathBuf, String> {
    resolve_with(model, || Ok(hub.clone())).map_err(|e| {
        let text = e.to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    })
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A port that nothing listens on.
fn dead_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

#[test]
fn a_model_is_downloaded_once() {
    let cache = tempfile::tempdir().unwrap();
    let server = FakeHub::start(small());
    let dir = get("owner/name", &server.hub(&cache)).unwrap();
    assert!(dir.ends_with(format!("hub/models--owner--name/snapshots/{SHA}")));
    assert_eq!(names(&dir), ["chat_template.jinja", CONFIG, WEIGHTS, TOKENIZER]);
    assert_eq!(fs::read_to_string(dir.join(CONFIG)).unwrap(), CONFIG_TEXT);
    assert_eq!(fs::read_to_string(dir.join(WEIGHTS)).unwrap(), "weights");
    assert!(server.asked().iter().all(|path| !path.ends_with(".bin") && !path.ends_with(".model")));
    let asked = server.asked().len();
    assert_eq!(get("owner/name", &server.hub(&cache)).unwrap(), dir);
    assert_eq!(server.asked().len(), asked, "the second time asks nothing");
    let hub = Hub { offline: true, ..server.hub(&cache) };
    drop(server);
    assert_eq!(get("owner/name", &hub).unwrap(), dir);
    assert_eq!(get(&format!("owner/name@{SHA}"), &hub).unwrap(), dir);
}

#[test]
fn shards_come_from_the_index() {
    let cache = tempfile::tempdir().unwrap();
    let server = FakeHub::start(sharded());
    let dir = get("owner/name@v1/x", &server.hub(&cache)).unwrap();
    assert_eq!(names(&dir), [CONFIG, "model-1.safetensors", "model-2.safetensors", INDEX, TOKENIZER]);
    assert_eq!(get("owner/name@v1/x", &hub(dead_port(), &cache)).unwrap(), dir);
}

#[test]
fn a_missing_shard_is_named_and_fetched_later() {
    let cache = tempfile::tempdir().unwrap();
    let mut answers = sharded();
    answers.files.remove("model-2.safetensors");
    answers.lost = "model-2.safetensors";
    let server = FakeHub::start(answers);
    let error = get("owner/name", &server.hub(&cache)).unwrap_err();
    assert_eq!(error, "model owner/name: model-2.safetensors: http status: 404");
    drop(server);
    let offline = Hub { offline: true, ..hub(dead_port(), &cache) };
    assert!(get("owner/name", &offline).is_err());
    let server = FakeHub::start(sharded());
    get("owner/name", &server.hub(&cache)).unwrap();
    let again = server.asked().iter().filter(|path| path.ends_with("model-1.safetensors")).count();
    assert_eq!(again, 0, "what is there is not fetched again");
}

#[test]
fn a_file_that_ends_early_is_not_kept() {
    let cache = tempfile::tempdir().unwrap();
    let server = FakeHub::start(Answers { cut: WEIGHTS, ..small() });
    let error = get("owner/name", &server.hub(&cache)).unwrap_err();
    assert_eq!(error, "model owner/name: model.safetensors: has 7 bytes instead of 12");
    drop(server);
    let server = FakeHub::start(small());
    let dir = get("owner/name", &server.hub(&cache)).unwrap();
    assert_eq!(fs::read_to_string(dir.join(WEIGHTS)).unwrap(), "weights");
}

#[test]
fn without_a_hub_the_cache_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let dead = hub(dead_port(), &cache);
    let place = dead.cache.display().to_string();
    let error = get("owner/name", &dead).unwrap_err();
    let start = format!("model owner/name: not in the cache ({place}) and the hub cannot be reached: ");
    assert!(error.starts_with(&start), "{error}");
    let error = get("owner/name", &Hub { offline: true, ..dead }).unwrap_err();
    assert!(
        error.starts_with(&format!("model owner/name: not in the cache ({place}) and HF_HUB_OFFLINE")),
        "{error}"
    );
}

#[test]
fn a_cached_model_without_tokenizer_runs_without_a_hub() {
    let cache = tempfile::tempdir().unwrap();
    let server = FakeHub::start(Answers::new(&[(CONFIG, CONFIG_TEXT), (WEIGHTS, "weights")]));
    let dir = get("owner/name", &server.hub(&cache)).unwrap();
    drop(server);
    assert_eq!(get("owner/name", &hub(dead_port(), &cache)).unwrap(), dir);
}

#[test]
fn an_unknown_model_or_one_that_cannot_run_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    let server = FakeHub::start(small());
    let error = get("owner/other", &server.hub(&cache)).unwrap_err();
    assert!(error.ends_with("and the hub has no such model or revision"), "{error}");
    drop(server);
    let refused = |answers: Answers| {
        let server = FakeHub::start(answers);
        get("owner/name", &server.hub(&tempfile::tempdir().unwrap())).unwrap_err()
    };
    assert!(refused(Answers::new(&[(WEIGHTS, "")])).ends_with("the repository has no config.json"));
    assert!(refused(Answers::new(&[(CONFIG, "{}")])).contains("neither model.safetensors nor"));
    assert!(refused(Answers { sha: "../../x", ..small() }).contains("impossible commit"));
    let index = |text| refused(Answers::new(&[(CONFIG, "{}"), (INDEX, text)]));
    assert!(index("{").contains("model.safetensors.index.json: "));
    assert!(index(r#"{"weight_map": {}}"#).ends_with("names no files"));
    assert!(
        index(r#"{"weight_map": {"a": "../x.safetensors"}}"#)
            .contains("impossible file: \"../x.safetensors\"")
    );
}

#[test]
fn names_and_folders_are_told_apart() {
    let cache = tempfile::tempdir().unwrap();
    let dead = hub(dead_port(), &cache);
    let folder = cache.path().to_str().unwrap();
    assert_eq!(get(folder, &dead).unwrap(), cache.path());
    let file = cache.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(get(file.to_str().unwrap(), &dead).unwrap_err().contains("is a file"));
    for path in
        ["/absent/folder", "./absent", "../absent/x", "~/x", "absent", "a/b/c", "a/", "", "a\\b", "./a/b"]
    {
        assert!(get(path, &dead).unwrap_err().contains("no such folder"), "{path}");
    }
    for name in [
        "owner/..",
        "owner/a..b",
        "-a/b",
        "owner/na me",
        "owner/n@",
        "o/n@../x",
        "o/n@a//b",
        "o/.hidden",
        "ö/n",
    ] {
        assert!(get(name, &dead).unwrap_err().contains("is not a model's name"), "{name}");
    }
    assert!(get(&format!("o/{}", "n".repeat(97)), &dead).is_err());
    let name = Name::parse("Qwen/Qwen2.5-0.5B_x@refs/pr/1").unwrap();
    assert_eq!((name.id.as_str(), name.revision.as_str()), ("Qwen/Qwen2.5-0.5B_x", "refs/pr/1"));
}

#[test]
fn a_damaged_cache_is_not_taken_for_a_model() {
    let cache = tempfile::tempdir().unwrap();
    let dead = hub(dead_port(), &cache);
    let repo = dead.cache.join("models--owner--name");
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
    for reference in ["abc", "../../..", "", "no such commit"] {
        fs::write(repo.join("refs/main"), reference).unwrap();
        assert!(get("owner/name", &dead).is_err(), "{reference:?}");
    }
    fs::write(repo.join("refs/main"), "abc\n").unwrap();
    fs::write(repo.join("snapshots/abc").join(CONFIG), "{}").unwrap();
    fs::write(repo.join("snapshots/abc").join(INDEX), INDEX_TEXT).unwrap();
    assert!(get("owner/name", &dead).unwrap_err().contains("incomplete in the cache"));
}
