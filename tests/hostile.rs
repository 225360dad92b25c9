//! The promise: whatever is in a model folder or a layout, the answer is a result or one line that names the
//! file, tensor, key or flag. Here every kind of damage is done on purpose; `hostile_random.rs` does it blindly.

use std::{fs, path::Path};

use pipeline_infer::{
    Error, Layout,
    model::{
        Model, arch,
        config::{Config, GenerationConfig},
        open_model,
        spec::{ModelSpec, Role},
        weights::{Weights, parse_header},
    },
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const EMBED: &str = "model.embed_tokens.weight";

/// A tensor as a header describes it.
#[derive(Clone)]
struct Described {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

impl Described {
    fn bytes(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

fn config() -> Map<String, Value> {
    let Value::Object(values) = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 8, "head_dim": 4,
        "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 10, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "hidden_act": "silu",
        "rope_theta": 10000.0, "rope_scaling": null, "torch_dtype": "float16", "tie_word_embeddings": false,
        "eos_token_id": 2, "bos_token_id": 1, "attention_bias": false, "use_sliding_window": false,
    }) else {
        unreachable!()
    };
    values
}

fn config_with(changes: &[(&str, Value)]) -> Config {
    let mut values = config();
    values.extend(changes.iter().map(|(key, value)| (key.to_string(), value.clone())));
    Config::parse("config.json", &serde_json::to_vec(&values).unwrap()).unwrap()
}

/// All that is read of a config.json.
fn spec(changes: &[(&str, Value)]) -> Result<ModelSpec, Error> {
    let config = config_with(changes);
    config.dtype()?;
    let spec = arch::find(&config)?.spec(&config)?;
    GenerationConfig::from_configs(Some(&config), &config)?;
    Ok(spec)
}

fn roles(spec: &ModelSpec) -> Vec<Role> {
    let layers = (0..spec.layers.len()).flat_map(|i| spec.layer_roles(i));
    [Role::Embed, Role::FinalNorm, Role::Head].into_iter().chain(layers).collect()
}

/// Every tensor of the model that [`config`] describes.
fn tensors() -> Vec<Described> {
    let config = config_with(&[]);
    let arch = arch::find(&config).unwrap();
    let spec = arch.spec(&config).unwrap();
    let described = |role| Described { name: arch.tensor(role), dtype: "F16", shape: spec.shape(role) };
    roles(&spec).into_iter().map(described).collect()
}

fn file(header: &[u8], data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn safetensors(tensors: &[Described]) -> Vec<u8> {
    let mut at = 0;
    let mut header = Map::from_iter([("__metadata__".to_string(), json!({"format": "pt"}))]);
    for t in tensors {
        let offsets = [at, at + t.bytes()];
        at = offsets[1];
        header.insert(t.name.clone(), json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}));
    }
    file(&serde_json::to_vec(&header).unwrap(), at)
}

fn index<'a>(places: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let map: Map<_, _> =
        places.into_iter().map(|(tensor, shard)| (tensor.to_string(), json!(shard))).collect();
    serde_json::to_vec(&json!({"metadata": {"total_size": 1}, "weight_map": map})).unwrap()
}

/// A folder with these files; its config.json is sound.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), serde_json::to_vec(&config()).unwrap()).unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// Opens the folder and reads every tensor.
fn load(dir: &Path) -> Result<Model, Error> {
    let model = open_model(dir, false)?;
    for role in roles(&model.spec) {
        model.tensor(role)?;
    }
    Ok(model)
}

#[track_caller]
fn check(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    assert!(!message.contains(|c: char| c.is_control()), "{message:?} is not one plain line");
    assert!(message.len() < 2000, "{message:?} is long");
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[track_caller]
fn check_load(dir: &Path, parts: &[&str]) {
    check(&load(dir).err().expect("a damaged folder was opened"), parts);
}

#[track_caller]
fn check_folder(files: &[(&str, &[u8])], parts: &[&str]) {
    check_load(folder(files).path(), parts);
}

#[test]
fn sound_folders_open() {
    let all = tensors();
    let model = load(folder(&[(SINGLE, &safetensors(&all))]).path()).unwrap();
    assert!(model.weights.has("lm_head.weight") && !model.weights.has("x"));
    let (a, b) = all.split_at(9);
    let place = |shard| move |t: &'_ Described| (t.name.clone(), shard);
    let places: Vec<(String, &str)> =
        a.iter().map(place("a.safetensors")).chain(b.iter().map(place("b.safetensors"))).collect();
    let index = index(places.iter().map(|(tensor, shard)| (tensor.as_str(), *shard)));
    let (a, b) = (safetensors(a), safetensors(b));
    let sharded = folder(&[(INDEX, &index), ("a.safetensors", &a), ("b.safetensors", &b)]);
    let model = load(sharded.path()).unwrap();
    assert!(model.weights.has("lm_head.weight") && !model.weights.has("x"));
    let random = open_model(folder(&[]).path(), true).unwrap();
    assert_eq!(random.tensor(Role::Head).unwrap().shape, [10, 8]);
}

#[test]
fn a_stage_reads_its_own_shards_only() {
    let all = tensors();
    let places = all.iter().map(|t| (t.name.as_str(), "b.safetensors"));
    let index = index(places.chain([(EMBED, "a.safetensors")]));
    let dir =
        folder(&[(INDEX, &index), ("a.safetensors", &safetensors(&all[..1])), ("b.safetensors", b"no")]);
    let weights = Weights::open(dir.path()).unwrap();
    weights.tensor(EMBED, &[10, 8]).unwrap();
    check(&weights.tensor("model.norm.weight", &[8]).err().unwrap(), &["b.safetensors: 2 bytes are too few"]);
}

#[test]
fn files_of_the_reference_implementation_open() {
    use safetensors::{Dtype, serialize, tensor::TensorView};
    let values: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![2, 1], &values).unwrap();
    let empty = TensorView::new(Dtype::I64, vec![0, 3], &[]).unwrap();
    let bytes = serialize([("a", view), ("b", empty)], None).unwrap();
    let dir = folder(&[(SINGLE, &bytes)]);
    let weights = Weights::open(dir.path()).unwrap();
    assert_eq!(weights.tensor("a", &[2, 1]).unwrap().to_f32(), [1.5, -2.0]);
    check(&weights.tensor("b", &[0, 3]).err().unwrap(), &[SINGLE, "tensor b", "its type is I64"]);
}

#[test]
fn damaged_files_are_named() {
    let sound = safetensors(&tensors());
    let with_len = |len: u64| [&len.to_le_bytes()[..], &sound[8..]].concat();
    let no_header = "its header is not as it should be";
    for (bytes, said) in [
        (vec![], "0 bytes are too few"),
        (sound[..7].to_vec(), "7 bytes are too few"),
        (sound[..100].to_vec(), "its header claims"),
        (sound[..sound.len() - 1].to_vec(), "are not within"),
        ([&sound[..], &[0]].concat(), "its last 1 bytes belong to no tensor"),
        (with_len(u64::MAX), "its header claims 18446744073709551615 bytes, more than 100000000"),
        (with_len(100_000_001), "its header claims 100000001 bytes, more than 100000000"),
        (with_len(sound.len() as u64 - 7), "its header claims"),
        (with_len(0), no_header),
        (with_len(20), no_header),
        (file(b"not JSON", 0), no_header),
        (file(b"[]", 0), no_header),
        (file("[".repeat(100_000).as_bytes(), 0), no_header),
        (file(b"{\"\xff\": 1}", 0), no_header),
    ] {
        check(&parse_header(Path::new("f"), &bytes).unwrap_err(), &["f: ", said]);
        check_folder(&[(SINGLE, &bytes)], &["model.safetensors: ", said]);
    }
}

#[test]
fn damaged_entries_are_named() {
    let one = |dtype, shape, offsets| {
        format!(r#"{{"t": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    let two = |names: [&str; 2], offsets: [&str; 2]| {
        let entry = |i: usize| {
            format!(r#""{}": {{"dtype": "U8", "shape": [4], "data_offsets": {}}}"#, names[i], offsets[i])
        };
        format!("{{{}, {}}}", entry(0), entry(1))
    };
    let fits = |header: String, data| parse_header(Path::new("f"), &file(header.as_bytes(), data));
    fits(one("U8", "[4]", "[0, 4]"), 4).unwrap();
    fits(two(["a", "b"], ["[4, 8]", "[0, 4]"]), 8).unwrap();
    for (header, data, said) in [
        (r#"{"t": 3}"#.into(), 0, "tensor t: invalid type"),
        (r#"{"t": {}}"#.into(), 0, "tensor t: missing field"),
        (one("U8", "[-1]", "[0, 1]"), 1, "tensor t: invalid value"),
        (one("U8", "[1.5]", "[0, 1]"), 1, "tensor t: invalid type"),
        (one("U8", "[18446744073709551616]", "[0, 1]"), 1, "tensor t: invalid type"),
        (one("U8", "[1]", "[0]"), 1, "tensor t: invalid length"),
        (one("U8", "[1]", "[1, 0]"), 1, "tensor t: its offsets, 1 to 0"),
        (one("U8", "[2]", "[0, 2]"), 1, "tensor t: its offsets, 0 to 2"),
        (one("U8", "[0]", "[18446744073709551615, 18446744073709551615]"), 1, "tensor t: its offsets"),
        (one("F32", "[1]", "[0, 2]"), 2, "tensor t: [1] of F32 are 4 bytes, not 2"),
        (one("F16", "[]", "[0, 0]"), 0, "tensor t: [] of F16 are 2 bytes, not 0"),
        (one("F32", "[4294967296, 4294967296]", "[0, 0]"), 0, "is too large"),
        (two(["a", "b"], ["[0, 4]", "[2, 6]"]), 8, "tensor b: it overlaps"),
        (two(["a", "b"], ["[0, 4]", "[0, 4]"]), 8, "tensor b: it overlaps"),
        (two(["a", "b"], ["[0, 4]", "[5, 9]"]), 9, "tensor b: it leaves a hole"),
        (two(["a", "b"], ["[1, 5]", "[5, 9]"]), 9, "tensor a: it leaves a hole"),
        (two(["a", "a"], ["[0, 4]", "[4, 8]"]), 8, "tensor a: it is there twice"),
    ] {
        check(&fits(header, data).unwrap_err(), &["f: ", said]);
    }
}

#[test]
fn missing_and_unfit_tensors_are_named() {
    let sound = tensors();
    for i in 0..sound.len() {
        let damaged = |damage: &dyn Fn(&mut Vec<Described>), said: &str| {
            let mut tensors = sound.clone();
            damage(&mut tensors);
            check_folder(&[(SINGLE, &safetensors(&tensors))], &[SINGLE, "tensor ", &sound[i].name, said]);
        };
        damaged(&|tensors| drop(tensors.remove(i)), "is missing");
        damaged(&|tensors| tensors[i].shape.push(1), "its shape is");
        damaged(&|tensors| tensors[i].shape[0] += 1, "its shape is");
        damaged(&|tensors| tensors[i].dtype = "I16", "its type is I16");
    }
    let mut damaged = sound;
    damaged[0].name = "a\nb\u{1b}[31m\u{202e}".into();
    damaged[0].dtype = "F32";
    check_folder(&[(SINGLE, &safetensors(&damaged))], &["tensor a\\nb\\u{1b}[31m\\u{202e}: "]);
}

#[test]
fn damaged_indices_are_named() {
    let shard = safetensors(&tensors()[1..]);
    let with =
        |index: &[u8], parts: &[&str]| check_folder(&[(INDEX, index), ("a.safetensors", &shard)], parts);
    for name in
        ["../a.safetensors", "/etc/a.safetensors", "..", "", "x/../a.safetensors", "a", "a\0.safetensors"]
            .into_iter()
            .chain(["a\\b.safetensors", "C:a.safetensors", "~a.safetensors", "a\n.safetensors"])
            .chain([&*format!("{}.safetensors", "a".repeat(300))])
    {
        with(&index([(EMBED, name)]), &[INDEX, EMBED, "is not a .safetensors file of this folder"]);
    }
    with(&index([(EMBED, "b.safetensors")]), &["b.safetensors: No such file"]);
    with(&index([(EMBED, "a.safetensors")]), &["a.safetensors: tensor model.embed_tokens.weight is missing"]);
    with(&index([("x", "a.safetensors")]), &[INDEX, "tensor model.embed_tokens.weight is missing"]);
    for text in
        ["", "no", "[]", "{}", r#"{"weight_map": 3}"#, r#"{"weight_map": {"x": 3}}"#, "{\"weight_map\": {"]
    {
        with(text.as_bytes(), &[INDEX, "it is not an index"]);
    }
    let twice = r#"{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}"#;
    with(twice.as_bytes(), &[INDEX, "tensor x: it is there twice"]);
}

#[test]
fn files_that_cannot_be_read_are_named() {
    check_folder(&[], &["it has neither model.safetensors nor model.safetensors.index.json"]);
    check_load(Path::new("/nowhere"), &["/nowhere/config.json: No such file"]);
    let dir = folder(&[]);
    fs::create_dir(dir.path().join(SINGLE)).unwrap();
    check_load(dir.path(), &["model.safetensors: it is not a file"]);
    for name in ["config.json", "generation_config.json"] {
        let dir = folder(&[]);
        let path = dir.path().join(name);
        fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        check_load(dir.path(), &[name, "it is larger than"]);
        for text in ["", "{", "no", &"[".repeat(1 << 20), "\u{feff}{}"] {
            fs::write(&path, text).unwrap();
            check_load(dir.path(), &[name, "it is not JSON"]);
        }
        fs::write(&path, "[1]").unwrap();
        check_load(dir.path(), &[name, "it is not a JSON object"]);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        check_load(dir.path(), &[name, "it is not a file"]);
    }
}

#[track_caller]
fn check_value(key: &str, value: Value) {
    let error = spec(&[(key, value.clone())]).err().unwrap_or_else(|| panic!("{key} = {value} is taken"));
    check(&error, &["config.json: ", key]);
}

#[test]
fn sizes_out_of_bounds_are_named() {
    const NEEDED: [&str; 5] =
        ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    let bad = json!([0, -1, u64::MAX, 1u64 << 40, 2.5, 1e300, "8", [8], {}, true]);
    for key in NEEDED.into_iter().chain(["num_key_value_heads", "max_position_embeddings", "head_dim"]) {
        bad.as_array().unwrap().iter().for_each(|value| check_value(key, value.clone()));
    }
    for key in NEEDED {
        check(&spec(&[(key, Value::Null)]).unwrap_err(), &["config.json: ", key, "it is missing"]);
    }
    let llama = ("architectures", json!(["LlamaForCausalLM"]));
    let heads =
        |changes: &[(&str, Value)]| spec(&[std::slice::from_ref(&llama), changes].concat()).unwrap_err();
    check_value("num_key_value_heads", json!(3));
    check_value("num_key_value_heads", json!(8));
    check_value("head_dim", json!(3));
    let error = heads(&[("head_dim", Value::Null), ("hidden_size", json!(9))]);
    check(&error, &["num_attention_heads: 4 does not divide hidden_size, 9"]);
    let error = heads(&[("head_dim", Value::Null), ("hidden_size", json!(12))]);
    check(&error, &["num_attention_heads: heads of 3 numbers"]);
    let error = heads(&[("head_dim", json!(4096)), ("num_attention_heads", json!(1 << 20))]);
    check(&error, &["num_attention_heads: 1048576 heads of 4096 numbers"]);
}

#[test]
fn other_values_out_of_bounds_are_named() {
    for (key, values) in [
        ("rms_norm_eps", json!([0, -1, 2, 1e39, 1e-60, "x"])),
        ("rope_theta", json!([0, -1, 1, 1e39, "x"])),
        ("rope_scaling", json!([3, "x", {"type": 3}, {"type": "x"}, {"rope_type": "longrope"}])),
        ("rope_scaling", json!([{"type": "linear"}, {"type": "linear", "factor": -1}])),
        ("hidden_act", json!(["gelu", 3])),
        ("architectures", json!(["x", 3, [3], ["x"], ["Qwen3ForCausalLM\n"]])),
        ("torch_dtype", json!(["int8", 3])),
        ("dtype", json!(["int8", 3])),
        ("tie_word_embeddings", json!([0, "true"])),
        ("attention_bias", json!([0, "true"])),
        ("use_sliding_window", json!([1])),
        ("layer_types", json!([[], ["full_attention"], ["x", "y"], 3, [3, 3]])),
        ("eos_token_id", json!([-1, 1.5, "x", 4_294_967_296u64, [1, -1], {}])),
        ("quantization_config", json!([{}, {"bits": 4}])),
        ("temperature", json!([-1, 1e39, "x"])),
    ] {
        values.as_array().unwrap().iter().for_each(|value| check_value(key, value.clone()));
    }
    for window in json!([0, -1, 1e30, "x"]).as_array().unwrap() {
        let on = ("use_sliding_window", json!(true));
        check(
            &spec(&[on, ("sliding_window", window.clone())]).unwrap_err(),
            &["config.json: sliding_window: "],
        );
    }
}

#[test]
fn the_largest_config_does_not_overflow() {
    let sizes = [("hidden_size", 1 << 20), ("intermediate_size", 1 << 20), ("vocab_size", 1 << 24)];
    let heads = [("head_dim", 4096), ("num_attention_heads", 256), ("num_key_value_heads", 256)];
    let all = [&sizes[..], &heads, &[("num_hidden_layers", 4096)]].concat();
    let all: Vec<_> = all.into_iter().map(|(key, value)| (key, json!(value))).collect();
    let spec = spec(&all).unwrap();
    let params = spec.layers.len() * spec.layer_params() + spec.embed_params() + spec.head_params();
    assert!(params.checked_mul(4).is_some());
}

#[test]
fn layouts_that_cannot_be_are_named() {
    for text in ["", ",", "0-", "-1", "0-1,1-2", "0,2", "1-2", "2-1", "0-18446744073709551615", "0@cuda:-1"]
        .into_iter()
        .chain(["0@cuda:99999999999999999999", "0@\n", "0-1@cpu@cpu", "\u{202e}", "0-9999999999999999999999"])
    {
        let error = text.parse::<Layout>().unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().lines().count()), (2, 1), "{text:?}: {error}");
    }
}
