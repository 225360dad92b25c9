//! Shapes of well-known models by name, for planning without a checkpoint.

use super::{arch, config::Config, spec::ModelSpec};
use crate::error::Result;

/// Names and config.json's keys. `7b` and `72b` are the shapes that this project measures.
const SHAPES: &[(&str, &str)] = &[
    ("7b", QWEN2_7B),
    ("72b", QWEN2_72B),
    ("qwen2.5-7b", QWEN2_7B),
    ("qwen2.5-72b", QWEN2_72B),
    (
        "llama-3.2-1b",
        r#"{"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": true,
        "max_position_embeddings": 131072}"#,
    ),
    (
        "llama-3.1-8b",
        r#"{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072}"#,
    ),
    (
        "llama-3.1-70b",
        r#"{"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256,
        "max_position_embeddings": 131072}"#,
    ),
    (
        "llama-3.1-405b",
        r#"{"model_type": "llama", "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256,
        "max_position_embeddings": 131072}"#,
    ),
    (
        "mistral-7b",
        r#"{"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32768, "sliding_window": null,
        "max_position_embeddings": 32768}"#,
    ),
    (
        "qwen3-32b",
        r#"{"model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936,
        "max_position_embeddings": 40960}"#,
    ),
    ("vl-3b", VL_3B),
    ("vl-7b", VL_7B),
    ("vl-32b", VL_32B),
    ("vl-72b", VL_72B),
    ("qwen2.5-vl-3b", VL_3B),
    ("qwen2.5-vl-7b", VL_7B),
    ("qwen2.5-vl-32b", VL_32B),
    ("qwen2.5-vl-72b", VL_72B),
];

const QWEN2_7B: &str = r#"{"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 32768}"#;
const QWEN2_72B: &str = r#"{"model_type": "qwen2", "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29568, "vocab_size": 152064,
    "max_position_embeddings": 32768}"#;

const VL_3B: &str = r#"{"model_type": "qwen2_5_vl", "hidden_size": 2048, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 11008, "vocab_size": 151936,
    "tie_word_embeddings": true, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048, "tokens_per_second": 2}}"#;
const VL_7B: &str = r#"{"model_type": "qwen2_5_vl", "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "tokens_per_second": 2}}"#;
const VL_32B: &str = r#"{"model_type": "qwen2_5_vl", "hidden_size": 5120, "num_hidden_layers": 64,
    "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648, "vocab_size": 152064,
    "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 5120, "tokens_per_second": 2}}"#;
const VL_72B: &str = r#"{"model_type": "qwen2_5_vl", "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29568, "vocab_size": 152064,
    "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 8192, "tokens_per_second": 2}}"#;

/// The shape of that name; `None` if there is none.
pub fn find(name: &str) -> Option<Result<ModelSpec>> {
    let (_, text) = SHAPES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name))?;
    Some(Config::parse(name, text.as_bytes()).and_then(|config| arch::find(&config)?.spec(&config)))
}

/// All names.
pub fn names() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_the_size_that_its_name_says() {
        let billions = |name: &str| {
            let spec = find(name).unwrap().unwrap();
            let head = if spec.tied { 0 } else { spec.head_params() };
            (spec.embed_params() + spec.layers.len() * spec.layer_params() + head) as f64 / 1e9
        };
        for (name, want) in [
            ("7b", 7.6),
            ("72b", 72.7),
            ("llama-3.2-1b", 1.24),
            ("llama-3.1-8b", 8.03),
            ("llama-3.1-70b", 70.6),
            ("llama-3.1-405b", 405.9),
            ("mistral-7b", 7.25),
            ("qwen3-32b", 32.8),
            // Without their towers.
            ("vl-3b", 3.09),
            ("vl-7b", 7.6),
            ("vl-32b", 32.8),
            ("vl-72b", 72.7),
        ] {
            assert!((billions(name) / want - 1.0).abs() < 0.01, "{name}: {}", billions(name));
        }
        assert!(names().all(|name| find(name).unwrap().is_ok()));
        let towers = names().filter(|name| find(name).unwrap().unwrap().vision.is_some());
        assert!(towers.eq(names().filter(|name| name.contains("vl-"))));
        assert!(find("gpt-2").is_none());
    }
}
