//! Images in prompts: transformers' tokens for them, and one clear line for what is no image.

use std::fs;

use super::*;

const JSON: [&str; 2] = ["--format", "json"];

fn folder() -> String {
    data("qwen2_5_vl")
}

/// Asks the small model that reads images.
fn see(args: &[&str]) -> Output {
    run(&[&["--model", &folder()], args].concat())
}

fn golden() -> Value {
    serde_json::from_str(&fs::read_to_string(data("qwen2_5_vl/golden.json")).unwrap()).unwrap()
}

#[test]
fn images_and_videos_before_a_prompt_are_those_of_transformers() {
    let golden = golden();
    let limits = ["--max-tokens", "8", "--ignore-eos"];
    let [large, frames] = ["vision/large.png", "qwen2_5_vl/frames"].map(data);
    let seen: [(usize, &[&str]); 2] = [
        (0, &["--image", &large, "--prompt", "Hello there"]),
        (2, &["--video", &frames, "--fps", "1", "--prompt", "How many?"]),
    ];
    for (i, args) in seen {
        let want = &golden["seen"][i];
        let line = json(&see(&[args, &limits, &JSON, &["--layout", "v0-1,v2,0,1-2"]].concat()));
        assert_eq!((&line["prompt_ids"], &line["token_ids"]), (&want["ids"], &want["greedy"]), "{args:?}");
        // As text, with a place for it.
        let raw = [args, &limits, &JSON, &["--raw"]].concat();
        let text = want["text"].as_str().unwrap();
        let raw: Vec<&str> =
            raw.iter().map(|arg| if *arg == args[args.len() - 1] { text } else { arg }).collect();
        assert_eq!(json(&see(&raw))["token_ids"], want["greedy"], "{raw:?}");
    }
    // Images and videos stand in the order of the flags.
    let odd = data("vision/odd.png");
    let args = [
        "--image", &odd, "--video", &frames, "--fps", "1", "--image", &large, "--prompt", "a", "--format",
        "json",
    ];
    let line = json(&see(&[&args[..], &limits].concat()));
    let mut pads: Vec<u64> =
        line["prompt_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    pads.retain(|id| [322, 323].contains(id));
    let want: Vec<u64> = [(322, 6), (323, 12), (322, 35)].iter().flat_map(|&(id, n)| vec![id; n]).collect();
    assert_eq!(pads, want);
}

#[test]
fn lines_of_a_file_bring_their_images() {
    let golden = golden();
    let place = tempfile::tempdir().unwrap();
    for name in ["odd.png", "large.png"] {
        fs::copy(data(&format!("vision/{name}")), place.path().join(name)).unwrap();
    }
    let want = &golden["seen"][1];
    // Once with the names beside the messages, once within them, once as bytes.
    let beside = serde_json::json!({"messages": want["messages"], "images": ["odd.png", "large.png"]});
    let mut within = serde_json::json!({"messages": want["messages"]});
    let content = within["messages"][0]["content"].as_array_mut().unwrap();
    content[1] = serde_json::json!({"type": "image_url", "image_url": {"url": "odd.png"}});
    let url = format!("file://{}", place.path().join("large.png").display());
    content[3] = serde_json::json!({"type": "image_url", "image_url": url});
    let missing = serde_json::json!({"prompt": "a", "image": "no.png"});
    // A conversation that goes on, with images and a video.
    let last = &golden["seen"][3];
    let long = serde_json::json!({"messages": last["messages"], "images": [data("vision/odd.png"), data("vision/thin.png")],
        "videos": [{"frames": data("qwen2_5_vl/frames"), "fps": 1}]});
    let file = place.path().join("prompts.jsonl");
    fs::write(&file, format!("{beside}\n{missing}\n{within}\n{long}\n")).unwrap();
    let output =
        see(&[&["--prompt-file", file.to_str().unwrap(), "--max-tokens", "8", "--ignore-eos"], &JSON[..]]
            .concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let lines = lines(&output);
    for (line, want) in [(&lines[0], want), (&lines[2], want), (&lines[3], last)] {
        assert_eq!((&line["prompt_ids"], &line["token_ids"]), (&want["ids"], &want["greedy"]));
    }
    assert!(lines[1]["error"].as_str().unwrap().contains("no.png: No such file"), "{}", lines[1]);
}

#[test]
fn fewer_pixels_are_fewer_tokens() {
    let large = data("vision/large.png");
    let count = |args: &[&str]| {
        let line = json(&see(
            &[&["--image", &large, "--prompt", "a", "--max-tokens", "1"], &JSON[..], args].concat()
        ));
        let ids = line["prompt_ids"].as_array().unwrap().clone();
        ids.iter().filter(|id| **id == 322).count()
    };
    assert_eq!(count(&[]), 35);
    assert_eq!(count(&["--max-pixels", "12x28x28"]), 8);
    assert_eq!(count(&["--min-pixels", "60*28*28", "--max-pixels", "80x28x28"]), 70);
    let wrong = |args: &[&str]| error(&see(&[&["--image", &large, "--prompt", "a"], args].concat()), 2);
    assert!(wrong(&["--max-pixels", "700"]).contains("--max-pixels: 700 are less than a token's 784"));
    assert!(wrong(&["--max-pixels", "900", "--min-pixels", "2000"]).contains("--min-pixels: 2000 are more"));
    assert!(wrong(&["--max-pixels", "many"]).contains("--max-pixels"));
}

/// Files that are no images, and what is said of each.
fn bad_files(place: &Path) -> Vec<(PathBuf, &'static str)> {
    let write = |name: &str, bytes: &[u8]| {
        fs::write(place.join(name), bytes).unwrap();
        place.join(name)
    };
    let read = |name: &str| fs::read(data(&format!("vision/{name}"))).unwrap();
    let half = |name: &str| {
        let bytes = read(name);
        bytes[..bytes.len() / 2].to_vec()
    };
    let fifo = place.join("fifo.png");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    fs::create_dir(place.join("folder.png")).unwrap();
    let huge = place.join("huge.png");
    fs::File::create(&huge).unwrap().set_len((256 << 20) + 1).unwrap();
    vec![
        (write("empty.png", b""), "is empty"),
        (write("text.png", b"hello, this is text"), "is no PNG, JPEG, WebP, GIF, BMP or TIFF image"),
        (write("half.png", &half("odd.png")), "PNG image: "),
        (write("half.jpg", &half("turned.jpg")), "is a truncated JPEG image"),
        (write("half.webp", &half("lossy.webp")), "WEBP image: "),
        (write("ribbon.png", &read("hostile/ribbon.png")), "is 10000x20: one side is more than 200 times"),
        (write("zero.png", &read("hostile/zero.png")), "PNG image: "),
        (write("bomb.png", &read("hostile/bomb.png")), "60000x60000 pixels are more than 100000000"),
        (write("bomb.tiff", &read("hostile/bomb.tiff")), "60000x60000 pixels are more than 100000000"),
        (huge, "is larger than 256 MiB"),
        (place.join("folder.png"), "is a folder, not an image"),
        (fifo, "is not a file"),
        ("/dev/zero".into(), "is not a file"),
        (place.join("none.png"), "No such file"),
    ]
}

#[test]
fn what_is_no_image_is_one_line_that_names_it() {
    let place = tempfile::tempdir().unwrap();
    let bad = bad_files(place.path());
    for (path, why) in &bad {
        let path = path.to_str().unwrap();
        let told = error(&see(&["--prompt", "a", "--image", path]), 1);
        assert!(told.starts_with(&format!("error: {path}: ")) && told.contains(why), "{told}");
    }
    // The same in one run, each in its place, and none keeps the good ones from being answered.
    let odd = place.path().join("photo.gif");
    fs::copy(data("vision/turned.jpg"), &odd).unwrap();
    let one = data("vision/one.png");
    let named = bad.iter().map(|(path, _)| path.to_str().unwrap());
    let names: Vec<&str> = [&one[..]].into_iter().chain(named).chain([odd.to_str().unwrap()]).collect();
    let input = place.path().join("in.jsonl");
    let lines: String = names
        .iter()
        .map(|name| serde_json::json!({"prompt": "a", "image": name}).to_string() + "\n")
        .collect();
    fs::write(&input, lines).unwrap();
    let results = place.path().join("out.jsonl");
    let paths = [&input, &results].map(|path| path.to_str().unwrap());
    let output =
        run(&["batch", "--model", &folder(), "--input", paths[0], "--output", paths[1], "--max-tokens", "2"]);
    let told = error(&output, 1);
    assert!(told.starts_with(&format!("error: {} of {} items failed", bad.len(), names.len())), "{told}");
    let text = fs::read_to_string(&results).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), names.len());
    for ((path, why), line) in bad.iter().zip(&lines[1..]) {
        let told = line["error"].as_str().unwrap();
        assert!(told.starts_with(&path.display().to_string()) && told.contains(why), "{told}");
    }
    assert!(lines[0]["text"].is_string() && lines[names.len() - 1]["text"].is_string());
}

#[test]
fn frames_that_do_not_fit_together_are_named() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().to_str().unwrap().to_owned();
    let video = |dir: &str, code| error(&see(&["--prompt", "a", "--video", dir, "--fps", "2"]), code);
    assert!(video(&dir, 1).contains(&format!("{dir}: holds no images (known by .png, ")));
    fs::copy(data("vision/odd.png"), place.path().join("9.png")).unwrap();
    fs::copy(data("vision/large.png"), place.path().join("10.png")).unwrap();
    assert!(video(&dir, 1).contains("10.png: is 613x407, and the video's first frame is 91x67"));
    let file = data("vision/odd.png");
    assert!(video(&file, 1).contains("odd.png: is no folder of frames"));
    assert!(error(&see(&["--prompt", "a", "--video", &dir]), 2).contains("--fps"));
    assert!(error(&see(&["--prompt", "a", "--video", &dir, "--fps", "0"]), 2).contains("--fps"));
}

#[test]
fn images_and_their_places_must_agree() {
    let odd = data("vision/odd.png");
    let told = error(&see(&["--raw", "--prompt", "What?", "--image", &odd]), 2);
    let place = "<|vision_start|><|image_pad|><|vision_end|>";
    assert!(
        told.contains("images: 1 given, and the prompt has no place for one: ") && told.contains(place),
        "{told}"
    );
    let two = error(&see(&["--raw", "--prompt", place, "--image", &odd, "--image", &odd]), 2);
    assert!(two.contains("images: 2 given, but the prompt has places for 1"), "{two}");
    let none = error(&see(&["--prompt", place]), 2);
    assert!(none.contains("images: 0 given, but the prompt has places for 1"), "{none}");
    let ids = error(&see(&["--prompt-ids", "5,6", "--image", &odd]), 2);
    assert!(ids.contains("images: 1 given, but the prompt has places for 0"), "{ids}");
    json(&see(
        &[&["--prompt-ids", "320,322,321,5", "--image", &odd, "--max-tokens", "1"], &JSON[..]].concat()
    ));
    let file = error(&see(&["--prompt-file", "f", "--image", &odd]), 2);
    assert!(file.contains("--image") && file.contains("--prompt-file"), "{file}");
}

#[test]
fn a_text_model_has_no_use_for_images() {
    let (odd, frames) = (data("vision/odd.png"), data("qwen2_5_vl/frames"));
    for (flags, named) in [
        (&["--image", &odd][..], "--image"),
        (&["--video", &frames, "--fps", "1"], "--video"),
        (&["--max-pixels", "5000"], "--max-pixels"),
    ] {
        let told = error(&ask(&[&["--prompt", "a"], flags].concat()), 2);
        assert_eq!(told, format!("error: {named}: the model reads no images\n"));
    }
    let line = serde_json::json!({"prompt": "a", "image": odd}).to_string();
    let output = run_with(&line, &["--model", &model(), "--prompt-file", "-", "--format", "json"]);
    assert_eq!(lines(&output)[0]["error"], "request: images are of no use to this model: it reads none");
}
