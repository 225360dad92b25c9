//! Models on a GPU: against transformers and the processor, in any number of stages, in company and alone.

#[path = "gpu_model/batches.rs"]
mod batches;
mod common;
#[path = "gpu/device.rs"]
mod device;
#[path = "gpu_model/faults.rs"]
mod faults;
#[path = "gpu_model/goldens.rs"]
mod goldens;
#[path = "gpu_model/images.rs"]
mod images;
#[path = "gpu_model/mixed.rs"]
mod mixed;
#[path = "gpu_model/relayout.rs"]
mod relayout;
#[path = "gpu_model/seen.rs"]
mod seen;
#[path = "gpu_model/stages.rs"]
mod stages;
#[path = "gpu_model/tokens.rs"]
mod tokens;
#[path = "gpu_model/traffic.rs"]
mod traffic;

use std::path::Path;

use device::layout;
use pipeline_infer::{Engine, backend::DType, engine::EngineBuilder, model::open_model};

/// An engine on the GPUs there are, in so many stages.
fn on_gpus(
    dir: &Path,
    stages: usize,
    dtype: DType,
    with: impl FnOnce(EngineBuilder) -> EngineBuilder,
) -> Engine {
    let layers = open_model(dir, true).unwrap().spec.layers.len();
    let builder = Engine::builder().model(dir).dtype(dtype).layout(layout(stages, layers));
    with(builder).build().unwrap_or_else(|e| panic!("{}, {stages} stages: {e}", dir.display()))
}

/// A model without weights: a config.json in a folder of its own.
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dim: usize,
    layers: usize,
    context: usize,
}

impl Shape {
    const SMALL: Shape = Shape { heads: 4, kv_heads: 2, head_dim: 64, dim: 256, layers: 3, context: 512 };
    const VOCAB: usize = 1003;

    fn write(&self, dtype: DType) -> tempfile::TempDir {
        let dtype = match dtype {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
        };
        let config = serde_json::json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "dtype": dtype,
            "vocab_size": Self::VOCAB, "hidden_size": self.dim, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": 2 * self.dim + 8, "max_position_embeddings": self.context, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": false, "use_sliding_window": false, "bos_token_id": 0, "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }
}
