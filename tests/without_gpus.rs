//! The CUDA backend on a driver without GPUs (tests/driver): what the host does for GPUs, in order and to the end. Kernels leave
//! memory as it is there, so tokens are whatever zeros lead to.
#![cfg(target_os = "linux")]

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(240);

/// A place for the driver's libraries, for what the program keeps, and for configs.
struct Place {
    folder: TempDir,
}

/// What a program has said, and whether it was content.
struct Said {
    ok: bool,
    out: String,
    err: String,
}

impl Place {
    fn new() -> Place {
        // Cargo builds it beside this test.
        let _ = pipeline_infer_driver::VERSION;
        let here = std::env::current_exe().unwrap();
        let library = here.parent().unwrap().join("libpipeline_infer_driver.so");
        let folder = TempDir::new().unwrap();
        std::fs::create_dir(folder.path().join("lib")).unwrap();
        for name in ["libcuda.so", "libnvrtc.so", "libcublasLt.so"] {
            std::os::unix::fs::symlink(&library, folder.path().join("lib").join(name)).unwrap();
        }
        Place { folder }
    }

    /// A folder with a config of so many layers, whose passes are as long as those of a large model.
    fn model(&self, layers: usize) -> String {
        let folder = self.folder.path().join(format!("model-{layers}"));
        std::fs::create_dir_all(&folder).unwrap();
        let config = json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "dtype": "bfloat16",
            "vocab_size": 32_000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
            "use_sliding_window": false, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 1e6, "hidden_size": 8192,
            "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29_568
        });
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        folder.to_str().unwrap().to_owned()
    }

    /// The program with these flags and settings of the driver.
    fn program(&self, args: &[&str], settings: &[(&str, &str)]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipeline-infer"));
        command.args(args).env_remove("RUST_LOG").envs(settings.iter().copied());
        command
            .env("XDG_CACHE_HOME", self.folder.path())
            .env("LD_LIBRARY_PATH", self.folder.path().join("lib"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it to its end.
    fn run(&self, args: &[&str], settings: &[(&str, &str)]) -> Said {
        let mut child = self.program(args, settings).spawn().unwrap();
        let mut pipes = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let all = |pipe: &mut dyn Read| {
            let mut text = String::new();
            pipe.read_to_string(&mut text).map(|_| text).unwrap()
        };
        std::thread::scope(|scope| {
            let err = scope.spawn(move || all(&mut pipes.1));
            let ended = scope.spawn(move || {
                let deadline = Instant::now() + PATIENCE;
                loop {
                    match child.try_wait().unwrap() {
                        Some(status) => return Some(status),
                        None if Instant::now() > deadline => break,
                        None => std::thread::sleep(Duration::from_millis(5)),
                    }
                }
                child.kill().unwrap();
                child.wait().unwrap();
                None
            });
            let out = all(&mut pipes.0);
            let (err, ended) = (err.join().unwrap(), ended.join().unwrap());
            let ended = ended.unwrap_or_else(|| panic!("{args:?} does not end: {out}{err}"));
            assert!(!err.contains("DRIVER MISUSED"), "{args:?}: {err}");
            Said { ok: ended.success(), out, err }
        })
    }

    /// The JSON that it prints.
    fn json(&self, args: &[&str], settings: &[(&str, &str)]) -> Value {
        let said = self.run(args, settings);
        assert!(said.ok, "{args:?}: {}{}", said.out, said.err);
        serde_json::from_str(&said.out).unwrap()
    }
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

const FAST: (&str, &str) = ("DRIVER_SPEED", "20");

/// `bench throughput` with dummy weights, and what it says of itself.
fn bench(place: &Place, layers: usize, stages: &str, load: [usize; 3], settings: &[(&str, &str)]) -> Value {
    let [requests, input, output] = load.map(|n| n.to_string());
    let model = place.model(layers);
    let mut args = vec!["bench", "throughput", "--model", &model, "--weights", "dummy", "--repeat", "1"];
    args.extend([
        "--stages",
        stages,
        "--requests",
        &requests,
        "--input-len",
        &input,
        "--output-len",
        &output,
    ]);
    args.extend(["--format", "json"]);
    place.json(&args, settings)
}

#[test]
fn gpus_are_listed_and_their_absence_is_said() {
    let place = Place::new();
    let found = place.json(&["devices", "--no-measure", "--format", "json"], &[("DRIVER_GPUS", "3")]);
    let gpus = found["gpus"].as_array().unwrap();
    assert_eq!(gpus.len(), 3, "{found}");
    assert!(gpus.iter().all(|gpu| gpu["arch"] == "sm_90a"), "{found}");
    let model = data("chat-llama");
    let args = ["--model", model.to_str().unwrap(), "--prompt", "a", "--max-tokens", "1"];
    let none = place.run(&args, &[("DRIVER_GPUS", "0")]);
    assert!(none.ok && none.err.contains("the driver sees no GPU"), "{}", none.err);
    let none = place.run(&[&args[..], &["--device", "cuda"]].concat(), &[("DRIVER_GPUS", "0")]);
    assert!(!none.ok && none.err.lines().count() == 1, "{}", none.err);
}

/// Prompts beside single steps, with far more launches than a stream takes: whoever brings more waits, and keeps a lock that
/// all others need, for as long as another GPU takes. Nobody may wait for what comes after that.
#[test]
fn full_launch_queues_hold_nobody_up_for_ever() {
    let place = Place::new();
    for (stages, queue, lock) in [("4", "40", "process"), ("2", "100", "gpu")] {
        let settings = [FAST, ("DRIVER_QUEUE", queue), ("DRIVER_LOCK", lock)];
        let said = bench(&place, 16, stages, [96, 300, 24], &settings);
        assert_eq!(said["kv_tokens"].as_u64().unwrap(), 96 * 336, "{said}");
        let rows: u64 = said["stages"][0]["rows"].as_u64().unwrap();
        // The last token of each is not fed again.
        assert_eq!(rows, 96 * (300 + 24 - 1), "{said}");
        assert_eq!(said["dropped_measurements"], 0);
    }
}

/// Several stages on a GPU, and a stage on the processor beside GPUs.
#[test]
fn layouts_of_all_kinds_come_to_their_end() {
    let place = Place::new();
    let model = data("chat-llama");
    let model = model.to_str().unwrap();
    for layout in [
        "0@cuda:0,1@cuda:0,2@cuda:1,3@cuda:1",
        "0@cuda:0,1@cpu,2-3@cuda:1",
        "0-1@cpu,2-3@cuda:0",
        "0-3@cuda:3",
        "0@cuda:0,1@cuda:1,2-3@cuda:2,head@all",
        "0-1@cuda:1,2@cpu,3@cuda:0,head@all",
    ] {
        let args =
            ["--model", model, "--layout", layout, "--prompt", "a b c", "--max-tokens", "40", "--ignore-eos"];
        let said = place.run(&args, &[FAST]);
        assert!(said.ok, "{layout}: {}", said.err);
    }
}

/// A vision tower on other GPUs than the layers, on the processor, and the other way round.
#[test]
fn images_come_to_wherever_the_layers_are() {
    let place = Place::new();
    let [model, image] =
        [data("qwen2_5_vl"), data("vision/odd.png")].map(|path| path.to_str().unwrap().to_owned());
    for layout in
        ["v0@cuda:0,v1-2@cuda:1,0@cuda:2,1-2@cuda:0", "vision@cpu,0-2@cuda:0", "vision@cuda:1,0-2@cpu"]
    {
        let mut args = vec!["--model", &model, "--layout", layout, "--max-context", "400", "--image", &image];
        args.extend(["--prompt", "a b c", "--max-tokens", "9", "--ignore-eos"]);
        let said = place.run(&args, &[FAST]);
        assert!(said.ok, "{layout}: {}", said.err);
    }
}

/// Keys and values go from GPU to GPU while requests run, again and again.
#[test]
fn a_layer_moves_while_requests_run() {
    let place = Place::new();
    let model = place.model(8);
    for head in ["", ",head@all"] {
        let cuts =
            ["0-1@cuda:0,2-3@cuda:1,4-5@cuda:2,6-7@cuda:3", "0-2@cuda:0,3@cuda:1,4-5@cuda:2,6-7@cuda:3"];
        let [from, to] = cuts.map(|cut| format!("{cut}{head}"));
        let mut args = vec!["bench", "relayout", "--model", &model, "--weights", "dummy", "--layout", &from];
        args.extend(["--to", &to, "--requests", "24", "--input-len", "100", "--output-len", "500"]);
        args.extend(["--after", "20", "--format", "json"]);
        let said = place.json(&args, &[]);
        let runs = said["runs"].as_array().unwrap();
        let moved = |run: &&Value| run["relayout"]["kv_bytes"].as_u64().is_some_and(|bytes| bytes > 0);
        assert!(runs.iter().filter(moved).count() > 1, "{said}");
    }
}

#[test]
fn what_does_not_fit_is_one_line_with_what_there_is() {
    let place = Place::new();
    let model = place.model(16);
    let args = ["--model", &model, "--weights", "dummy", "--stages", "2", "--prompt", "x"];
    let said = place.run(&args, &[FAST, ("DRIVER_GIB", "5")]);
    assert!(
        !said.ok && said.err.lines().count() == 1 && said.err.contains("there is room for"),
        "{}",
        said.err
    );
}

/// Stages want the same kernels at the same time; what is on the disk is used again, unless it is damaged.
#[test]
fn a_kernel_is_compiled_once_whoever_wants_it() {
    let place = Place::new();
    let model = data("chat-llama");
    let args = ["--model", model.to_str().unwrap(), "--stages", "4", "--prompt", "a", "--max-tokens", "2"];
    let compiled = || {
        let settings = [FAST, ("RUST_LOG", "pipeline_infer=debug"), ("DRIVER_COMPILE_MS", "60")];
        let said = place.run(&args, &settings);
        assert!(said.ok, "{}", said.err);
        let lines = said.err.lines().filter_map(|line| line.split_once(" compiled file="));
        let mut all: Vec<String> =
            lines.map(|(_, what)| what.split(" ms=").next().unwrap().to_owned()).collect();
        all.sort();
        all
    };
    let first = compiled();
    assert!(first.len() > 10 && first.windows(2).all(|pair| pair[0] != pair[1]), "{first:#?}");
    assert_eq!(compiled(), Vec::<String>::new());
    let folder = place.folder.path().join("pipeline-infer");
    let rope = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let rope = rope.into_iter().find(|path| path.to_str().unwrap().contains("rope.cu")).unwrap();
    std::fs::write(&rope, &std::fs::read(&rope).unwrap()[..100]).unwrap();
    let again = compiled();
    assert!(again.len() == 1 && again[0].contains("rope.cu"), "{again:?}");
    // Where nothing can be kept, it is once in each process.
    std::fs::remove_dir_all(place.folder.path().join("pipeline-infer")).unwrap();
    std::fs::write(place.folder.path().join("pipeline-infer"), "no folder").unwrap();
    assert_eq!(compiled(), first);
}

/// A GPU that is lost, at different moments: the others wait for it for ever, and nobody for them.
#[test]
fn a_lost_gpu_ends_what_runs_with_its_name() {
    let place = Place::new();
    let model = place.model(8);
    for fails in ["1:10", "1:30", "0:800", "2:1800"] {
        let mut args = vec!["bench", "throughput", "--model", &model, "--weights", "dummy", "--repeat", "1"];
        args.extend(["--stages", "3", "--requests", "64", "--input-len", "200", "--output-len", "60"]);
        let said = place.run(&args, &[FAST, ("DRIVER_FAILS", fails)]);
        let gpu = format!("cuda:{}", &fails[..1]);
        assert!(
            !said.ok && said.err.contains(&gpu) && said.err.contains("launch failure"),
            "{fails}: {}",
            said.err
        );
    }
}

/// Nor does a signal: neither the program nor its driver, which waits for GPUs when a process ends.
#[test]
fn work_that_never_ends_keeps_no_process_alive() {
    let place = Place::new();
    let model = place.model(8);
    let mut args = vec!["bench", "throughput", "--model", &model, "--weights", "dummy", "--stages", "2"];
    args.extend(["--requests", "8", "--input-len", "200", "--output-len", "4000", "--repeat", "9"]);
    let mut child = place.program(&args, &[FAST, ("DRIVER_STUCK", "1:3000")]).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(6));
    assert!(child.try_wait().unwrap().is_none(), "it has ended, and work has not");
    Command::new("kill").arg(child.id().to_string()).status().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}
