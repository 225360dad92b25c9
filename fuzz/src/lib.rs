//! What a fuzz target does with its bytes. `tests/hostile_random.rs` does the same with bytes of its own.
//!
//! Each gives what the reader said, after it has panicked if that was not a sound value or one plain line.

use std::path::Path;

use pipeline_infer::{
    Error,
    backend::DType,
    model::{
        arch,
        config::{Config, GenerationConfig},
        spec::ModelSpec,
        weights::{Header, parse_header, parse_index},
    },
};

/// Data behind a header's text.
const DATA_BYTES: [usize; 2] = [0, 48];

/// Headers of safetensors files: the bytes as a file, and as the text of a header with data behind it.
pub fn header(bytes: &[u8]) -> Vec<Result<(), Error>> {
    let with_data = |data| {
        let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
        file.extend(bytes);
        file.resize(file.len() + data, 0);
        header_of(&file)
    };
    [header_of(bytes)].into_iter().chain(DATA_BYTES.map(with_data)).collect()
}

fn header_of(file: &[u8]) -> Result<(), Error> {
    sound(parse_header(Path::new("file"), file), |header| sound_header(&header, file))
}

/// Indices of sharded checkpoints.
pub fn index(bytes: &[u8]) -> Result<(), Error> {
    sound(parse_index(Path::new("file"), bytes), |index| {
        assert!(index.places.values().all(|&shard| shard < index.shards.len()));
        assert!(index.shards.iter().all(|shard| Path::new(shard).components().count() == 1));
    })
}

/// config.json and generation_config.json, up to what the forward pass is built from.
pub fn config(bytes: &[u8]) -> Result<(), Error> {
    let read = || {
        let config = Config::parse("file", bytes)?;
        config.dtype()?;
        GenerationConfig::from_configs(Some(&config), &config)?;
        // All architectures: chance would seldom find their names.
        for arch in arch::ARCHS {
            let _ = sound(arch.spec(&config), |spec| sound_spec(&spec));
        }
        arch::find(&config)?.spec(&config)
    };
    sound(read(), |spec| sound_spec(&spec))
}

fn sound<T>(result: Result<T, Error>, invariants: impl Fn(T)) -> Result<(), Error> {
    if let Err(error) = &result {
        let line = error.to_string();
        assert!(!line.contains(|c: char| c.is_control()) && line.len() < 2000, "{line:?}");
        assert!(line.starts_with("file: "), "{line:?} does not name the file");
    }
    result.map(invariants)
}

fn sound_header(header: &Header, file: &[u8]) {
    let mut total = 0;
    for (name, entry) in &header.tensors {
        assert!(entry.range.start <= entry.range.end && entry.range.end <= file.len(), "{name}");
        total += entry.range.len();
        if let Some(dtype) = entry.dtype() {
            assert_eq!(entry.shape.iter().product::<usize>() * dtype.size(), entry.range.len(), "{name}");
        }
    }
    let text = u64::from_le_bytes(file[..8].try_into().expect("a header's length")) as usize;
    assert_eq!(8 + text + total, file.len(), "tensors do not cover the file");
}

fn sound_spec(spec: &ModelSpec) {
    let heads = spec.heads;
    assert!(heads.heads.is_multiple_of(heads.kv_heads) && heads.head_dim.is_multiple_of(2));
    assert!((1..=4096).contains(&spec.layers.len()));
    assert!(spec.layers.iter().all(|layer| layer.window != Some(0)));
    assert_eq!(spec.rope.inv_freq.len(), heads.head_dim / 2);
    assert!(spec.rope.inv_freq.iter().chain([&spec.rope.scale]).all(|x| x.is_finite()));
    assert!(spec.layer_params() > 0 && spec.embed_params() > 0 && spec.head_params() > 0);
    assert!(spec.kv_bytes_per_token(DType::F32) > 0 && spec.context_max > 0);
}
