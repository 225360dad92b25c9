//! Mistral: Llama with one window on all layers.

use super::{Arch, Role, common};
use crate::{
    error::Result,
    model::{
        config::Config,
        spec::{LayerSpec, ModelSpec},
    },
};

pub(super) struct Mistral;

impl Arch for Mistral {
    fn name(&self) -> &'static str {
        "MistralForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "mistral"
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec> {
        let defaults =
            common::Defaults { kv_heads: Some(8), context_max: 131_072, ..common::Defaults::USUAL };
        let mut spec = common::spec(config, self.name(), defaults)?;
        let window = common::window(config, 4096)?;
        spec.layers.fill(LayerSpec { window });
        Ok(spec)
    }

    fn tensor(&self, role: Role) -> String {
        common::tensor(role)
    }
}
