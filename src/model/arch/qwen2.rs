//! Qwen2 and Qwen2.5: biases on queries, keys and values.

use super::{Arch, Role, common};
use crate::{
    error::Result,
    model::{
        config::Config,
        spec::{Biases, ModelSpec},
    },
};

pub(super) struct Qwen2;

impl Arch for Qwen2 {
    fn name(&self) -> &'static str {
        "Qwen2ForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "qwen2"
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec> {
        let defaults =
            common::Defaults { kv_heads: Some(32), context_max: 32_768, ..common::Defaults::USUAL };
        let mut spec = common::spec(config, self.name(), defaults)?;
        spec.bias = Biases { qkv: true, out: false, mlp: false };
        spec.layers = common::qwen_windows(config, spec.layers.len(), 28)?;
        Ok(spec)
    }

    fn tensor(&self, role: Role) -> String {
        common::tensor(role)
    }
}
