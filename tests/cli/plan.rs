//! `plan`: predicted tables that hang together, without GPUs; and `--stages`, `--split` and `--layout` of `run`.

use super::*;

fn plan(args: &[&str]) -> Output {
    run(&[&["plan"], args].concat())
}

#[test]
fn described_devices_are_planned_for() {
    let output = plan(&["--model", "7b", "--devices", "4xh200-141g", "--stages", "4"]);
    let text = good(&output);
    assert_eq!(stderr(&output), "");
    for start in [
        "7b: 28 layers, bf16; 4 devices, predicted",
        "256 requests at once of 512 prompt and 256 new tokens",
        "stage  device",
        "0      cuda:0  h200-141g  embed, 0-6, head/4",
        "stage   1 row  32 rows  256 rows  chunk of 2048",
        "3      ",
        "layout  ",
        "KV tokens  ",
        "bubble of the slowest  ",
        "new tokens/s, 256 at once",
        "prompt tokens/s",
    ] {
        assert!(text.lines().any(|line| line.starts_with(start)), "{start}\n{text}");
    }
    assert!(text.is_ascii() && !text.contains('\x1b'), "what is no terminal gets ASCII without colours");
    // A layout is for copying: it is not broken.
    let fits = |line: &str| line.len() <= 80 || line.starts_with("layout ");
    assert!(text.lines().all(|line| fits(line) && line == line.trim_end()), "{text}");
}

#[test]
fn json_has_what_the_table_has() {
    let flags = ["--devices", "2xh100-80g,2xl4", "--stages", "4", "--kv-tokens", "50000", "--format", "json"];
    let told = json(&plan(&[&["--model", "llama-3.1-8b"], &flags[..]].concat()));
    assert_eq!((&told["layers"], &told["dtype"]), (&32.into(), &"bf16".into()));
    assert_eq!(told["devices"].as_array().unwrap().len(), 4);
    assert_eq!(
        (&told["devices"][3]["device"], &told["devices"][3]["name"]),
        (&"cuda:3".into(), &"l4".into())
    );
    let stages = told["plan"]["stages"].as_array().unwrap();
    assert_eq!((stages.len(), &stages[0]["embed"], &stages[3]["head"]), (4, &true.into(), &true.into()));
    let layers = |i: usize| {
        let text = stages[i]["layers"].as_str().unwrap();
        let ends: Vec<usize> = text.split('-').map(|n| n.parse().unwrap()).collect();
        ends[ends.len() - 1] - ends[0] + 1
    };
    assert_eq!((0..4).map(layers).sum::<usize>(), 32);
    assert!(layers(0) > 5 * layers(3), "an L4 reads a tenth as fast");
    let number = |value: &Value| value.as_f64().unwrap();
    assert!(stages.iter().all(|stage| number(&stage["kv_tokens"]) >= 50_000.0));
    let most = stages.iter().map(|stage| number(&stage["share"])).fold(0.0, f64::max);
    assert_eq!(most, 1.0);
    assert_eq!(stages[0]["times"].as_array().unwrap().len(), 4);
    assert_eq!(told["plan"]["decode"][0]["requests"], 1);
}

#[test]
fn a_folder_is_planned_like_a_shape_and_a_given_layout_is_explained() {
    let flags = ["--devices", "2xl4", "--layout", "0@cuda:1,1-3@cuda:0", "--format", "json"];
    let told = json(&plan(&[&["--model", &model()], &flags[..]].concat()));
    assert_eq!(told["plan"]["layout"], "0@cuda:1,1-3@cuda:0");
    let told = error(&plan(&["--model", "7b", "--devices", "l4", "--layout", "0-13@cuda:0,14-27@cuda:3"]), 2);
    assert!(told.contains("stage 1 is on cuda:3, which is not among the devices"), "{told}");
}

#[test]
fn splits_are_ranked() {
    let flags = ["--model", "7b", "--devices", "3xh200-141g,h200-141g:bw=1t,bf16=200t", "--compare"];
    let ranking = json(&plan(&[&flags[..], &["--format", "json"]].concat()));
    let ranking = ranking["ranking"].as_array().unwrap().clone();
    let rates: Vec<f64> =
        ranking.iter().map(|entry| entry["plan"]["new_tokens_per_s"].as_f64().unwrap()).collect();
    assert!(rates.len() >= 6 && rates.is_sorted_by(|a, b| a >= b), "{rates:?}");
    let place = |stages: u64, split: &str| {
        ranking.iter().position(|entry| entry["stages"] == stages && entry["split"] == split).unwrap()
    };
    assert!(place(4, "planned") < place(4, "even"));
    let text = good(&plan(&flags));
    assert!(
        text.lines()
            .any(|line| line.starts_with("stages") && line.contains("even") || line.contains("split"))
    );
    assert!(text.lines().any(|line| line.starts_with("4 even: 0-6@cuda:0,7-13@cuda:1,")), "{text}");
    // Some do not fit.
    let text = good(&plan(&["--model", "72b", "--devices", "3xh100-80g", "--compare"]));
    assert!(text.contains("1 planned: device 1 x h100-80g: the model does not fit"), "{text}");
}

#[test]
fn the_tower_of_a_model_that_reads_images_is_planned_with_the_layers() {
    let flags = ["--model", "vl-7b", "--devices", "4xh200-141g", "--stages", "4"];
    let plan_of = |more: &[&str]| json(&plan(&[&flags[..], more, &["--format", "json"]].concat()));
    let told = plan_of(&["--output-len", "1"]);
    assert_eq!(
        (&told["images"]["tokens"], &told["workload"]["prompt"]),
        (&1369.into(), &(512 + 1371).into())
    );
    let vision = told["plan"]["vision"].as_array().unwrap();
    assert_eq!((vision.len(), &vision[0]["patches"], &vision[3]["merger"]), (4, &true.into(), &true.into()));
    let number = |value: &Value| value.as_f64().unwrap();
    assert_eq!(told["plan"]["images_per_s"], told["plan"]["requests_per_s"]);
    assert!(
        vision.iter().all(|stage| number(&stage["image_seconds"]) < 0.006 && number(&stage["share"]) > 0.9)
    );
    assert!(
        told["plan"]["layout"].as_str().unwrap().starts_with("v0-7@cuda:0,v8-"),
        "{}",
        told["plan"]["layout"]
    );
    // Small images cost little, and several of them have a prompt's tokens each.
    let small = plan_of(&["--images", "3", "--image-size", "280x140"]);
    assert_eq!((&small["images"]["tokens"], &small["workload"]["prompt"]), (&50.into(), &(512 + 156).into()));
    let text = good(&plan(&flags));
    for start in ["vl-7b: 28 layers", "vision  device", "0       cuda:0  h200-141g", "images/s, with prompts"]
    {
        assert!(text.lines().any(|line| line.starts_with(start)), "{start}\n{text}");
    }
    assert!(text.contains("  patches, v0-") && text.contains(", merger  "), "{text}");
    // A layout is one word, to be passed on.
    let wide = |line: &&str| line.len() > 80 && !line.starts_with("layout  ");
    assert_eq!(text.lines().find(wide), None);
    let told = error(&plan(&["--model", "7b", "--devices", "l4", "--images", "1"]), 2);
    assert!(told.contains("--images: the model reads no images"), "{told}");
    let told = error(&plan(&["--model", "vl-7b", "--devices", "l4", "--image-size", "9000x9"]), 2);
    assert!(told.contains("--image-size 9000x9: "), "{told}");
}

/// Of a model that is larger than the GPU as much as can be is there, and the table says what the rest costs.
#[test]
fn a_processor_takes_what_has_no_room_on_gpus() {
    let plan_on = |devices: &str| {
        let flags = ["--devices", devices, "--running", "64", "--chunk", "256", "--format", "json"];
        json(&plan(&[&["--model", "72b"], &flags[..]].concat()))["plan"].clone()
    };
    const CPU: &str = "cpu:mem=512g,bw=200g,bf16=2t";
    let number = |value: &Value| value.as_f64().unwrap();
    let mixed = plan_on(&format!("h100-80g,{CPU}"));
    let stages = mixed["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 2);
    let on = |device: &str| stages.iter().find(|stage| stage["device"] == device).unwrap();
    let (gpu, cpu) = (on("cuda:0"), on("cpu"));
    assert!(number(&gpu["weight_bytes"]) > 0.85 * number(&gpu["room_bytes"]), "{gpu}");
    assert_eq!(number(&cpu["share"]), 1.0);
    assert!(number(&gpu["share"]) < 0.1, "the GPU waits nearly all the time: {gpu}");
    assert!(number(&mixed["kv_tokens"]) >= 16.0 * 768.0, "{mixed}");
    // Better than the processor alone, and far from what GPUs alone reach, where it is not used.
    let rate = |plan: &Value| number(&plan["new_tokens_per_s"]);
    let (alone, gpus) = (plan_on(CPU), plan_on(&format!("2xh100-80g,{CPU}")));
    assert!(rate(&mixed) > 1.5 * rate(&alone) && rate(&mixed) < 0.05 * rate(&gpus));
    assert!(gpus["stages"].as_array().unwrap().iter().all(|stage| stage["device"] != "cpu"));
    // Neither has room for the other's part.
    let told = error(&plan(&["--model", "72b", "--devices", "l4,cpu:mem=64g,bw=200g,bf16=2t"]), 1);
    assert!(
        told.contains("device 1 x l4, 1 x cpu: the model does not fit") && told.contains(" more l4"),
        "{told}"
    );
    // This machine's processor, as it is measured.
    let told = json(&plan(&["--model", &model(), "--devices", "cpu", "--format", "json"]));
    assert!(number(&told["devices"][0]["bandwidth"]) > 1e6, "{told}");
    assert_eq!(told["plan"]["stages"][0]["device"], "cpu");
}

#[test]
fn what_cannot_be_planned_is_one_line() {
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--model", "7b", "--devices", "v100"], 2, "too old"),
        (&["--model", "7b", "--devices", "h900"], 2, "--devices h900: no known device"),
        (&["--model", "gpt-5", "--devices", "l4"], 2, "--model gpt-5: neither a folder nor a known shape"),
        (&["--model", "no/such/folder", "--devices", "l4"], 2, "no/such/folder"),
        (&["--model", "72b", "--devices", "l4"], 1, "it fits with"),
        (&["--model", "72b", "--devices", "2xh100-80g", "--kv-tokens", "9000000"], 1, "--kv-tokens "),
        (&["--model", "7b", "--devices", "l4", "--stages", "29"], 2, "--stages: 29 stages"),
        (&["--model", "7b", "--devices", "l4", "--stages", "0"], 2, "--stages"),
        (&["--model", "7b", "--devices", "l4", "--stages", "two"], 2, "--stages"),
        (&["--model", "7b", "--devices", "l4", "--layout", "0-1,3"], 2, "layer 2 is in no stage"),
        (&["--model", "7b", "--devices", "l4", "--layout", "0-1", "--stages", "2"], 2, "--layout"),
        (&["--model", "7b", "--devices", "l4", "--layout", "0-5@cuda:0"], 2, "layers 6-27 are in no stage"),
        (&["--model", "7b", "--devices", "l4", "--kv-tokens", "0"], 2, "--kv-tokens"),
        (&["--model", "7b", "--devices", "l4", "--split", "odd"], 2, "odd"),
        (
            &["--model", "7b", "--devices", "2xl4", "--split", "even", "--any-order"],
            2,
            "--any-order: --split even",
        ),
        (
            &["--model", "7b", "--devices", "l4", "--weights", "real"],
            2,
            "--weights real: 7b is a shape by name",
        ),
        (&["--devices", "l4"], 2, "--model"),
    ];
    for (args, code, needle) in cases {
        let told = error(&plan(args), *code);
        assert!(told.contains(needle), "{args:?}: {told}");
    }
    let gpus = json(&run(&["devices", "--no-measure", "--format", "json"]));
    if gpus["gpus"].as_array().unwrap().is_empty() {
        let told = error(&plan(&["--model", "7b"]), 2);
        assert!(told.contains("--devices: no GPU to plan for") && told.contains("4xh100-80g"), "{told}");
    }
}

/// The layout that a run logs.
fn ran_in(args: &[&str]) -> String {
    let flags = ["--device", "cpu", "--prompt", "Hello", "--max-tokens", "1", "-v"];
    let flags = if args.contains(&"--layout") { &flags[2..] } else { &flags[..] };
    let output = ask(&[flags, args].concat());
    good(&output);
    let text = stderr(&output);
    text.split("layout=").nth(1).unwrap_or_else(|| panic!("{text}")).split(' ').next().unwrap().to_owned()
}

#[test]
fn runs_take_layouts_from_files_and_splits() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("layout.toml");
    let text = "# Three stages.\n[[stage]]\nlayers = \"0\"\ndevice = \"cpu\"\n[[stage]]\nlayers = \"1-2\"\ndevice = \"cpu\"\n[[stage]]\nlayers = \"3\"\ndevice = \"cpu\"\n";
    std::fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    assert_eq!(ran_in(&["--layout", path]), "0@cpu,1-2@cpu,3@cpu");
    std::fs::write(&file, text.replace("1-2", "2")).unwrap();
    let told = error(&ask(&["--prompt", "a", "--layout", path]), 1);
    assert!(
        told.contains("layout.toml: line 5: stage 1 begins with layer 2: layer 1 is in no stage"),
        "{told}"
    );
    // The processor's stages take turns: one of them, or near-equal ones.
    assert_eq!(ran_in(&["--stages", "auto"]), "0-3@cpu");
    assert_eq!(ran_in(&["--stages", "3", "--split", "planned"]), "0-1@cpu,2@cpu,3@cpu");
    assert_eq!(ran_in(&["--stages", "3", "--split", "even"]), "0-1@cpu,2@cpu,3@cpu");
    let told = error(&ask(&["--prompt", "a", "--layout", "0-3", "--split", "even"]), 2);
    assert!(told.contains("--split"), "{told}");
    for (devices, needle) in
        [("cpu,cpu", "named twice"), ("cpu,gpu", "--devices gpu: it is none of"), ("cuda:99,cpu", "cuda")]
    {
        let output = ask(&["--prompt", "a", "--devices", devices]);
        assert!(
            !output.status.success() && stderr(&output).contains(needle),
            "{devices}: {}",
            stderr(&output)
        );
    }
}

/// What README.md shows of commands that measure nothing is what they print, but for what it leaves out.
#[test]
fn examples_are_as_they_are_printed() {
    let cache = tempfile::tempdir().unwrap();
    let readme = include_str!("../../README.md");
    let mut count = 0;
    for block in readme.split("```").skip(1).step_by(2) {
        let Some((command, shown)) = block.trim_start().split_once('\n') else { continue };
        let Some(args) = command.strip_prefix("$ pipeline-infer ") else { continue };
        if !args.starts_with("plan ") && !args.starts_with("bench simulate ") {
            continue;
        }
        let args: Vec<&str> = args.split_whitespace().collect();
        let output = program(&args).env("XDG_CACHE_HOME", cache.path()).output().unwrap();
        let text = stdout(&output) + &stderr(&output);
        let mut printed = text.lines();
        for line in shown.lines().filter(|line| !matches!(*line, "" | "…")) {
            assert!(
                printed.any(|printed| printed == line),
                "{command}: {line}\nis not, or not there, in\n{text}"
            );
        }
        count += 1;
    }
    assert_eq!(count, 5);
}
