#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = pipeline_infer_fuzz::header(bytes);
});
