//! What runs measure: told beside what was predicted, kept, believed by the next run and by plans, and ignored where it is damaged or
//! where nobody wants it.

use super::*;

/// The program with a cache folder.
fn run_in(cache: &std::path::Path, args: &[&str]) -> Output {
    program(args).env("XDG_CACHE_HOME", cache).output().unwrap()
}

const RUN: [&str; 6] = ["--device", "cpu", "--stages", "2", "--prompt", "Hello"];

/// The one file of a cache folder, if there is one.
fn profile(cache: &std::path::Path) -> Option<PathBuf> {
    let folder = std::fs::read_dir(cache.join("pipeline-infer/profiles")).ok()?;
    let files: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next()
}

fn bench(cache: &std::path::Path, more: &[&str]) -> Output {
    let work = ["--requests", "2", "--input-len", "9", "--output-len", "30", "--stages", "2"];
    let flags = ["bench", "throughput", "--model", &model(), "--weights", "dummy", "--device", "cpu"];
    run_in(cache, &[&flags[..], &work, more].concat())
}

#[test]
fn a_bench_tells_what_was_predicted_and_the_next_one_predicts_what_it_measured() {
    let cache = tempfile::tempdir().unwrap();
    let first = json(&bench(cache.path(), &["--format", "json"]))["compared"].clone();
    assert_eq!(first["profiled"], Value::from(vec![false]));
    let passes = first["passes"].as_array().unwrap();
    assert!(passes.len() >= 4 && passes.iter().any(|pass| pass["pass"]["decode"]["rows"] == 2), "{passes:?}");
    for pass in passes {
        let number = |name: &str| pass[name].as_f64().unwrap();
        let error = 100.0 * (1.0 - number("predicted") / number("measured"));
        assert!((error - number("error_percent")).abs() < 1e-6 && number("passes") > 0.0, "{pass}");
    }
    let path = profile(cache.path()).unwrap();
    let second = json(&bench(cache.path(), &["--format", "json"]))["compared"].clone();
    assert_eq!(second["profiled"], Value::from(vec![true]));
    // Two rows at a time, as before: told from what was measured, not from data. What others do on this machine is noise.
    let decode = second["passes"].as_array().unwrap().iter().find(|pass| pass["pass"]["decode"]["rows"] == 2);
    assert!(decode.unwrap()["error_percent"].as_f64().unwrap().abs() < 80.0, "{second}");
    let text = good(&bench(cache.path(), &[]));
    assert!(text.contains("stage times, predicted from earlier runs\npass"), "{text}");
    let before = std::fs::read(&path).unwrap();
    let text = good(&bench(cache.path(), &["--no-profiles"]));
    assert!(text.contains("stage times, predicted from device data\npass"), "{text}");
    assert_eq!(std::fs::read(&path).unwrap(), before, "nothing is kept");
}

#[test]
fn a_run_tells_it_if_asked() {
    let cache = tempfile::tempdir().unwrap();
    let model = model();
    let flags = [&["--model", &model], &RUN[..], &["--max-tokens", "30", "--ignore-eos"]].concat();
    let quiet = run_in(cache.path(), &flags);
    good(&quiet);
    assert!(!stderr(&quiet).contains("predicted") && profile(cache.path()).is_none());
    let told = run_in(cache.path(), &[&flags[..], &["-v"]].concat());
    good(&told);
    let text = stderr(&told);
    assert!(
        text.contains("stage times, predicted from device data\npass") && text.contains("1 row at "),
        "{text}"
    );
    let path = profile(cache.path()).unwrap();
    // As lines of JSON where answers are JSON.
    let flags = [&flags[..], &["-v", "--format", "json", "--log-format", "json"]].concat();
    let told = run_in(cache.path(), &flags);
    json(&told);
    let lines = stderr(&told);
    let times: Vec<&str> = lines.lines().filter(|line| line.contains("\"stage time\"")).collect();
    assert!(times.len() >= 2 && times.iter().all(|line| line.contains("\"error_percent\"")), "{lines}");
    // A damaged file is ignored, and replaced.
    for damaged in
        ["{", "", &std::fs::read_to_string(&path).unwrap().replace("\"version\": \"", "\"version\": \"0-")]
    {
        std::fs::write(&path, damaged).unwrap();
        let told = run_in(cache.path(), &flags);
        json(&told);
        assert!(stderr(&told).contains("a profile is ignored"), "{}", stderr(&told));
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"points\""));
    }
}

#[test]
fn plans_believe_what_is_kept_unless_told_not_to() {
    let cache = tempfile::tempdir().unwrap();
    // Measured on L4s: a layer takes a millisecond.
    let model = model();
    let flags = ["plan", "--model", &model, "--devices", "2xl4", "--stages", "2"];
    let told = json(&run_in(cache.path(), &[&flags[..], &["--format", "json"]].concat()));
    assert_eq!(told["measured"], Value::from(vec![false, false]));
    json(&bench(cache.path(), &["--format", "json"]));
    let path = profile(cache.path()).unwrap();
    let mut kept: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let (device, shape, dtype) = ("l4", kept["shape"].as_str().unwrap().to_owned(), kept["dtype"].clone());
    kept["device"] = device.into();
    for point in kept["points"].as_array_mut().unwrap() {
        point["seconds"] = 1e-3.into();
    }
    let name = format!("{shape}-{device}-{}.json", dtype.as_str().unwrap());
    std::fs::write(path.with_file_name(name), kept.to_string()).unwrap();
    let slowest = |more: &[&str]| {
        let told = json(&run_in(cache.path(), &[&flags[..], &["--format", "json"], more].concat()));
        told["plan"]["stages"][0]["times"][1]["seconds"].as_f64().unwrap()
    };
    assert!(slowest(&[]) > 4.0 * slowest(&["--no-profiles"]));
    let text = good(&run_in(cache.path(), &flags));
    assert!(text.contains("2 devices, predicted from earlier runs\n"), "{text}");
    let text = good(&run_in(cache.path(), &[&flags[..], &["--no-profiles"]].concat()));
    assert!(text.contains("2 devices, predicted from device data\n"), "{text}");
    // One that is described as slower than its name says has no profile.
    let slow = [&flags[..4], &["2xl4:bw=100g", "--stages", "2"]].concat();
    assert!(good(&run_in(cache.path(), &slow)).contains("predicted from device data\n"));
}

#[test]
fn less_memory_may_be_taken_than_there_is() {
    let flags = ["plan", "--model", "72b", "--devices", "4xh200-141g", "--stages", "4", "--format", "json"];
    let layout = |more: &[&str]| {
        let told = json(&run(&[&flags[..], more].concat()));
        (
            told["plan"]["layout"].as_str().unwrap().to_owned(),
            told["plan"]["new_tokens_per_s"].as_f64().unwrap(),
        )
    };
    let (planned, fast) = layout(&["--device-memory", "cuda:1=40g"]);
    let (even, slow) = layout(&["--device-memory", "cuda:1=40g", "--split", "even"]);
    assert!(
        planned.starts_with("0-21@cuda:0,22-35@cuda:1,") && even.starts_with("0-19@cuda:0,"),
        "{planned}"
    );
    assert!(fast > 1.4 * slow, "{fast} and {slow}");
    let text = good(&run(&[&flags[..7], &["--split", "even", "--device-memory", "cuda:1=40g"]].concat()));
    assert!(text.contains("of 256: cuda:1 has no room for more KV tokens"), "{text}");
    for (limit, want) in
        [("cuda:9=4g", "--device-memory cuda:9: it is not among"), ("4g", "expected DEVICE=BYTES")]
    {
        let told = error(&run(&[&flags[..], &["--device-memory", limit]].concat()), 2);
        assert!(told.contains(want), "{told}");
    }
    let told = error(&ask(&["--prompt", "a", "--device-memory", "cuda:1"]), 2);
    assert!(told.contains("expected DEVICE=BYTES"), "{told}");
    // On the processor it bounds the KV cache.
    let flags =
        ["--device", "cpu", "--prompt", "Hello", "--max-tokens", "1", "-v", "--device-memory", "cpu=30k"];
    let told = stderr(&ask(&flags));
    assert!(told.contains("kv_tokens=80 "), "{told}");
}
