//! Headers of safetensors files: the bytes as a file, and as the text of a header with data behind it.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use pipeline_infer::model::weights::parse_header;

const DATA_BYTES: [usize; 2] = [0, 48];

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    for data in DATA_BYTES {
        let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
        file.extend(bytes);
        file.resize(file.len() + data, 0);
        check(&file);
    }
});

fn check(file: &[u8]) {
    match parse_header(Path::new("file"), file) {
        Ok(header) => {
            for entry in header.tensors.values() {
                let bytes = &file[entry.range.clone()];
                if let Some(dtype) = entry.dtype() {
                    assert_eq!(entry.shape.iter().product::<usize>() * dtype.size(), bytes.len());
                }
            }
        }
        Err(error) => assert!(!error.to_string().contains(|c: char| c.is_control())),
    }
}
