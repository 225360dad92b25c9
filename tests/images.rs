//! The scheduler with images, over random schedules: whatever comes when, however small the image store is, every client
//! gets the tokens that its text and its images lead to, nothing is read before it is there or after it has gone, and
//! nobody waits for ever.
//!
//! A schedule that fails prints its number; `PIPELINE_INFER_SCHEDULE=NUMBER` runs that one alone, and
//! `PIPELINE_INFER_SCHEDULES=COUNT` says how many there are.

#[path = "images/world.rs"]
mod world;

use std::panic::catch_unwind;

use pipeline_infer::{
    batch::{IMAGE_ROW, KV_BLOCK},
    grid::Grid,
    schedule::{ImageConfig, SchedulerConfig},
};
use world::{Part, Wanted, World};

const SCHEDULES: u64 = 20_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From `low` to `high`, both included.
    fn within(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.within(1, 100) <= percent
    }
}

/// Images of all schedules: single tokens, ribbons, and a video.
fn grid(image: u32) -> Grid {
    let [t, h, w] =
        [[1, 2, 2], [1, 4, 4], [1, 2, 12], [1, 6, 8], [3, 4, 4], [1, 8, 10], [2, 4, 8]][image as usize % 7];
    Grid { t, h, w }
}

const IMAGES: u32 = 14;
/// Of the largest image.
const TOKENS_MAX: usize = 20;

fn wanted(random: &mut Random, images_max: usize) -> Wanted {
    let mut parts = Vec::new();
    for _ in 0..random.within(0, images_max) {
        if random.chance(80) {
            parts.push(Part::Text { kind: random.within(0, 2) as u32, len: random.within(1, 30) });
        }
        let image = random.within(0, IMAGES as usize - 1) as u32;
        let seconds = random.within(1, 2) as f64;
        parts.push(Part::Image { image, grid: grid(image), seconds });
    }
    if parts.is_empty() || random.chance(90) {
        parts.push(Part::Text { kind: random.within(0, 9) as u32, len: random.within(1, 40) });
    }
    Wanted {
        seed: random.next() % 3,
        parts,
        answer: random.within(1, 25),
        priority: random.within(0, 2) as i32,
    }
}

fn schedule(seed: u64) -> World {
    let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95));
    let chunk = random.within(1, 60);
    let config = SchedulerConfig {
        slots: random.within(1, 4),
        chunk,
        chunk_min: random.within(1, chunk),
        running_max: random.within(1, 8),
        ahead: random.chance(60),
        prefix_reuse: random.chance(80),
    };
    let images = ImageConfig {
        rows: TOKENS_MAX + [0, random.within(0, 10), random.within(0, 200)][random.within(0, 2)],
        patches: random.within(1, 300),
        passes: random.within(1, 3),
    };
    let images_max = random.within(0, 4);
    let all: Vec<Wanted> = (0..random.within(1, 12)).map(|_| wanted(&mut random, images_max)).collect();
    let least = all.iter().map(|w| (w.prompt().0.len() + w.answer).div_ceil(KV_BLOCK)).max().unwrap_or(1);
    let mut world = World::new(config, images, least + random.within(0, 20));
    let mut new = all.into_iter().enumerate();
    for _ in 0..random.within(0, 200) {
        match random.within(0, 9) {
            0 => new.next().into_iter().for_each(|(id, wanted)| world.add(id as u64, wanted)),
            1 if random.chance(20) => world.cancel(random.within(0, 11) as u64),
            2 => world.plan_images(),
            3 => world.encode(),
            4 => world.apply_images(),
            5 | 6 => world.plan(),
            7 | 8 => world.run(),
            _ => world.read(),
        }
    }
    new.for_each(|(id, wanted)| world.add(id as u64, wanted));
    world.finish();
    world
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text}: not a number")))
}

#[test]
fn every_schedule_keeps_every_promise() {
    if let Some(seed) = number("PIPELINE_INFER_SCHEDULE") {
        schedule(seed);
        return;
    }
    let count = number("PIPELINE_INFER_SCHEDULES").unwrap_or(SCHEDULES);
    let (mut failed, mut seen) = (Vec::new(), [0u64; 5]);
    for seed in 0..count {
        match catch_unwind(|| schedule(seed)) {
            Ok(world) => {
                let stats = world.scheduler.stats();
                let images = stats.images.expect("a store");
                let again = images.encoded.saturating_sub(u64::from(IMAGES));
                let more =
                    [images.encoded, again, world.image_rows, stats.preemptions, stats.prefix_hit_tokens];
                seen.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
            }
            Err(_) => failed.push(seed),
        }
        assert!(failed.len() < 5, "these fail: {failed:?}");
    }
    assert!(failed.is_empty(), "these fail: {failed:?}");
    println!("{seen:?}");
    assert!(seen.into_iter().all(|n| n >= count / 50), "not all that can happen has: {seen:?}");
}

fn config() -> SchedulerConfig {
    SchedulerConfig { slots: 2, chunk: 64, chunk_min: 16, running_max: 8, ..SchedulerConfig::default() }
}

const STORE: ImageConfig = ImageConfig { rows: 100, patches: 200, passes: 2 };

fn text(kind: u32, len: usize) -> Part {
    Part::Text { kind, len }
}

fn image(image: u32) -> Part {
    Part::Image { image, grid: grid(image), seconds: 1.0 }
}

fn asks(seed: u64, parts: Vec<Part>) -> Wanted {
    Wanted { seed, parts, answer: 5, priority: 0 }
}

#[test]
fn images_of_several_requests_are_encoded_together_and_each_once() {
    let mut world = World::new(config(), STORE, 64);
    for id in 0..4 {
        world.add(id, asks(id, vec![text(1, 5), image(5), image(id as u32 % 2), text(id as u32, 9)]));
    }
    world.plan_images();
    let passes: Vec<usize> = world.planned_passes.iter().map(|pass| pass.images.len()).collect();
    assert_eq!(passes, [3], "the one that all have, and two others");
    world.finish();
    assert_eq!(world.scheduler.stats().images.expect("a store").encoded, 3);
}

#[test]
fn text_goes_on_while_images_are_encoded() {
    let mut world = World::new(config(), STORE, 64);
    world.add(0, asks(0, vec![text(1, 5), image(5), text(2, 9)]));
    world.plan_images();
    world.add(1, asks(1, vec![text(3, 40)]));
    for _ in 0..20 {
        world.plan();
        world.run();
        world.read();
    }
    assert_eq!(world.ended, [1]);
    assert_eq!(world.scheduler.stats().running, 0, "nothing is held for who waits for an image");
    world.finish();
}

#[test]
fn a_prompt_goes_up_to_the_image_that_is_missing_and_on_when_it_is_there() {
    let mut world = World::new(config(), STORE, 64);
    world.add(0, asks(0, vec![text(1, 30), image(5), text(2, 9)]));
    world.plan_images();
    world.plan();
    let rows: Vec<usize> = world.queued.iter().map(|step| step.batch.rows()).collect();
    assert_eq!(rows, [30]);
    world.add(1, asks(1, vec![text(3, 8)]));
    world.plan();
    assert_eq!(world.queued.back().map(|step| step.batch.rows()), Some(8), "others go on meanwhile");
    world.encode();
    world.apply_images();
    world.run();
    world.run();
    world.read();
    world.read();
    world.plan();
    let batch = &world.queued[0].batch;
    assert_eq!(batch.ids.iter().filter(|&&id| id & IMAGE_ROW != 0).count(), 20);
    world.finish();
}

#[test]
fn an_image_in_a_reused_prefix_is_not_encoded_again() {
    let mut world = World::new(config(), ImageConfig { rows: 20, ..STORE }, 64);
    let parts = |kind| vec![text(1, 12), image(5), text(2, 32), text(kind, 3)];
    world.add(0, asks(0, parts(3)));
    world.finish();
    // Another takes the store.
    world.add(1, asks(1, vec![image(12), text(2, 3)]));
    world.finish();
    let before = world.scheduler.stats();
    world.add(2, asks(2, parts(4)));
    world.finish();
    let after = world.scheduler.stats();
    assert_eq!(after.images.map(|i| i.encoded), before.images.map(|i| i.encoded));
    assert!(after.prefix_hit_tokens >= before.prefix_hit_tokens + 64);
    // The same text around another image of the same size is another prompt.
    world.add(3, asks(3, vec![text(1, 12), image(12), text(2, 32), text(4, 3)]));
    world.finish();
}

#[test]
fn a_prompt_with_more_images_than_the_store_holds_is_served() {
    let mut world = World::new(config(), ImageConfig { rows: 20, patches: 10, passes: 3 }, 64);
    for id in 0..3 {
        let images = (0..6).map(|i| image((i * 7 + 5 + id as u32) % IMAGES));
        world.add(id, asks(id, images.chain([text(1, 4)]).collect()));
    }
    world.finish();
    assert!(world.scheduler.stats().images.expect("a store").encoded >= 10);
}
