//! Answers of a small checkpoint, as text and as JSON.

use serde_json::json;

use super::*;

const HELLO: [&str; 4] = ["--prompt", "Hello", "--temperature", "0"];
const JSON: [&str; 2] = ["--format", "json"];

/// What transformers answers to the first prompt: its ids, the prompt's ids, the text.
fn golden() -> (Value, Value) {
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(data("chat-llama/golden.json")).unwrap()).unwrap();
    let prompt = &golden["prompts"][0];
    (prompt["ids"].clone(), prompt["greedy"].clone())
}

fn ids(line: &Value) -> Vec<u64> {
    line["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn text_and_json_agree_with_the_golden() {
    let (prompt_ids, greedy) = golden();
    let flags = ["--dtype", "f32", "--max-tokens", "16", "--ignore-eos", "--repetition-penalty", "1"];
    let line = json(&ask(&[&HELLO[..], &flags, &JSON].concat()));
    assert_eq!(line["prompt_ids"], prompt_ids);
    assert_eq!(line["token_ids"], greedy);
    assert_eq!(line["prompt_tokens"], 17);
    assert_eq!(line["completion_tokens"], 16);
    assert_eq!(line["finish_reason"], "length");
    assert!(line.get("logprobs").is_none());
    let timings = &line["timings"];
    for field in ["queued_s", "first_token_s", "total_s", "prompt_tokens_per_s", "decode_tokens_per_s"] {
        assert!(timings[field].as_f64().unwrap() >= 0.0, "{timings}");
    }
    let output = ask(&[&HELLO[..], &flags].concat());
    assert_eq!(good(&output), format!("{}\n", line["text"].as_str().unwrap()));
    let report = stderr(&output);
    let rows: Vec<&str> = report.lines().collect();
    for row in ["prompt tokens", "new tokens", "time to first token", "prompt tokens/s", "decode tokens/s"] {
        assert!(rows.iter().any(|r| r.starts_with(row)), "{report}");
    }
    assert!(rows.iter().any(|r| r.starts_with("0 ") && r.contains("cpu") && r.contains("0-3")), "{report}");
}

#[test]
fn stages_and_layouts_change_nothing_but_the_report() {
    let ask_in = |split: &[&str]| {
        let output = ask(&[&HELLO[..], &["--max-tokens", "12", "--ignore-eos"], &JSON, split].concat());
        ids(&json(&output))
    };
    let one = ask_in(&[]);
    assert_eq!(one.len(), 12);
    for split in [&["--stages", "2"][..], &["--stages", "4", "--threads", "1"], &["--layout", "0,1-3@cpu"]] {
        assert_eq!(ask_in(split), one, "{split:?}");
    }
    let output = ask(&[&HELLO[..], &["--max-tokens", "2", "--layout", "0,1-3"]].concat());
    let report = stderr(&output);
    assert!(report.lines().any(|l| l.starts_with("1 ") && l.contains(" 1-3 ")), "{report}");
    assert!(error(&ask(&["--prompt", "a", "--layout", "0-2"]), 2).contains("layer 3 is in no stage"));
    assert!(error(&ask(&["--prompt", "a", "--stages", "5"]), 2).contains("--stages"));
}

#[test]
fn a_device_that_is_not_there_is_one_line() {
    let output = ask(&["--prompt", "a", "--device", "cuda"]);
    assert!(error(&output, 1).contains("cuda"));
}

#[test]
fn prompts_come_from_flags_stdin_and_ids() {
    let limits = ["--max-tokens", "4", "--temperature", "0"];
    let flag = json(&ask(&[&HELLO[..], &limits[..2], &JSON].concat()));
    let model = model();
    for text in ["Hello", "Hello\n", "Hello\r\n"] {
        let args = [&["--model", &model][..], &limits, &JSON].concat();
        assert_eq!(json(&run_with(text, &args))["prompt_ids"], flag["prompt_ids"], "{text:?}");
    }
    let list: Vec<String> = flag["prompt_ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let by_ids = json(&ask(&[&["--prompt-ids", &list.join(",")][..], &limits, &JSON].concat()));
    assert_eq!(by_ids["token_ids"], flag["token_ids"]);
    // The template is what a chat adds; a system message makes it longer.
    let raw = json(&ask(&[&HELLO[..], &limits[..2], &JSON, &["--raw"]].concat()));
    let system = json(&ask(&[&HELLO[..], &limits[..2], &JSON, &["--system", "Be brief."]].concat()));
    let count = |line: &Value| line["prompt_tokens"].as_u64().unwrap();
    assert!(count(&raw) < count(&flag) && count(&flag) < count(&system));
    assert_eq!(
        json(&ask(&[&HELLO[..], &limits[..2], &JSON, &["--chat"]].concat()))["token_ids"],
        flag["token_ids"]
    );
    assert!(error(&run_with("", &["--model", &model]), 2).contains("stdin is empty"));
    assert!(error(&ask(&["--prompt-ids", "1,99999"]), 2).contains("99999"));
    assert!(error(&ask(&["--prompt", "a", "--logit-bias", "99999:1"]), 2).contains("99999"));
}

#[test]
fn a_model_without_a_template_takes_prompts_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(format!("{}/{name}", model()), folder.path().join(name)).unwrap();
    }
    let ask = |args: &[&str]| {
        let flags = ["--model", folder.path().to_str().unwrap(), "--max-tokens", "3", "--format", "json"];
        run(&[&flags, args].concat())
    };
    let plain = json(&ask(&["--prompt", "Hello"]));
    assert_eq!(plain["prompt_ids"], json(&ask(&["--prompt", "Hello", "--raw"]))["prompt_ids"]);
    for flags in [&["--chat"][..], &["--system", "s"]] {
        let told = error(&ask(&[&["--prompt", "Hello"], flags].concat()), 2);
        assert!(told.contains(flags[0]) && told.contains("no chat template"), "{told}");
    }
    let messages = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
    let flags = ["--model", folder.path().to_str().unwrap(), "--prompt-file", "-", "--format", "json"];
    let output = run_with(messages, &flags);
    assert!(lines(&output)[0]["error"].as_str().unwrap().contains("chat template"));
    // Tokens go in and come out where there is no tokenizer.
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let flags = ["--model", folder.path().to_str().unwrap(), "--max-tokens", "3", "--prompt-ids", "5,6"];
    let numbers = good(&run(&flags));
    assert_eq!(numbers.split_whitespace().filter(|id| id.parse::<u32>().is_ok()).count(), 3, "{numbers}");
    assert!(error(&ask(&["--prompt", "Hello"]), 2).contains("tokenizer"));
}

#[test]
fn a_file_of_prompts_keeps_its_order_and_names_bad_lines() {
    let file = concat!(
        "\"one\"\n",
        "{\"prompt\": \"two\", \"max_tokens\": 2, \"temperature\": 0}\n",
        "\n",
        "{\"prompt\": \"three\", \"max_tokns\": 2}\n",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"four\"}], \"n\": 2}\n",
        "not json\n",
        "{\"prompt_ids\": [5, 6, 7], \"stop\": [\"x\"], \"ignore_eos\": true}\n",
        "{\"prompt_ids\": [4000000000]}\n",
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompts.jsonl");
    std::fs::write(&path, file).unwrap();
    let flags = ["--prompt-file", path.to_str().unwrap(), "--max-tokens", "5", "--seed", "1"];
    let output = ask(&[&flags[..], &JSON].concat());
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "error: 3 of 7 prompts failed\n");
    let lines = lines(&output);
    assert_eq!(lines.len(), 7);
    assert!(lines[0]["text"].is_string());
    assert!((1..=2).contains(&ids(&lines[1]).len()));
    let told = |i: usize| lines[i]["error"].as_str().unwrap();
    assert!(told(2).contains("line 4: ") && told(2).contains("max_tokns"), "{}", told(2));
    assert_eq!(lines[3]["samples"].as_array().unwrap().len(), 2);
    assert!(told(4).contains("line 6: "), "{}", told(4));
    assert_eq!(lines[5]["prompt_ids"], json!([5, 6, 7]));
    assert!(told(6).contains("4000000000"), "{}", told(6));
    // The same as text: a heading for each answer, an error line for each that is wrong.
    let output = ask(&flags);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let headings: Vec<&str> = text.lines().filter(|l| l.starts_with("=== ")).collect();
    assert_eq!(headings.len(), 8, "{text}");
    assert_eq!(headings[4], "=== prompt 4, sample 2 ===");
    assert_eq!(stderr(&output).lines().filter(|l| l.starts_with("error: ")).count(), 4);
}

#[test]
fn many_prompts_run_together_and_keep_their_order() {
    let file: String = (0..1500).map(|i| format!("{{\"prompt_ids\": [{}, 9]}}\n", 3 + i % 300)).collect();
    let flags = ["--model", &model(), "--prompt-file", "-", "--max-tokens", "2", "--format", "json"];
    let output = run_with(&file, &flags);
    good(&output);
    let lines = lines(&output);
    assert_eq!(lines.len(), 1500);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["prompt_ids"], json!([3 + i % 300, 9]));
    }
}

#[test]
fn a_file_of_prompts_that_cannot_be_read_is_refused_before_the_model_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    for path in ["/no/such/file", folder.path().to_str().unwrap()] {
        let told = error(&run(&["--model", "/no/such/model", "--prompt-file", path]), 1);
        assert!(told.starts_with(&format!("error: {path}: ")), "{told}");
    }
}

#[test]
fn a_tokenizer_that_makes_the_library_panic_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(model()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    tokenizer["model"]["continuing_subword_prefix"] = json!("#".repeat(40));
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let told = error(&run(&["--model", folder.path().to_str().unwrap(), "--prompt", "Hello"]), 1);
    assert!(told.contains("tokenizer.json: ") && !told.contains("bug"), "{told}");
}

#[test]
fn an_answer_comes_before_the_next_line_is_there() {
    let flags = ["--model", &model(), "--prompt-file", "-", "--max-tokens", "2", "--format", "json"];
    let mut child = program(&flags).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut answers = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    for text in ["one", "two"] {
        writeln!(stdin, "\"{text}\"").unwrap();
        let answer: Value = serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap();
        assert!(answer["text"].is_string());
    }
    drop(stdin);
    assert!(answers.next().is_none());
    assert!(child.wait().unwrap().success());
}

#[test]
fn samples_differ_by_seed_and_seeds_repeat() {
    let flags =
        ["--prompt", "Hello", "--max-tokens", "12", "--temperature", "1.5", "--top-k", "0", "--top-p", "1"];
    let draw = |more: &[&str]| json(&ask(&[&flags[..], &JSON, more].concat()));
    let three = draw(&["--seed", "5", "--n", "3"]);
    let samples = three["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3);
    assert!(three.get("text").is_none() && three["prompt_ids"].is_array());
    for (i, sample) in samples.iter().enumerate() {
        let alone = draw(&["--seed", &(5 + i).to_string()]);
        assert_eq!(sample["token_ids"], alone["token_ids"]);
        assert_eq!(sample["text"], alone["text"]);
    }
    assert_ne!(samples[0]["token_ids"], samples[1]["token_ids"]);
    assert_ne!(draw(&[])["token_ids"], draw(&[])["token_ids"], "without a seed");
    let text = ask(&[&flags[..], &["--seed", "5", "--n", "3"]].concat());
    let mut want = String::new();
    for (i, sample) in samples.iter().enumerate() {
        want += &format!("=== sample {} ===\n{}\n", i + 1, sample["text"].as_str().unwrap());
    }
    assert_eq!(good(&text), want);
}

#[test]
fn sampling_defaults_are_the_models_own_and_flags_win() {
    let flags = ["--prompt", "Hello", "--max-tokens", "16", "--ignore-eos", "--seed", "3"];
    let draw = |more: &[&str]| ids(&json(&ask(&[&flags[..], &JSON, more].concat())));
    let own = draw(&[]);
    let named = ["--temperature", "0.7", "--top-k", "20", "--top-p", "0.8", "--repetition-penalty", "1.05"];
    assert_eq!(draw(&named), own);
    assert_ne!(draw(&["--temperature", "0"]), own);
    assert_eq!(draw(&["--temperature", "0"]), draw(&["--temperature", "0", "--top-k", "7"]));
    assert_eq!(draw(&["--top-k", "1"]), draw(&["--temperature", "0"]));
    let output = ask(&[&flags[..], &["--temperature", "0", "--top-p", "0.5"]].concat());
    assert!(stderr(&output).contains("top-p changes nothing at temperature 0"), "{}", stderr(&output));
}

#[test]
fn stop_strings_biases_and_logprobs() {
    let flags = [&HELLO[..], &["--max-tokens", "16", "--ignore-eos"], &JSON].concat();
    let line = json(&ask(&[&flags[..], &["--logprobs", "3"]].concat()));
    let text = line["text"].as_str().unwrap();
    let tokens = line["logprobs"].as_array().unwrap();
    assert_eq!(tokens.len(), 16);
    for (token, id) in tokens.iter().zip(ids(&line)) {
        assert_eq!(token["id"], id);
        assert!(token["token"].is_string() && token["logprob"].as_f64().unwrap() <= 0.0);
        let top = token["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert!(top[0]["logprob"].as_f64() >= top[2]["logprob"].as_f64());
    }
    // The fifth and sixth characters end the answer before them.
    let stop: String = text.chars().skip(4).take(2).collect();
    let cut = json(&ask(&[&flags[..], &["--stop", "no such text", "--stop", &stop]].concat()));
    assert_eq!(cut["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
    assert_eq!(cut["finish_reason"], "stop");
    let first = ids(&line)[0];
    let bias = format!("7:0.5,{first}:-100");
    let banned = json(&ask(&[&flags[..], &["--logit-bias", &bias, "--presence-penalty", "-0.5"]].concat()));
    assert!(!ids(&banned).contains(&first));
}

#[test]
fn a_prompt_that_does_not_fit_is_one_line() {
    let output = ask(&["--prompt", &"word ".repeat(200), "--max-context", "32"]);
    assert!(error(&output, 2).contains("32"));
    // Whoever asks for so many new tokens gets no fewer.
    let told = error(&ask(&[&HELLO[..], &["--max-context", "24", "--max-tokens", "20"]].concat()), 2);
    assert!(told.contains("max_tokens is 20; prompt and answer together have room for 24"), "{told}");
    let filled = json(&ask(&[&HELLO[..], &["--max-context", "24", "--ignore-eos"], &JSON].concat()));
    assert_eq!(filled["finish_reason"], "length");
    assert!(filled["prompt_tokens"].as_u64().unwrap() + filled["completion_tokens"].as_u64().unwrap() <= 25);
}

#[cfg(target_os = "linux")]
#[test]
fn a_timeline_that_finds_no_room_leaves_the_answer_and_is_an_error() {
    const FULL: [&str; 2] = ["--timeline", "/dev/full"];
    let flags = [&HELLO[..], &["--max-tokens", "4", "--ignore-eos"], &FULL].concat();
    let output = ask(&flags);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let said = stderr(&output);
    let told = said.lines().last().unwrap();
    assert!(told.starts_with("error: /dev/full: the timeline could not be written: "), "{said}");
    assert_eq!(stdout(&output), stdout(&ask(&flags[..flags.len() - 2])));
    let bench = ["--weights", "dummy", "--requests", "2", "--input-len", "4", "--output-len", "2"];
    let model = model();
    let flags = [&["bench", "throughput", "--model", &model][..], &bench, &FULL].concat();
    let output = run(&flags);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stdout(&output).contains("output tokens/s"), "{}", stdout(&output));
}
