//! Requests with images through an engine, wherever the tower is: transformers' tokens.

use pipeline_infer::{
    Engine, Event, Events, Layout, Prompt, Request, backend::DType, engine::EngineBuilder, request::Media,
};

use crate::{
    common::{
        collect, data, logprob_bits,
        seen::{FOLDER, SeenPrompt, seen_golden},
    },
    device::gpus,
};

fn builder(layout: &str) -> EngineBuilder {
    // With fewer GPUs neighbours share the last one.
    let last = gpus() - 1;
    let layout = (0..4).fold(layout.to_owned(), |layout, i| {
        layout.replace(&format!("cuda:{i}"), &format!("CUDA:{}", i.min(last)))
    });
    let layout: Layout = layout.to_lowercase().parse().unwrap();
    Engine::builder().model(data(FOLDER)).dtype(DType::F32).layout(layout)
}

fn media(engine: &Engine, prompt: &SeenPrompt) -> Vec<Media> {
    let images = prompt.images.iter().map(|path| engine.image_file(&data(path)).unwrap());
    let videos = prompt.videos.iter().map(|video| {
        let frames: Vec<_> = video.frames.iter().map(|path| data(path)).collect();
        engine.video(&frames, video.fps).unwrap()
    });
    images.chain(videos).collect()
}

fn submit(engine: &Engine, prompt: &SeenPrompt) -> Events {
    let request = Request::new(Prompt::Text(prompt.text.clone()));
    let mut request = Request { media: media(engine, prompt), ..request };
    request.stop.max_tokens = Some(prompt.greedy.len() as u32);
    request.stop.ignore_eos = true;
    engine.submit(request).unwrap()
}

const LAYOUTS: [&str; 7] = [
    "vision@cuda:0,0-2@cuda:0",
    "vision@cuda:1,0-2@cuda:0",
    "v0@cuda:0,v1-2@cuda:1,0@cuda:0,1-2@cuda:1",
    "v0@cuda:3,v1@cuda:2,v2@cuda:1,0@cuda:0,1@cuda:1,2@cuda:2",
    "vision@cpu,0-2@cuda:0",
    "vision@cuda:0,0-2@cpu",
    "v0@cpu,v1-2@cuda:0,0@cuda:0,1-2@cpu",
];

#[test]
fn greedy_tokens_are_those_of_transformers_wherever_the_tower_is() {
    if gpus() == 0 {
        return;
    }
    let golden = seen_golden();
    for layout in LAYOUTS {
        // With a store that holds all images, and with one that holds one.
        for rows in [200, 35] {
            let engine = builder(layout).image_rows(rows).build().unwrap();
            for round in 0..3 {
                let open: Vec<Events> = golden.seen.iter().map(|prompt| submit(&engine, prompt)).collect();
                for (events, prompt) in open.into_iter().zip(&golden.seen) {
                    let (ids, _) = logprob_bits(&collect(events));
                    assert_eq!(ids, prompt.greedy, "{layout}, {rows} rows, round {round}");
                }
            }
        }
    }
}

/// Where nobody says where, all GPUs of the layers have a part of the tower, or as many as are worth it.
#[test]
fn the_tower_goes_where_plans_put_it() {
    if gpus() == 0 {
        return;
    }
    let golden = seen_golden();
    let engine = builder("0@cuda:0,1-2@cuda:1").expect_images(3, 1024, 1024).build().unwrap();
    let layout = engine.layout();
    let blocks = layout.tower(Some(3)).unwrap();
    assert_eq!(blocks.last().map(|(_, blocks)| blocks.end), Some(3), "{layout}");
    for prompt in &golden.seen {
        assert_eq!(logprob_bits(&collect(submit(&engine, prompt))).0, prompt.greedy, "{layout}");
    }
    let stats = engine.stats();
    assert_eq!(stats.vision.len(), blocks.len());
    assert!(stats.vision.iter().all(|stage| stage.times.batches > 0 && stage.buffer_bytes() > Some(0)));
}

#[test]
fn whoever_goes_away_while_images_are_encoded_takes_nothing_along() {
    if gpus() == 0 {
        return;
    }
    let golden = seen_golden();
    let engine = builder(LAYOUTS[2]).image_rows(40).prefix_cache(false).build().unwrap();
    for round in 0..40 {
        let open: Vec<Events> = (0..6).map(|i| submit(&engine, &golden.seen[(round + i) % 3])).collect();
        for (i, mut events) in open.into_iter().enumerate() {
            if (i + round) % 2 == 0 {
                (0..i % 3).for_each(|_| assert!(!matches!(events.next(), Some(Event::Error(_)))));
            }
        }
    }
    for prompt in &golden.seen {
        assert_eq!(logprob_bits(&collect(submit(&engine, prompt))).0, prompt.greedy);
    }
}
