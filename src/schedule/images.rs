//! Images of prompts: what prompts have beside their tokens, and which of it the image store holds.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Range,
};

use serde::Serialize;

use crate::batch::{KV_BLOCK, SeqId};

/// Stands for the pixels of an image or a video: equal ids are equal pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId(pub u128);

/// An image or a video of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptImage {
    /// Which.
    pub image: ImageId,
    /// Its places in the prompt: as many rows of the store.
    pub tokens: Range<usize>,
    /// Rows of the vision tower's input.
    pub patches: usize,
}

/// What a prompt has beside its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PromptImages {
    /// In the order of their places.
    pub images: Vec<PromptImage>,
    /// Each token's turns: in time, down and across.
    pub turns: Vec<[u32; 3]>, // [prompt]
    /// What is added to the place of a token after the prompt for its turns.
    pub delta: i64,
}

/// How much is encoded at once, and how much of it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageConfig {
    /// Rows of the image store.
    pub rows: usize,
    /// Patches of a pass with several images at most; a single image may have more.
    pub patches: usize,
    /// Passes in flight at most.
    pub passes: usize,
}

/// Images that go through the vision tower together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePass {
    /// Counts up from 0.
    pub pass: u64,
    /// They, in the order of the tower's rows.
    pub images: Vec<PassImage>,
}

/// An image on its way to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassImage {
    /// Which.
    pub image: ImageId,
    /// A sequence that has it, and its number among that one's images.
    pub of: (SeqId, usize),
    /// Where its rows begin in the store.
    pub row: u32,
}

/// What became of images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ImageStats {
    /// Rows of the store.
    pub rows_total: usize,
    /// Those that hold images, or will.
    pub rows_used: usize,
    /// Images in passes that have been planned.
    pub encoded: u64,
    /// Passes that have been planned.
    pub passes: u64,
    /// Of them, those that have not come back.
    pub in_flight: usize,
}

impl PromptImages {
    /// Tokens of all images.
    pub fn tokens(&self) -> usize {
        self.images.iter().map(|image| image.tokens.len()).sum()
    }

    /// The turns of a token, whether it is in the prompt or after it.
    pub fn turn(&self, place: usize) -> [u32; 3] {
        let after = || [(place as i64 + self.delta) as u32; 3];
        self.turns.get(place).copied().unwrap_or_else(after)
    }

    /// The images that have tokens at these places, each with its number.
    pub(super) fn within(&self, places: Range<usize>) -> impl Iterator<Item = (usize, &PromptImage)> {
        let first = self.images.partition_point(|image| image.tokens.end <= places.start);
        let from = self.images.iter().enumerate().skip(first);
        from.take_while(move |(_, image)| image.tokens.start < places.end)
    }

    /// What the keys and values of a full block depend on beside the ids of its tokens and what is before it.
    pub(super) fn block_bytes(&self, block: usize) -> Vec<u8> {
        let places = block * KV_BLOCK..(block + 1) * KV_BLOCK;
        let mut bytes = Vec::new();
        for (_, PromptImage { image, tokens, .. }) in self.within(places.clone()) {
            let (from, to) = (tokens.start.max(places.start), tokens.end.min(places.end));
            bytes.extend(image.0.to_le_bytes());
            let numbers = [from - places.start, to - places.start, from - tokens.start];
            bytes.extend(as_bytes(numbers.map(|n| n as u32)));
        }
        if !bytes.is_empty() {
            // Equal videos whose frames are further apart have other turns.
            places.for_each(|place| bytes.extend(as_bytes(self.turn(place))));
        }
        bytes
    }
}

fn as_bytes(numbers: [u32; 3]) -> impl Iterator<Item = u8> {
    numbers.into_iter().flat_map(u32::to_le_bytes)
}

/// The image store: which rows hold which image.
///
/// An image's rows lie together. Those of images that no planned step reads and nobody has claimed can be had for
/// others, the longest unused first.
#[derive(Debug)]
pub(super) struct Images {
    pub(super) config: ImageConfig,
    by_row: BTreeMap<u32, Entry>,
    rows: HashMap<ImageId, u32>,
    in_flight: VecDeque<(u64, Vec<u32>)>,
    /// Counts how often passes have been looked for.
    round: u64,
    stats: ImageStats,
}

#[derive(Debug)]
struct Entry {
    image: ImageId,
    end: u32,
    ready: bool,
    /// The latest step that reads it.
    read: Option<u64>,
    /// The last round in which it was claimed or read.
    used: u64,
}

/// What somebody who needs an image finds.
pub(super) enum Claim {
    /// It is in the store, or on its way.
    There,
    /// These rows, which it is to be brought to.
    Given(u32),
    /// No room for now.
    Refused,
}

impl Images {
    pub(super) fn new(config: ImageConfig) -> Self {
        assert!(
            config.rows > 0 && config.patches > 0 && config.passes > 0,
            "an image store without room; this is a bug"
        );
        let stats = ImageStats { rows_total: config.rows, ..ImageStats::default() };
        let (by_row, rows, in_flight) = Default::default();
        Images { config, by_row, rows, in_flight, round: 0, stats }
    }

    /// Another store in its place, with nothing in it.
    pub(super) fn emptied(self, config: ImageConfig) -> Self {
        assert!(self.in_flight.is_empty(), "an image on its way to a store that goes; this is a bug");
        let ImageStats { encoded, passes, .. } = self.stats;
        let mut other = Images::new(config);
        (other.stats.encoded, other.stats.passes) = (encoded, passes);
        other
    }

    pub(super) fn stats(&self) -> ImageStats {
        let rows_used = self.by_row.iter().map(|(&row, entry)| (entry.end - row) as usize).sum();
        ImageStats { rows_used, in_flight: self.in_flight(), ..self.stats }
    }

    /// Passes planned and not applied.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether another pass may be planned.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight() < self.config.passes
    }

    /// The first row of an image that can be read.
    pub(super) fn ready(&self, image: ImageId) -> Option<u32> {
        let &row = self.rows.get(&image)?;
        self.by_row[&row].ready.then_some(row)
    }

    /// Whether it is neither in the store nor on its way.
    pub(super) fn is_absent(&self, image: ImageId) -> bool {
        !self.rows.contains_key(&image)
    }

    /// A planned step reads an image.
    pub(super) fn read(&mut self, row: u32, step: u64) {
        let entry = self.by_row.get_mut(&row).filter(|entry| entry.ready);
        let entry = entry.expect("an image is read that is not there; this is a bug");
        (entry.read, entry.used) = (Some(step), self.round);
    }

    /// Begins to look for what comes next: all claims are made anew, the most urgent first.
    pub(super) fn begin_round(&mut self) {
        self.round += 1;
    }

    /// Keeps an image from those who claim after this, or makes room for it. `oldest` is the first step that has not
    /// come back.
    pub(super) fn claim(&mut self, image: &PromptImage, oldest: u64) -> Claim {
        if let Some(row) = self.rows.get(&image.image) {
            let entry = self.by_row.get_mut(row).expect("an image without its rows; this is a bug");
            entry.used = self.round;
            return Claim::There;
        }
        let rows = image.tokens.len() as u32;
        let Some(row) = self.find_room(rows, oldest) else { return Claim::Refused };
        let gone: Vec<u32> =
            self.by_row.range(..row + rows).rev().map_while(|(&at, e)| (e.end > row).then_some(at)).collect();
        for at in gone {
            let entry = self.by_row.remove(&at).expect("just seen; this is a bug");
            self.rows.remove(&entry.image);
        }
        let entry = Entry { image: image.image, end: row + rows, ready: false, read: None, used: self.round };
        self.by_row.insert(row, entry);
        self.rows.insert(image.image, row);
        Claim::Given(row)
    }

    /// Where so many rows are free, or can be had: where the image that was used last has not been used for longest.
    fn find_room(&self, rows: u32, oldest: u64) -> Option<u32> {
        let can_go = |entry: &Entry| {
            entry.ready && entry.used < self.round && entry.read.is_none_or(|step| step < oldest)
        };
        let mut best: Option<(u64, u32)> = None;
        // Any run of rows can be moved up to the image before it, or to the beginning, and takes no more by that.
        for start in std::iter::once(0).chain(self.by_row.values().map(|entry| entry.end)) {
            let end = start + rows;
            if end as usize > self.config.rows {
                break;
            }
            let mut within = self.by_row.range(start..end).map(|(_, entry)| entry);
            let used = within.try_fold(0, |used, entry| {
                let worse = best.is_some_and(|(best, _)| entry.used + 1 >= best);
                (can_go(entry) && !worse).then_some(used.max(entry.used + 1))
            });
            if let Some(used) = used.filter(|&used| best.is_none_or(|(best, _)| used < best)) {
                best = Some((used, start));
            }
        }
        best.map(|(_, start)| start)
    }

    /// Images that have been given rows set off.
    pub(super) fn set_off(&mut self, images: Vec<PassImage>) -> ImagePass {
        let pass = self.stats.passes;
        self.stats.passes += 1;
        self.stats.encoded += images.len() as u64;
        self.in_flight.push_back((pass, images.iter().map(|image| image.row).collect()));
        ImagePass { pass, images }
    }

    /// A pass has come back: its images can be read.
    pub(super) fn arrived(&mut self, pass: u64) {
        let front = self.in_flight.pop_front().filter(|(number, _)| *number == pass);
        let (_, rows) = front.expect("a pass that was not planned, or not the next one; this is a bug");
        for row in rows {
            self.by_row.get_mut(&row).expect("rows of an image on its way; this is a bug").ready = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: u128, rows: usize) -> PromptImage {
        PromptImage { image: ImageId(id), tokens: 3..3 + rows, patches: 4 * rows }
    }

    fn give(images: &mut Images, wanted: &[PromptImage], oldest: u64) -> Vec<Option<u32>> {
        images.begin_round();
        let mut pass = Vec::new();
        let mut rows = Vec::new();
        for image in wanted {
            rows.push(match images.claim(image, oldest) {
                Claim::There => images.ready(image.image),
                Claim::Given(row) => {
                    pass.push(PassImage { image: image.image, of: (SeqId(0), 0), row });
                    Some(row)
                }
                Claim::Refused => None,
            });
        }
        let pass = images.set_off(pass).pass;
        images.arrived(pass);
        rows
    }

    #[test]
    fn images_lie_side_by_side_and_the_longest_unused_goes_first() {
        let mut images = Images::new(ImageConfig { rows: 10, patches: 100, passes: 1 });
        let [a, b, c, d] = [image(1, 4), image(2, 3), image(3, 3), image(4, 4)];
        assert_eq!(give(&mut images, &[a.clone(), b.clone(), c.clone()], 0), [Some(0), Some(4), Some(7)]);
        assert_eq!(give(&mut images, std::slice::from_ref(&a), 0), [Some(0)]);
        // Of b and c, both unused for as long, the room of two is needed.
        assert_eq!(give(&mut images, std::slice::from_ref(&d), 0), [Some(4)]);
        assert!(images.is_absent(b.image) && images.is_absent(c.image) && !images.is_absent(a.image));
        // What is claimed first stays.
        assert_eq!(give(&mut images, &[d.clone(), a.clone(), b.clone()], 0), [Some(4), Some(0), None]);
        // What a step in flight reads stays.
        images.read(0, 7);
        assert_eq!(give(&mut images, &[image(9, 7)], 7), [None]);
        assert_eq!(give(&mut images, &[image(9, 7)], 8), [Some(0)]);
        assert_eq!(images.stats().rows_used, 7);
    }

    #[test]
    fn keys_tell_images_their_parts_and_their_turns_apart() {
        let of = |id: u128, start: usize, step: u32| PromptImages {
            images: vec![PromptImage { image: ImageId(id), tokens: start..start + 20, patches: 80 }],
            turns: (0..64).map(|i| [i * step, i, i]).collect(),
            delta: -5,
        };
        let one = of(1, 20, 1);
        assert!(one.block_bytes(0).is_empty() && one.block_bytes(3).is_empty());
        assert_eq!(one.block_bytes(1), of(1, 20, 1).block_bytes(1));
        for other in [of(2, 20, 1), of(1, 21, 1), of(1, 20, 2)] {
            assert_ne!(one.block_bytes(1), other.block_bytes(1));
        }
        assert_ne!(one.block_bytes(1), one.block_bytes(2));
        assert_eq!((one.turn(3), one.turn(64)), ([3; 3], [59; 3]));
    }
}
