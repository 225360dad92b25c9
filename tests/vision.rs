//! Images and videos become what Pillow and transformers make of them, and no file breaks the decoders.

mod common;
#[path = "vision/hostile.rs"]
mod hostile;
#[path = "vision/places.rs"]
mod places;

use std::{fs, path::PathBuf};

use pipeline_infer::vision::{Bounds, Limits, Preprocessor, Rgb, Size, decode, resize, smart_resize};
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    common::data("vision").join(name)
}

fn golden(key: &str) -> Value {
    let text = fs::read_to_string(data("golden.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()[key].take()
}

fn list<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{value}: {e}"))
}

fn decoded(name: &str) -> Rgb {
    let path = data(name);
    decode(&path, &fs::read(&path).unwrap(), Limits::default()).unwrap()
}

/// A folder with a configuration and the preprocessor it makes.
fn preprocessor(config: &str) -> pipeline_infer::Result<Preprocessor> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("preprocessor_config.json"), config).unwrap();
    Preprocessor::read(folder.path())
}

/// How far two images are apart: the share of values that are equal, the largest difference, and the mean.
fn apart(a: &Rgb, b: &Rgb) -> (f64, u8, f64) {
    assert_eq!(a.size, b.size);
    let differences: Vec<u8> = a.data.iter().zip(&b.data).map(|(a, b)| a.abs_diff(*b)).collect();
    let len = differences.len() as f64;
    let equal = differences.iter().filter(|&&d| d == 0).count() as f64 / len;
    let sum: f64 = differences.iter().map(|&d| f64::from(d)).sum();
    (equal, differences.iter().copied().max().unwrap_or(0), sum / len)
}

/// What is decoded and resized is Pillow's to the last bit. Where colours are coded in a lossy way decoders may round
/// differently; there the bounds are stated: the largest difference of a value and their mean.
#[test]
fn images_are_decoded_and_resized_as_pillow_does_it() {
    let mut wrong = Vec::new();
    for case in golden("images").as_array().unwrap() {
        let name = case["file"].as_str().unwrap();
        let image = decoded(name);
        let [width, height]: [u32; 2] = list(&case["size"]);
        assert_eq!(image.size, Size { width, height }, "{name}");
        let bounds = Bounds { min: list(&case["min_pixels"]), max: list(&case["max_pixels"]) };
        let expected = decoded(case["resized"].as_str().unwrap());
        let size = smart_resize(image.size, 28, bounds).unwrap();
        assert_eq!(size, expected.size, "{name} within {bounds:?}");
        let (equal, most, mean) = apart(&resize(image, size), &expected);
        let (most_allowed, mean_allowed) = match name.rsplit_once('.').unwrap().1 {
            "jpg" => (8, 0.6),
            _ if name == "lossy.webp" => (4, 0.3),
            _ => (0, 0.0),
        };
        println!(
            "{name} to {}x{}: {equal:.4} equal, at most {most}, mean {mean:.3}",
            size.width, size.height
        );
        if most > most_allowed || mean > mean_allowed {
            wrong.push(format!("{name} to {size:?}: {equal:.4} equal, at most {most}, mean {mean:.3}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Compares rows of floats with transformers': samples of them, and each one's 8-bit level.
fn same_rows(rows: &[f32], case: &Value) {
    const MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
    const STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];
    let samples: std::collections::BTreeMap<String, f32> = list(&case["samples"]);
    assert!(samples.len() > 10);
    for (i, value) in samples {
        let ours = rows[i.parse::<usize>().unwrap()];
        assert!((ours - value).abs() <= 1e-6, "number {i} is {ours}, not {value}");
    }
    let levels = decoded(case["patches"].as_str().unwrap());
    assert_eq!(levels.size.pixels() as usize, rows.len());
    for (i, (pixel, value)) in levels.data.chunks(3).zip(rows).enumerate() {
        let colour = i % 1176 / 392;
        let level = (f64::from(*value) * STD[colour] + MEAN[colour]) * 255.0;
        assert!((level - f64::from(pixel[0])).abs() < 1e-3, "number {i} is level {level}, not {}", pixel[0]);
    }
}

#[test]
fn patches_are_those_of_transformers() {
    let preprocessor =
        preprocessor(r#"{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}"#).unwrap();
    let mut compared = 0;
    for case in golden("images").as_array().unwrap().iter().filter(|c| !c["patches"].is_null()) {
        let patches = preprocessor.image_file(&data(case["file"].as_str().unwrap())).unwrap();
        let grid: [u32; 3] = list(&case["grid"]);
        assert_eq!([patches.grid.t, patches.grid.h, patches.grid.w], grid);
        same_rows(&patches.rows, case);
        compared += 1;
    }
    assert_eq!(compared, 2);
}

#[test]
fn a_video_is_pairs_of_frames() {
    let preprocessor =
        preprocessor(r#"{"size": {"shortest_edge": 3136, "longest_edge": 12845056}}"#).unwrap();
    let frames: Vec<PathBuf> = (0..3).map(|i| data(&format!("video/{i}.png"))).collect();
    let video = preprocessor.video_files(&frames, 4.0).unwrap();
    let case = golden("video");
    let grid: [u32; 3] = list(&case["grid"]);
    assert_eq!([video.patches.grid.t, video.patches.grid.h, video.patches.grid.w], grid);
    same_rows(&video.patches.rows, &case);
    assert_eq!(video.seconds, 0.5);
}

#[test]
fn videos_have_bounds() {
    let preprocessor = preprocessor(r#"{"min_pixels": 784, "max_pixels": 12845056}"#).unwrap();
    let video =
        preprocessor.with_pixels(None, Some(784)).unwrap().video_files(&[data("large.png")], 1.0).unwrap();
    assert_eq!(video.patches.grid.tokens(2), 1);
    let error = preprocessor.video_files(&vec![data("large.png"); 769], 1.0).unwrap_err().to_string();
    assert_eq!(error, "request: a video has 769 frames, more than 768");
    let mixed = [data("large.png"), data("odd.png")];
    let error = preprocessor.video_files(&mixed, 1.0).unwrap_err().to_string();
    assert!(error.ends_with("odd.png: is 91x67, and the video's first frame is 613x407"), "{error}");
}

#[test]
fn configurations_have_two_spellings() {
    let bounds = |config: &str| preprocessor(config).unwrap().image.bounds;
    let expected = Bounds { min: 4000, max: 90000 };
    assert_eq!(bounds(r#"{"min_pixels": 4000, "max_pixels": 90000}"#), expected);
    assert_eq!(bounds(r#"{"size": {"shortest_edge": 4000, "longest_edge": 90000}}"#), expected);
    assert_eq!(bounds(r#"{"size": {"min_pixels": 4000, "max_pixels": 90000}}"#), expected);
    assert_eq!(
        bounds(r#"{"max_pixels": 90000, "size": {"shortest_edge": 4000, "longest_edge": 5}}"#),
        expected
    );
    assert_eq!(bounds("{}"), Bounds { min: 3136, max: 1003520 });
    let narrow = preprocessor("{}").unwrap().with_pixels(None, Some(2000)).unwrap();
    assert_eq!(narrow.image.bounds, Bounds { min: 2000, max: 2000 });
}

#[test]
fn wrong_configurations_are_one_line_each() {
    let error = |config: &str| preprocessor(config).unwrap_err().to_string();
    for (config, why) in [
        ("[", "EOF while parsing"),
        (r#"{"patch_size": 0}"#, "patch_size: 0 is not from 1 to 64"),
        (r#"{"merge_size": -1}"#, "invalid value"),
        (r#"{"max_pixels": 783}"#, "max_pixels: 783 are less than a token's 784"),
        (r#"{"min_pixels": 9000, "max_pixels": 8000}"#, "min_pixels: 9000 are more than max_pixels, 8000"),
        (r#"{"image_std": [0, 1, 1]}"#, "they give no ordinary numbers"),
        (r#"{"resample": 2}"#, "only 3, bicubic"),
        (r#"{"do_resize": false}"#, "do_resize"),
    ] {
        let error = error(config);
        assert!(error.contains("preprocessor_config.json: ") && error.contains(why), "{error}");
        assert!(!error.contains('\n'));
    }
    let error = Preprocessor::read(&data("video")).unwrap_err().to_string();
    assert!(error.contains("preprocessor_config.json: is missing"), "{error}");
    let usage = preprocessor("{}").unwrap().with_pixels(Some(10), Some(5)).unwrap_err();
    assert_eq!(usage.exit_code(), 2);
}
