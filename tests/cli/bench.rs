//! `bench`: its figures hang together, and nonsense is refused before a model is loaded.

use super::*;

/// Runs `bench throughput` on the small model, of its config.json alone.
fn throughput(args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(PathBuf::from(model()).join("config.json"), dir.path().join("config.json")).unwrap();
    let model = dir.path().to_str().unwrap();
    run(&[&["bench", "throughput", "--model", model, "--weights", "dummy", "--device", "cpu"], args].concat())
}

/// Figures of a phase agree. On one processor stages take turns: the slowest idles while the other ones work.
fn full(phase: &Value, name: &str) {
    let number = |value: &Value| value.as_f64().unwrap();
    assert_eq!(phase["name"], name);
    assert!(number(&phase["steps"]) > 0.0 && number(&phase["measured"]) > 0.0, "{phase}");
    for share in ["bubble", "imbalance"] {
        assert!((0.0..1.0).contains(&number(&phase[share])), "{phase}");
    }
    let slowest = &phase["stages"][phase["slowest"].as_u64().unwrap() as usize];
    let idle = number(&slowest["waiting_for_input"]) + number(&slowest["waiting_for_room"]);
    assert!((idle - number(&phase["bubble"])).abs() < 1e-9, "{phase}");
}

#[test]
fn limits_on_what_waits_that_refuse_the_workload_are_named() {
    let told = error(&throughput(&["--requests", "3", "--waiting", "1"]), 2);
    assert_eq!(told.trim_end(), "error: --waiting: 1, and 3 requests come at once");
    let told = error(&throughput(&["--requests", "3", "--input-len", "8", "--waiting-tokens", "23"]), 2);
    assert_eq!(told.trim_end(), "error: --waiting-tokens: 23, and prompts of 24 tokens come at once");
}

#[test]
fn throughput_as_json_is_one_object_whose_figures_agree() {
    let flags = ["--requests", "70", "--input-len", "20", "--output-len", "6", "--stages", "2"];
    let figures = json(&throughput(&[&flags[..], &["--repeat", "3", "--format", "json"]].concat()));
    assert_eq!(figures["workload"]["requests"], 70);
    assert_eq!((&figures["layout"], &figures["dtype"]), (&"0-1@cpu,2-3@cpu".into(), &"bf16".into()));
    assert_eq!(figures["devices"][0]["device"], "cpu");
    assert!(figures["devices"][0]["name"].as_str().is_some_and(|name| !name.is_empty()));
    let number = |value: &Value| value.as_f64().unwrap();
    let mut seconds: Vec<f64> = figures["seconds"].as_array().unwrap().iter().map(number).collect();
    seconds.sort_by(f64::total_cmp);
    assert_eq!(seconds.len(), 3);
    for (rate, each) in [
        ("output_tokens_per_s", 6.0),
        ("prompt_tokens_per_s", 20.0),
        ("total_tokens_per_s", 26.0),
        ("requests_per_s", 1.0),
    ] {
        for (which, seconds) in [("median", seconds[1]), ("best", seconds[0])] {
            let (told, want) = (number(&figures[rate][which]), 70.0 * each / seconds);
            assert!((told / want - 1.0).abs() < 1e-9, "{rate} {which}: {told}, not {want}");
        }
    }
    for spread in ["ttft_ms", "tpot_ms", "itl_ms"] {
        let of = |which: &str| number(&figures[spread][which]);
        assert!(0.0 < of("median") && of("median") <= of("p90") && of("p90") <= of("p99"), "{figures}");
        assert!(of("p99") <= of("max") && of("max") <= 1e3 * seconds[2], "{figures}");
    }
    assert!(number(&figures["gap_max_over_median"]) >= 1.0 && figures["late_prompt"].is_null());
    full(&figures["pipeline"]["whole"], "whole run");
    assert!(figures["pipeline"]["steady"].is_null(), "the first request ends before the last one begins");
    let scheduler = &figures["scheduler"];
    assert!((2..=70).contains(&scheduler["running_max"].as_u64().unwrap()), "{scheduler}");
    assert_eq!((&scheduler["in_flight_max"], &scheduler["kv_blocks_total"]), (&1.into(), &(2 * 70).into()));
    let costs = figures["costs"].as_array().unwrap();
    assert!(costs.len() == 2 && costs.iter().all(|cost| number(&cost["base"]) >= 0.0), "{costs:?}");
    assert_eq!(figures["dropped_measurements"], 0);
    // All of them at once, of 26 tokens each: two blocks.
    assert_eq!(figures["kv_tokens"], 70 * 32);
    let stages = figures["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 2);
    let bytes: u64 = stages.iter().map(|s| s["weight_bytes"].as_u64().unwrap()).sum();
    assert!(bytes > 0 && figures["weight_bytes"] == bytes);
    // Keys and values of 2 heads of 10 numbers, 2 bytes each, in 4 layers.
    let bytes: u64 = stages.iter().map(|s| s["kv_bytes"].as_u64().unwrap()).sum();
    assert_eq!(bytes, 70 * 32 * 2 * 2 * 10 * 2 * 4);
    for stage in stages {
        let kinds = ["busy", "copying", "waiting_for_input", "waiting_for_room", "waiting_for_device"];
        // What the CPU's buffers take, nobody counts.
        assert!(stage["buffer_bytes"].is_null() && stage["device_bytes_peak"].is_null());
        let all: f64 = kinds.iter().map(|kind| number(&stage[kind])).sum();
        assert!((all - 1.0).abs() < 1e-9, "{stage}");
        // The warm-up is not among them; the last token is never fed.
        assert_eq!(stage["rows"], 3 * 70 * 25);
        assert!(stage["batches"].as_u64().unwrap() >= 3 * 6);
    }
}

#[test]
fn a_prompt_that_comes_later_and_a_prefix_in_common_are_among_the_figures() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.json");
    let flags = ["--requests", "3", "--input-len", "40", "--output-len", "60", "--shared-prefix", "32"];
    let more = [
        "--stages",
        "2",
        "--then-input-len",
        "90",
        "--chunk",
        "16",
        "--exact",
        "--format",
        "json",
        "--timeline",
    ];
    let figures = json(&throughput(&[&flags[..], &more, &[trace.to_str().unwrap()]].concat()));
    assert_eq!(
        (&figures["workload"]["shared_prefix"], &figures["workload"]["then_input_len"]),
        (&32.into(), &90.into())
    );
    let late = &figures["late_prompt"];
    assert_eq!(late["input_len"], 90);
    let number = |name: &str| late[name].as_f64().unwrap();
    assert!(number("ttft_ms") > 0.0 && number("gap_median_ms") > 0.0, "{late}");
    assert!(number("gap_max_over_median") > 0.0 && number("gap_max_ms") > 0.0, "{late}");
    full(&figures["pipeline"]["steady"], "decode");
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    // The warm-up, too; the late prompt is cut into chunks.
    let bars = events.iter().filter(|event| event["ph"] == "X").count();
    assert!(bars >= 2 * 3 * 60, "{bars} bars");
    let output =
        throughput(&["--requests", "2", "--input-len", "9", "--output-len", "20", "--then-input-len", "30"]);
    let text = good(&output);
    assert!(text.contains("a prompt of 30 later") && text.contains("max over median"), "{text}");
}

#[test]
fn the_trace_of_a_process_that_was_killed_lacks_its_bracket_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.json");
    let flags = ["bench", "throughput", "--model", &model(), "--weights", "dummy", "--device", "cpu"];
    let more = ["--input-len", "9", "--repeat", "1000", "--timeline", path.to_str().unwrap()];
    let mut child = program(&[&flags[..], &more].concat()).stdout(Stdio::null()).spawn().unwrap();
    let written = || std::fs::metadata(&path).is_ok_and(|file| file.len() > 100_000);
    while !written() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let events: Vec<Value> = serde_json::from_str(&(text + "]")).unwrap();
    assert!(events.len() > 100);
}

#[test]
fn throughput_as_tables_is_aligned_and_short() {
    let flags =
        ["--requests", "2", "--input-len", "9", "--output-len", "1", "--repeat", "1", "--warmup", "0"];
    let output = throughput(&flags);
    let text = good(&output);
    assert_eq!(stderr(&output), "");
    for start in [
        "workload",
        "requests ",
        "1 run",
        "output tokens/s",
        "TTFT",
        "E2EL",
        "whole run",
        "host cores",
        "stage  device",
        "0 ",
    ] {
        assert!(text.lines().any(|line| line.starts_with(start)), "{start}\n{text}");
    }
    assert!(!text.contains("TPOT") && !text.contains("ITL"), "one token has no time between tokens\n{text}");
    assert!(text.lines().all(|line| line.len() < 120 && line == line.trim_end()), "{text}");
}

#[test]
fn requests_that_cannot_run_at_once_wait() {
    let flags = ["--requests", "5", "--input-len", "9", "--output-len", "3", "--running", "2"];
    let figures = json(&throughput(&[&flags[..], &["--format", "json"]].concat()));
    assert_eq!(figures["kv_tokens"], 2 * 16);
    // A KV cache of two sequences: as slow, and told.
    let token = 4 * 2 * 2 * 10 * 2;
    let flags = ["--requests", "5", "--input-len", "9", "--output-len", "3", "--kv-memory"];
    let output = throughput(&[&flags[..], &[&(32 * token).to_string(), "--format", "json"]].concat());
    assert_eq!(json(&output)["kv_tokens"], 2 * 16);
    assert!(stderr(&output).contains("does not hold all requests at once"), "{}", stderr(&output));
}

#[test]
fn nonsense_is_one_line_and_exit_code_2() {
    let cases: &[(&[&str], &str)] = &[
        (&["--requests", "0"], "--requests"),
        (&["--requests", "many"], "--requests"),
        (&["--input-len", "0"], "--input-len"),
        (&["--output-len", "-1"], "--output-len"),
        (&["--repeat", "0"], "--repeat"),
        (&["--warmup", "x"], "--warmup"),
        (&["--shared-prefix", "513"], "--shared-prefix: 513 tokens"),
        (&["--then-input-len", "0"], "--then-input-len"),
        (&["--running", "0"], "--running"),
        (&["--running", "99999"], "--running"),
        (&["--format", "text"], "--format"),
        (&["--prompt", "a"], "--prompt"),
        (&["--requests", "1000000", "--input-len", "100000000"], "--requests: 1000000 requests"),
        (&["--input-len", "200", "--output-len", "57"], "--input-len 200 --output-len 57: 257 tokens"),
        (&["--input-len", "60", "--output-len", "5", "--max-context", "64"], "--max-context: 64 tokens"),
        (&["--input-len", "60", "--output-len", "5", "--kv-memory", "2K"], "--kv-memory"),
    ];
    for (args, needle) in cases {
        let told = error(&throughput(args), 2);
        assert!(told.contains(needle), "{args:?}: {told}");
    }
    assert!(error(&run(&["bench"]), 2).contains("throughput"));
    assert!(error(&run(&["bench", "speed"]), 2).contains("speed"));
    assert!(error(&run(&["bench", "throughput"]), 2).contains("--model"));
    assert!(error(&throughput(&["--timeline", "/nowhere/a.json"]), 1).contains("/nowhere/a.json: "));
    // Real weights where there are none.
    let told = error(&throughput(&["--weights", "real", "--input-len", "4", "--output-len", "4"]), 2);
    assert!(told.contains("--weights"), "{told}");
}

fn simulate(args: &[&str]) -> Output {
    run(&[&["bench", "simulate"], args].concat())
}

#[test]
fn a_simulation_needs_no_model_and_its_figures_agree() {
    let flags = ["--stages", "5", "--layers", "50", "--head-us", "0", "--output-us", "0", "--format", "json"];
    let work = ["--requests", "80", "--input-len", "100", "--output-len", "60", "--chunk", "256"];
    let figures = json(&simulate(&[&flags[..], &work].concat()));
    let number = |value: &Value| value.as_f64().unwrap();
    let seconds = number(&figures["seconds"]);
    assert!((number(&figures["output_tokens_per_s"]) * seconds / 4800.0 - 1.0).abs() < 1e-9);
    assert!((number(&figures["prompt_tokens_per_s"]) * seconds / 8000.0 - 1.0).abs() < 1e-9);
    assert_eq!(figures["rows"], 80 * 159);
    assert_eq!((&figures["slots"], &figures["kv_tokens"]), (&5.into(), &(80 * 160).into()));
    assert!(number(&figures["bubble"]) < 0.05 && number(&figures["imbalance"]) < 0.01, "{figures}");
    // What it prints as costs, it reads.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("costs.json");
    std::fs::write(&path, figures.to_string()).unwrap();
    let from_file = ["--costs", path.to_str().unwrap(), "--format", "json"];
    assert_eq!(json(&simulate(&[&from_file[..], &work].concat())), figures);
    let told = error(&simulate(&["--costs", path.to_str().unwrap(), "--stages", "4"]), 2);
    assert!(told.contains("--stages: 4") && told.contains("has 5"), "{told}");
    std::fs::write(&path, "[{}]").unwrap();
    let told = error(&simulate(&["--costs", path.to_str().unwrap()]), 1);
    assert!(told.contains("costs.json: costs: stage 0"), "{told}");
    std::fs::write(&path, r#"[{"base": 1e300}]"#).unwrap();
    let told = error(&simulate(&["--costs", path.to_str().unwrap()]), 2);
    assert!(told.contains("584 years"), "{told}");
    std::fs::write(&path, " ".repeat((4 << 20) + 1)).unwrap();
    let told = error(&simulate(&["--costs", path.to_str().unwrap()]), 1);
    assert!(told.contains("costs.json: it is larger than"), "{told}");
}

#[test]
fn a_simulation_as_tables_has_a_row_a_stage() {
    let flags =
        ["--layout", "0-9,10-11,12-15", "--devices", "2", "--arrivals", "300", "--shared-prefix", "9"];
    let output = simulate(&[&flags[..], &["--no-ahead", "--kv-tokens", "2000", "--running", "4"]].concat());
    let text = good(&output);
    for start in ["new tokens/s", "bubble", "imbalance", "time to first token", "stage", "2 "] {
        assert!(text.lines().any(|line| line.starts_with(start)), "{start}\n{text}");
    }
}

#[test]
fn a_simulation_of_nonsense_is_one_line() {
    let cases: &[(&[&str], &str)] = &[
        (&["--stages", "0"], "--stages"),
        (&["--stages", "65"], "--stages"),
        (&["--stages", "29"], "--stages: 29 stages"),
        (&["--layout", "0-3,5-6"], "--layout"),
        (&["--devices", "5"], "--devices: 5 for 4 stages"),
        (&["--layer-us", "-1"], "--layer-us"),
        (&["--layer-us", "nan"], "--layer-us"),
        (&["--layer-us", "0", "--row-us", "0", "--attended-us", "0", "--read-us", "0"], "--layer-us 0"),
        (&["--kv-tokens", "100"], "--kv-tokens: a request needs 640 tokens"),
        (&["--arrivals", "0"], "--arrivals"),
        (
            &["--arrivals", "1e-6", "--requests", "30000", "--input-len", "1", "--output-len", "1"],
            "584 years",
        ),
        (&["--shared-prefix", "513"], "--shared-prefix: 513 tokens are more than --input-len 512"),
        (&["--requests", "1000000", "--input-len", "100000000"], "--requests: "),
        (&["--costs", "x.json", "--layers", "3"], "--costs"),
        (&["--model", "x"], "--model"),
    ];
    for (args, needle) in cases {
        let told = error(&simulate(args), 2);
        assert!(told.contains(needle), "{args:?}: {told}");
    }
    assert!(error(&simulate(&["--costs", "no-such.json"]), 1).contains("no-such.json"));
}

#[test]
fn a_relayout_is_measured_in_the_middle_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(PathBuf::from(model()).join("config.json"), dir.path().join("config.json")).unwrap();
    let model = dir.path().to_str().unwrap();
    let bench = |args: &[&str]| {
        let of =
            ["bench", "relayout", "--model", model, "--weights", "dummy", "--device", "cpu", "--stages", "2"];
        run(&[&of[..], &["--requests", "4", "--input-len", "8", "--output-len", "20"], args].concat())
    };
    let figures = json(&bench(&["--to", "0,1-2,3", "--repeat", "3", "--format", "json"]));
    let runs = figures["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 5);
    assert!(runs.iter().all(|run| run["requests_different"] == 0), "{figures}");
    let to: Vec<&str> = runs.iter().filter_map(|run| run["relayout"]["to"].as_str()).collect();
    assert_eq!(to, ["0@cpu,1-2@cpu,3@cpu", "0-1@cpu,2-3@cpu", "0@cpu,1-2@cpu,3@cpu"]);
    let table = good(&bench(&["--to", "0,1-3", "--repeat", "1"]));
    assert!(table.contains("0@cpu,1-3@cpu") && table.contains("stall"), "{table}");
    let refused = error(&bench(&["--to", "0-2"]), 2);
    assert!(refused.contains("layer 3 is in no stage"), "{refused}");
    let late = error(&bench(&["--to", "0-3", "--after", "20"]), 2);
    assert!(late.contains("--after: each request has 20 new tokens"), "{late}");
}
