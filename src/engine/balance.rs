//! Which layer should move, where a stage is slower than the others for long.
//!
//! It looks at what stages take for the same steps. A move is wanted if by what has been seen the slowest stage would be
//! faster with a layer less by more than the one that takes it over becomes slower, and if that is so for some windows of
//! time in a row. A layer goes back only for twice as many windows as the last time, so what comes and goes moves a layer
//! ever more seldom.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    batch::Observation,
    layout::{Device, Layout, Stage},
};

/// By so much the slowest stage has to become faster.
const GAIN: f64 = 1.04;
/// The same for a layer that goes back.
const GAIN_BACK: f64 = 1.08;
/// Steps that not all stages have been heard of, at most.
const OPEN: usize = 256;
/// A device that had no room is not asked again for so many windows.
const REFUSED: u32 = 64;
/// Doublings of patience at most.
const DOUBLINGS: u32 = 16;

/// How long a stage must have been slow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Pace {
    /// Steps of so long are looked at together.
    pub(super) window: Duration,
    /// And so many at least.
    pub(super) steps_min: u32,
    /// So many times in a row.
    pub(super) patience: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { window: Duration::from_secs(2), steps_min: 24, patience: 5 }
    }
}

/// Watches stages.
#[derive(Debug)]
pub(super) struct Balancer {
    pace: Pace,
    layout: Layout,
    /// How many layers the head weighs.
    head: f64,
    /// Since when steps are counted; `None` before the first.
    since: Option<Instant>,
    steps: u32,
    seconds: Vec<f64>, // [stages]
    /// What is known of steps that not all stages have been heard of.
    open: BTreeMap<u64, Vec<Option<f64>>>,
    /// The stage that a layer should leave, and for how many windows it has been so.
    slow: Option<(usize, u32)>,
    /// Devices that have given a layer to another one.
    moved: Vec<(Device, Device)>,
    /// How often a layer has gone back.
    backs: u32,
    /// Devices without room, and for how many windows they are not asked.
    refused: BTreeMap<Device, u32>,
}

/// A layer less here and one more there.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shift {
    from: usize,
    to: usize,
    gain: f64,
}

impl Balancer {
    pub(super) fn new(pace: Pace, layout: &Layout, head: f64) -> Self {
        Balancer {
            pace,
            layout: layout.clone(),
            head,
            since: None,
            steps: 0,
            seconds: vec![0.0; layout.stages().len()],
            open: BTreeMap::new(),
            slow: None,
            moved: Vec::new(),
            backs: 0,
            refused: BTreeMap::new(),
        }
    }

    /// A stage took so long for a step.
    pub(super) fn observe(&mut self, seen: Observation) {
        let stages = self.seconds.len();
        if seen.stage >= stages {
            return;
        }
        let step = self.open.entry(seen.step).or_insert_with(|| vec![None; stages]);
        step[seen.stage] = Some(seen.busy.as_secs_f64());
        if step.iter().all(Option::is_some) {
            let step = self.open.remove(&seen.step).unwrap_or_default();
            self.seconds.iter_mut().zip(step).for_each(|(sum, seconds)| *sum += seconds.unwrap_or_default());
            self.steps += 1;
        } else if self.open.len() > OPEN {
            self.open.pop_first();
        }
    }

    /// The layout that should be, if another one has been better for long enough.
    pub(super) fn wanted(&mut self, now: Instant) -> Option<Layout> {
        let since = *self.since.get_or_insert(now);
        if now < since + self.pace.window || self.steps < self.pace.steps_min {
            return None;
        }
        let shift = self.best_shift();
        self.begin_window(now);
        self.refused.retain(|_, windows| {
            *windows -= 1;
            *windows > 0
        });
        let Some(shift) = shift else {
            self.slow = None;
            return None;
        };
        let windows = match self.slow {
            Some((stage, windows)) if stage == shift.from => windows + 1,
            _ => 1,
        };
        self.slow = Some((shift.from, windows));
        let doublings = if self.is_back(shift) { (self.backs + 1).min(DOUBLINGS) } else { 0 };
        (windows >= self.pace.patience << doublings).then(|| self.shifted(shift))
    }

    /// The layout has changed, by what was wanted or by others.
    pub(super) fn changed(&mut self, layout: &Layout) {
        let old = std::mem::replace(&mut self.layout, layout.clone());
        let (mut more, mut less) = (Vec::new(), Vec::new());
        for (device, change) in changes(&old, layout) {
            if change > 0 { more.push(device) } else { less.push(device) }
        }
        for (&from, &to) in less.iter().zip(&more) {
            if self.moved.contains(&(to, from)) {
                self.backs += 1;
            }
            self.moved.retain(|moved| *moved != (to, from));
            self.moved.push((from, to));
        }
        self.seconds = vec![0.0; layout.stages().len()];
        self.forget();
        self.refused.clear();
    }

    /// What was wanted was not possible: the devices that would have had more layers are not asked again for a while.
    pub(super) fn refused(&mut self, wanted: &Layout) {
        let full = changes(&self.layout, wanted).into_iter().filter(|(_, change)| *change > 0);
        self.refused.extend(full.map(|(device, _)| (device, REFUSED)));
        self.forget();
    }

    /// Nothing that was seen says anything any more.
    pub(super) fn forget(&mut self) {
        self.slow = None;
        self.since = None;
        self.open.clear();
        self.steps = 0;
        self.seconds.fill(0.0);
    }

    fn begin_window(&mut self, now: Instant) {
        self.since = Some(now);
        self.steps = 0;
        self.seconds.fill(0.0);
    }

    /// The move that makes the slowest stage fastest, if that is worth it.
    fn best_shift(&self) -> Option<Shift> {
        let stages = self.layout.stages();
        let seconds = |stage: usize| self.seconds[stage];
        let from = (0..stages.len()).max_by(|&a, &b| seconds(a).total_cmp(&seconds(b)))?;
        if stages[from].layers.len() < 2 || seconds(from) <= 0.0 {
            return None;
        }
        let layer = |stage: usize| {
            let head = self.head * self.layout.head_share(stage);
            seconds(stage) / (stages[stage].layers.len() as f64 + head)
        };
        let after = |to: usize| {
            let others = (0..stages.len()).filter(|&stage| stage != from && stage != to).map(seconds);
            let both = (seconds(from) - layer(from)).max(seconds(to) + layer(to));
            others.fold(both, f64::max)
        };
        let takes = |&to: &usize| {
            let device = stages[to].device;
            // One device takes as long whichever of its stages does the work.
            device != stages[from].device && !self.refused.contains_key(&device)
        };
        let shifts =
            (0..stages.len()).filter(takes).map(|to| Shift { from, to, gain: seconds(from) / after(to) });
        let best = shifts.max_by(|a, b| a.gain.total_cmp(&b.gain))?;
        (best.gain >= if self.is_back(best) { GAIN_BACK } else { GAIN }).then_some(best)
    }

    /// Whether a layer would go back to where one has come from.
    fn is_back(&self, shift: Shift) -> bool {
        let device = |stage: usize| self.layout.stages()[stage].device;
        self.moved.iter().any(|&(from, to)| from == device(shift.to) || to == device(shift.from))
    }

    /// Every boundary between the two stages moves by a layer.
    fn shifted(&self, shift: Shift) -> Layout {
        let mut stages: Vec<Stage> = self.layout.stages().to_vec();
        let Shift { from, to, .. } = shift;
        for left in from.min(to)..from.max(to) {
            let cut = &mut stages[left].layers.end;
            if from < to {
                *cut -= 1
            } else {
                *cut += 1
            }
            stages[left + 1].layers.start = *cut;
        }
        let shifted =
            Layout::new(stages).and_then(|layout| layout.with_vision(self.layout.vision().to_vec()));
        let shifted = shifted.expect("a layer fewer of several, one more elsewhere; this is a bug");
        shifted.with_split_head(self.layout.splits_head())
    }
}

/// How many layers more each device has, if not as many.
fn changes(old: &Layout, new: &Layout) -> Vec<(Device, isize)> {
    let mut layers = BTreeMap::<Device, isize>::new();
    for (layout, sign) in [(old, -1), (new, 1)] {
        for stage in layout.stages() {
            *layers.entry(stage.device).or_default() += sign * stage.layers.len() as isize;
        }
    }
    layers.into_iter().filter(|(_, change)| *change != 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace { window: Duration::from_secs(1), steps_min: 10, patience: 3 };

    /// Stages on devices of some speeds, at a hundred steps a second, and what became of their layout.
    struct World {
        balancer: Balancer,
        now: Instant,
        step: u64,
        relayouts: u32,
    }

    impl World {
        fn new(layout: &str, head: f64) -> World {
            let balancer = Balancer::new(PACE, &layout.parse().unwrap(), head);
            World { balancer, now: Instant::now(), step: 0, relayouts: 0 }
        }

        /// So many seconds, with devices that take so long for a layer. Some noise comes with it.
        fn run(&mut self, seconds: u32, layer: impl Fn(usize) -> f64) {
            for _ in 0..100 * seconds {
                self.now += Duration::from_millis(10);
                let layout = self.balancer.layout.clone();
                for (i, stage) in layout.stages().iter().enumerate() {
                    let Device::Cuda(device) = stage.device else { panic!("{stage}") };
                    let head = self.balancer.head * layout.head_share(i);
                    let noise = 1.0 + 0.02 * (((self.step * 7 + i as u64 * 3) % 5) as f64 - 2.0);
                    let busy = noise * layer(device) * (stage.layers.len() as f64 + head) / 1e4;
                    let busy = Duration::from_secs_f64(busy);
                    self.balancer.observe(Observation { stage: i, step: self.step, busy });
                }
                self.step += 1;
                if let Some(layout) = self.balancer.wanted(self.now) {
                    layout.check(self.balancer.layout.layers()).unwrap();
                    self.balancer.changed(&layout);
                    self.relayouts += 1;
                }
            }
        }

        fn layers(&self) -> Vec<usize> {
            self.balancer.layout.stages().iter().map(|s| s.layers.len()).collect()
        }
    }

    const FOUR: &str = "0-6@cuda:0,7-13@cuda:1,14-20@cuda:2,21-27@cuda:3";

    #[test]
    fn what_is_even_stays() {
        let mut world = World::new(FOUR, 0.0);
        world.run(100, |_| 1.0);
        assert_eq!((world.relayouts, world.layers()), (0, vec![7; 4]));
        // A layer fewer or more makes nothing better.
        let mut world = World::new("0-4@cuda:0,5-10@cuda:1", 0.0);
        world.run(100, |_| 1.0);
        assert_eq!(world.relayouts, 0);
    }

    #[test]
    fn layers_leave_a_slow_device_one_at_a_time_until_it_is_as_fast_as_others() {
        let slow = |device| if device == 1 { 2.0 } else { 1.0 };
        let mut world = World::new(FOUR, 0.0);
        world.run(2, slow);
        assert_eq!(world.relayouts, 0, "not before it has been so for long");
        world.run(2, slow);
        assert_eq!(world.relayouts, 1);
        world.run(200, slow);
        let layers = world.layers();
        assert!(layers[1] == 4 && layers.iter().max() == Some(&8), "{layers:?}");
        let settled = world.relayouts;
        world.run(500, slow);
        assert_eq!(world.relayouts, settled);
    }

    #[test]
    fn the_heads_stage_gives_layers_too() {
        let mut world = World::new("0-6@cuda:0,7-13@cuda:1", 3.0);
        world.run(100, |_| 1.0);
        assert_eq!(world.layers(), [8, 6], "8 beside 9, where 7 were beside 10");
    }

    #[test]
    fn what_comes_and_goes_moves_layers_ever_more_seldom() {
        let mut world = World::new("0-7@cuda:0,8-15@cuda:1", 0.0);
        let mut after = Vec::new();
        for round in 0..400 {
            let slow = |device| if device == round % 2 { 1.6 } else { 1.0 };
            world.run(10, slow);
            after.push(world.relayouts);
        }
        let (first, all) = (after[39], after[399]);
        assert!(first < 12 && all - first <= 4, "{after:?}");
    }

    #[test]
    fn a_device_without_room_is_left_alone_for_a_while() {
        let mut world = World::new(FOUR, 0.0);
        let wanted: Layout = "0-6@cuda:0,7-12@cuda:1,13-20@cuda:2,21-27@cuda:3".parse().unwrap();
        world.balancer.refused(&wanted);
        let slow = |device| if device == 1 { 1.5 } else { 1.0 };
        world.run(5, slow);
        assert_eq!((world.relayouts, world.layers()[2]), (1, 7), "another one took it");
    }

    #[test]
    fn stages_of_one_device_do_not_help_each_other() {
        let mut world = World::new("0-6@cuda:0,7-9@cuda:0,10-11@cuda:0", 0.0);
        world.run(20, |_| 1.0);
        assert_eq!(world.relayouts, 0);
    }
}
