//! Qwen3: queries and keys are normalised head by head.

use super::{Arch, Role, common};
use crate::{
    error::Result,
    model::{
        config::Config,
        spec::{Biases, ModelSpec},
    },
};

pub(super) struct Qwen3;

impl Arch for Qwen3 {
    fn name(&self) -> &'static str {
        "Qwen3ForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "qwen3"
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec> {
        let defaults = common::Defaults {
            kv_heads: Some(32),
            head_dim: Some(128),
            context_max: 32_768,
            ..common::Defaults::USUAL
        };
        let mut spec = common::spec(config, self.name(), defaults)?;
        let attention = config.flag("attention_bias")?.unwrap_or(false);
        spec.bias = Biases { qkv: attention, out: attention, mlp: false };
        spec.qk_norm = true;
        spec.layers = common::qwen_windows(config, spec.layers.len(), 28)?;
        Ok(spec)
    }

    fn tensor(&self, role: Role) -> String {
        common::tensor(role)
    }
}
