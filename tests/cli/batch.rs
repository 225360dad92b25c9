//! `batch`: results in the order of the items, whatever goes wrong with some of them, and however often it is broken off.

#![allow(unsafe_code)]

use std::{
    fs,
    process::Child,
    time::{Duration, Instant},
};

use serde_json::json;
use tempfile::TempDir;

use super::*;

/// Every flag of `batch` that `run` has not.
const FLAGS: &[&str] = &["--images", "--question", "--input", "--output", "--resume", "--force"];

/// A place for a batch: a folder of images, and the results.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("photos/more")).unwrap();
        for (from, to) in [
            ("odd.png", "10.png"),
            ("large.png", "9.png"),
            ("turned.jpg", "B.JPG"),
            ("lossy.webp", "more/1.webp"),
            ("one.png", "more/2.png"),
        ] {
            fs::copy(data(&format!("vision/{from}")), dir.path().join("photos").join(to)).unwrap();
        }
        fs::write(dir.path().join("photos/notes.txt"), "no image").unwrap();
        Place { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn text(&self, name: &str) -> String {
        // What is being written may end within a character.
        String::from_utf8_lossy(&fs::read(self.path(name)).unwrap_or_default()).into_owned()
    }

    fn lines(&self, name: &str) -> Vec<Value> {
        self.text(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn ids(&self, name: &str) -> Vec<Value> {
        self.lines(name).into_iter().map(|mut line| line["id"].take()).collect()
    }

    /// The flags of a batch about the folder.
    fn flags(&self, output: &str, more: &[&str]) -> Vec<String> {
        let (model, photos, output) = (data("qwen2_5_vl"), self.path("photos"), self.path(output));
        let first =
            ["batch", "--model", &model, "--images", &photos, "--output", &output, "--max-tokens", "6"];
        first.iter().chain(more).map(|flag| flag.to_string()).collect()
    }

    fn batch(&self, output: &str, more: &[&str]) -> Output {
        start(&self.flags(output, more)).output().unwrap()
    }

    fn of_lines(&self, lines: &[Value], more: &[&str]) -> Vec<String> {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(self.path("in.jsonl"), text).unwrap();
        let (input, output) = (self.path("in.jsonl"), self.path("out.jsonl"));
        let first = ["batch", "--input", &input, "--output", &output];
        first.iter().chain(more).map(|flag| flag.to_string()).collect()
    }

    /// Waits until so many lines are written.
    fn wait_for(&self, name: &str, lines: usize) {
        let started = Instant::now();
        while self.text(name).lines().count() < lines {
            assert!(started.elapsed() < Duration::from_secs(60), "{}", self.text(name));
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn start(flags: &[String]) -> Command {
    program(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A model that reads images and takes its time: random weights, the small model's tokenizer.
fn slow_model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"] {
        fs::copy(format!("{}/{name}", data("qwen2_5_vl")), folder.path().join(name)).unwrap();
    }
    let config = fs::read_to_string(format!("{}/config.json", data("qwen2_5_vl"))).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (key, value) in [("hidden_size", 256), ("intermediate_size", 256), ("num_hidden_layers", 8)] {
        config[key] = value.into();
    }
    config["max_position_embeddings"] = 8192.into();
    config["vision_config"]["out_hidden_size"] = 256.into();
    config["rope_scaling"]["mrope_section"] = json!([8, 12, 12]);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: the call touches no memory; the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id().try_into().unwrap(), signal) }, 0);
}

#[test]
fn a_folder_is_answered_in_order_as_each_image_alone() {
    let place = Place::new();
    let questions = ["--question", "Hello there", "--question", "How many?"];
    let output = place.batch("out.jsonl", &questions);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("out.jsonl has all 10 items: 10 in "), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    let lines = place.lines("out.jsonl");
    let names = ["9.png", "10.png", "B.JPG", "more/1.webp", "more/2.png"];
    let ids: Vec<String> = names.iter().flat_map(|name| [format!("{name}#1"), format!("{name}#2")]).collect();
    assert_eq!(place.ids("out.jsonl"), ids);
    for (i, line) in lines.iter().enumerate() {
        let (name, question) = (names[i / 2], questions[1 + i % 2 * 2]);
        assert_eq!((&line["image"], &line["question"]), (&json!(name), &json!(question)));
        let image = place.path(&format!("photos/{name}"));
        let model = data("qwen2_5_vl");
        let alone = run(&[
            "--model",
            &model,
            "--image",
            &image,
            "--prompt",
            question,
            "--max-tokens",
            "6",
            "--format",
            "json",
        ]);
        let alone = json(&alone);
        for field in ["text", "finish_reason", "completion_tokens", "prompt_tokens"] {
            assert_eq!(line[field], alone[field], "{line}");
        }
    }
    // A glob and files are called as they are given; one question leaves no number.
    let (model, output) = (data("qwen2_5_vl"), place.path("glob.jsonl"));
    let (glob, file) = (place.path("photos/*.png"), place.path("photos/B.JPG"));
    let flags =
        ["batch", "--model", &model, "--images", &glob, &file, "--question", "a", "--output", &output];
    good(&run(&[&flags[..], &["--max-tokens", "1"]].concat()));
    assert_eq!(
        place.ids("glob.jsonl"),
        ["9.png", "10.png", "B.JPG"].map(|n| place.path(&format!("photos/{n}")))
    );
}

#[test]
fn an_item_that_is_wrong_is_an_error_on_its_line() {
    let place = Place::new();
    let model = data("qwen2_5_vl");
    let lines = [
        json!({"id": "first", "image": "photos/9.png", "question": "Hello there", "max_tokens": 8, "ignore_eos": true}),
        json!({"id": "gone", "image": "photos/gone.png", "question": "Hello"}),
        json!({"id": 7, "prompt": "Hello", "temprature": 1}),
        json!({"prompt": "Hello", "n": 2, "seed": 1, "temperature": 1}),
        json!({"id": "many", "prompt": "Hello", "max_tokens": 100_000}),
        json!(["no", "request"]),
        json!({"id": "last", "messages": [{"role": "user", "content": "Hello"}], "logprobs": 1}),
    ];
    let flags = place.of_lines(&lines, &["--model", &model, "--max-tokens", "3"]);
    let output = start(&flags).output().unwrap();
    let told = error(&output, 1);
    assert!(told.starts_with("error: 4 of 7 items failed, as their lines of "), "{told}");
    assert!(
        told.contains("the first of this run: \"gone\": ") && told.contains("gone.png: No such file"),
        "{told}"
    );
    let lines = place.lines("out.jsonl");
    assert_eq!(
        place.ids("out.jsonl"),
        [json!("first"), json!("gone"), json!(7), json!(4), json!("many"), json!(6), json!("last")]
    );
    assert_eq!(lines[0]["text"], "�_�eac\u{e}'m=eac", "as transformers says");
    let why = |i: usize| lines[i]["error"].as_str().unwrap();
    assert!(why(1).ends_with("photos/gone.png: No such file or directory (os error 2)"), "{}", why(1));
    assert!(why(2).contains("in.jsonl: line 3: ") && why(2).contains("temprature"), "{}", why(2));
    assert_eq!(lines[3]["samples"].as_array().unwrap().len(), 2);
    assert!(why(4).contains("max_tokens is 100000"), "{}", why(4));
    assert!(why(5).contains("line 6: it is neither a string nor an object"), "{}", why(5));
    assert_eq!(lines[6]["logprobs"].as_array().unwrap().len(), lines[6]["completion_tokens"]);
    // They stay as they are where there is nothing left to do.
    let before = place.text("out.jsonl");
    let told = error(&start(&[flags, vec!["--resume".into()]].concat()).output().unwrap(), 1);
    assert!(told.starts_with("error: 4 of 7 items failed"), "{told}");
    assert_eq!(place.text("out.jsonl"), before);
}

#[test]
fn a_killed_run_goes_on_without_losing_or_repeating_an_item() {
    let (place, model) = (Place::new(), slow_model());
    let model = model.path().to_str().unwrap();
    let slow = ["--model", model, "--weights", "dummy", "--ignore-eos", "--max-tokens", "60"];
    let images = ["photos/9.png", "photos/B.JPG", "no"];
    let lines: Vec<Value> =
        (0..12).map(|i| json!({"id": i, "image": images[i % 3], "prompt": format!("{i}")})).collect();
    let flags = place.of_lines(&lines, &slow);
    let whole = start(&flags).output().unwrap();
    assert_eq!(whole.status.code(), Some(1), "{}", stderr(&whole));
    let want = place.text("out.jsonl");
    assert_eq!(place.ids("out.jsonl"), (0..12).collect::<Vec<_>>());
    fs::remove_file(place.path("out.jsonl")).unwrap();
    // Killed again and again, one item after another.
    let one = [&flags[..], &["--running".into(), "1".into(), "--resume".into()]].concat();
    for lines in [2, 5] {
        let mut child = start(&one).stderr(Stdio::null()).spawn().unwrap();
        place.wait_for("out.jsonl", lines);
        signal(&child, libc::SIGKILL);
        child.wait().unwrap();
        let now = place.text("out.jsonl");
        assert!(want.starts_with(&now) && now.lines().count() < 12, "{now}");
    }
    // A line that is torn, at every kind of place.
    let text = place.text("out.jsonl");
    let ends = text.len() - 1 - text[..text.len() - 1].rfind('\n').unwrap();
    let resume = [&flags[..], &["--resume".into()]].concat();
    for cut in [1, ends / 2, ends - 1] {
        fs::write(place.path("out.jsonl"), &text.as_bytes()[..text.len() - cut]).unwrap();
        let output = start(&resume).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains("4 of 12 items failed"), "{}", stderr(&output));
        assert_eq!(place.text("out.jsonl"), want, "cut by {cut}");
    }
}

#[test]
fn ctrl_c_writes_what_is_finished_and_says_how_to_go_on() {
    let (place, model) = (Place::new(), slow_model());
    let model = model.path().to_str().unwrap();
    let lines = [(2, "a"), (250, "b"), (2, "c"), (4000, "d"), (2, "e")].map(|(n, text)| {
        json!({"id": text, "prompt": text, "max_tokens": n, "ignore_eos": true, "image": "photos/10.png"})
    });
    let flags = place.of_lines(&lines[..4], &["--model", model, "--weights", "dummy"]);
    let child = start(&flags).stderr(Stdio::piped()).spawn().unwrap();
    place.wait_for("out.jsonl", 1);
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, libc::SIGINT);
    let output = child.wait_with_output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(130), "{said}");
    let told = said.lines().last().unwrap();
    let want = format!(
        "error: interrupted: {} has 3 items; the same command with --resume goes on",
        place.path("out.jsonl")
    );
    assert_eq!(told, want, "{said}");
    // The second was waited for, since the third had been answered; the last was not.
    assert_eq!(place.ids("out.jsonl"), ["a", "b", "c"]);
    assert_eq!(place.lines("out.jsonl")[1]["completion_tokens"], 250);
    // The rest may change before it is asked.
    let flags = place.of_lines(
        &[&lines[..3], &lines[4..]].concat(),
        &["--model", model, "--weights", "dummy", "--resume"],
    );
    good(&start(&flags).output().unwrap());
    assert_eq!(place.ids("out.jsonl"), ["a", "b", "c", "e"]);
}

#[test]
fn results_of_other_work_are_left_alone() {
    let place = Place::new();
    let hello = ["--question", "Hello"];
    good(&place.batch("out.jsonl", &hello));
    let (before, output) = (place.text("out.jsonl"), place.path("out.jsonl"));
    let refused = |more: &[&str], code: i32, why: &str| {
        let told = error(&place.batch("out.jsonl", more), code);
        assert!(told.contains(&output) && told.contains(why), "{told}");
        assert_eq!(place.text("out.jsonl"), before);
    };
    refused(&hello, 2, "there are results already: --resume goes on with them, --force replaces them");
    let other = "line 1: item \"9.png\" was asked with another question, model or setting";
    refused(&["--question", "Bye", "--resume"], 1, other);
    refused(&[&hello[..], &["--temperature", "0.5", "--resume"]].concat(), 1, other);
    refused(&[&hello[..], &["--max-pixels", "5000", "--resume"]].concat(), 1, other);
    refused(
        &[&hello[..], &["--question", "Bye", "--resume"]].concat(),
        1,
        "line 1: it is of item \"9.png\", and this input has \"9.png#1\"",
    );
    let third = place.path("photos/B.JPG");
    fs::rename(&third, place.path("photos/B.hidden")).unwrap();
    refused(
        &[&hello[..], &["--resume"]].concat(),
        1,
        "line 3: it is of item \"B.JPG\", and this input has \"more/1.webp\"",
    );
    fs::rename(place.path("photos/B.hidden"), &third).unwrap();
    fs::remove_file(place.path("photos/more/2.png")).unwrap();
    refused(&[&hello[..], &["--resume"]].concat(), 1, "line 5: there are more results than items");
    // Nor is a file that holds no results.
    for text in ["precious", "precious\n", "{\"name\": 1}\n"] {
        fs::write(place.path("notes"), text).unwrap();
        let told = error(&place.batch("notes", &["--question", "Hello", "--resume"]), 1);
        assert!(told.contains("notes: line 1: it is no result of a batch"), "{told}");
        assert_eq!(place.text("notes"), text);
    }
    // The layout is no part of the work; --force is what it says.
    good(&place.batch("new.jsonl", &hello));
    good(&place.batch("new.jsonl", &["--question", "Hello", "--resume", "--layout", "v0,v1-2,0,1-2"]));
    good(&place.batch("new.jsonl", &["--question", "Bye", "--force"]));
    assert!(place.lines("new.jsonl").iter().all(|line| line["question"] == "Bye"));
    assert_eq!(place.lines("new.jsonl").len(), 4);
}

#[test]
fn what_there_is_nothing_to_ask_about_is_one_line() {
    let place = Place::new();
    let (model, vl, out) = (model(), data("qwen2_5_vl"), place.path("out.jsonl"));
    let (photos, notes) = (place.path("photos"), place.path("photos/notes.txt"));
    fs::create_dir(place.path("empty")).unwrap();
    fs::write(place.path("none.jsonl"), "\n  \n").unwrap();
    let (empty, none) = (place.path("empty"), place.path("none.jsonl"));
    let glob = place.path("photos/*.gif");
    let ask = ["--question", "a", "--output", &out];
    let cases: &[(&[&str], i32, &str)] = &[
        (
            &["--model", &vl, "--images", &empty, "--question", "a", "--output", &out],
            1,
            "empty: holds no images",
        ),
        (
            &["--model", &vl, "--images", &glob, "--question", "a", "--output", &out],
            1,
            "*.gif: matches no image",
        ),
        (
            &["--model", &vl, "--images", "/no/such", "--question", "a", "--output", &out],
            1,
            "/no/such: No such",
        ),
        (&["--model", &vl, "--images", &photos, "--output", &out], 2, "--question"),
        (&["--model", &vl, "--images", &photos, "--question", " ", "--output", &out], 2, "it asks nothing"),
        (&["--model", &vl, "--images", &photos, "--question", "a"], 2, "--output"),
        (&["--model", &vl, "--output", &out], 2, "--images"),
        (&["--model", &vl, "--input", &none, "--output", &out], 1, "none.jsonl: holds no requests"),
        (&["--model", &vl, "--input", &photos, "--output", &out], 1, "it is a folder"),
        (
            &["--model", &vl, "--input", &none, "--images", &photos, "--question", "a", "--output", &out],
            2,
            "--in",
        ),
        (&["--model", &vl, "--images", &photos, "--question", "a", "--output", &photos], 1, "is not a file"),
        (
            &["--model", &vl, "--images", &photos, "--question", "a", "--output", "/dev/null"],
            1,
            "is not a file",
        ),
        (
            &["--model", &model, "--images", &photos, ask[0], ask[1], ask[2], ask[3]],
            2,
            "--images: the model reads no images",
        ),
    ];
    for (args, code, why) in cases {
        let told = error(&run(&[&["batch"], *args].concat()), *code);
        assert!(told.contains(why), "{args:?}: {told}");
    }
    // A file that is named is taken for an image, whatever it is called.
    let named = ["batch", "--model", &vl, "--images", &notes, "--question", "a", "--output", &out];
    let told = error(&run(&named), 1);
    assert!(told.contains("notes.txt: is no PNG"), "{told}");
}

#[test]
fn a_batch_of_text_comes_from_stdin_too() {
    let place = Place::new();
    let out = place.path("out.jsonl");
    let flags = ["batch", "--model", &model(), "--input", "-", "--output", &out, "--max-tokens", "3"];
    good(&run_with("\"one\"\n\"two\"\n", &flags));
    assert_eq!(place.ids("out.jsonl"), [1, 2]);
    good(&run_with("\"one\"\n\"two\"\n\"three\"\n", &[&flags[..], &["--resume"]].concat()));
    // Of a pipe with a name no line is lost, either.
    let (pipe, named) = (place.path("pipe"), place.path("named.jsonl"));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let from = pipe.clone();
    let writer = std::thread::spawn(move || fs::write(from, "\"one\"\n\"two\"\n").unwrap());
    good(&run(&["batch", "--model", &model(), "--input", &pipe, "--output", &named, "--max-tokens", "3"]));
    writer.join().unwrap();
    assert_eq!(place.ids("named.jsonl"), [1, 2]);
    assert_eq!(place.ids("out.jsonl"), [1, 2, 3]);
}

#[test]
fn help_and_the_readme_tell_every_flag() {
    let help = good(&run(&["batch", "--help"]));
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    for flag in FLAGS {
        assert!(help.contains(&format!("{flag} ")) || help.contains(&format!("{flag}\n")), "{flag}:\n{help}");
        assert!(readme.contains(&format!("`{flag}")) || readme.contains(&format!("{flag} ")), "{flag}");
    }
    for flag in
        ["--model", "--stages", "--layout", "--device", "--max-tokens", "--temperature", "--max-pixels"]
    {
        assert!(help.contains(flag), "{flag}");
    }
}
