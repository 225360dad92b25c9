//! A layout of one's own: an uneven cut, several requests at once, a layer that moves while they run, and what each stage
//! did.
//!
//! `cargo run --release --example custom_layout -- MODEL_DIR FIRST_STAGE_LAYERS`

use pipeline_infer::{
    Engine, Error, Event, Layout, Prompt, Request,
    layout::{Device, Stage},
    model::config::Config,
};

fn main() -> pipeline_infer::Result<()> {
    let mut args = std::env::args().skip(1);
    let first = args.next_back().and_then(|n| n.parse::<usize>().ok());
    let (Some(model), Some(first)) = (std::env::args().nth(1), first) else {
        eprintln!("usage: custom_layout MODEL_DIR FIRST_STAGE_LAYERS");
        std::process::exit(2);
    };
    let layers = Config::read(model.as_ref())?
        .count("num_hidden_layers", 4096)?
        .ok_or_else(|| Error::data(&model, "config.json: num_hidden_layers is missing"))?;
    let cut = |first| {
        Layout::new(vec![
            Stage { device: Device::Cpu, layers: 0..first },
            Stage { device: Device::Cpu, layers: first..layers },
        ])
    };
    let layout = cut(first)?;
    println!("layout {layout}");

    let engine = Engine::builder().model(model).layout(layout).slots(2).build()?;
    let mut answers = Vec::new();
    for i in 0..4 {
        let mut request = Request::new(Prompt::Ids(vec![1, 2, 3 + i]));
        request.stop.max_tokens = Some(16);
        request.stop.ignore_eos = true;
        answers.push(engine.submit(request)?);
    }
    // Requests go on in another layout, and nobody notices.
    if first > 1 {
        let report = engine.relayout(cut(first - 1)?)?;
        println!("layout {}: the requests waited {:.1?}", report.to, report.stall);
    }
    for (i, events) in answers.into_iter().enumerate() {
        let mut ids = Vec::new();
        for event in events {
            match event {
                Event::Token { id, .. } => ids.push(id),
                Event::Error(error) => return Err(error),
                _ => (),
            }
        }
        println!("request {i}: {ids:?}");
    }
    for stage in engine.stats().stages {
        let (busy, batches) = (stage.times.busy, stage.times.batches);
        println!(
            "layers {:>6} on {}: busy {busy:.1?} in {batches} micro-batches",
            stage.layers, stage.device
        );
    }
    Ok(())
}
