//! Which images are encoded next, and how far prompts can go meanwhile.

use super::Scheduler;
use crate::{
    batch::{IMAGE_ROW, KV_BLOCK, MicroBatch},
    schedule::{
        ImageConfig, ImagePass, NewSequence, PassImage, PromptImage,
        images::{Claim, Images},
        sequence::State,
    },
};

/// Waiting sequences whose images are thought of, at most.
const LOOKED_AT_MAX: usize = 256;

impl Scheduler {
    /// The same, for a model that reads images.
    pub fn with_images(mut self, config: ImageConfig) -> Self {
        self.images = Some(Images::new(config));
        self
    }

    /// Decides which images are encoded next; `None` if none can be now. Until [`Scheduler::apply_images`] says that they
    /// are in the store, no step reads them.
    ///
    /// It is to be called before and after steps are planned: each of the two learns what can be found of a prompt, which
    /// changes what the other one does.
    ///
    /// The order is that in which prompts go on: those that have begun, then those that wait. Each keeps what it needs
    /// from those behind it, and nothing is given to these before it has what it needs. So the first of all gets its
    /// images one after another, however small the store is.
    pub fn plan_images(&mut self) -> Option<ImagePass> {
        if !self.images.as_ref()?.has_room() {
            return None;
        }
        let begun = self.begun();
        let waiting =
            std::iter::successors(self.waiting.next(None), |(rank, _)| self.waiting.next(Some(*rank)));
        let wanting: Vec<u32> =
            begun.into_iter().chain(waiting.take(LOOKED_AT_MAX).map(|(_, slot)| slot)).collect();
        let (mut pass, mut patches) = (Vec::new(), 0);
        self.images.as_mut()?.begin_round();
        for slot in wanting {
            if !self.claim_images(slot, &mut pass, &mut patches) {
                break;
            }
        }
        if pass.is_empty() { None } else { Some(self.images.as_mut()?.set_off(pass)) }
    }

    /// Records that a pass's images are in the store. Passes are applied in their order.
    pub fn apply_images(&mut self, pass: u64) {
        let images = self.images.as_mut().expect("a pass of no images; this is a bug");
        images.arrived(pass);
    }

    /// Whoever submits it has to see to it that each of its images fits.
    pub(super) fn check_images(&self, new: &NewSequence) {
        let Some(of) = &new.images else { return };
        let store = self.images.as_ref().expect("images for a model that reads none; this is a bug");
        assert!(of.turns.len() == new.prompt.len(), "turns of another prompt; this is a bug");
        let fits = |image: &PromptImage| !image.tokens.is_empty() && image.tokens.len() <= store.config.rows;
        assert!(of.images.iter().all(fits), "an image that can never be in the store; this is a bug");
    }

    /// Prompts that have begun and are not whole, in the order of their beginning.
    fn begun(&self) -> Vec<u32> {
        let mut begun: Vec<u32> = self.held.values().copied().chain(self.prompt).collect();
        begun.sort_unstable_by_key(|&slot| self.sequences[slot].begun);
        begun
    }

    /// Claims all images that a sequence still needs; false if it does not get one of them now.
    fn claim_images(&mut self, slot: u32, pass: &mut Vec<PassImage>, patches: &mut usize) -> bool {
        let Some(of) = self.sequences[slot].new.images.clone() else { return true };
        let oldest = self.steps.front().map_or(u64::MAX, |step| step.step);
        for (i, image) in of.images.iter().enumerate() {
            let images = self.images.as_ref().expect("images for a model that reads none; this is a bug");
            let absent = images.is_absent(image.image);
            if image.tokens.end <= self.done_without(slot)
                || (absent && self.is_found(slot, image.tokens.end))
            {
                continue;
            }
            let images = self.images.as_mut().expect("just seen; this is a bug");
            let full = *patches > 0 && *patches + image.patches > images.config.patches;
            if absent && full {
                return false;
            }
            match images.claim(image, oldest) {
                Claim::There => (),
                Claim::Given(row) => {
                    let of = (self.sequences[slot].new.seq, i);
                    pass.push(PassImage { image: image.image, of, row });
                    *patches += image.patches;
                }
                Claim::Refused => return false,
            }
        }
        true
    }

    /// Tokens of a sequence that need no image any more, as far as it is known: those of a waiting one that could be found
    /// when it was looked at last.
    fn done_without(&self, slot: u32) -> usize {
        let sequence = &self.sequences[slot];
        match sequence.state {
            State::Waiting => sequence.findable * KV_BLOCK,
            _ => sequence.planned,
        }
    }

    /// Whether the first tokens of a waiting sequence can be found, as they are now.
    fn is_found(&mut self, slot: u32, tokens: usize) -> bool {
        let sequence = &mut self.sequences[slot];
        if sequence.state != State::Waiting {
            return false;
        }
        let most = (sequence.known() - 1) / KV_BLOCK;
        let found = sequence.keys.iter().take(most).take_while(|&&key| self.pool.find(key).is_some());
        sequence.findable = found.count();
        tokens <= sequence.findable * KV_BLOCK
    }

    /// How far a sequence's tokens from a place on can be planned: up to the first image that is not ready.
    pub(super) fn reach(&self, slot: u32, from: usize) -> usize {
        let sequence = &self.sequences[slot];
        let (Some(of), Some(images)) = (&sequence.new.images, &self.images) else { return sequence.known() };
        let mut later = of.within(from..usize::MAX);
        let missing = later.find(|(_, image)| images.ready(image.image).is_none());
        missing.map_or(sequence.known(), |(_, image)| image.tokens.start.max(from))
    }

    /// Whether a prompt is to go on, or to begin, at a place. Where an image is missing it waits for it if little can be
    /// done before, unless it keeps others' room itself: the missing one may be waiting for that.
    pub(super) fn can_go(&self, slot: u32, from: usize) -> bool {
        let sequence = &self.sequences[slot];
        let reach = self.reach(slot, from);
        let (Some(of), Some(images)) = (&sequence.new.images, &self.images) else { return true };
        if reach == sequence.known() || reach - from >= self.config.chunk_min {
            return true;
        }
        let missing = of.within(reach..usize::MAX).next().expect("an image is missing; this is a bug");
        from < reach && of.within(from..reach).next().is_some() && images.is_absent(missing.1.image)
    }

    /// Lays the prompt in hand aside if it waits for an image, and takes the first one back that does not any more.
    pub(super) fn change_prompts(&mut self) {
        if self.images.is_none() {
            return;
        }
        if let Some(slot) = self.prompt
            && !self.can_go(slot, self.sequences[slot].planned)
        {
            self.held.insert(self.sequences[slot].begun, slot);
            self.prompt = None;
        }
        if self.prompt.is_none() {
            let goes = |slot: &u32| self.can_go(*slot, self.sequences[*slot].planned);
            self.prompt = self.held.values().copied().find(goes);
            self.prompt.iter().for_each(|&slot| _ = self.held.remove(&self.sequences[slot].begun));
        }
    }

    /// Puts rows of the store in place of tokens that stand for images, and says which step reads them.
    pub(super) fn place_images(&mut self, slot: u32, from: usize, ids: &mut [u32]) {
        let (Some(of), Some(images)) = (&self.sequences[slot].new.images, &mut self.images) else { return };
        for (_, image) in of.within(from..from + ids.len()) {
            let row =
                images.ready(image.image).expect("an image is planned that is not there; this is a bug");
            images.read(row, self.next_step);
            for place in image.tokens.start.max(from)..image.tokens.end.min(from + ids.len()) {
                ids[place - from] = IMAGE_ROW | (row + (place - image.tokens.start) as u32);
            }
        }
    }

    /// The turns of a sequence's next rows, which are behind those of `batch`: of all rows or of none.
    pub(super) fn push_turns(&self, slot: u32, len: usize, batch: &mut MicroBatch) {
        let sequence = &self.sequences[slot];
        let places = sequence.planned..sequence.planned + len;
        if let Some(of) = &sequence.new.images {
            if batch.turns.is_empty() {
                batch.turns.extend(batch.positions.iter().map(|&place| [place; 3]));
            }
            batch.turns.extend(places.map(|place| of.turn(place)));
        } else if !batch.turns.is_empty() {
            batch.turns.extend(places.map(|place| [place as u32; 3]));
        }
    }
}
