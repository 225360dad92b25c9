//! One small file an architecture.
//!
//! An architecture turns config.json into a [`ModelSpec`] and roles into tensor names; the forward pass knows
//! only those. To add one: a file here and a line in [`ARCHS`].

mod common;
mod llama;
mod mistral;
mod qwen2;
mod qwen2_5_vl;
mod qwen3;
mod rope;

pub use super::spec::Role;

use super::{config::Config, spec::ModelSpec, weights::Weights};
use crate::{
    backend::Tensor,
    error::{Result, shown},
};

/// An architecture.
pub trait Arch: Sync {
    /// As in config.json's `architectures`: `LlamaForCausalLM`.
    fn name(&self) -> &'static str;
    /// As in config.json's `model_type`: `llama`.
    fn model_type(&self) -> &'static str;
    /// What a config.json of this architecture describes.
    fn spec(&self, config: &Config) -> Result<ModelSpec>;
    /// What the checkpoint calls the tensor of this role.
    fn tensor(&self, role: Role) -> String;
    /// What other checkpoints call it.
    fn other_tensor(&self, _: Role) -> Option<String> {
        None
    }
}

impl dyn Arch {
    /// The tensor of this role, under the name that it has there.
    pub fn load(&self, weights: &Weights, spec: &ModelSpec, role: Role) -> Result<Tensor> {
        let usual = self.tensor(role);
        let name = match self.other_tensor(role) {
            Some(other) if !weights.has(&usual) && weights.has(&other) => other,
            _ => usual,
        };
        weights.tensor(&name, &spec.shape(role))
    }
}

/// All architectures.
pub const ARCHS: &[&dyn Arch] =
    &[&llama::Llama, &mistral::Mistral, &qwen2::Qwen2, &qwen2_5_vl::Qwen2_5Vl, &qwen3::Qwen3];

/// The architecture that a config.json names: the first of `architectures`, or else `model_type`.
pub fn find(config: &Config) -> Result<&'static dyn Arch> {
    let named = config.texts("architectures")?.and_then(|list| list.first().copied());
    let (key, name, of): (_, _, fn(&dyn Arch) -> &'static str) = match named {
        Some(name) => ("architectures", name, |arch| arch.name()),
        None => {
            let name = config.required("architectures", config.text("model_type")?)?;
            ("model_type", name, |arch| arch.model_type())
        }
    };
    ARCHS.iter().copied().find(|&arch| of(arch) == name).ok_or_else(|| {
        let known: Vec<_> = ARCHS.iter().map(|&arch| of(arch)).collect();
        config.error(key, format!("\"{}\" is not known (known: {})", shown(name), known.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse("config.json", text.as_bytes()).unwrap()
    }

    fn message(text: &str) -> String {
        find(&config(text)).err().unwrap().to_string()
    }

    #[test]
    fn each_is_found_by_either_name_and_names_are_its_own() {
        for (i, arch) in ARCHS.iter().enumerate() {
            let by_name = format!("{{\"architectures\": [{:?}], \"model_type\": \"x\"}}", arch.name());
            let by_type = format!("{{\"architectures\": null, \"model_type\": {:?}}}", arch.model_type());
            for text in [by_name, by_type] {
                assert_eq!(find(&config(&text)).unwrap().name(), arch.name());
            }
            assert!(
                ARCHS[..i].iter().all(|b| b.name() != arch.name() && b.model_type() != arch.model_type())
            );
        }
    }

    #[test]
    fn the_unknown_is_named_with_the_known() {
        let said = message(r#"{"architectures": ["GPT2LMHeadModel"]}"#);
        assert_eq!(
            said,
            "config.json: architectures: \"GPT2LMHeadModel\" is not known (known: LlamaForCausalLM, \
             MistralForCausalLM, Qwen2ForCausalLM, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM)"
        );
        assert!(message(r#"{"architectures": [], "model_type": "gpt2"}"#).contains("llama, mistral, qwen2"));
        assert_eq!(message("{}"), "config.json: architectures: it is missing");
        assert!(message(r#"{"architectures": "Llama"}"#).contains("is not a list of strings"));
        assert!(!message("{\"architectures\": [\"a\\nb\\u001b[31m\"]}").contains(['\n', '\u{1b}']));
    }

    /// A config.json of the architecture with a few keys changed: `null` in `changes` removes a key.
    fn spec(arch: &str, changes: &str) -> Result<ModelSpec> {
        let text = r#"{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 100,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4,
            "vision_config": {"hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
            "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}"#;
        let mut values: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).unwrap();
        values.extend(serde_json::from_str::<serde_json::Map<_, _>>(changes).unwrap());
        values.insert("architectures".into(), serde_json::json!([arch]));
        values.retain(|_, v| v != "absent");
        let config = config(&serde_json::to_string(&values).unwrap());
        find(&config)?.spec(&config)
    }

    fn windows(arch: &str, changes: &str) -> Vec<Option<usize>> {
        spec(arch, changes).unwrap().layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let bare = r#"{"num_key_value_heads": "absent", "max_position_embeddings": "absent", "num_attention_heads": 32}"#;
        for (arch, kv_heads, head_dim, context_max) in [
            ("LlamaForCausalLM", 32, 2, 2048),
            ("MistralForCausalLM", 8, 2, 131_072),
            ("Qwen2ForCausalLM", 32, 2, 32_768),
            ("Qwen3ForCausalLM", 32, 128, 32_768),
        ] {
            let spec = spec(arch, bare).unwrap();
            assert_eq!((spec.heads.kv_heads, spec.heads.head_dim), (kv_heads, head_dim), "{arch}");
            assert_eq!(spec.context_max, context_max, "{arch}");
            assert_eq!(spec.norm, crate::model::spec::Norm::Rms { eps: 1e-6 });
            assert_eq!(spec.rope.inv_freq.len(), head_dim / 2);
            assert!(!spec.tied);
        }
        let null = r#"{"num_key_value_heads": null, "tie_word_embeddings": true, "head_dim": 32}"#;
        let spec = spec("MistralForCausalLM", null).unwrap();
        assert_eq!((spec.heads.kv_heads, spec.heads.head_dim, spec.tied), (4, 32, true));
    }

    #[test]
    fn biases_and_head_norms_belong_to_their_architectures() {
        let biases = |arch: &str, changes: &str| {
            let spec = spec(arch, changes).unwrap();
            (spec.bias.qkv, spec.bias.out, spec.bias.mlp, spec.qk_norm)
        };
        let all = r#"{"attention_bias": true, "mlp_bias": true}"#;
        assert_eq!(biases("LlamaForCausalLM", "{}"), (false, false, false, false));
        assert_eq!(biases("LlamaForCausalLM", all), (true, true, true, false));
        assert_eq!(biases("MistralForCausalLM", all), (false, false, false, false));
        assert_eq!(biases("Qwen2ForCausalLM", all), (true, false, false, false));
        assert_eq!(biases("Qwen3ForCausalLM", "{}"), (false, false, false, true));
        assert_eq!(biases("Qwen3ForCausalLM", all), (true, true, false, true));
    }

    #[test]
    fn windows_are_those_of_transformers() {
        let mistral = |changes: &str| windows("MistralForCausalLM", changes);
        assert_eq!(mistral("{}"), [Some(4096); 4]);
        assert_eq!(mistral(r#"{"sliding_window": null}"#), [None; 4]);
        assert_eq!(mistral(r#"{"sliding_window": 3}"#), [Some(3); 4]);
        assert_eq!(windows("LlamaForCausalLM", r#"{"sliding_window": 3}"#), [None; 4]);
        for arch in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
            let qwen = |changes: &str| windows(arch, changes);
            let on = r#""use_sliding_window": true"#;
            assert_eq!(qwen(r#"{"sliding_window": 3, "max_window_layers": 2}"#), [None; 4]);
            let last_two = qwen(&format!(r#"{{{on}, "sliding_window": 3, "max_window_layers": 2}}"#));
            assert_eq!(last_two, [None, None, Some(3), Some(3)]);
            assert_eq!(qwen(&format!(r#"{{{on}, "max_window_layers": 0}}"#)), [Some(4096); 4]);
            assert_eq!(qwen(&format!(r#"{{{on}, "sliding_window": 3}}"#)), [None; 4]);
            let types = r#""layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]"#;
            let second = qwen(&format!(r#"{{{on}, "sliding_window": 3, {types}}}"#));
            assert_eq!(second, [None, Some(3), None, None]);
            for wrong in [
                format!("{{{types}}}"),
                r#"{"layer_types": []}"#.into(),
                r#"{"layer_types": ["x", "x", "x", "x"]}"#.into(),
            ] {
                let said = spec(arch, &wrong).unwrap_err().to_string();
                assert!(said.starts_with("config.json: layer_types: "), "{said}");
            }
        }
    }

    #[test]
    fn each_role_has_a_name_of_its_own() {
        for arch in ARCHS {
            let mut spec = spec(arch.name(), "{}").unwrap();
            spec.bias = crate::model::spec::Biases { qkv: true, out: true, mlp: true };
            spec.qk_norm = true;
            let mut roles = vec![Role::Embed, Role::FinalNorm, Role::Head];
            roles.extend((0..4).flat_map(|i| spec.layer_roles(i)));
            let names: std::collections::HashSet<_> = roles.iter().map(|&role| arch.tensor(role)).collect();
            assert_eq!(names.len(), roles.len());
            assert!(names.contains("model.layers.3.self_attn.q_proj.bias"));
        }
    }
}
