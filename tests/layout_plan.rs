//! The planner finds the best cut there is: by hand and by brute force, over devices that differ. Cuts of plain numbers and what plans
//! do with predictions are here; `cases` has real shapes on devices, `tower` vision towers beside the layers.

#[path = "layout_plan/cases.rs"]
mod cases;
#[path = "layout_plan/tower.rs"]
mod tower;

use pipeline_infer::{
    Layout,
    backend::DType,
    layout::{
        DeviceSpec, Planner, Workload,
        plan::{Problem, Sizes, Slot, costs, solve},
        planner::Scratch,
    },
    model::{shapes, spec::ModelSpec},
};
use proptest::prelude::*;

/// Every cut of `layers` over `slots`, as lengths.
fn cuts(layers: usize, slots: usize) -> Vec<Vec<usize>> {
    if slots == 1 {
        return vec![vec![layers]];
    }
    let with = |first: usize| {
        let rest = cuts(layers - first, slots - 1);
        rest.into_iter().map(move |rest| [vec![first], rest].concat())
    };
    (1..=layers.saturating_sub(slots - 1)).flat_map(with).collect()
}

/// What a cut costs, slot by slot; `None` if it does not fit. Written anew, unit by unit.
fn cost(problem: &Problem, lens: &[usize]) -> Option<Vec<u64>> {
    let sizes = &problem.sizes;
    let (mut start, mut all) = (0, Vec::new());
    for (i, (slot, &len)) in problem.slots.iter().zip(lens).enumerate() {
        let (mut time, mut bytes) = (slot.pass, 0);
        let (first, last) = (i == 0, i + 1 == lens.len());
        for layer in start..start + len {
            time += slot.layers[layer];
            bytes += sizes.layers[layer];
        }
        if first {
            time += slot.embed;
            bytes += sizes.embed;
        }
        if last {
            time += slot.head;
            bytes += if first { sizes.head_tied.unwrap_or(sizes.head) } else { sizes.head };
        } else {
            time += slot.boundary;
        }
        if bytes > slot.room || len < slot.layers_min {
            return None;
        }
        all.push(time);
        start += len;
    }
    Some(all)
}

fn slowest_first(mut costs: Vec<u64>) -> Vec<u64> {
    costs.sort_unstable_by(|a, b| b.cmp(a));
    costs
}

/// The least that any cut costs, the slowest slot first.
fn brute_force(problem: &Problem) -> Option<Vec<u64>> {
    let (layers, slots) = (problem.sizes.layers.len(), problem.slots.len());
    if layers < slots {
        return None;
    }
    cuts(layers, slots).iter().filter_map(|lens| cost(problem, lens)).map(slowest_first).min()
}

/// The planner's cut as lengths, once it is known to be as good as the best.
fn planned(problem: &Problem) -> Option<Vec<usize>> {
    let cut = solve(problem);
    let best = brute_force(problem);
    let Some(cut) = cut else {
        assert_eq!(best, None, "{problem:?}");
        return None;
    };
    let lens: Vec<usize> = cut.iter().map(|layers| layers.len()).collect();
    assert_eq!(cost(problem, &lens).as_ref(), Some(&costs(problem, &cut)), "{problem:?}");
    assert_eq!(Some(slowest_first(costs(problem, &cut))), best, "{lens:?} of {problem:?}");
    Some(lens)
}

/// `layers` alike, on slots that take so long for each and have so much room.
fn alike(layers: usize, slots: &[(u64, u64)]) -> Problem {
    let slot = |&(time, room): &(u64, u64)| Slot { layers: vec![time; layers], room, ..Slot::default() };
    let sizes = Sizes { layers: vec![10; layers], ..Sizes::default() };
    Problem { sizes, slots: slots.iter().map(slot).collect() }
}

const ROOMY: u64 = 1_000_000;

fn with_head(mut problem: Problem, head: u64, bytes: u64) -> Problem {
    problem.slots.iter_mut().for_each(|slot| slot.head = head * slot.layers[0] / 10);
    problem.sizes.head = bytes;
    problem
}

#[test]
fn twelve_hand_made_problems_have_the_optimum() {
    let same = |layers, slots| alike(layers, &vec![(10, ROOMY); slots]);
    // 1. Nothing to choose.
    assert_eq!(planned(&same(28, 1)), Some(vec![28]));
    // 2. Alike: near-equal lengths.
    assert_eq!(planned(&same(12, 4)), Some(vec![3, 3, 3, 3]));
    // 3. A head of 2.3 layers, as of 7b while answers are written: the last stage gets fewer.
    let lens = planned(&with_head(same(28, 4), 23, 0)).unwrap();
    assert!(lens[3] == 5 || lens[3] == 6, "{lens:?}");
    assert_eq!(lens.iter().max(), Some(&8));
    // 4. A head that outweighs everything: one layer stays with it, the others are even.
    assert_eq!(planned(&with_head(same(10, 4), 1000, 0)), Some(vec![3, 3, 3, 1]));
    // 5. One device is half as fast.
    assert_eq!(planned(&alike(10, &[(10, ROOMY), (20, ROOMY), (10, ROOMY)])), Some(vec![4, 2, 4]));
    // 6. One device has room for three layers alone.
    assert_eq!(planned(&alike(12, &[(10, ROOMY), (10, 30), (10, ROOMY)])).unwrap()[1], 3);
    // 7. Fast but small beside slow but large.
    assert_eq!(planned(&alike(12, &[(5, 40), (20, ROOMY)])), Some(vec![4, 8]));
    // 8. A tied embedding: on one device it counts once, on two twice.
    let mut tied = alike(2, &[(10, 125)]);
    tied.sizes = Sizes { layers: vec![10; 2], embed: 100, head: 105, head_tied: Some(5) };
    assert_eq!(planned(&tied), Some(vec![2]));
    tied.slots = alike(2, &[(10, 125), (10, 114)]).slots;
    assert_eq!(planned(&tied), None);
    tied.slots[1].room = 115;
    assert_eq!(planned(&tied), Some(vec![1, 1]));
    // 9. An embedding that takes the first device's room.
    let mut embed = alike(8, &[(10, 120), (10, ROOMY)]);
    embed.sizes.embed = 100;
    assert_eq!(planned(&embed), Some(vec![2, 6]));
    // 10. Of equally slow cuts that whose second-slowest stage is faster: 4+4+3, not 5+... or 4+3+4 with a head.
    let mut uneven = same(5, 3);
    uneven.slots.iter_mut().for_each(|slot| slot.layers = vec![40, 10, 10, 10, 10]);
    assert_eq!(planned(&uneven), Some(vec![1, 2, 2]));
    // 11. A slow link is worth a layer less on the stage before it.
    let mut link = same(9, 2);
    link.slots[0].boundary = 25;
    assert_eq!(planned(&link), Some(vec![3, 6]));
    // 12. Just fits, and just does not.
    assert_eq!(planned(&alike(9, &[(10, 40), (10, 30), (10, 20)])), Some(vec![4, 3, 2]));
    assert_eq!(planned(&alike(9, &[(10, 40), (10, 30), (10, 19)])), None);
    // More slots than layers, and none.
    assert_eq!((planned(&same(3, 4)), solve(&same(3, 0))), (None, None));
}

fn slot(layers: usize) -> impl Strategy<Value = Slot> {
    let times = prop::collection::vec(0u64..40, layers);
    (times, 0u64..60, 0u64..120, 0u64..9, 0u64..30, 0u64..200, 0usize..3).prop_map(
        |(layers, embed, head, pass, boundary, room, layers_min)| Slot {
            layers,
            embed,
            head,
            pass,
            boundary,
            room: room * 2,
            layers_min,
        },
    )
}

fn problem(layers: usize, slots: usize) -> impl Strategy<Value = Problem> {
    (1..=layers, 1..=slots).prop_flat_map(|(layers, slots)| {
        let sizes = (prop::collection::vec(1u64..40, layers), 0u64..80, 0u64..20, any::<bool>());
        (sizes, prop::collection::vec(slot(layers), slots)).prop_map(
            |((layers, embed, norm, tied), slots)| {
                let sizes = Sizes { layers, embed, head: embed + norm, head_tied: tied.then_some(norm) };
                Problem { sizes, slots }
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_problems_have_the_optimum(problem in problem(9, 5)) {
        planned(&problem);
    }
}

fn shape(name: &str) -> ModelSpec {
    shapes::find(name).unwrap().unwrap()
}

fn lens(layout: &Layout) -> Vec<usize> {
    layout.stages().iter().map(|stage| stage.layers.len()).collect()
}

#[test]
fn a_plan_is_never_slower_than_the_even_split_and_mends_uneven_devices() {
    let devices = |text: &str| DeviceSpec::list(text).unwrap();
    for name in ["7b", "72b", "llama-3.2-1b"] {
        let spec = shape(name);
        for (text, gain) in [
            ("4xh200-141g", 1.0),
            ("2xh200-141g:bw=2t,bf16=345t,2xh200-141g", 1.3),
            ("h200-141g,h200-141g:bw=1.4t,bf16=230t,2xh200-141g", 1.4),
        ] {
            let devices = devices(text);
            let planner = Planner::new(&spec, DType::BF16, &devices);
            let rate = |layout: &Layout| planner.predict(layout).unwrap().requests_per_s;
            let (planned, even) = (rate(&planner.plan(4).unwrap()), rate(&planner.even(4).unwrap()));
            assert!(planned >= even * 0.999, "{name} on {text}: {planned} and {even}");
            assert!(
                name == "llama-3.2-1b" || planned >= gain * even,
                "{name} on {text}: {planned} and {even}"
            );
        }
    }
}

#[test]
fn the_head_of_7b_costs_the_last_stage_layers_while_answers_are_written() {
    let (spec, devices) = (shape("7b"), DeviceSpec::list("4xh200-141g").unwrap());
    let mut planner = Planner::new(&spec, DType::BF16, &devices);
    planner.workload = Workload { prompt: 1, new: 512, ..Workload::default() };
    planner.split_head = Some(false);
    let whole = planner.plan(4).unwrap();
    let cut = lens(&whole);
    assert!(cut[3] <= 6 && cut.iter().max() == Some(&8) && !whole.splits_head(), "{whole}");
    // Unless all devices share it.
    planner.split_head = None;
    let split = planner.plan(4).unwrap();
    assert_eq!((lens(&split), split.splits_head()), (vec![7; 4], true));
    let rate = |layout: &Layout| planner.predict(layout).unwrap().requests_per_s;
    assert!(rate(&split) > 1.03 * rate(&whole), "{} and {}", rate(&split), rate(&whole));
}

#[test]
fn stages_share_devices_and_auto_takes_what_is_worth_it() {
    let (spec, devices) = (shape("7b"), DeviceSpec::list("2xh200-141g").unwrap());
    let planner = Planner::new(&spec, DType::BF16, &devices);
    let layout = planner.plan(5).unwrap();
    let on: Vec<String> = layout.stages().iter().map(|stage| stage.device.to_string()).collect();
    assert_eq!(on, ["cuda:0", "cuda:0", "cuda:0", "cuda:1", "cuda:1"]);
    layout.check(28).unwrap();
    assert_eq!(planner.plan_auto().unwrap().stages().len(), 2);
    // A device that could not take a layer in the time of the others is left out.
    let slow = DeviceSpec::list("h200-141g,slow:mem=80g,bw=10g,bf16=1t").unwrap();
    let auto = Planner::new(&spec, DType::BF16, &slow).plan_auto().unwrap();
    assert_eq!(auto.to_string(), "0-27@cuda:0");
    // As well if it comes first.
    let slow = DeviceSpec::list("slow:mem=80g,bw=10g,bf16=1t,h200-141g").unwrap();
    let auto = Planner::new(&spec, DType::BF16, &slow).plan_auto().unwrap();
    assert_eq!(auto.to_string(), "0-27@cuda:1");
}

#[test]
fn orders_of_devices_are_chosen_where_asked() {
    // The head's matrix does not fit the small one beside a layer; the embedding's does not either.
    let spec = shape("7b");
    let devices = DeviceSpec::list("small:mem=1.7g,free=1.5g,bw=1t,bf16=100t,2xl4").unwrap();
    let mut planner = Planner::new(&spec, DType::BF16, &devices);
    planner.split_head = Some(false);
    let layout = planner.plan_any_order(3).unwrap();
    let small = layout.stages().iter().position(|stage| stage.device.to_string() == "cuda:0");
    assert_eq!(small, Some(1), "{layout}");
    assert!(
        planner.predict(&layout).unwrap().requests_per_s
            >= planner.plan(3).map_or(0.0, |given| { planner.predict(&given).unwrap().requests_per_s })
    );
}

#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let spec = shape("72b");
    let refused = |text: &str, dtype, kv_tokens: Option<usize>| {
        let devices = DeviceSpec::list(text).unwrap();
        let mut planner = Planner::new(&spec, dtype, &devices);
        (planner.kv_tokens, planner.scratch) = (kv_tokens, Scratch { stage: 1 << 30, ..Scratch::default() });
        let told = planner.plan(devices.len()).unwrap_err().to_string();
        assert!(!told.contains('\n'), "{told}");
        (told, planner.plan_auto().is_err())
    };
    let (told, auto) = refused("h100-80g", DType::BF16, None);
    assert!(auto && told.contains("does not fit: weights in bf16 and 16 KV tokens take 145.4 GB"), "{told}");
    assert!(told.contains("it fits with 1 more h100-80g"), "{told}");
    let (told, _) = refused("2xh100-80g", DType::BF16, Some(1_000_000));
    assert!(told.contains("--kv-tokens ") && told.contains(" more h100-80g"), "{told}");
    let most: usize = told.split("--kv-tokens ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let devices = DeviceSpec::list("2xh100-80g").unwrap();
    let mut planner = Planner::new(&spec, DType::BF16, &devices);
    planner.scratch.stage = 1 << 30;
    planner.kv_tokens = Some(most);
    assert!(planner.predict(&planner.plan(2).unwrap()).unwrap().kv_tokens >= most);
    planner.kv_tokens = Some(most + 16);
    planner.plan(2).unwrap_err();
    // There are devices enough.
    let devices = DeviceSpec::list("3xh100-80g").unwrap();
    let told = Planner::new(&spec, DType::BF16, &devices).plan(1).unwrap_err().to_string();
    assert!(told.starts_with("device 1 x h100-80g: ") && told.ends_with("it fits with 2 stages"), "{told}");
    let (told, _) = refused("2xh100-80g", DType::F32, None);
    assert!(told.contains("it fits with --dtype bf16, or with 2 more h100-80g"), "{told}");
    let (told, _) = refused("tiny:mem=1g,bw=1t,bf16=1t", DType::BF16, None);
    assert!(told.ends_with("neither fewer KV tokens nor more of these devices make it fit"), "{told}");
}

#[test]
fn predictions_agree_with_measured_runs() {
    let close = |said: f64, measured: f64, within: f64, what: &str| {
        assert!((said / measured - 1.0).abs() < within, "{what}: {said}, measured {measured}");
    };
    let devices = DeviceSpec::list("4xh200-141g").unwrap();
    // 4 x H200, even cuts, `bench throughput`: one request of 512 prompt tokens.
    for (name, measured) in [("7b", 267.2), ("72b", 28.9)] {
        let spec = shape(name);
        let planner = Planner::new(&spec, DType::BF16, &devices);
        let prediction = planner.predict(&planner.even(4).unwrap()).unwrap();
        close(prediction.decode[0].tokens_per_s, measured, 0.05, name);
    }
    // 256 requests of 512 prompt tokens, prompts included. A run fills the pipeline and drains it, which a rate does not count.
    for (name, new, measured) in [("7b", 256, 26_127.0), ("72b", 128, 2_195.0)] {
        let spec = shape(name);
        let mut planner = Planner::new(&spec, DType::BF16, &devices);
        planner.workload.new = new;
        close(planner.predict(&planner.even(4).unwrap()).unwrap().new_tokens_per_s, measured, 0.2, name);
    }
}

#[test]
fn absurd_numbers_are_refused_in_time() {
    let spec = shape("llama-3.1-405b");
    let devices = DeviceSpec::list("126xh200-141g").unwrap();
    let planner = Planner::new(&spec, DType::BF16, &devices);
    assert_eq!(lens(&planner.plan(126).unwrap()), vec![1; 126]);
    assert_eq!(planner.plan(200).unwrap_err().to_string().split(':').next(), Some("--stages"));
    assert!(planner.plan(0).is_err());
    let mut planner = Planner::new(&spec, DType::F32, &devices);
    planner.kv_tokens = Some(usize::MAX);
    assert!(planner.plan(8).unwrap_err().to_string().contains("does not fit"));
}
