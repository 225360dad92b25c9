//! config.json and generation_config.json, up to what the forward pass is built from.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pipeline_infer::{
    Error,
    backend::DType,
    model::{
        arch,
        config::{Config, GenerationConfig},
        spec::ModelSpec,
    },
};

fuzz_target!(|bytes: &[u8]| {
    match read(bytes) {
        Ok(spec) => {
            assert_eq!(spec.rope.inv_freq.len(), spec.heads.head_dim / 2);
            assert!(spec.rope.inv_freq.iter().all(|x| x.is_finite()));
            assert!(spec.layer_params() > 0 && spec.embed_params() > 0 && spec.head_params() > 0);
            assert!(spec.kv_bytes_per_token(DType::F32) > 0);
        }
        Err(error) => assert!(!error.to_string().contains(|c: char| c.is_control())),
    }
});

fn read(bytes: &[u8]) -> Result<ModelSpec, Error> {
    let config = Config::parse("file", bytes)?;
    config.dtype()?;
    GenerationConfig::from_configs(Some(&config), &config)?;
    // All architectures: the fuzzer would seldom find their names.
    for arch in arch::ARCHS {
        let _ = arch.spec(&config);
    }
    arch::find(&config)?.spec(&config)
}
