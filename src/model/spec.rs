//! What a model is: shapes and choices, as data.

use std::sync::Arc;

use super::vision::VisionSpec;
use crate::backend::{DType, HeadShape};

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
    /// How many of the frequencies turn by time, by the place down and by the place across; `None`: all by the place in
    /// the sequence.
    pub sections: Option<[usize; 3]>,
    /// Which linear layers have biases.
    pub bias: Biases,
    /// Queries and keys are normalised head by head.
    pub qk_norm: bool,
    /// The head's weights are the embedding's.
    pub tied: bool,
    /// The longest sequence the model was made for.
    pub context_max: usize,
    /// The vision tower.
    pub vision: Option<Arc<VisionSpec>>,
    /// The tokens that stand for what it sees.
    pub pads: Option<Pads>,
}

/// Tokens that stand for images and videos, and those around them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pads {
    /// `<|image_pad|>`, once for each token that the tower makes of an image.
    pub image: u32,
    /// `<|video_pad|>`, likewise.
    pub video: u32,
    /// `<|vision_start|>`.
    pub start: u32,
    /// `<|vision_end|>`.
    pub end: u32,
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

/// What a tensor is for, with its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The names are the documentation.
pub enum Role {
    Embed,
    FinalNorm,
    Head,
    AttnNorm(usize),
    Q(usize),
    K(usize),
    V(usize),
    O(usize),
    QBias(usize),
    KBias(usize),
    VBias(usize),
    OBias(usize),
    QNorm(usize),
    KNorm(usize),
    MlpNorm(usize),
    Gate(usize),
    Up(usize),
    Down(usize),
    GateBias(usize),
    UpBias(usize),
    DownBias(usize),
}

impl ModelSpec {
    /// The tensor's shape, outermost first.
    pub fn shape(&self, role: Role) -> Vec<usize> {
        let q = self.heads.q_dim();
        let kv = self.heads.kv_heads * self.heads.head_dim;
        match role {
            Role::Embed | Role::Head => vec![self.vocab, self.dim],
            Role::FinalNorm | Role::AttnNorm(_) | Role::MlpNorm(_) => vec![self.dim],
            Role::Q(_) => vec![q, self.dim],
            Role::K(_) | Role::V(_) => vec![kv, self.dim],
            Role::O(_) => vec![self.dim, q],
            Role::QBias(_) => vec![q],
            Role::KBias(_) | Role::VBias(_) => vec![kv],
            Role::OBias(_) | Role::DownBias(_) => vec![self.dim],
            Role::QNorm(_) | Role::KNorm(_) => vec![self.heads.head_dim],
            Role::Gate(_) | Role::Up(_) => vec![self.ffn, self.dim],
            Role::Down(_) => vec![self.dim, self.ffn],
            Role::GateBias(_) | Role::UpBias(_) => vec![self.ffn],
        }
    }

    /// All tensors of layer `i`.
    pub fn layer_roles(&self, i: usize) -> Vec<Role> {
        use Role::*;
        let mut roles = vec![AttnNorm(i), Q(i), K(i), V(i), O(i), MlpNorm(i), Gate(i), Up(i), Down(i)];
        if self.bias.qkv {
            roles.extend([QBias(i), KBias(i), VBias(i)]);
        }
        if self.bias.out {
            roles.push(OBias(i));
        }
        if self.bias.mlp {
            roles.extend([GateBias(i), UpBias(i), DownBias(i)]);
        }
        if self.qk_norm {
            roles.extend([QNorm(i), KNorm(i)]);
        }
        roles
    }

    /// Numbers in the weights of one layer; all layers have the same shapes.
    pub fn layer_params(&self) -> usize {
        self.params(&self.layer_roles(0))
    }

    /// Numbers in the embedding.
    pub fn embed_params(&self) -> usize {
        self.params(&[Role::Embed])
    }

    /// Numbers in the final norm and the head. A tied head counts in full: a last stage that does not hold
    /// the embedding needs its own copy.
    pub fn head_params(&self) -> usize {
        self.params(&[Role::FinalNorm, Role::Head])
    }

    /// Bytes of one layer's keys and values of one token.
    pub fn kv_bytes_per_token(&self, dtype: DType) -> usize {
        product(&[2, self.heads.kv_heads, self.heads.head_dim, dtype.size()])
    }

    fn params(&self, roles: &[Role]) -> usize {
        let counts = roles.iter().map(|&role| product(&self.shape(role)));
        counts.fold(0, |sum, n| sum.checked_add(n).expect(BOUNDED))
    }
}

const BOUNDED: &str = "sizes are bounded where config.json is read; this is a bug";

fn product(of: &[usize]) -> usize {
    of.iter().fold(1, |n, &d| usize::checked_mul(n, d).expect(BOUNDED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm2() -> ModelSpec {
        ModelSpec {
            arch: "LlamaForCausalLM",
            dim: 576,
            vocab: 49152,
            ffn: 1536,
            heads: HeadShape { heads: 9, kv_heads: 3, head_dim: 64 },
            layers: vec![LayerSpec { window: None }; 30],
            norm: Norm::Rms { eps: 1e-5 },
            rope: Rope { inv_freq: vec![1.0; 32], scale: 1.0 },
            sections: None,
            bias: Biases::default(),
            qk_norm: false,
            tied: true,
            context_max: 8192,
            vision: None,
            pads: None,
        }
    }

    #[test]
    fn counts_agree_with_a_known_model() {
        let spec = smollm2();
        // 134,515,008 is what transformers' num_parameters() says of SmolLM2-135M.
        assert_eq!(spec.embed_params() + 30 * spec.layer_params() + 576, 134_515_008);
        assert_eq!(spec.head_params(), spec.embed_params() + 576);
        assert_eq!(spec.kv_bytes_per_token(DType::F16), 2 * 3 * 64 * 2);
    }

    #[test]
    fn biases_and_head_norms_add_their_tensors() {
        let plain = smollm2().layer_params();
        let bias = Biases { qkv: true, out: true, mlp: true };
        let spec = ModelSpec { bias, qk_norm: true, ..smollm2() };
        assert_eq!(spec.layer_params() - plain, (576 + 2 * 192) + 576 + (2 * 1536 + 576) + 2 * 64);
        let roles: std::collections::HashSet<_> = spec.layer_roles(3).into_iter().collect();
        assert_eq!(roles.len(), 18);
    }
}
