//! The promise of `hostile.rs`, blindly: sound headers, indices and configs, damaged at random, give a result
//! that keeps its invariants or one line; never a panic, never memory without bound.
//!
//! `PIPELINE_INFER_FUZZ_RUNS` says how many inputs of each kind there are. The same seed, the same inputs. What is
//! done with them is what the targets of `fuzz/` do, which look further, with feedback.

#[path = "../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is a library's root too")]
mod fuzz;

use std::collections::HashMap;

use pipeline_infer::Error;
use serde_json::Value;

const HEADER: &str = r#"{"__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [2, 1, 2], "data_offsets": [32, 40]},
    "d": {"dtype": "I64", "shape": [], "data_offsets": [40, 48]}}"#;

const INDEX: &str = r#"{"metadata": {"total_size": 48}, "weight_map": {
    "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
    "c": "model-00002-of-00002.safetensors"}}"#;

const CONFIGS: [&str; 3] = [
    r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "head_dim": 16,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "hidden_act": "silu",
    "dtype": "float16", "tie_word_embeddings": false, "eos_token_id": [2, 3], "bos_token_id": 1,
    "attention_bias": false, "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {"rope_type": "yarn",
    "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": false}}"#,
    r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100, "rope_theta": 500000.0,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16", "mlp_bias": true, "rope_scaling": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32}, "do_sample": true, "temperature": 0.6, "top_k": 20,
    "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}"#,
    r#"{"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 100, "sliding_window": null,
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}}"#,
];

/// What to put in place of something else.
const TOKENS: [&str; 28] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "1.5",
    "1e308",
    "-1e308",
    "1e-308",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1048576",
    "16777216",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"x\"",
    "[1, 2]",
    ",",
    "\"a\"",
    "}",
    "]",
    "\"default\"",
    "\"linear\"",
];

fn runs() -> usize {
    let given = std::env::var("PIPELINE_INFER_FUZZ_RUNS").ok();
    given.map_or(100_000, |text| text.parse().expect("PIPELINE_INFER_FUZZ_RUNS is not a number"))
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }

    fn token(&mut self) -> &'static str {
        TOKENS[self.below(TOKENS.len())]
    }

    /// One to four changes to the bytes, or to the values.
    fn damage(&mut self, text: &str) -> Vec<u8> {
        let mut bytes = text.as_bytes().to_vec();
        if self.below(3) == 0 {
            for _ in 0..=self.below(4) {
                self.damage_bytes(&mut bytes);
            }
            return bytes;
        }
        let mut value: Value = serde_json::from_str(text).unwrap();
        for _ in 0..=self.below(3) {
            self.damage_value(&mut value);
        }
        serde_json::to_vec(&value).unwrap()
    }

    fn damage_bytes(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len());
        let end = at + self.below((bytes.len() - at).min(40));
        match self.below(5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 => drop(bytes.drain(at..end)),
            2 => drop(bytes.splice(at..end, self.token().bytes())),
            3 => {
                let copy = bytes[at..end].to_vec();
                let to = self.below(bytes.len());
                drop(bytes.splice(to..to, copy));
            }
            _ if self.below(8) == 0 => bytes.truncate(at),
            _ => drop(bytes.splice(at..at, self.token().bytes())),
        }
    }

    /// Changes a value within, a key, or the value itself.
    fn damage_value(&mut self, value: &mut Value) {
        match value {
            Value::Object(map) if !map.is_empty() && self.below(8) != 0 => {
                let at = self.below(map.len());
                let key = map.keys().nth(at).unwrap().clone();
                match self.below(10) {
                    0 => drop(map.remove(&key)),
                    1 => {
                        let other = map.keys().nth(self.below(map.len())).unwrap().clone();
                        let moved = map[&key].clone();
                        map.insert(other, moved);
                    }
                    _ => self.damage_value(&mut map[&key]),
                }
            }
            Value::Array(list) if !list.is_empty() && self.below(4) != 0 => match self.below(4) {
                0 => list.push(list[0].clone()),
                1 => drop(list.pop()),
                _ => {
                    let at = self.below(list.len());
                    self.damage_value(&mut list[at]);
                }
            },
            Value::Number(n) if self.below(2) == 0 => {
                let near = n.as_f64().unwrap_or(0.0) + self.below(5) as f64 - 2.0;
                *value = if n.is_f64() { near.into() } else { (near as i64).into() };
            }
            _ => *value = serde_json::from_str(self.token()).unwrap_or_else(|_| "\u{1b}\n".into()),
        }
    }
}

/// Counts what came out, so that a test that only ever sees one outcome fails.
#[derive(Default)]
struct Outcomes {
    good: usize,
    bad: HashMap<String, usize>,
}

impl Outcomes {
    fn add(&mut self, result: Result<(), Error>) {
        match result {
            Ok(()) => self.good += 1,
            Err(error) => {
                let line = error.to_string();
                let kind: String =
                    line.chars().filter(|c| c.is_ascii_alphabetic() || *c == ' ').take(40).collect();
                *self.bad.entry(kind).or_default() += 1;
            }
        }
    }

    fn finish(self, what: &str, kinds_min: usize) {
        let bad: usize = self.bad.values().sum();
        println!("{what}: {} accepted, {bad} refused, for {} kinds of reasons", self.good, self.bad.len());
        assert!(self.good > 0 && self.bad.len() >= kinds_min, "{what}: the damage is too uniform");
    }
}

/// The most that this process has ever used, or `None` where that cannot be told: resident and mapped bytes.
fn memory_max() -> Option<[usize; 2]> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? << 10)
    };
    Some([field("VmHWM:")?, field("VmPeak:")?])
}

/// All kinds in one test: the memory that is measured is the process's.
#[test]
fn damage_at_random_gives_results_or_lines() {
    let mut random = Random(0x5eed);
    let before = memory_max();
    let mut headers = Outcomes::default();
    for _ in 0..runs() {
        let mut bytes = random.damage(HEADER);
        if random.below(8) == 0 {
            // A file as it is: with a wrong length of its header, or wrong data.
            let text = if random.below(2) == 0 { random.below(1000) } else { bytes.len() };
            bytes.splice(..0, (text as u64).to_le_bytes());
            bytes.resize(bytes.len() + random.below(100), 0);
        }
        fuzz::header(&bytes).into_iter().for_each(|result| headers.add(result));
    }
    headers.finish("headers", 10);
    let mut indices = Outcomes::default();
    for _ in 0..runs() {
        indices.add(fuzz::index(&random.damage(INDEX)));
    }
    indices.finish("indices", 5);
    let mut configs = Outcomes::default();
    for i in 0..runs() {
        configs.add(fuzz::config(&random.damage(CONFIGS[i % CONFIGS.len()])));
    }
    configs.finish("configs", 50);
    if let (Some(before), Some(after)) = (before, memory_max()) {
        let [resident, mapped] = [after[0] - before[0], after[1] - before[1]];
        println!("memory: {} KiB resident, {} KiB mapped more than before", resident >> 10, mapped >> 10);
        assert!(
            resident < 64 << 20 && mapped < 512 << 20,
            "inputs of a few hundred bytes took {resident} bytes"
        );
    }
}
