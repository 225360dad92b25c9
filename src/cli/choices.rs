//! How to sample and when to stop: the same choices as flags and as fields of a line of `--prompt-file`.

use std::collections::BTreeMap;

use clap::Args;
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::{
    error::{Error, Result},
    model::config::GenerationConfig,
    request::{Prompt, Request, SamplingParams, StopParams},
};

/// New tokens at most, where nobody says otherwise.
const MAX_TOKENS: u32 = 512;

/// What is chosen; `None` leaves it to the model's generation_config.json or to the default.
#[derive(Debug, Clone, Default, PartialEq, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Sampling and stopping")]
pub(super) struct Choices {
    /// New tokens at most; a prompt that leaves no room for as many is refused [default: 512, or as many as there is room for]
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// 0 takes the most likely token [default: 0, or generation_config.json's if that says do_sample; so
    /// for top-k, top-p and min-p]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Keeps the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Keeps the fewest most likely tokens that together reach this probability; 1 keeps all
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keeps tokens with at least this share of the most likely one's probability; 0 keeps all
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens in prompt and answer; 1 is none
    /// [default: generation_config.json's, or 1]
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens already in the answer
    #[arg(long, value_name = "X")]
    presence_penalty: Option<f32>,
    /// Subtracted once for each time that a token is already in the answer
    #[arg(long, value_name = "X")]
    frequency_penalty: Option<f32>,
    /// Added to single tokens' logits; comma list, repeatable
    #[arg(long, value_name = "ID:BIAS", value_delimiter = ',', value_parser = bias)]
    #[serde(deserialize_with = "bias_map")]
    logit_bias: Option<Vec<(u32, f32)>>,
    /// The same seed gives the same answer; sample I uses SEED + I
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Ends the answer before this text; repeatable
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    #[serde(deserialize_with = "one_or_many")]
    stop: Option<Vec<String>>,
    /// Goes on past the model's end-of-sequence tokens
    #[arg(long, num_args = 0, default_missing_value = "true")]
    ignore_eos: Option<bool>,
    /// Independent samples to draw of each prompt
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    n: Option<u32>,
    /// Prompts of higher priority come first; those of one priority in their order [default: 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    priority: Option<i32>,
    /// Reports each token's log-probability and the K most likely tokens (JSON only)
    #[arg(long, value_name = "K")]
    logprobs: Option<u32>,
}

impl Choices {
    /// Whether every value can be used, as far as can be told without the model. `name` makes a field's name
    /// what the user wrote: `--top-p`.
    pub(super) fn check(&self, name: fn(&str) -> String) -> Result<()> {
        let mut request = Request::new(Prompt::Ids(Vec::new()));
        self.apply(&mut request);
        request.sampling.check(usize::MAX).and_then(|()| request.stop.check()).map_err(|e| match e {
            Error::Request(why) => match why.split_once(": ") {
                Some((field, why)) => Error::usage(name(field), why),
                None => Error::Request(why),
            },
            other => other,
        })
    }

    /// Whether log-probabilities are asked for.
    pub(super) fn logprobs(&self) -> bool {
        self.logprobs.is_some()
    }

    /// Whether more than one sample is asked for.
    pub(super) fn several(&self) -> bool {
        self.n.is_some_and(|n| n > 1)
    }

    /// The request for a prompt: these choices over the model's own. `over` are a line's, which go first.
    pub(super) fn request(&self, prompt: Prompt, model: &GenerationConfig, over: &Choices) -> Request {
        let mut request = Request {
            media: Vec::new(),
            prompt,
            sampling: model_default(model),
            stop: StopParams { max_tokens: Some(MAX_TOKENS), shorten: true, ..StopParams::default() },
            n: 1,
            priority: 0,
        };
        self.apply(&mut request);
        over.apply(&mut request);
        if request.sampling.temperature == 0.0 {
            self.warn_greedy(over);
        }
        request
    }

    /// Changes a request in what is chosen.
    pub(super) fn apply(&self, request: &mut Request) {
        fn set<T: Clone>(to: &mut T, from: &Option<T>) {
            if let Some(value) = from {
                to.clone_from(value);
            }
        }
        let Request { sampling, stop, n, priority, .. } = request;
        set(&mut sampling.temperature, &self.temperature);
        set(&mut sampling.top_k, &self.top_k);
        set(&mut sampling.top_p, &self.top_p);
        set(&mut sampling.min_p, &self.min_p);
        set(&mut sampling.repetition_penalty, &self.repetition_penalty);
        set(&mut sampling.presence_penalty, &self.presence_penalty);
        set(&mut sampling.frequency_penalty, &self.frequency_penalty);
        set(&mut sampling.logit_bias, &self.logit_bias);
        sampling.seed = self.seed.or(sampling.seed);
        sampling.logprobs = self.logprobs.or(sampling.logprobs);
        if let Some(max_tokens) = self.max_tokens {
            // Whoever asks for so many wants no fewer.
            (stop.max_tokens, stop.shorten) = (Some(max_tokens), false);
        }
        set(&mut stop.strings, &self.stop);
        set(&mut stop.ignore_eos, &self.ignore_eos);
        set(n, &self.n);
        set(priority, &self.priority);
    }

    /// Choices that greedy decoding silently passes over would surprise.
    fn warn_greedy(&self, over: &Choices) {
        for choices in [self, over] {
            let narrowed = [
                ("top-k", choices.top_k.is_some()),
                ("top-p", choices.top_p.is_some()),
                ("min-p", choices.min_p.is_some()),
            ];
            for (name, _) in narrowed.iter().filter(|(_, chosen)| *chosen) {
                tracing::warn!("{name} changes nothing at temperature 0");
            }
        }
    }
}

/// Greedy, unless the model's folder says `do_sample`. Its penalty holds either way, as in transformers.
fn model_default(model: &GenerationConfig) -> SamplingParams {
    let mut greedy = SamplingParams::default();
    greedy.repetition_penalty = model.repetition_penalty.unwrap_or(greedy.repetition_penalty);
    if !model.do_sample {
        return greedy;
    }
    SamplingParams {
        temperature: model.temperature.unwrap_or(1.0),
        top_k: model.top_k.unwrap_or(greedy.top_k),
        top_p: model.top_p.unwrap_or(greedy.top_p),
        min_p: model.min_p.unwrap_or(greedy.min_p),
        ..greedy
    }
}

/// `ID:BIAS`.
fn bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once(':').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    parsed.ok_or_else(|| "expected TOKEN_ID:NUMBER, such as 42:-1.5".into())
}

/// `{"42": -1.5}`, as other programs write it.
fn bias_map<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<(u32, f32)>>, D::Error> {
    let map = Option::<BTreeMap<String, f32>>::deserialize(from)?;
    let pairs = map.map(|map| {
        let id = |text: &str| text.parse().map_err(|_| D::Error::custom(format!("{text:?} is no token id")));
        map.iter().map(|(k, &bias)| Ok((id(k)?, bias))).collect()
    });
    pairs.transpose()
}

/// `"text"` or `["text", …]`.
fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "stop is neither a string nor a list of strings")]
    enum Stop {
        One(String),
        Many(Vec<String>),
    }
    Ok(Option::<Stop>::deserialize(from)?.map(|stop| match stop {
        Stop::One(text) => vec![text],
        Stop::Many(texts) => texts,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(json: &str) -> Choices {
        serde_json::from_str(json).unwrap()
    }

    fn sampling_model() -> GenerationConfig {
        GenerationConfig {
            do_sample: true,
            temperature: Some(0.7),
            top_p: Some(0.9),
            repetition_penalty: Some(1.1),
            ..GenerationConfig::default()
        }
    }

    #[test]
    fn a_line_goes_before_flags_and_flags_before_the_model() {
        let flags =
            line(r#"{"temperature": 0.5, "priority": 3, "seed": 7, "ignore_eos": true, "stop": ["a", "b"]}"#);
        let over = line(
            r#"{"priority": -2, "seed": 8, "ignore_eos": false, "stop": "c", "logit_bias": {"3": -1.5}}"#,
        );
        let request = flags.request(Prompt::Ids(vec![1]), &sampling_model(), &over);
        assert_eq!(request.sampling.temperature, 0.5);
        assert_eq!(request.sampling.top_p, 0.9);
        assert_eq!(request.sampling.repetition_penalty, 1.1);
        assert_eq!(request.sampling.top_k, 0);
        assert_eq!(request.sampling.seed, Some(8));
        assert_eq!(request.sampling.logit_bias, [(3, -1.5)]);
        assert_eq!(request.stop.strings, ["c"]);
        assert_eq!(request.priority, -2);
        let alone = flags.request(Prompt::Ids(vec![1]), &sampling_model(), &Choices::default());
        assert_eq!(alone.priority, 3);
        assert!(!request.stop.ignore_eos);
        assert_eq!((request.stop.max_tokens, request.stop.shorten), (Some(MAX_TOKENS), true));
        let asked = flags.request(Prompt::Ids(vec![1]), &sampling_model(), &line(r#"{"max_tokens": 512}"#));
        assert_eq!((asked.stop.max_tokens, asked.stop.shorten), (Some(512), false));
    }

    #[test]
    fn greedy_unless_the_model_or_a_flag_says_otherwise() {
        let none = Choices::default();
        let temperature = |flags: &Choices, model: &GenerationConfig| {
            flags.request(Prompt::Ids(vec![1]), model, &none).sampling.temperature
        };
        let greedy = GenerationConfig { temperature: Some(0.7), ..GenerationConfig::default() };
        assert_eq!(temperature(&none, &greedy), 0.0);
        assert_eq!(temperature(&none, &sampling_model()), 0.7);
        assert_eq!(temperature(&line(r#"{"temperature": 0}"#), &sampling_model()), 0.0);
        let unnamed = GenerationConfig { do_sample: true, ..GenerationConfig::default() };
        assert_eq!(temperature(&none, &unnamed), 1.0);
    }

    #[test]
    fn the_models_penalty_holds_for_greedy_decoding_too() {
        let model =
            GenerationConfig { do_sample: false, top_k: Some(5), min_p: Some(0.1), ..sampling_model() };
        let want = SamplingParams { repetition_penalty: 1.1, ..SamplingParams::default() };
        assert_eq!(model_default(&model), want);
        let flag = line(r#"{"repetition_penalty": 1}"#);
        let request = flag.request(Prompt::Ids(vec![1]), &model, &Choices::default());
        assert_eq!(request.sampling, SamplingParams::default());
    }

    #[test]
    fn values_out_of_range_are_named() {
        let wrong = |choices: Choices| {
            let e = choices.check(|f| format!("--{f}")).unwrap_err();
            assert_eq!(e.exit_code(), 2);
            e.to_string()
        };
        let nan = Choices { temperature: Some(f32::NAN), ..Choices::default() };
        assert!(wrong(nan).starts_with("--temperature: NaN is not "));
        let infinite = Choices { logit_bias: Some(vec![(1, f32::INFINITY)]), ..Choices::default() };
        assert!(wrong(infinite).starts_with("--logit_bias: inf "));
        for (json, field) in [
            (r#"{"top_p": 0}"#, "--top_p: 0 "),
            (r#"{"min_p": 1.5}"#, "--min_p: 1.5 "),
            (r#"{"repetition_penalty": 0}"#, "--repetition_penalty: 0 "),
            (r#"{"max_tokens": 0}"#, "--max_tokens: 0 "),
            (r#"{"stop": ["x", ""]}"#, "--stop: "),
        ] {
            let told = wrong(line(json));
            assert!(told.starts_with(field), "{told}");
        }
        line(r#"{"presence_penalty": -2, "n": 3, "top_k": 0}"#).check(str::to_owned).unwrap();
    }

    #[test]
    fn unknown_fields_and_wrong_types_are_errors() {
        for json in [r#"{"top": 1}"#, r#"{"stop": 3}"#, r#"{"logit_bias": {"a": 1}}"#, r#"{"seed": -1}"#] {
            serde_json::from_str::<Choices>(json).unwrap_err();
        }
        assert_eq!(line(r#"{"stop": null, "seed": null}"#), Choices::default());
    }

    #[test]
    fn biases_are_id_and_number() {
        assert_eq!(bias("42:-1.5"), Ok((42, -1.5)));
        for text in ["", "42", "-1:2", "a:1", "1:b", "1:2:3"] {
            bias(text).unwrap_err();
        }
    }
}
