//! config.json and generation_config.json.

/// What a folder says about generation: end-of-sequence ids and default sampling.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// `false` asks for greedy decoding.
    pub do_sample: bool,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub temperature: Option<f32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub top_k: Option<u32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub top_p: Option<f32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub min_p: Option<f32>,
    /// As in [`crate::SamplingParams`], where the file says so.
    pub repetition_penalty: Option<f32>,
}
