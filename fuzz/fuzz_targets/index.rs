//! Indices of sharded checkpoints.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use pipeline_infer::model::weights::parse_index;

fuzz_target!(|bytes: &[u8]| {
    match parse_index(Path::new("file"), bytes) {
        Ok(index) => {
            assert!(index.places.values().all(|&shard| shard < index.shards.len()));
            assert!(index.shards.iter().all(|shard| Path::new(shard).components().count() == 1));
        }
        Err(error) => assert!(!error.to_string().contains(|c: char| c.is_control())),
    }
});
