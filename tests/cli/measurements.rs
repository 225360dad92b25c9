//! `bench latency`, `serve`, `sweep`, `compare` and `report`; prompts of a file; plots.

use super::*;

/// Runs a measurement on the small model with random weights.
fn bench(name: &str, args: &[&str]) -> Output {
    let model = model();
    let common = ["bench", name, "--model", &model, "--weights", "dummy"];
    // Layouts name their devices themselves.
    let place: &[&str] = if args.contains(&"0-1@cpu,2-3@cpu") { &[] } else { &["--device", "cpu"] };
    run(&[&common[..], place, args].concat())
}

/// Small requests: 12 prompt tokens, 5 new ones.
const SMALL: [&str; 4] = ["--input-len", "12", "--output-len", "5"];

fn number(value: &Value, path: &str) -> f64 {
    let at = path.split('.').fold(value, |value, key| &value[key]);
    at.as_f64().unwrap_or_else(|| panic!("{path} is {at} in {value}"))
}

/// A spread whose values are in order.
fn spread(value: &Value, name: &str) {
    let of = |which: &str| number(value, &format!("{name}.{which}"));
    assert!(0.0 < of("mean") && of("median") <= of("p90"), "{name}: {value}");
    assert!(of("p90") <= of("p99") && of("p99") <= of("max"), "{name}: {value}");
}

/// An SVG file: one element, with so many dots at least.
fn picture(path: &Path, dots: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"), "{text}");
    assert!(
        text.matches("<circle").count() >= dots && !text.contains("NaN") && !text.contains("inf\""),
        "{text}"
    );
    text
}

#[test]
fn latency_is_of_one_batch_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("stages.svg");
    let flags = ["--requests", "3", "--repeat", "4", "--stages", "2", "--format", "json"];
    let limits = ["--limits", "cpu:mem=8g,bw=10g,bf16=100g", "--plot", plot.to_str().unwrap()];
    let figures = json(&bench("latency", &[&SMALL[..], &flags, &limits].concat()));
    assert_eq!((&figures["bench"], &figures["id"]), (&"latency".into(), &"chat-llama/3x12x5/s2".into()));
    assert_eq!(
        (figures["seconds"].as_array().unwrap().len(), figures["runs"].as_array().unwrap().len()),
        (4, 4)
    );
    for name in ["batch_ms", "ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"] {
        spread(&figures, name);
    }
    assert!(number(&figures, "e2el_ms.max") <= number(&figures, "batch_ms.max"));
    assert!(number(&figures, "ttft_ms.median") < number(&figures, "e2el_ms.median"));
    // Of a described device shares are told, and nothing of a GPU's energy.
    assert!(number(&figures, "limit_share") > 0.0 && figures["energy"].is_null());
    for stage in figures["stages"].as_array().unwrap() {
        let of = |name: &str| number(stage, &format!("of_limits.{name}"));
        assert!(of("roofline") >= of("bandwidth") && of("roofline") >= of("matmul") && of("matmul") > 0.0);
    }
    assert!(number(&figures, "host_cpu.cores") > 0.0 && number(&figures, "host_bytes_peak") > 1e6);
    assert!(number(&figures, "kv_use.max") <= 1.0 && number(&figures, "kv_use.mean") > 0.0);
    let text = picture(&plot, 0);
    assert!(text.contains("chat-llama/3x12x5/s2") && text.contains("cpu 2-3"), "{text}");
    assert!(text.matches("<rect").count() > 10, "{text}");
    // Without a description nothing is made up.
    let figures = json(&bench("latency", &[&SMALL[..], &["--repeat", "1", "--format", "json"]].concat()));
    assert!(figures["limit_share"].is_null() && figures["stages"][0]["of_limits"].is_null());
    assert_eq!(figures["id"], "chat-llama/1x12x5/s1");
}

#[test]
fn requests_come_at_rates_and_good_ones_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("serve.svg");
    let flags = ["--requests", "12", "--request-rate", "150,inf", "--format", "json", "--plot"];
    let limits = ["--goodput", "ttft:60000", "tpot:60000"];
    let output = bench("serve", &[&SMALL[..], &flags, &[plot.to_str().unwrap()], &limits].concat());
    good(&output);
    let [at_rate, at_once] = &lines(&output)[..] else { panic!("{}", stdout(&output)) };
    assert_eq!(
        (&at_rate["id"], &at_once["id"]),
        (&"chat-llama/12x12x5@150rps/s1".into(), &"chat-llama/12x12x5/s1".into())
    );
    assert_eq!(at_rate["workload"]["request_rate"], 150.0);
    assert!(at_once["workload"]["request_rate"].is_null());
    for figures in [at_rate, at_once] {
        assert_eq!(figures["goodput"]["share"], 1.0);
        assert_eq!(
            (&figures["goodput"]["ttft_limit_ms"], &figures["goodput"]["e2el_limit_ms"]),
            (&60000.0.into(), &Value::Null)
        );
        let (all, good) =
            (number(figures, "requests_per_s.median"), number(figures, "goodput.requests_per_s"));
        assert!((all / good - 1.0).abs() < 1e-9, "{figures}");
        spread(figures, "e2el_ms");
    }
    picture(&plot, 4);
    // Nobody is that fast.
    let strict = [
        "--requests",
        "2",
        "--goodput",
        "e2el:0.000001,ttft:5",
        "--arrival",
        "burst",
        "--request-rate",
        "1000",
    ];
    let text = good(&bench("serve", &[&SMALL[..], &strict, &["--burst-size", "2"]].concat()));
    assert!(
        text.contains("goodput, requests/s (TTFT 5 ms, E2EL 0.000001 ms)") && text.contains("0.0% good"),
        "{text}"
    );
    assert!(text.contains("requests/s, offered") && text.contains("@1000rps.burst2/s1"), "{text}");
}

#[test]
fn a_sweep_ranks_what_can_be_measured() {
    let flags = ["--stages", "1,2,9", "--slots", "1,2", "--chunk", "8", "--requests", "2,1", "--repeat", "1"];
    let output = bench("sweep", &[&SMALL[..], &flags, &["--format", "json"]].concat());
    good(&output);
    let (failed, points): (Vec<Value>, Vec<Value>) =
        lines(&output).into_iter().partition(|line| !line["error"].is_null());
    assert_eq!((points.len(), failed.len()), (8, 2));
    let rates: Vec<f64> = points.iter().map(|point| number(point, "total_tokens_per_s.median")).collect();
    assert!(rates.is_sorted_by(|a, b| a >= b), "{rates:?}");
    assert!(points.iter().enumerate().all(|(i, point)| point["rank"] == i + 1));
    assert!(points.iter().any(|point| point["id"] == "chat-llama/2x12x5/s2.slots2.chunk8"));
    assert_eq!(failed[0]["asked"], "--stages 9 --slots 1 --chunk 8");
    assert!(failed[0]["error"].as_str().unwrap().contains("9 stages"), "{failed:?}");
    let layouts =
        ["--layout", "0-1@cpu,2-3@cpu", "--layout", "0-2@cpu,3@cpu", "--requests", "1", "--rank-by", "tpot"];
    let text = good(&bench("sweep", &[&SMALL[..], &layouts].concat()));
    assert!(text.contains("chat-llama/1x12x5/s2.0-1+2-3") && text.contains("s2.0-2+3"), "{text}");
    assert!(text.starts_with("rank  ") && text.lines().count() == 3, "{text}");
    let text = good(&bench("sweep", &[&SMALL[..], &["--stages", "1,9", "--requests", "1"]].concat()));
    assert!(text.contains("left out") && text.contains("--stages 9"), "{text}");
}

#[test]
fn results_of_files_are_tables_plots_and_ratios() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let flags = ["--requests", "1,3", "--stages", "1,2", "--repeat", "2", "--format", "json"];
    let output = bench("sweep", &[&SMALL[..], &flags].concat());
    std::fs::write(path("a.json"), stdout(&output)).unwrap();
    let text = good(&run(&["bench", "report", &path("a.json"), "--format", "md", "--only", "/s2"]));
    assert!(text.starts_with("| rank | workload |") && text.lines().count() == 4, "{text}");
    let csv = good(&run(&["bench", "report", &path("a.json"), &path("a.json"), "--format", "csv"]));
    assert_eq!(csv.lines().count(), 9);
    let columns = csv.lines().next().unwrap();
    for column in
        ["requests_per_s", "median_ttft_ms", "p99_tpot_ms", "mean_itl_ms", "p90_e2el_ms", "limit_share"]
    {
        assert!(columns.split(',').any(|name| name == column), "{columns}");
    }
    let axes = ["--plot-x", "requests", "--plot-y", "output", "--plot-title", "a <b>"];
    let drawn =
        run(&[&["bench", "report", &path("a.json"), "--plot", &path("growth.svg")], &axes[..]].concat());
    good(&drawn);
    assert!(picture(Path::new(&path("growth.svg")), 4).contains("a &lt;b&gt;"));
    // The same file: nothing is worse.
    let same = ["bench", "compare", &path("a.json"), &path("a.json"), "--max-regression", "0"];
    let text = good(&run(&same));
    assert_eq!(text.matches("chat-llama/").count(), 4);
    assert!(text.contains("1.000") && text.contains("alike"), "{text}");
    // An eighth as fast, in every run.
    let slower: String = lines(&output).iter().map(|line| format!("{}\n", slowed(line.clone()))).collect();
    std::fs::write(path("b.json"), slower).unwrap();
    let compare = ["bench", "compare", &path("a.json"), &path("b.json"), "--format", "json"];
    let compared = json(&run(&compare));
    assert_eq!(compared["pairs"].as_array().unwrap().len(), 4);
    let figure = &compared["pairs"][0]["figures"][1];
    assert_eq!((&figure["name"], &figure["verdict"]), (&"output tokens/s".into(), &"worse".into()));
    // Numbers in files are read to the last bit but one.
    let ratio = figure["ratio"].as_f64().unwrap();
    assert!((ratio - 0.125).abs() < 1e-12, "{ratio}");
    let output = run(&[&compare[..], &["--max-regression", "20%"]].concat());
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("output tokens/s by 87.5%") && stderr(&output).lines().count() == 1);
}

/// With an eighth of its tokens a second.
fn slowed(mut line: Value) -> Value {
    let less = |value: &mut Value| *value = (value.as_f64().unwrap() / 8.0).into();
    less(&mut line["output_tokens_per_s"]["median"]);
    line["runs"].as_array_mut().unwrap().iter_mut().for_each(|run| less(&mut run["output_tokens_per_s"]));
    line
}

#[test]
fn prompts_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.jsonl");
    let lines = "\"Hello\"\n{\"prompt_ids\": [5, 6, 7], \"max_tokens\": 2}\n{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n";
    std::fs::write(&path, lines).unwrap();
    let file = path.to_str().unwrap();
    let common = ["--prompt-file", file, "--output-len", "4", "--format", "json"];
    let figures = json(&bench("throughput", &common));
    assert_eq!(
        (&figures["workload"]["requests"], &figures["workload"]["prompt_file"]),
        (&3.into(), &file.into())
    );
    // Two of 4 tokens and one of 2; a second run would find the prompts cached.
    let seconds = figures["seconds"].as_array().unwrap();
    assert_eq!(seconds.len(), 1);
    let tokens = number(&figures, "output_tokens_per_s.median") * seconds[0].as_f64().unwrap();
    assert!((tokens - 10.0).abs() < 1e-6, "{tokens}");
    assert_eq!(number(&figures, "scheduler.prefix_hit_tokens"), 0.0);
    let two = json(&bench("serve", &[&common[..], &["--requests", "2", "--request-rate", "500"]].concat()));
    assert_eq!(two["workload"]["requests"], 2);
    let cases = [
        ("", 1, "there is no prompt in it"),
        ("\"a\"\n{\"prompt\": 3}\n", 1, "line 2: prompt: invalid type"),
        ("nonsense", 1, "line 1: "),
        ("{\"prompt\": \"a\", \"n\": 2}", 1, "prompt 1 asks for more than one sample"),
        ("{\"prompt\": \"a\", \"image\": \"b\"}", 1, "prompt 1 has images, which are not measured"),
        ("{\"prompt\": \"a\", \"max_tokens\": 0}", 1, "line 1: max_tokens: 0 asks for nothing"),
        ("{\"prompt_ids\": []}", 1, "prompt 1: a prompt and an answer"),
        ("{\"prompt\": \"a\", \"max_tokens\": 4000000}", 1, "a sequence has room for"),
        ("{\"prompt_ids\": [3, 99999999]}", 1, "prompt 1: token 1 is 99999999; the model has "),
    ];
    for (text, code, needle) in cases {
        std::fs::write(&path, text).unwrap();
        let told = error(&bench("throughput", &common), code);
        assert!(told.contains(needle), "{text}: {told}");
    }
    std::fs::write(&path, "\"a\"").unwrap();
    let told = error(&bench("throughput", &[&common[..], &["--requests", "2"]].concat()), 2);
    assert!(told.contains("--requests: 2, and ") && told.contains("has 1 prompts"), "{told}");
    assert!(
        error(&bench("throughput", &[&common[..], &["--input-len", "3"]].concat()), 2)
            .contains("--input-len")
    );
    assert!(error(&bench("throughput", &["--prompt-file", "/nowhere.jsonl"]), 1).contains("/nowhere.jsonl"));
}

#[test]
fn nonsense_is_one_line() {
    let cases: &[(&str, &[&str], i32, &str)] = &[
        ("latency", &["--requests", "0"], 2, "--requests"),
        ("latency", &["--repeat", "0"], 2, "--repeat"),
        ("latency", &["--input-len", "9", "--output-len", "2", "--limits", "h900"], 2, "--limits h900: "),
        ("latency", &["--plot", "/nowhere/a.svg"], 1, "/nowhere/a.svg: there is no such folder"),
        ("latency", &["--plot", "/"], 1, "it is a folder"),
        ("throughput", &["--prompt-file", "x", "--then-input-len", "3"], 2, "--then-input-len"),
        ("serve", &["--request-rate", "nan"], 2, "--request-rate"),
        ("serve", &["--request-rate", "0"], 2, "--request-rate"),
        ("serve", &["--request-rate", "1,-1"], 2, "--request-rate"),
        ("serve", &["--request-rate", "1e-6"], 2, "--request-rate 0.000001: 100 requests would take"),
        ("serve", &["--goodput", "speed:3"], 2, "--goodput"),
        ("serve", &["--goodput", "ttft:nan"], 2, "--goodput"),
        ("serve", &["--burst-size", "0"], 2, "--burst-size"),
        ("serve", &["--arrival", "never"], 2, "--arrival"),
        ("sweep", &["--stages", "0"], 2, "--stages"),
        ("sweep", &["--stages", "many"], 2, "--stages"),
        ("sweep", &["--slots", "1,x"], 2, "--slots"),
        ("sweep", &["--chunk", "0"], 2, "--chunk"),
        ("sweep", &["--requests", "1,0"], 2, "--requests"),
        ("sweep", &["--stages", "77,78", "--input-len", "9"], 2, "77 stages"),
        ("sweep", &["--layout", "0-1@cpu,2-3@cpu", "--stages", "2"], 2, "--layout"),
    ];
    for (name, args, code, needle) in cases {
        let told = error(&bench(name, args), *code);
        assert!(told.contains(needle), "{name} {args:?}: {told}");
    }
    let many: Vec<String> = (1..=40).map(|n| n.to_string()).collect();
    let many = many.join(",");
    let told = error(&bench("sweep", &["--slots", &many, "--chunk", &many]), 2);
    assert!(told.contains("1600 engines are more than 1000"), "{told}");
}

#[test]
fn damaged_results_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let result = |id: &str| {
        format!(
            r#"{{"id": {id}, "workload": {{"requests": 1}}, "output_tokens_per_s": {{"median": 1e308}}, "stages": 3}}"#
        )
    };
    let (empty, broken) = (path("empty.json", ""), path("broken.json", "{\"id\": "));
    let (foreign, deep) = (path("foreign.json", "{\"a\": [1]}"), path("deep.json", &"[".repeat(100_000)));
    let good = path("good.json", &result("\"x/1x1x1/s1\""));
    let odd = path("odd.json", &result(r#""a\u001b[31m|,\n<b>""#));
    for (file, needle) in [
        (&empty, "there is no result of bench in it"),
        (&broken, "broken.json: "),
        (&foreign, "there is no result of bench in it"),
        (&deep, "deep.json: "),
        (&"/nowhere.json".to_owned(), "/nowhere.json: "),
    ] {
        assert!(error(&run(&["bench", "report", file]), 1).contains(needle), "{file}");
        assert!(error(&run(&["bench", "compare", &good, file]), 1).contains(needle), "{file}");
    }
    let svg = dir.path().join("odd.svg");
    for format in ["table", "md", "csv", "json"] {
        let text =
            stdout(&run(&["bench", "report", &odd, "--format", format, "--plot", svg.to_str().unwrap()]));
        assert!(!text.contains('\u{1b}') && !text.is_empty(), "{text}");
    }
    assert!(!picture(&svg, 0).contains("<b>"));
    let two = path("two.json", &format!("{}{}", result("\"y/1x1x1/s1\""), result("\"z/1x1x1/s1\"")));
    assert!(error(&run(&["bench", "compare", &good, &two]), 1).contains("no workload in common"));
    assert!(error(&run(&["bench", "compare", &good]), 2).contains("B.json"));
    assert!(
        error(&run(&["bench", "compare", &good, &good, "--max-regression", "nan"]), 2)
            .contains("--max-regression")
    );
    assert!(error(&run(&["bench", "report", &good, "--only", "q"]), 2).contains("--only"));
    assert!(error(&run(&["bench", "report", &good, "--plot-x", "requests"]), 2).contains("--plot"));
}
