//! Layouts of one's own: written in three ways, planned for devices that are described, run, and held against what was predicted.
//!
//! `cargo run --release --example custom_layout -- MODEL_DIR`; without a folder it takes a small checkpoint of the tests.

use std::path::Path;

use pipeline_infer::{
    Engine, Event, Layout, Prompt, Request, Result,
    layout::{Device, DeviceSpec, Planner, Stage, Workload},
    model::{open_model, spec::ModelSpec},
};

/// What requests look like: plans and cuts are made for them.
const PROMPT_TOKENS: usize = 24;
const NEW_TOKENS: usize = 40;

fn main() -> Result<()> {
    let model = std::env::args().nth(1);
    let model = model.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/chat-llama").into());
    print!("{}", show(Path::new(&model))?);
    Ok(())
}

/// All of it, as text.
pub(crate) fn show(model: &Path) -> Result<String> {
    let spec = open_model(model, true)?.spec;
    let mut text = planned(&spec)?;
    text += &run(model, written(spec.layers.len())?)?;
    Ok(text)
}

/// What the planner says for devices that need not be there.
fn planned(spec: &ModelSpec) -> Result<String> {
    // Two that are known by name, and one that is described: bytes, bytes a second, operations a second.
    let devices = DeviceSpec::list("2xl4,mine:mem=24g,bw=900g,bf16=150t")?;
    let mut planner = Planner::new(spec, pipeline_infer::backend::DType::BF16, &devices);
    planner.workload =
        Workload { running: 64, prompt: PROMPT_TOKENS, new: NEW_TOKENS, ..Workload::default() };
    // Room for so many tokens' keys and values on every device; `plan` says what would make it fit if it does not.
    planner.kv_tokens = Some(100_000);
    let mut text = String::new();
    let (few, many) = (planner.plan_auto()?, planner.plan_any_order(devices.len())?);
    let even = planner.even(devices.len())?;
    // All devices have a part of the head, which whole layers cannot always make up for: `,head@all` in the short form.
    let split = even.clone().with_split_head(true);
    for (name, layout) in [("auto", few), ("planned", many), ("even", even), ("split head", split)] {
        let told = planner.predict(&layout)?;
        text += &format!("{name}: {layout}, {:.0} new tokens/s\n", told.new_tokens_per_s);
        for stage in &told.stages {
            let megabytes = stage.weight_bytes as f64 / 1e6;
            let share = 100.0 * stage.share;
            text +=
                &format!("  {:>6} on {}: {megabytes:.1} MB, busy {share:.0}%\n", stage.layers, stage.device);
        }
    }
    Ok(text)
}

/// One layout in three ways: a first stage of one layer, and the rest in a second one, both on the processor.
fn written(layers: usize) -> Result<Layout> {
    let device = Device::Cpu;
    let value = Layout::new(vec![Stage { device, layers: 0..1 }, Stage { device, layers: 1..layers }])?;
    // As `--layout` takes it, and as a file has it.
    let short: Layout = value.to_string().parse()?;
    let file = Layout::from_toml(&value.to_toml(), Path::new("layout.toml"))?;
    assert_eq!((&short, &file), (&value, &value));
    // A layout that leaves a layer out is refused when it is made, and one of another model when it is checked.
    assert!("0-1,3".parse::<Layout>().is_err() && value.check(layers + 1).is_err());
    Ok(value)
}

/// Answers some requests at once; what each stage did, and what plans say that it takes.
fn run(model: &Path, layout: Layout) -> Result<String> {
    // `expect` says what requests look like to those who leave the cut to the engine: `.stages(2)` in place of a layout. Nothing that
    // earlier runs have measured is believed here, and nothing is kept.
    let mut text = format!("running {layout}\n");
    let builder = Engine::builder().model(model).expect(PROMPT_TOKENS, NEW_TOKENS).profiles(false);
    // With the balancer on, a layer leaves a device that is slower than the others for ten seconds or more. Stages of one device do
    // not help each other, so here it has nothing to do.
    let engine = builder.layout(layout).slots(2).balance(true).build()?;
    let watch = engine.watch()?;
    let request = |i: usize| {
        let mut request = Request::new(Prompt::Ids((0..PROMPT_TOKENS).map(|t| (t * i) as u32).collect()));
        request.stop.max_tokens = Some(NEW_TOKENS as u32);
        request.stop.ignore_eos = true;
        engine.submit(request)
    };
    let answers = (1..=4).map(request).collect::<Result<Vec<_>>>()?;
    // Requests go on in another layout, and nobody notices.
    let other = engine.relayout(Layout::even(2, engine.spec().layers.len(), Device::Cpu)?)?;
    let (moved, bytes) = (other.moved.len(), other.kv_bytes);
    text += &format!("now {}; {moved} units moved, with {bytes} bytes of keys and values; ", other.to);
    text += &format!("the requests waited {:.1?}\n", other.stall);
    for (i, events) in answers.into_iter().enumerate() {
        let mut tokens = 0;
        for event in events {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Error(error) => return Err(error),
                _ => (),
            }
        }
        text += &format!("request {i}: {tokens} tokens\n");
    }
    let stats = engine.stats();
    text +=
        &format!("{} of {} changes of the layout by the balancer\n", stats.relayouts - 1, stats.relayouts);
    for stage in stats.stages {
        let (busy, batches) = (stage.times.busy, stage.times.batches);
        text += &format!("  {:>6} on {}: {batches} passes, {busy:.1?} busy\n", stage.layers, stage.device);
    }
    // What is known of this machine's processor is a guess until a run's measurements are kept.
    for pass in engine.compare(&watch.end())?.passes {
        let ms = |seconds: f64| 1e3 * seconds;
        text += &format!(
            "  stage {}, {}: {:.3} ms predicted, {:.3} ms measured\n",
            pass.stage,
            pass.pass,
            ms(pass.predicted),
            ms(pass.measured)
        );
    }
    Ok(text)
}
