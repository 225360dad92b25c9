//! A vision tower beside the layers: cuts of both by brute force, and what plans of real shapes come to.

use pipeline_infer::{
    Layout,
    backend::DType,
    layout::{
        DeviceSpec, ImageLoad, Planner, Workload,
        joint::{Cuts, Tower, TowerSlot, beside, costs, fits, solve},
        plan::{self, Problem},
    },
    model::spec::ModelSpec,
};
use proptest::prelude::*;

use super::{cost, cuts, problem, shape, slowest_first};

/// Every cut of `blocks` over `slots`, of which some may have none, as lengths.
fn loose(blocks: usize, slots: usize) -> Vec<Vec<usize>> {
    // A cut of one more for each, which is then taken away again.
    let less = |lens: Vec<usize>| lens.into_iter().map(|len| len - 1).collect();
    cuts(blocks + slots, slots).into_iter().map(less).collect()
}

/// What the tower costs, slot by slot, and its bytes. Written anew, block by block.
fn tower_cost(tower: &Tower, lens: &[usize]) -> (Vec<u64>, Vec<u64>) {
    let (mut start, mut times, mut bytes) = (0, Vec::new(), Vec::new());
    for (slot, &len) in tower.slots.iter().zip(lens) {
        let (mut time, mut size) = (0, 0);
        if len > 0 {
            time += slot.pass + if start + len < tower.blocks.len() { slot.boundary } else { 0 };
            size += slot.buffers;
        }
        for block in start..start + len {
            time += slot.blocks[block];
            size += tower.blocks[block];
        }
        start += len;
        times.push(time);
        bytes.push(size);
    }
    (times, bytes)
}

/// What a pair of cuts costs, slot by slot; `None` if it does not fit.
fn both(problem: &Problem, tower: &Tower, layers: &[usize], blocks: &[usize]) -> Option<Vec<u64>> {
    let (times, bytes) = tower_cost(tower, blocks);
    let mut beside = problem.clone();
    for (slot, bytes) in beside.slots.iter_mut().zip(bytes) {
        slot.room = slot.room.checked_sub(bytes)?;
    }
    Some(cost(&beside, layers)?.into_iter().zip(times).map(|(a, b)| a + b).collect())
}

/// The least that any pair costs, the slowest slot first.
fn brute_force(problem: &Problem, tower: &Tower) -> Option<Vec<u64>> {
    let (layers, slots) = (problem.sizes.layers.len(), problem.slots.len());
    if layers < slots {
        return None;
    }
    let pairs = cuts(layers, slots).into_iter().flat_map(|layers| {
        loose(tower.blocks.len(), slots).into_iter().map(move |blocks| (layers.clone(), blocks))
    });
    pairs.filter_map(|(layers, blocks)| both(problem, tower, &layers, &blocks)).map(slowest_first).min()
}

fn lens(ranges: &[std::ops::Range<usize>]) -> Vec<usize> {
    ranges.iter().map(|range| range.len()).collect()
}

/// The planner's cuts are as good as the best.
fn planned(problem: &Problem, tower: &Tower) -> Option<Cuts> {
    let (cut, best) = (solve(problem, tower), brute_force(problem, tower));
    assert_eq!(
        (cut.is_some(), fits(problem, tower)),
        (best.is_some(), best.is_some()),
        "{problem:?} {tower:?}"
    );
    let cut = cut?;
    let is = both(problem, tower, &lens(&cut.layers), &lens(&cut.blocks));
    assert_eq!(is.as_ref(), Some(&costs(problem, tower, &cut)), "{cut:?} of {problem:?} {tower:?}");
    assert_eq!(is.map(slowest_first), best, "{cut:?} of {problem:?} {tower:?}");
    // Beside given layers, too.
    if let Some(layers) = plan::solve(problem) {
        let by_force = loose(tower.blocks.len(), layers.len())
            .into_iter()
            .filter_map(|blocks| both(problem, tower, &lens(&layers), &blocks));
        let is = beside(problem, &layers, tower).map(|cuts| slowest_first(costs(problem, tower, &cuts)));
        assert_eq!(is, by_force.map(slowest_first).min(), "{layers:?} of {problem:?} {tower:?}");
    }
    Some(cut)
}

fn tower(slots: usize) -> impl Strategy<Value = Tower> {
    (0usize..=5).prop_flat_map(move |blocks| {
        let times = prop::collection::vec(0u64..40, blocks);
        let slot = (times, 0u64..9, 0u64..30, 0u64..40)
            .prop_map(|(blocks, pass, boundary, buffers)| TowerSlot { blocks, pass, boundary, buffers });
        (prop::collection::vec(1u64..30, blocks), prop::collection::vec(slot, slots))
            .prop_map(|(blocks, slots)| Tower { blocks, slots })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn random_pairs_have_the_optimum(
        (problem, tower) in problem(6, 4).prop_flat_map(|problem| {
            let slots = problem.slots.len();
            (Just(problem), tower(slots))
        })
    ) {
        planned(&problem, &tower);
    }
}

fn seeing<'a>(spec: &'a ModelSpec, devices: &'a [DeviceSpec], new: usize) -> Planner<'a> {
    let plain = Planner::new(spec, DType::BF16, devices);
    Planner { workload: Workload { running: 64, new, ..plain.workload }, ..plain }
}

/// Requests a second.
fn rate(planner: &Planner<'_>, layout: &Layout) -> f64 {
    planner.predict(layout).unwrap().requests_per_s
}

#[test]
fn four_devices_share_a_tower_and_the_layers() {
    let spec = shape("vl-7b");
    let (four, one) = (DeviceSpec::list("4xh200-141g").unwrap(), DeviceSpec::list("h200-141g").unwrap());
    for (new, gain) in [(1, 3.8), (128, 2.7)] {
        let planner = seeing(&spec, &four, new);
        let layout = planner.plan(4).unwrap();
        let told = planner.predict(&layout).unwrap();
        let alone = seeing(&spec, &one, new);
        let single = rate(&alone, &alone.plan(1).unwrap());
        assert!(
            told.requests_per_s > gain * single,
            "{new}: {layout}: {}, one {single}",
            told.requests_per_s
        );
        assert!(told.imbalance < 0.03, "{layout}: {}", told.imbalance);
        assert_eq!(told.images_per_s, Some(told.requests_per_s));
        // Where it goes by default, and where it would keep the others waiting.
        let first = "vision@cuda:0,0-6@cuda:0,7-13@cuda:1,14-20@cuda:2,21-27@cuda:3".parse().unwrap();
        assert!(told.requests_per_s > 1.15 * rate(&planner, &first), "{layout}");
        assert_eq!(told.layout, layout.to_string());
        // All blocks once, in order.
        layout.tower(Some(32)).unwrap();
        let share = |device: &str| told.vision.iter().find(|stage| stage.device == device).map(|s| s.share);
        for stage in &told.stages {
            assert!(share(&stage.device).is_none_or(|of| of == stage.share), "{told:?}");
        }
        let ms = 1e3 * told.vision.iter().map(|stage| stage.image_seconds).sum::<f64>();
        assert!((16.0..18.0).contains(&ms), "{ms}");
        assert!(told.vision[0].patches && told.vision.last().unwrap().merger);
    }
}

#[test]
fn a_device_that_is_slow_or_small_gets_less_of_both() {
    let spec = shape("vl-7b");
    let slow = DeviceSpec::list("h200-141g,h200-141g:bw=1.4t,bf16=230t").unwrap();
    let planner = seeing(&spec, &slow, 64);
    let (layout, even) = (planner.plan(2).unwrap(), planner.even(2).unwrap());
    assert!(rate(&planner, &layout) > 1.25 * rate(&planner, &even), "{layout}, {even}");
    // The tower's buffers have no room on one of them, and its weights no room on the other as a whole.
    let mut small = DeviceSpec::list("2xh200-141g").unwrap();
    small[1].free = 6_000_000_000;
    let mut planner = seeing(&spec, &small, 64);
    planner.scratch.tower.stage = 2_000_000_000;
    planner.kv_tokens = Some(100_000);
    let layout = planner.plan(2).unwrap();
    let told = planner.predict(&layout).unwrap();
    assert!(told.kv_tokens >= 100_000, "{told:?}");
    small[0].free = 12_000_000_000;
    let mut planner = seeing(&spec, &small, 64);
    planner.scratch.tower.stage = 9_000_000_000;
    let refused = planner.plan(2).unwrap_err().to_string();
    assert!(refused.contains("the model does not fit"), "{refused}");
}

#[test]
fn more_images_move_layers_and_none_are_no_reason() {
    let (spec, devices) = (shape("vl-7b"), DeviceSpec::list("2xh200-141g").unwrap());
    let with = |per_request: usize| {
        let mut planner = seeing(&spec, &devices, 64);
        planner.images = planner.images.map(|images| ImageLoad { per_request, ..images });
        let layout = planner.plan(2).unwrap();
        (planner.predict(&layout).unwrap(), layout)
    };
    let ((none, _), (many, layout)) = (with(0), with(20));
    assert_eq!((none.images_per_s, none.vision.is_empty()), (Some(0.0), false));
    assert!(many.imbalance < 0.03 && many.images_per_s.unwrap() > 80.0, "{layout}: {many:?}");
    // A layout that says where the tower is keeps it there; one for a text model has none.
    let planner = seeing(&spec, &devices, 64);
    let given: Layout = "vision@cuda:1,0-13@cuda:0,14-27@cuda:1".parse().unwrap();
    assert_eq!(planner.predict(&given).unwrap().layout, "v0-31@cuda:1,0-13@cuda:0,14-27@cuda:1");
    let wrong: Layout = "vision@cuda:5,0-13@cuda:0,14-27@cuda:1".parse().unwrap();
    let told = planner.predict(&wrong).unwrap_err().to_string();
    assert!(told.contains("vision stage 0 is on cuda:5, which is not among the devices"), "{told}");
    let text = shape("7b");
    let text = Planner::new(&text, DType::BF16, &devices);
    assert!(text.plan(2).unwrap().vision().is_empty() && text.images.is_none());
    let told = text.predict(&given).unwrap_err().to_string();
    assert_eq!(told, "--layout: it has vision stages, and the model reads no images");
}

#[test]
fn a_large_model_on_many_devices_is_planned_in_time() {
    let spec = shape("vl-72b");
    let devices = DeviceSpec::list("4xh200-141g,4xh100-80g").unwrap();
    let planner = seeing(&spec, &devices, 128);
    let began = std::time::Instant::now();
    let layout = planner.plan(8).unwrap();
    assert!(planner.predict(&layout).unwrap().imbalance < 0.1, "{layout}");
    planner.plan_any_order(8).unwrap();
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
}
