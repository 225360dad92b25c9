//! What the architectures have in common: config.json's keys, and the hub's names of tensors.

use super::rope;
pub(super) use super::rope::sections;
use crate::{
    backend::HeadShape,
    error::Result,
    model::{
        config::Config,
        spec::{Biases, LayerSpec, ModelSpec, Norm, Role},
    },
};

// Far above any model, and small enough that no product of them overflows 64 bits.
const LAYERS_MAX: usize = 4096;
const DIM_MAX: usize = 1 << 20;
const HEAD_DIM_MAX: usize = 4096;
const VOCAB_MAX: usize = 1 << 24;
const TOKENS_MAX: usize = 1 << 30;

/// What transformers takes a key to be that config.json leaves out.
pub(super) struct Defaults {
    /// `None`: as many as heads.
    pub(super) kv_heads: Option<usize>,
    /// `None`: hidden size / heads.
    pub(super) head_dim: Option<usize>,
    pub(super) context_max: usize,
    pub(super) eps: f64,
    pub(super) theta: f64,
}

impl Defaults {
    /// What most architectures agree on.
    pub(super) const USUAL: Defaults =
        Defaults { kv_heads: None, head_dim: None, context_max: 2048, eps: 1e-6, theta: 10_000.0 };
}

/// A decoder with attention to all tokens and without biases or head norms.
pub(super) fn spec(config: &Config, arch: &'static str, defaults: Defaults) -> Result<ModelSpec> {
    let size = |key: &str, max: usize| config.required(key, config.size(key, max)?);
    not_quantised(config)?;
    let act = config.text("hidden_act")?.unwrap_or("silu");
    if act != "silu" {
        let why = format!("\"{}\" is not known (known: silu)", crate::error::shown(act));
        return Err(config.error("hidden_act", why));
    }
    let dim = size("hidden_size", DIM_MAX)?;
    let heads = heads(config, dim, &defaults)?;
    let context_max = config.size("max_position_embeddings", TOKENS_MAX)?.unwrap_or(defaults.context_max);
    let eps = config.positive("rms_norm_eps")?.unwrap_or(defaults.eps);
    if eps > 1.0 {
        return Err(config.error("rms_norm_eps", format!("{eps} is above 1")));
    }
    Ok(ModelSpec {
        arch,
        dim,
        vocab: size("vocab_size", VOCAB_MAX)?,
        ffn: size("intermediate_size", DIM_MAX)?,
        heads,
        layers: vec![LayerSpec { window: None }; size("num_hidden_layers", LAYERS_MAX)?],
        norm: Norm::Rms { eps: eps as f32 },
        rope: rope::read(config, heads.head_dim, context_max, defaults.theta)?,
        sections: None,
        bias: Biases::default(),
        qk_norm: false,
        tied: config.flag("tie_word_embeddings")?.unwrap_or(false),
        context_max,
        vision: None,
        pads: None,
    })
}

/// Refuses weights that are not plain numbers.
pub(super) fn not_quantised(config: &Config) -> Result<()> {
    const KEY: &str = "quantization_config";
    match config.has(KEY) {
        true => Err(config.error(KEY, "quantised checkpoints are not supported")),
        false => Ok(()),
    }
}

fn heads(config: &Config, dim: usize, defaults: &Defaults) -> Result<HeadShape> {
    const HEADS: &str = "num_attention_heads";
    const KV_HEADS: &str = "num_key_value_heads";
    let heads = config.required(HEADS, config.size(HEADS, DIM_MAX)?)?;
    let kv_heads = match config.size(KV_HEADS, DIM_MAX)? {
        Some(kv_heads) => kv_heads,
        None if config.is_null(KV_HEADS) => heads,
        None => defaults.kv_heads.unwrap_or(heads),
    };
    if !heads.is_multiple_of(kv_heads) {
        let why = format!("{kv_heads} does not divide num_attention_heads, {heads}");
        return Err(config.error(KV_HEADS, why));
    }
    let (key, head_dim) = match config.size("head_dim", HEAD_DIM_MAX)?.or(defaults.head_dim) {
        Some(head_dim) => ("head_dim", head_dim),
        None if !dim.is_multiple_of(heads) => {
            return Err(config.error(HEADS, format!("{heads} does not divide hidden_size, {dim}")));
        }
        None => (HEADS, dim / heads),
    };
    if !head_dim.is_multiple_of(2) || head_dim > HEAD_DIM_MAX {
        let why = format!("heads of {head_dim} numbers: it must be even and at most {HEAD_DIM_MAX}");
        return Err(config.error(key, why));
    }
    if heads.checked_mul(head_dim).is_none_or(|q| q > DIM_MAX) {
        let why = format!("{heads} heads of {head_dim} numbers are more than {DIM_MAX} numbers");
        return Err(config.error(HEADS, why));
    }
    Ok(HeadShape { heads, kv_heads, head_dim })
}

/// `sliding_window`: what transformers takes for absent is the caller's; `null` is none.
pub(super) fn window(config: &Config, absent: usize) -> Result<Option<usize>> {
    const KEY: &str = "sliding_window";
    match config.size(KEY, TOKENS_MAX)? {
        None if !config.is_null(KEY) => Ok(Some(absent)),
        window => Ok(window),
    }
}

/// Qwen's windows: by `layer_types` if it is there, else on the layers from `max_window_layers` on, or from `first` if that
/// is not there; none without `use_sliding_window`.
pub(super) fn qwen_windows(config: &Config, layers: usize, first: usize) -> Result<Vec<LayerSpec>> {
    let window =
        if config.flag("use_sliding_window")?.unwrap_or(false) { window(config, 4096)? } else { None };
    let Some(types) = config.texts("layer_types")? else {
        let first = config.count("max_window_layers", TOKENS_MAX)?.unwrap_or(first);
        return Ok((0..layers).map(|i| LayerSpec { window: window.filter(|_| i >= first) }).collect());
    };
    if types.len() != layers {
        let why = format!("{} entries for {layers} layers", types.len());
        return Err(config.error("layer_types", why));
    }
    let layer = |kind: &&str| match (*kind, window) {
        ("full_attention", _) => Ok(LayerSpec { window: None }),
        ("sliding_attention", Some(_)) => Ok(LayerSpec { window }),
        ("sliding_attention", None) => {
            let why = "sliding_attention, but use_sliding_window and sliding_window do not give a window";
            Err(config.error("layer_types", why))
        }
        (other, _) => {
            let known = "known: full_attention, sliding_attention";
            let why = format!("\"{}\" is not known ({known})", crate::error::shown(other));
            Err(config.error("layer_types", why))
        }
    };
    types.iter().map(layer).collect()
}

/// The names that all architectures use.
pub(super) fn tensor(role: Role) -> String {
    use Role::*;
    let (layer, rest) = match role {
        Embed => return "model.embed_tokens.weight".into(),
        FinalNorm => return "model.norm.weight".into(),
        Head => return "lm_head.weight".into(),
        AttnNorm(i) => (i, "input_layernorm.weight"),
        Q(i) => (i, "self_attn.q_proj.weight"),
        K(i) => (i, "self_attn.k_proj.weight"),
        V(i) => (i, "self_attn.v_proj.weight"),
        O(i) => (i, "self_attn.o_proj.weight"),
        QBias(i) => (i, "self_attn.q_proj.bias"),
        KBias(i) => (i, "self_attn.k_proj.bias"),
        VBias(i) => (i, "self_attn.v_proj.bias"),
        OBias(i) => (i, "self_attn.o_proj.bias"),
        QNorm(i) => (i, "self_attn.q_norm.weight"),
        KNorm(i) => (i, "self_attn.k_norm.weight"),
        MlpNorm(i) => (i, "post_attention_layernorm.weight"),
        Gate(i) => (i, "mlp.gate_proj.weight"),
        Up(i) => (i, "mlp.up_proj.weight"),
        Down(i) => (i, "mlp.down_proj.weight"),
        GateBias(i) => (i, "mlp.gate_proj.bias"),
        UpBias(i) => (i, "mlp.up_proj.bias"),
        DownBias(i) => (i, "mlp.down_proj.bias"),
    };
    format!("model.layers.{layer}.{rest}")
}
