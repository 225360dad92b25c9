//! What goes wrong is said in one line that names the GPU, and the process goes on.

#![allow(unsafe_code)] // A kernel that fails is launched past the library.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cudarc::{driver, nvrtc};
use pipeline_infer::{
    Engine, Error, Event, Layout,
    backend::{DType, cuda::devices},
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

/// In a child process, which GPU it is to lose.
const LOSES: &str = "PIPELINE_INFER_TEST_LOSES_GPU";

/// A lost context cannot be had back, so that is tried in processes of their own.
#[test]
fn a_lost_gpu_ends_requests_and_neither_hangs_nor_ends_the_process() {
    if let Ok(gpu) = std::env::var(LOSES) {
        return lose_gpu(gpu.parse().unwrap());
    }
    let count = gpus().min(4);
    // The first stage's, one between, and the last one's.
    let mut lost = vec![0, count / 2, count.saturating_sub(1)];
    lost.dedup();
    for gpu in lost.into_iter().filter(|_| count > 0) {
        let name = "faults::a_lost_gpu_ends_requests_and_neither_hangs_nor_ends_the_process";
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(LOSES, gpu.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        ends_well(child, gpu);
    }
}

fn ends_well(mut child: Child, gpu: usize) {
    let began = Instant::now();
    let mut hangs = false;
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > Duration::from_secs(90) {
            hangs = true;
            child.kill().unwrap();
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let done = child.wait_with_output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (said(&done.stdout), said(&done.stderr));
    let how = if hangs { "hangs".into() } else { done.status.to_string() };
    assert!(!hangs && done.status.success(), "a process that loses cuda:{gpu} {how}:\n{out}\n{err}");
    // Not the one test that was filtered out.
    assert!(out.contains("1 passed"), "{out}");
}

/// Runs requests that take seconds, and lets a kernel fail beside them.
fn lose_gpu(gpu: usize) {
    const ANSWER: u32 = 30_000;
    let stages = gpus().clamp(2, 4);
    let dir = Shape { layers: 4, context: 1 << 15, ..Shape::SMALL }.write(DType::BF16);
    let engine = on_gpus(dir.path(), stages, DType::BF16, |b| {
        b.weights(WeightSource::Dummy).max_context(1 << 15).kv_memory(256 << 20)
    });
    let mut open: Vec<_> = (0..3).map(|i| engine.submit(request(&[1, 2, 3 + i], ANSWER)).unwrap()).collect();
    for events in &mut open {
        assert!(matches!(events.next(), Some(Event::Token { .. })), "it runs");
    }
    launch_trap(gpu);
    let began = Instant::now();
    let error = |events: &mut dyn Iterator<Item = Event>| match events.last() {
        Some(Event::Error(error)) => error,
        other => panic!("not an error: {other:?}"),
    };
    for mut events in open {
        let text = said(&error(&mut events));
        println!("after {:?}: {text}", began.elapsed());
        assert!(text.contains(&format!("cuda:{gpu}:")), "{text}");
    }
    assert!(began.elapsed() < Duration::from_secs(5), "it takes {:?}", began.elapsed());
    let began = Instant::now();
    let text = said(&error(&mut engine.submit(request(&[1], 2)).unwrap()));
    assert!(text.contains(&format!("cuda:{gpu}:")), "{text}");
    assert!(began.elapsed() < Duration::from_millis(100), "it takes {:?}", began.elapsed());
    let began = Instant::now();
    drop(engine);
    println!("the engine has ended after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(10), "it takes {:?}", began.elapsed());
}

/// A kernel that fails, in the context that all users of the GPU in this process share.
fn launch_trap(gpu: usize) {
    let arch = devices().unwrap()[gpu].arch();
    let source = c"extern \"C\" __global__ void fail() { asm volatile(\"trap;\"); }";
    // SAFETY: the program is compiled before its code is asked for, which has as much room as it wants; the context is
    // never released; the kernel takes no arguments.
    unsafe {
        let program = nvrtc::result::create_program(source, None).unwrap();
        nvrtc::result::compile_program(program, &[format!("--gpu-architecture={arch}")]).unwrap();
        let mut len = 0;
        nvrtc::sys::nvrtcGetCUBINSize(program, &mut len).result().unwrap();
        let mut code = vec![0u8; len];
        nvrtc::sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result().unwrap();
        let device = driver::result::device::get(gpu as i32).unwrap();
        let context = driver::result::primary_ctx::retain(device).unwrap();
        driver::result::ctx::set_current(context).unwrap();
        let module = driver::result::module::load_data(code.as_ptr().cast()).unwrap();
        let kernel = driver::result::module::get_function(module, c"fail".into()).unwrap();
        let stream = driver::result::stream::create(driver::result::stream::StreamKind::NonBlocking).unwrap();
        driver::result::launch_kernel(kernel, (1, 1, 1), (1, 1, 1), 0, stream, &mut []).unwrap();
    }
}
