//! What a model is: shapes and choices, as data.

use crate::backend::HeadShape;

/// A decoder, whatever its architecture is called.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// As in config.json: `LlamaForCausalLM`.
    pub arch: &'static str,
    /// Numbers of a token's state.
    pub dim: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Numbers between the two halves of the feed-forward part.
    pub ffn: usize,
    /// Attention heads.
    pub heads: HeadShape,
    /// One entry a layer.
    pub layers: Vec<LayerSpec>,
    /// How rows are normalised.
    pub norm: Norm,
    /// Rotary positions.
    pub rope: Rope,
    /// Which linear layers have biases.
    pub bias: Biases,
    /// Queries and keys are normalised head by head.
    pub qk_norm: bool,
    /// The head's weights are the embedding's.
    pub tied: bool,
    /// The longest sequence the model was made for.
    pub context_max: usize,
}

/// One layer's own choices.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Tokens that a row sees, itself included; `None`: all.
    pub window: Option<usize>,
}

/// How rows are normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// By the root of the mean square.
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
}

/// Rotary positions, by halves of the head.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians a position, for each pair of numbers.
    pub inv_freq: Vec<f32>, // [head_dim / 2]
    /// Multiplies sines and cosines.
    pub scale: f32,
}

/// Which linear layers have biases.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Biases {
    /// Queries, keys, values.
    pub qkv: bool,
    /// Attention's output.
    pub out: bool,
    /// Gate, up and down.
    pub mlp: bool,
}
