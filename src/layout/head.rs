//! A head that is split by vocabulary over the devices of the stages, where whole layers cannot balance what it weighs.

use super::{Device, Layout};
use crate::model::{
    spec::ModelSpec,
    units::{Unit, units_of},
};

/// What stands for it in the short form.
pub(super) const SPLIT: &str = "head@all";

impl Layout {
    /// With the head split by vocabulary, in equal parts, over all devices that have stages: those that are GPUs if the last
    /// stage is on one. Each makes the logits of its part, and the last stage chooses from all of them. Or not, as without it:
    /// then the last stage has all of the head.
    ///
    /// ```
    /// # use pipeline_infer::{Layout, layout::Device};
    /// let layout: Layout = "0-13@cuda:0,14-27@cuda:1,head@all".parse()?;
    /// assert!(layout.splits_head() && layout.head_stages() == [0, 1]);
    /// assert_eq!(layout.with_split_head(false).to_string(), "0-13@cuda:0,14-27@cuda:1");
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn with_split_head(mut self, split: bool) -> Self {
        self.split_head = split;
        self
    }

    /// Whether it asks for a split head. On one device that changes nothing.
    pub fn splits_head(&self) -> bool {
        self.split_head
    }

    /// The stages that have parts of the head, in the order of the parts: the last one of each device. The last stage alone
    /// where it is not split.
    pub fn head_stages(&self) -> Vec<usize> {
        let last = self.stages.len() - 1;
        let on_host = |i: usize| self.stages[i].device == Device::Cpu;
        let lasts =
            |&i: &usize| self.stages[i + 1..].iter().all(|later| later.device != self.stages[i].device);
        let has_part = |i: &usize| *i == last || self.split_head && on_host(*i) == on_host(last) && lasts(i);
        (0..=last).filter(has_part).collect()
    }

    /// The same, but none where the head is whole.
    pub(crate) fn part_stages(&self) -> Vec<usize> {
        let stages = self.head_stages();
        if stages.len() > 1 { stages } else { Vec::new() }
    }

    /// A stage's part of the head, if it has one.
    pub fn head_of(&self, stage: usize) -> Option<Unit> {
        let stages = self.head_stages();
        let part = stages.iter().position(|&i| i == stage)?;
        Some(Unit::head(part, stages.len()))
    }

    /// The share of the head that a stage has.
    pub fn head_share(&self, stage: usize) -> f64 {
        match self.head_of(stage) {
            Some(Unit::HeadPart { parts, .. }) => 1.0 / parts as f64,
            Some(_) => 1.0,
            None => 0.0,
        }
    }

    /// A stage's units, in order.
    pub fn units(&self, stage: usize, spec: &ModelSpec) -> Vec<Unit> {
        let units = units_of(spec, &self.stages[stage].layers).into_iter();
        units.filter(|unit| *unit != Unit::Head).chain(self.head_of(stage)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    #[test]
    fn each_device_has_a_part_and_the_last_stage_the_last_one() {
        let stages = |text: &str| text.parse::<Layout>().unwrap().head_stages();
        assert_eq!(stages("0@cuda:0,1@cuda:1,2@cuda:2,head@all"), [0, 1, 2]);
        assert_eq!(stages("0@cuda:0,1@cuda:1,2@cuda:2"), [2]);
        // A device has one part, however many stages it has.
        assert_eq!(stages("0@cuda:0,1@cuda:1,2@cuda:0,head@all"), [1, 2]);
        assert_eq!(stages("0@cuda:0,1@cuda:0,head@all"), [1]);
        // The processor would keep the GPUs waiting, and the other way round.
        assert_eq!(stages("0@cuda:0,1@cpu,2@cuda:1,head@all"), [0, 2]);
        assert_eq!(stages("0@cuda:0,1@cuda:1,2@cpu,head@all"), [2]);
    }

    #[test]
    fn the_parts_make_up_the_head() {
        let spec = shapes::find("7b").unwrap().unwrap();
        let layout: Layout = "0-6@cuda:0,7-13@cuda:1,14-20@cuda:2,21-27@cuda:3,head@all".parse().unwrap();
        let (mut tokens, mut layers) = (0..0, 0);
        for stage in 0..4 {
            let units = layout.units(stage, &spec);
            layers += units.iter().filter(|unit| matches!(unit, Unit::Layer(_))).count();
            let part = units.last().unwrap().tokens(spec.vocab);
            assert_eq!((part.start, part.len()), (tokens.end, spec.vocab / 4));
            tokens = part;
            assert_eq!(units.contains(&Unit::Embed), stage == 0);
            assert_eq!(layout.head_share(stage), 0.25);
        }
        assert_eq!((tokens.end, layers), (spec.vocab, 28));
        let whole = layout.with_split_head(false);
        assert_eq!((whole.head_of(3), whole.head_of(0), whole.head_share(3)), (Some(Unit::Head), None, 1.0));
        assert_eq!(whole.units(3, &spec), units_of(&spec, &(21..28)));
    }
}
