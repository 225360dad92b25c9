//! An image of 1024x1024 to patches, on one core: `cargo bench --bench vision -- --quick`.
//!
//! The picture is made up: slopes, edges and noise, 1.8 bits a pixel as JPEG. `PIPELINE_INFER_BENCH_IMAGE` names another.

use std::{fs, hint::black_box, path::Path};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use image::{ExtendedColorType, ImageEncoder, codecs::jpeg::JpegEncoder};
use pipeline_infer::vision::{Limits, Preprocessor, decode, resize, smart_resize};

criterion_group!(benches, preprocessing);
criterion_main!(benches);

const SIDE: u32 = 1024;

fn photo() -> Vec<u8> {
    if let Some(path) = std::env::var_os("PIPELINE_INFER_BENCH_IMAGE") {
        return fs::read(path).unwrap();
    }
    let mut noise = 1u32;
    let mut pixels = Vec::new();
    for y in 0..SIDE {
        for x in 0..SIDE {
            for c in 0..3 {
                noise = noise.wrapping_mul(1664525).wrapping_add(1013904223);
                let edge = if (x / 90 + y / 70) % 3 == c { 90 } else { 0 };
                let slope = (x * (c + 1) + y * 2) * 100 / (SIDE * 5);
                pixels.push((edge + slope + (noise >> 28)) as u8);
            }
        }
    }
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, 90)
        .write_image(&pixels, SIDE, SIDE, ExtendedColorType::Rgb8)
        .unwrap();
    bytes
}

fn preprocessing(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"min_pixels": 3136, "max_pixels": 12845056}"#;
    fs::write(folder.path().join("preprocessor_config.json"), config).unwrap();
    let preprocessor = Preprocessor::read(folder.path()).unwrap();
    let (path, bytes) = (Path::new("photo.jpg"), photo());
    let image = decode(path, &bytes, Limits::default()).unwrap();
    let cut = preprocessor.image.cut;
    let size = smart_resize(image.size, cut.factor(), preprocessor.image.bounds).unwrap();
    let resized = [resize(image.clone(), size)];

    println!("{} bytes, {:?} to {size:?}", bytes.len(), image.size);
    let mut group = c.benchmark_group("vision");
    group.throughput(Throughput::Elements(1));
    group.bench_function("whole", |b| b.iter(|| preprocessor.image(path, black_box(&bytes)).unwrap()));
    group
        .bench_function("decode", |b| b.iter(|| decode(path, black_box(&bytes), Limits::default()).unwrap()));
    group.bench_function("resize", |b| b.iter(|| resize(black_box(image.clone()), size)));
    group.bench_function("patches", |b| b.iter(|| cut.cut(black_box(&resized))));
    group.finish();
}
