//! Llama 2 and 3, and what is built like them.

use super::{Arch, Role, common};
use crate::{
    error::Result,
    model::{
        config::Config,
        spec::{Biases, ModelSpec},
    },
};

pub(super) struct Llama;

impl Arch for Llama {
    fn name(&self) -> &'static str {
        "LlamaForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "llama"
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec> {
        let defaults = common::Defaults { context_max: 2048, ..common::Defaults::USUAL };
        let mut spec = common::spec(config, self.name(), defaults)?;
        let attention = config.flag("attention_bias")?.unwrap_or(false);
        let mlp = config.flag("mlp_bias")?.unwrap_or(false);
        spec.bias = Biases { qkv: attention, out: attention, mlp };
        Ok(spec)
    }

    fn tensor(&self, role: Role) -> String {
        common::tensor(role)
    }
}
