//! Which prompts begin, and how they are cut.

use super::{Draft, Scheduler, memory::Prefix};
use crate::{
    batch::KV_BLOCK,
    schedule::{PassShape, sequence::State},
};

/// Waiting prompts that are passed over in a step because another one computes their prefix, at most.
const PASSED_OVER_MAX: usize = 32;
/// A micro-batch may take so many times as long as without prompts where decoding sequences should not notice. When all
/// become slower at once, the last of as many as there are stages waits for those before it and is slower itself: at
/// 1.5 its token comes after twice the usual time, for any number of stages. Predictions are a few percent off.
const SLOWER: f64 = 1.45;
/// This share of `chunk_min` has room even so, or prompts would starve.
const FLOOR: usize = 4;
/// Decoding sequences should not notice prompts if there are so many times as many of them as prompts.
const MANY: usize = 8;
/// A chunk may take so many times as long as one of as many rows at a prompt's beginning. Those behind a few thousand tokens
/// are as long as the first ones then: shorter ones would be more passes, each of which works less well.
const NEAR: f64 = 1.25;
/// Micro-batches of so many rows and more end with a whole one of these where prompts are cut, if little would be left over: a
/// product's tiles have up to as many rows, and one that is nearly empty takes its time nevertheless.
const TILED_MIN: usize = 1024;
const TILE: usize = 256;

/// What prompts may still put into a micro-batch.
struct Room {
    rows: usize,
    /// As many rows as this have room in any case.
    floor: usize,
    /// Of the slowest stage, for the whole micro-batch.
    seconds: f64,
    /// Whether prompts may be cut to what fills tiles.
    tiled: bool,
}

impl Scheduler {
    /// Sees to it that there is a prompt in hand, if one can begin. A prompt that has begun goes on before another begins, so
    /// none is left half done. One whose prefix is being computed in this step waits for the next step, and one whose image
    /// is not in the store for that.
    pub(super) fn begin_prompt(&mut self) {
        self.change_prompts();
        let mut after = None;
        for _ in 0..=PASSED_OVER_MAX {
            if self.prompt.is_some() || self.seats.is_empty() {
                return;
            }
            let Some((rank, slot)) = self.waiting.next(after) else { return };
            if self.returning.first().is_some_and(|&first| first < rank) {
                return;
            }
            if !self.can_go(slot, self.sequences[slot].findable * KV_BLOCK) {
                after = Some(rank);
                continue;
            }
            match self.find_prefix(slot) {
                Prefix::Coming => after = Some(rank),
                Prefix::Found(blocks) if !self.can_go(slot, blocks * KV_BLOCK) => after = Some(rank),
                Prefix::Found(blocks) => {
                    if self.take_blocks(slot) {
                        self.admit(slot, blocks * KV_BLOCK);
                    }
                    return;
                }
            }
        }
    }

    fn admit(&mut self, slot: u32, found: usize) {
        let sequence = &mut self.sequences[slot];
        sequence.state = State::Prompt;
        sequence.goal = sequence.known();
        sequence.begun = self.begun_next;
        self.begun_next += 1;
        sequence.seat = self.seats.pop();
        self.prompt = Some(slot);
        self.prompt_tokens -= found;
        self.stats.prefix_lookup_tokens += sequence.goal as u64;
        self.stats.prefix_hit_tokens += found as u64;
        if let Some((rank, raised)) = self.waiting.admit(sequence.rank) {
            self.sequences[raised].rank = rank;
        }
    }

    /// How many prompt tokens a micro-batch has room for now that others wait: where few wait, they are spread over
    /// all micro-batches in flight, so that no stage waits long for its first one; a single stage has nobody to keep waiting.
    pub(super) fn cut_anew(&mut self) {
        let parts = if self.config.slots == 1 { 1 } else { self.config.in_flight_max() };
        let share = self.prompt_tokens.div_ceil(parts).next_multiple_of(KV_BLOCK);
        self.cut = share.max(self.config.chunk_min).min(self.config.chunk);
    }

    /// Fills a micro-batch with prompt chunks. A chunk needs no result of the chunk before it, so a long
    /// prompt fills the pipeline by itself.
    pub(super) fn plan_prompts(&mut self, draft: &mut Draft) {
        if self.prompt.is_none() {
            return;
        }
        if draft.batch.rows() > 0 {
            self.singles = PassShape::of(&draft.batch);
        }
        let mut room = self.room(draft);
        while room.rows > 0 {
            self.begin_prompt();
            let Some(slot) = self.prompt else { return };
            let start = self.sequences[slot].planned;
            let reach = self.reach(slot, start);
            let left = reach - start;
            let len = match room.seconds.is_finite() {
                true => {
                    let shape = PassShape::of(&draft.batch);
                    let most = room.rows.min(left);
                    let fits = self.cost.rows_within(room.seconds, shape, start, most);
                    fits.max(room.floor.min(most))
                }
                false => room.rows.min(left),
            };
            let len = match len < left && room.tiled {
                true => whole_tiles(draft.batch.rows(), len, room.floor),
                false => len,
            };
            if len == 0 {
                return;
            }
            let sequence = &mut self.sequences[slot];
            if !std::mem::replace(&mut sequence.started, true) {
                draft.batch.starts.push(sequence.start());
            }
            let row = draft.batch.ids.len();
            draft.batch.ids.extend(sequence.tokens(start, len));
            self.place_images(slot, start, &mut draft.batch.ids[row..]);
            self.push_rows(slot, len, draft);
            self.publish_full(&[slot]);
            self.prompt_tokens -= len;
            room.rows -= len;
            room.floor = room.floor.saturating_sub(len);
            if len < left {
                return;
            }
            if reach < self.sequences[slot].goal {
                continue;
            }
            self.prompt = None;
            self.sequences[slot].state = State::Decoding;
            self.decoding += 1;
            self.want_token(slot, draft);
        }
    }

    /// The room for prompts beside a micro-batch's single steps.
    ///
    /// As a rule chunks take the slowest stage about as long as one of `cut` tokens at a prompt's beginning. Where few prompts
    /// come to many decoding sequences, micro-batches take at most `SLOWER` times as long as without prompts, but have room
    /// for a share of `chunk_min` tokens.
    fn room(&self, draft: &Draft) -> Room {
        let (most, floor) = (self.config.chunk, self.config.chunk_min.min(self.config.chunk));
        let given = Room { rows: most, floor: most, seconds: f64::INFINITY, tiled: false };
        if floor == most {
            return given;
        }
        let unlimited = Room { tiled: true, ..given };
        let beside = self.cut.saturating_sub(draft.batch.rows()).max(floor);
        match (self.spares_decoding(), self.cost.is_known()) {
            (true, true) => {
                let seconds = SLOWER * self.cost.slowest(&self.singles);
                Room { floor: floor.div_ceil(FLOOR), seconds, ..unlimited }
            }
            (true, false) => Room { rows: floor, ..unlimited },
            (false, true) => {
                let singles = PassShape { outputs: draft.batch.outputs.len(), ..PassShape::default() };
                let seconds = NEAR * self.cost.slowest(&singles.with_rows(0, self.cut));
                Room { rows: beside, floor, seconds, ..unlimited }
            }
            (false, false) => Room { rows: beside, ..unlimited },
        }
    }

    /// Whether prompts are so few that the sequences that were decoding before them should not notice them. Where many
    /// prompts came together, those that have begun to decode gain most if the others follow soon.
    fn spares_decoding(&self) -> bool {
        let Some(slot) = self.prompt else { return false };
        let prompts = self.waiting.len() + 1;
        MANY * prompts <= self.decoding.min(self.sequences[slot].decoding_before)
    }
}

/// How many of `len` rows go beside others if those that make less than half a tile wait, as far as `floor` rows remain.
fn whole_tiles(others: usize, len: usize, floor: usize) -> usize {
    let rows = others + len;
    let left_over = rows % TILE;
    let fits = rows >= TILED_MIN && left_over < TILE / 2 && left_over + floor.max(1) <= len;
    if fits { len - left_over } else { len }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_fill_little_of_a_tile_wait_and_no_prompt_starves() {
        let sizes =
            [0, 1, 2, 31, 127, 128, 129, 250, 500, 1000, 1023, 1024, 1030, 1264, 1909, 2048, 2085, 5000];
        for (others, len, floor) in sizes.iter().flat_map(|&others| {
            sizes.iter().flat_map(move |&len| [0, 1, 32, 128].map(|floor| (others, len, floor)))
        }) {
            let cut = whole_tiles(others, len, floor);
            let what = format!("{len} rows beside {others}, at least {floor}: {cut}");
            assert!(cut <= len && cut >= len.min(floor.max(1)), "{what}");
            let whole = (others + cut).is_multiple_of(TILE);
            let small = others + len < TILED_MIN;
            assert!(cut == len || (!small && whole && len - cut < TILE / 2), "{what}");
            let could = !small && (others + len) % TILE < TILE / 2 && len >= TILE + floor;
            assert!(!could || whole, "{what}");
        }
        assert_eq!(
            [(0, 1909), (0, 2000), (37, 2048), (1030, 500)].map(|(o, len)| whole_tiles(o, len, 32)),
            [1792, 2000, 2011, 500]
        );
    }
}
