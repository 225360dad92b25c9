//! Requests with images through an engine: transformers' tokens, wherever the tower is and however it is cut, whatever the
//! chunks, the store and the company.

mod common;

use std::{fs, path::Path};

use common::{collect, data, logprob_bits};
use pipeline_infer::{
    Engine, EngineBuilder, Event, Events, Message, Prompt, Request,
    layout::{Device, Layout},
    request::{Media, Part},
    schedule::ImageStats,
};
use serde_json::Value;

const FOLDER: &str = "qwen2_5_vl";

fn builder() -> EngineBuilder {
    Engine::builder().model(data(FOLDER)).device(Device::Cpu).threads(1)
}

fn golden() -> Value {
    serde_json::from_slice(&fs::read(data(FOLDER).join("golden.json")).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn paths(value: &Value) -> Vec<std::path::PathBuf> {
    value.as_array().into_iter().flatten().map(|path| data(text(path))).collect()
}

/// A golden prompt's images and videos, in their order.
fn media(engine: &Engine, prompt: &Value) -> Vec<Media> {
    let images = paths(&prompt["images"]);
    let images = images.iter().map(|path| engine.image_file(path).unwrap());
    let videos = prompt["videos"].as_array().into_iter().flatten();
    let videos = videos.map(|v| engine.video(&paths(&v["frames"]), v["fps"].as_f64().unwrap()).unwrap());
    images.chain(videos).collect()
}

/// The conversation that a golden prompt is.
fn chat(engine: &Engine, prompt: &Value) -> Request {
    let (images, videos): (Vec<Media>, Vec<Media>) =
        media(engine, prompt).into_iter().partition(|media| media.seconds.is_none());
    let (mut images, mut videos) = (images.into_iter(), videos.into_iter());
    let message = |message: &Value| {
        let part = |part: &Value| match text(&part["type"]) {
            "text" => Part::Text(text(&part["text"]).into()),
            "image" => Part::Media(images.next().unwrap()),
            _ => Part::Media(videos.next().unwrap()),
        };
        match message["content"].as_array() {
            Some(parts) => Message::of_parts(text(&message["role"]), parts.iter().map(part)),
            None => Message::new(text(&message["role"]), text(&message["content"])),
        }
    };
    let messages = prompt["messages"].as_array().unwrap().iter().map(message).collect();
    asks(Request::new(Prompt::Chat(messages)), prompt)
}

/// The same as text, with a placeholder for each image.
fn plain(engine: &Engine, prompt: &Value) -> Request {
    let request = Request::new(Prompt::Text(text(&prompt["text"]).into()));
    asks(Request { media: media(engine, prompt), ..request }, prompt)
}

fn asks(mut request: Request, prompt: &Value) -> Request {
    request.stop.max_tokens = Some(numbers(&prompt["greedy"]).len() as u32);
    request.stop.ignore_eos = true;
    request.sampling.logprobs = Some(3);
    request
}

fn answers(all: Vec<Events>) -> Vec<(Vec<u32>, Vec<u32>)> {
    all.into_iter().map(|events| logprob_bits(&collect(events))).collect()
}

fn images(engine: &Engine) -> ImageStats {
    engine.stats().scheduler.images.expect("a model that reads images")
}

/// All golden prompts at once.
fn all(engine: &Engine) -> Vec<(Vec<u32>, Vec<u32>)> {
    let golden = golden();
    let prompts = golden["seen"].as_array().unwrap().iter();
    answers(engine.submit_all(prompts.map(|prompt| chat(engine, prompt)).collect()).unwrap())
}

/// Several threads make what is known of them.
#[test]
fn requests_with_images_that_come_together_keep_their_order() {
    let (engine, golden) = (builder().build().unwrap(), golden());
    let seen = golden["seen"].as_array().unwrap();
    let text = || {
        let mut request = Request::new(Prompt::Ids([5, 6].into()));
        (request.stop.max_tokens, request.sampling.logprobs) = (Some(2), Some(3));
        request.stop.ignore_eos = true;
        request
    };
    let each = || seen.iter().flat_map(|prompt| [chat(&engine, prompt), text(), plain(&engine, prompt)]);
    let events = engine.submit_all(each().collect()).unwrap();
    for (three, prompt) in events.chunks(3).zip(seen) {
        let ids = numbers(&prompt["ids"]);
        assert_eq!([0, 1, 2].map(|i| three[i].prompt_ids()), [&ids[..], &[5, 6], &ids[..]]);
    }
    for (i, (tokens, _)) in answers(events).iter().enumerate() {
        match i % 3 {
            1 => assert_eq!(tokens.len(), 2),
            _ => assert_eq!(tokens, &numbers(&seen[i / 3]["greedy"]), "request {i}"),
        }
    }
    // Nothing comes of any if one is wrong.
    let wrong = Request { media: media(&engine, &seen[0]), ..text() };
    let error = engine.submit_all(each().chain([wrong]).collect()).map(drop).unwrap_err().to_string();
    assert!(
        error.starts_with("request: images: ") && error.ends_with("the prompt has places for 0"),
        "{error}"
    );
    let stats = engine.stats().scheduler;
    assert_eq!((stats.waiting, stats.running), (0, 0));
}

#[test]
fn prompts_and_greedy_tokens_are_those_of_transformers() {
    let engine = builder().build().unwrap();
    for prompt in golden()["seen"].as_array().unwrap() {
        for request in [chat(&engine, prompt), plain(&engine, prompt)] {
            let events = engine.submit(request).unwrap();
            assert_eq!(events.prompt_ids(), numbers(&prompt["ids"]));
            assert_eq!(answers(vec![events])[0].0, numbers(&prompt["greedy"]), "{}", prompt["text"]);
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.vision.len(), &*stats.vision[0].layers), (1, "v0-2"));
    assert!(stats.vision[0].times.batches > 0 && stats.vision[0].weight_bytes > 0);
}

#[test]
fn the_towers_place_the_stages_and_the_company_change_no_bit() {
    let expected = all(&builder().build().unwrap());
    for tower in ["vision", "v0,v1-2", "v0-1,v2", "v0,v1,v2"] {
        for layers in ["0-2", "0,1-2", "0-1,2", "0,1,2"] {
            let layout: Layout = format!("{tower},{layers}").parse().unwrap();
            assert!(all(&builder().layout(layout.clone()).build().unwrap()) == expected, "{layout}");
        }
    }
    for chunk in [1, 7, 50] {
        let engine = builder().stages(2).chunk(chunk).slots(3).build().unwrap();
        assert!(all(&engine) == expected, "chunks of {chunk}");
    }
    // The store has room for one of the images alone.
    let engine = builder().image_rows(35).running(2).build().unwrap();
    for _ in 0..3 {
        assert!(all(&engine) == expected, "with a small store");
    }
    assert!(images(&engine).encoded > 3, "some have been encoded again: {:?}", images(&engine));
    let engine = builder().prefix_cache(false).image_patches(140).build().unwrap();
    assert!(all(&engine) == expected, "passes of one image");
}

#[test]
fn an_image_is_encoded_once_whoever_brings_it() {
    let (engine, golden) = (builder().prefix_cache(false).build().unwrap(), golden());
    let request = || chat(&engine, &golden["seen"][0]);
    let first = answers((0..5).map(|_| engine.submit(request()).unwrap()).collect());
    assert!(first.iter().all(|answer| *answer == first[0]));
    assert_eq!(images(&engine).encoded, 1);
    let samples = engine.submit(Request { n: 3, ..request() }).unwrap();
    assert_eq!(collect(samples).iter().filter(|e| matches!(e, Event::Finished { .. })).count(), 3);
    assert_eq!(images(&engine).encoded, 1);
}

#[test]
fn whoever_goes_away_whenever_takes_nothing_along() {
    let (engine, golden) = (builder().stages(2).slots(2).image_rows(40).build().unwrap(), golden());
    let expected = all(&engine);
    let mut random = common::Random::new(5);
    for round in 0..60 {
        let events: Vec<Events> =
            (0..4).map(|i| engine.submit(chat(&engine, &golden["seen"][(round + i) % 3])).unwrap()).collect();
        for mut events in events {
            if random.below(3) == 0 {
                continue;
            }
            std::thread::sleep(std::time::Duration::from_micros(random.below(3000) as u64));
            (0..random.below(3)).for_each(|_| _ = events.next());
        }
    }
    assert!(all(&engine) == expected);
    let stats = engine.stats().scheduler;
    assert_eq!((stats.running, stats.waiting), (0, 0));
}

#[test]
fn what_is_wrong_with_images_is_said_at_once() {
    let (engine, golden) = (builder().image_patches(100).build().unwrap(), golden());
    let said = |request: Request| match engine.submit(request) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("it is accepted"),
    };
    let prompt = &golden["seen"][0];
    let large = said(chat(&engine, prompt));
    assert_eq!(
        large,
        "request: image 0: its 140 patches (196x140 pixels) are more than a pass of the tower holds, 100; \
         --max-pixels makes it smaller, --max-context gives it room"
    );
    let engine = builder().image_rows(20).build().unwrap();
    let said = |request: Request| engine.submit(request).map(drop).unwrap_err().to_string();
    assert_eq!(
        said(chat(&engine, prompt)),
        "request: image 0: its 35 tokens are more than the store of images holds, 20"
    );
    let engine = builder().max_context(60).build().unwrap();
    assert_eq!(
        engine.submit(chat(&engine, prompt)).map(drop).unwrap_err().to_string(),
        "request: the prompt has 83 tokens, 35 of them of images, which --max-pixels makes smaller; prompt and answer \
         together have room for 60"
    );
    let engine = builder().image_rows(20).build().unwrap();
    let said = |request: Request| engine.submit(request).map(drop).unwrap_err().to_string();
    let ids = |ids: &[u32]| Request::new(Prompt::Ids(ids.into()));
    assert_eq!(said(ids(&[5, 322])), "request: images: 0 given, but the prompt has places for 1");
    let odd = engine.image_file(&data("vision/odd.png")).unwrap();
    let with = |request: Request, media: &[Media]| Request { media: media.to_vec(), ..request };
    assert_eq!(
        said(with(ids(&[5]), std::slice::from_ref(&odd))),
        "request: images: 1 given, but the prompt has places for 0"
    );
    assert!(said(with(chat(&engine, prompt), std::slice::from_ref(&odd))).contains("belong to its messages"));
    let cut = Media { width: 30, ..odd.clone() };
    assert!(said(with(ids(&[322]), &[cut])).starts_with("request: image 0: 30x"));
    let lacks = Media { frames: vec![vec![0; 5]].into(), ..odd.clone() };
    assert!(said(with(ids(&[322]), &[lacks])).contains("its frames are not all of"));
    let text_model = Engine::builder().model(data("chat-llama")).device(Device::Cpu).build().unwrap();
    let error = text_model.image_file(Path::new("x.png")).unwrap_err().to_string();
    assert_eq!(error, "request: images are of no use to this model: it reads none");
    let error = text_model.submit(with(ids(&[5]), &[odd])).map(drop).unwrap_err().to_string();
    assert_eq!(error, "request: 1 images, and the model reads none");
    let layout: Layout = "vision,0-3".parse().unwrap();
    let error = Engine::builder().model(data("chat-llama")).layout(layout).build().map(drop).unwrap_err();
    assert_eq!(error.to_string(), "--layout: it has vision stages, and the model reads no images");
}
