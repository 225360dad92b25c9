//! `bench throughput --images`: requests with made-up images, on a tower of random weights.

use super::*;

/// Runs it on the small model that reads images, of its config.json alone.
fn throughput(args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/qwen2_5_vl/config.json");
    std::fs::copy(from, dir.path().join("config.json")).unwrap();
    let model = dir.path().to_str().unwrap();
    run(&[&["bench", "throughput", "--model", model, "--weights", "dummy"], args].concat())
}

const WORK: [&str; 8] =
    ["--requests", "5", "--input-len", "12", "--output-len", "3", "--image-size", "100x60"];

#[test]
fn images_are_prepared_encoded_and_counted() {
    let flags = ["--images", "2", "--layout", "v0-1,v2,0-1,2", "--format", "json"];
    let limits = ["--limits", "cpu:mem=8g,bw=10g,bf16=100g"];
    let figures = json(&throughput(&[&WORK[..], &flags, &limits].concat()));
    let number = |value: &Value| value.as_f64().unwrap();
    let (workload, images) = (&figures["workload"]["images"], &figures["images"]);
    // 100x60 becomes 112x56, patches of 14 pixels in fours.
    assert_eq!((&workload["patches"], &workload["tokens"]), (&32.into(), &8.into()), "{workload}");
    let prompt = 5.0 * (2.0 * 10.0 + 12.0);
    let seconds = number(&figures["seconds"][0]).min(number(&figures["seconds"][1]));
    assert!((number(&figures["prompt_tokens_per_s"]["best"]) * seconds / prompt - 1.0).abs() < 1e-9);
    assert!((number(&images["images_per_s"]["best"]) * seconds / 10.0 - 1.0).abs() < 1e-9);
    assert_eq!(figures["id"].as_str().unwrap().split('/').nth(1), Some("5x12x3.img2x100x60"));
    // Two runs of five requests with two images, all different, each encoded once.
    assert_eq!(images["encoded"], 20);
    let stages = images["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 2);
    for (stage, blocks) in stages.iter().zip(["v0-1", "v2"]) {
        assert_eq!((&stage["blocks"], &stage["patches"]), (&blocks.into(), &(20 * 32).into()), "{stage}");
        assert!(
            (0.0..1.0).contains(&number(&stage["busy"])) && number(&stage["ms_per_image"]) > 0.0,
            "{stage}"
        );
        assert!(number(&stage["of_limits"]["matmul"]) > 0.0, "{stage}");
    }
    // One device, whose time is all stages', of which the tower has its part.
    let shares = |stages: &Value| -> f64 {
        stages.as_array().unwrap().iter().map(|stage| number(&stage["of_limits"]["roofline"])).sum()
    };
    let (tower, layers) = (shares(&images["stages"]), shares(&figures["stages"]));
    assert!((number(&figures["limit_share"]) / (tower + layers) - 1.0).abs() < 1e-9, "{tower} {layers}");
    assert!(number(&images["prepare_ms"]) > 0.0 && number(&images["tower_images_per_s"]) > 0.0, "{images}");
    let text = good(&throughput(&[&WORK[..], &["--images", "1", "--prepared"]].concat()));
    for start in ["images/s ", "vision  device", "images encoded", "preparing, images/s"] {
        assert!(text.lines().any(|line| line.starts_with(start)), "{start}\n{text}");
    }
    assert!(text.lines().all(|line| line.len() < 120 && line == line.trim_end()), "{text}");
}

#[test]
fn images_in_common_are_encoded_once() {
    let flags = ["--images", "1", "--same-images", "--repeat", "1", "--format", "json"];
    let figures = json(&throughput(&[&WORK[..], &flags].concat()));
    assert_eq!(
        (&figures["images"]["encoded"], &figures["workload"]["images"]["same"]),
        (&1.into(), &true.into())
    );
}

#[test]
fn what_cannot_be_done_with_images_is_one_line() {
    let cases: &[(&[&str], &str)] = &[
        (&["--images", "0"], "--images"),
        (&["--image-size", "10x10"], "--images"),
        (&["--images", "1", "--image-size", "10"], "expected pixels across and down"),
        (
            &["--images", "1", "--image-size", "9000x40"],
            "--image-size 9000x40: is 9000x40: one side is more than",
        ),
        (&["--images", "1", "--max-context", "100"], "--max-context: 100 tokens have no room for "),
        (&["--images", "1000", "--image-size", "9000x9000"], "--images: 16000 of them have more than"),
    ];
    for (args, needle) in cases {
        let told = error(&throughput(args), 2);
        assert!(told.contains(needle), "{args:?}: {told}");
    }
    let flags = ["bench", "throughput", "--model", &model(), "--weights", "dummy", "--images", "1"];
    assert!(error(&run(&flags), 2).contains("--images: 1: the model reads no images"));
}
