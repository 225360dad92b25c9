//! What goes wrong is said in one line that names the GPU, and the process goes on.

use pipeline_infer::{
    Engine, Error, Layout,
    backend::DType,
    engine::WeightSource,
    layout::{Device, Stage},
};

use crate::{
    Shape,
    common::{chat_llama, collect, request},
    device::gpus,
    on_gpus,
};

fn said(error: &Error) -> String {
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.is_empty(), "one line: {text:?}");
    text
}

fn on(gpu: usize) -> Layout {
    Layout::new(vec![Stage { device: Device::Cuda(gpu), layers: 0..4 }]).unwrap()
}

/// Its KV cache can be of any size, and its weights are small.
fn with_large_pages() -> tempfile::TempDir {
    Shape { heads: 32, kv_heads: 32, head_dim: 128, dim: 64, layers: 4, context: 1 << 20 }.write(DType::BF16)
}

fn answers(engine: &Engine) -> bool {
    collect(engine.submit(request(&[1, 2, 3], 4)).unwrap()).len() == 5
}

#[test]
fn a_gpu_that_is_not_there_is_named() {
    let count = gpus();
    for gpu in [count, 99] {
        let error = Engine::builder().model(chat_llama()).layout(on(gpu)).build().err().expect("refused");
        let text = said(&error);
        // Without a driver no GPU is asked for by its number.
        assert!(text.contains(&format!("cuda:{gpu}")) || count == 0 && text.contains("cuda"), "{text}");
        assert_eq!(error.exit_code(), 1, "{text}");
    }
}

#[test]
fn memory_that_is_not_there_is_one_line_and_the_next_engine_works() {
    if gpus() == 0 {
        return;
    }
    let dir = with_large_pages();
    let build = |stages: usize, bytes: usize, context: usize| {
        Engine::builder()
            .model(dir.path())
            .weights(WeightSource::Dummy)
            .layout(crate::device::layout(stages, 4))
            .max_context(context)
            .kv_memory(bytes)
            .build()
    };
    for stages in [1, 4] {
        for bytes in [1 << 42, 1 << 40] {
            let text = said(&build(stages, bytes, 1 << 20).err().expect("no GPU has a terabyte"));
            assert!(text.contains("memory") && text.contains("cuda:"), "{text}");
        }
        assert!(answers(&build(stages, 1 << 28, 1024).unwrap()), "{stages} stages");
    }
}

/// Each engine takes an eighth of the GPU; twelve in turn need all of it again and again.
#[test]
fn an_engine_that_ends_gives_its_memory_back() {
    if gpus() == 0 {
        return;
    }
    let dir = with_large_pages();
    for i in 0..12 {
        let engine = on_gpus(dir.path(), 2, DType::BF16, |b| {
            b.weights(WeightSource::Dummy).max_context(1 << 18).kv_memory(16 << 30)
        });
        assert!(answers(&engine), "engine {i}");
    }
}
