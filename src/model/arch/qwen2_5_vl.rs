//! Qwen2.5-VL: Qwen2 with a vision tower, whose rows turn by time and by their places down and across.

use super::{Arch, Role, common};
use crate::{
    error::Result,
    model::{
        config::Config,
        spec::{Biases, ModelSpec, Pads},
        vision::VisionSpec,
    },
};

pub(super) struct Qwen2_5Vl;

impl Arch for Qwen2_5Vl {
    fn name(&self) -> &'static str {
        "Qwen2_5_VLForConditionalGeneration"
    }

    fn model_type(&self) -> &'static str {
        "qwen2_5_vl"
    }

    fn spec(&self, config: &Config) -> Result<ModelSpec> {
        common::not_quantised(config)?;
        // Newer files have the language model in an object of its own.
        let nested = config.text_config()?;
        let text = nested.as_ref().unwrap_or(config);
        let defaults = common::Defaults {
            kv_heads: Some(8),
            context_max: 32_768,
            eps: 1e-5,
            theta: 1e6,
            ..common::Defaults::USUAL
        };
        let mut spec = common::spec(text, self.name(), defaults)?;
        spec.bias = Biases { qkv: true, out: false, mlp: false };
        spec.layers = common::qwen_windows(text, spec.layers.len(), 80)?;
        spec.sections = Some(common::sections(text, spec.heads.head_dim)?);
        // In newer files it stands beside the language model, or in it.
        spec.tied |= config.flag("tie_word_embeddings")?.unwrap_or(false);
        let vision = VisionSpec::read(config)?;
        if vision.out != spec.dim {
            let why = format!("{} is not the language model's hidden_size, {}", vision.out, spec.dim);
            return Err(config.error("vision_config.out_hidden_size", why));
        }
        spec.vision = Some(vision.into());
        spec.pads = Some(pads(config, spec.vocab)?);
        Ok(spec)
    }

    fn tensor(&self, role: Role) -> String {
        common::tensor(role)
    }

    fn other_tensor(&self, role: Role) -> Option<String> {
        let rest = self.tensor(role);
        rest.strip_prefix("model.").map(|rest| format!("model.language_model.{rest}"))
    }
}

fn pads(config: &Config, vocab: usize) -> Result<Pads> {
    let id = |key: &str, absent: usize| {
        let id = config.count(key, u32::MAX as usize)?.unwrap_or(absent);
        match id < vocab {
            true => Ok(id as u32),
            false => Err(config.error(key, format!("{id} is not among the vocabulary's {vocab}"))),
        }
    };
    Ok(Pads {
        image: id("image_token_id", 151_655)?,
        video: id("video_token_id", 151_656)?,
        start: id("vision_start_token_id", 151_652)?,
        end: id("vision_end_token_id", 151_653)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch::find;

    const TEXT: &str = r#""hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512"#;
    const REST: &str = r#""architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": 5,
        "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
        "vision_config": {"hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}"#;

    fn spec(text: &str) -> Result<ModelSpec> {
        let config = Config::parse("config.json", text.as_bytes()).unwrap();
        find(&config)?.spec(&config)
    }

    #[test]
    fn spellings_mean_the_same() {
        let old = format!(
            r#"{{{TEXT}, {REST}, "rope_theta": 50000.0, "tie_word_embeddings": true,
            "rope_scaling": {{"type": "mrope", "mrope_section": [2, 3, 3]}}}}"#
        );
        let new = format!(
            r#"{{{REST}, "tie_word_embeddings": true, "text_config": {{{TEXT},
            "rope_parameters": {{"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [2, 3, 3]}}}}}}"#
        );
        let between = format!(
            r#"{{{REST}, {TEXT}, "hidden_size": 3, "text_config": {{{TEXT}, "tie_word_embeddings": true,
            "rope_theta": 50000.0, "rope_scaling": {{"type": "default", "rope_type": "default",
            "mrope_section": [2, 3, 3]}}}}}}"#
        );
        let first = spec(&old).unwrap();
        assert_eq!(first.sections, Some([2, 3, 3]));
        assert_eq!(first.pads, Some(Pads { image: 5, video: 6, start: 7, end: 8 }));
        assert_eq!((first.tied, first.bias.qkv, first.rope.inv_freq.len()), (true, true, 8));
        assert_eq!(first.vision.as_ref().unwrap().full.len(), 32);
        for text in [new, between] {
            assert_eq!(spec(&text).unwrap(), first, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |more: &str, from: &str, to: &str| {
            let text = format!(r#"{{{TEXT}, {REST}{more}}}"#).replace(from, to);
            spec(&text).unwrap_err().to_string()
        };
        let sections =
            |list: &str| with(&format!(r#", "rope_scaling": {{"mrope_section": {list}}}"#), "", "");
        assert!(sections("[2, 3, 4]").starts_with("config.json: rope_scaling.mrope_section: "));
        assert!(sections("[2, 6]").contains("[2, 6]"));
        assert!(sections("[4294967295, 1, 8]").contains("mrope_section"));
        // Those of heads of 128 numbers are taken where none are given.
        assert!(with("", "", "").contains("mrope_section"));
        let good = r#", "rope_scaling": {"mrope_section": [2, 3, 3]}"#;
        for (from, to, said) in [
            (
                "\"out_hidden_size\": 64",
                "\"out_hidden_size\": 65",
                "vision_config.out_hidden_size: 65 is not",
            ),
            ("\"image_token_id\": 5", "\"image_token_id\": 99", "image_token_id: 99 is not among"),
            ("\"video_token_id\": 6, ", "", "video_token_id: 151656 is not among the vocabulary's 99"),
            ("\"vision_config\"", "\"vision\"", "vision_config: it is missing"),
        ] {
            let message = with(good, from, to);
            assert!(message.starts_with(&format!("config.json: {said}")), "{message}");
        }
    }
}
