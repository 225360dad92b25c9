//! Real shapes on devices that differ, each case by its name: what the planner takes is the best of all cuts, which are all tried here,
//! with costs and bytes added up anew, unit by unit.

use pipeline_infer::{
    Layout,
    backend::DType,
    layout::{DeviceSpec, MemoryLimits, Planner, Workload},
    model::{
        spec::{LayerSpec, ModelSpec},
        units::{Unit, units_of},
    },
};

use super::{cuts, lens, shape};

/// Answers alone, and prompts alone: what the head weighs most in, and least.
const ANSWERS: Workload = Workload { running: 256, prompt: 1, new: 512, chunk: 2048 };
const PROMPTS: Workload = Workload { running: 256, prompt: 2048, new: 1, chunk: 2048 };

fn devices(text: &str) -> Vec<DeviceSpec> {
    DeviceSpec::list(text).unwrap()
}

fn planner<'a>(spec: &'a ModelSpec, devices: &'a [DeviceSpec], workload: Workload) -> Planner<'a> {
    let split_head = Some(false);
    Planner { workload, kv_tokens: Some(16), split_head, ..Planner::new(spec, DType::BF16, devices) }
}

/// What each device takes for a request with such a cut over devices in this order, the slowest first; `None` if it does not
/// fit. Devices have `own` stages each.
fn taken(planner: &Planner<'_>, order: &[usize], own: usize, lens: &[usize]) -> Option<Vec<f64>> {
    let (spec, dtype, passes) = (planner.spec, planner.dtype, planner.workload.passes(order.len()));
    let (mut start, mut all) = (0, Vec::new());
    for (i, (&place, &len)) in order.iter().zip(lens).enumerate() {
        let (costs, layers) = (planner.costs(place), start..start + len);
        let split = planner.split_head == Some(true);
        let part = split.then_some(Unit::HeadPart { part: i, parts: order.len() });
        let units = units_of(spec, &layers).into_iter().filter(|unit| !split || *unit != Unit::Head);
        let units: Vec<Unit> = units.chain(part).collect();
        let last = layers.end == spec.layers.len();
        let seconds = |(pass, weight): &(_, f64)| {
            let of_units: f64 = units.iter().map(|&unit| costs.seconds(unit, *pass)).sum();
            let leaving = if last { 0.0 } else { costs.boundary(&planner.devices[order[i + 1]], *pass) };
            weight * (of_units + own as f64 * costs.pass() + leaving)
        };
        all.push(passes.iter().map(seconds).sum::<f64>());
        let kv = |unit: &Unit| unit.kv_bytes_per_token(spec, dtype) * planner.kv_tokens.unwrap();
        let bytes: usize = units.iter().map(|unit| unit.weight_bytes(spec, dtype) + kv(unit)).sum();
        let both = spec.tied && start == 0 && last;
        let twice = if both { Unit::Embed.weight_bytes(spec, dtype) } else { 0 };
        if bytes - twice > costs.device.free || len < own {
            return None;
        }
        start += len;
    }
    all.sort_by(|a, b| b.total_cmp(a));
    Some(all)
}

/// The best of all cuts over devices in this order: the slowest device as fast as can be, then the second-slowest.
fn best(planner: &Planner<'_>, order: &[usize], own: usize) -> Option<(Vec<f64>, Vec<usize>)> {
    let fitting = |lens: Vec<usize>| Some((taken(planner, order, own, &lens)?, lens));
    let all = cuts(planner.spec.layers.len(), order.len()).into_iter().filter_map(fitting);
    all.min_by(|(a, _), (b, _)| a.partial_cmp(b).unwrap())
}

/// The planner's cut into a stage for each device, once it is known to be as good as the best of all.
fn planned(planner: &Planner<'_>) -> Vec<usize> {
    let order: Vec<usize> = (0..planner.devices.len()).collect();
    let layout = planner.plan(order.len()).unwrap();
    layout.check(planner.spec.layers.len()).unwrap();
    let lens = lens(&layout);
    let (best, by_force) = best(planner, &order, 1).unwrap();
    let is = taken(planner, &order, 1, &lens).unwrap_or_else(|| panic!("{layout} does not fit"));
    for (is, best) in is.iter().zip(&best) {
        assert!(*is <= best * (1.0 + 1e-6), "{lens:?} takes {is}, and {by_force:?} takes {best}");
    }
    lens
}

/// All orders of so many of these.
fn orders(of: usize, count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let longer = |order: Vec<usize>| -> Vec<Vec<usize>> {
        let rest = (0..of).filter(|i| !order.contains(i));
        rest.map(|i| [&order[..], &[i]].concat()).collect()
    };
    orders(of, count - 1).into_iter().flat_map(longer).collect()
}

/// Requests a second of the best cuts over so many of the devices in any order.
fn best_rate(planner: &Planner<'_>, count: usize) -> f64 {
    let rate = |order: Vec<usize>| {
        let (_, lens) = best(planner, &order, 1)?;
        let mut start = 0;
        let stage = |(&place, &len): (&usize, &usize)| {
            start += len;
            let device = planner.devices[place].device;
            pipeline_infer::layout::Stage { device, layers: start - len..start }
        };
        let layout = Layout::new(order.iter().zip(&lens).map(stage).collect()).unwrap();
        Some(planner.predict(&layout).unwrap().requests_per_s)
    };
    orders(planner.devices.len(), count).into_iter().filter_map(rate).fold(0.0, f64::max)
}

#[test]
fn case_1_devices_alike_and_a_head_that_weighs_nothing() {
    let (spec, devices) = (shape("7b"), devices("4xh200-141g"));
    assert_eq!(planned(&planner(&spec, &devices, PROMPTS)), [7, 7, 7, 7]);
}

#[test]
fn case_2_a_head_that_weighs_two_layers() {
    let (spec, devices) = (shape("7b"), devices("4xh200-141g"));
    let lens = planned(&planner(&spec, &devices, ANSWERS));
    assert!(lens[3] <= 6 && lens.iter().max() == Some(&8), "{lens:?}");
}

#[test]
fn case_3_one_device_is_half_as_fast() {
    let (spec, devices) = (shape("7b"), devices("h200-141g,h200-141g:bw=2t,bf16=345t,2xh200-141g"));
    for workload in [ANSWERS, PROMPTS, Workload::default()] {
        let lens = planned(&planner(&spec, &devices, workload));
        assert!(2 * lens[1] <= lens[0] + 1, "{lens:?}");
    }
}

#[test]
fn case_4_one_device_has_little_memory() {
    // Two layers of 0.47 GB, and no third.
    let (spec, devices) = (shape("7b"), devices("h200-141g,h200-141g:mem=2g,free=1.3g,2xh200-141g"));
    assert_eq!(planned(&planner(&spec, &devices, Workload::default()))[1], 2);
}

#[test]
fn case_5_others_use_one_devices_memory() {
    let (spec, mut devices) = (shape("72b"), devices("4xh200-141g"));
    "cuda:2=30g".parse::<MemoryLimits>().unwrap().apply(&mut devices);
    let lens = planned(&planner(&spec, &devices, Workload::default()));
    assert_eq!(lens[2], 17, "of 1.76 GB each: {lens:?}");
    assert!(lens[0] >= 21 && lens[1] >= 21, "{lens:?}");
}

#[test]
fn case_6_fast_and_small_beside_slow_and_large() {
    let spec = shape("7b");
    let devices = devices("fast:mem=8g,free=7g,bw=3t,bf16=600t,slow:mem=80g,bw=500g,bf16=100t");
    let lens = planned(&planner(&spec, &devices, Workload::default()));
    // Beside the embedding of 1.09 GB.
    assert_eq!(lens[0], 12);
}

#[test]
fn case_7_a_slow_link_costs_the_stage_before_it_layers() {
    let (spec, slow, fast) = (shape("7b"), devices("h200-141g:link=0.1g,h200-141g"), devices("2xh200-141g"));
    let [slow, fast] = [slow, fast].map(|devices| planned(&planner(&spec, &devices, PROMPTS)));
    assert!(slow[0] < fast[0], "{slow:?} and {fast:?}");
}

#[test]
fn case_8_keys_and_values_that_must_have_room() {
    let (spec, devices) = (shape("7b"), devices("h200-141g,l40s"));
    let at = |kv_tokens| {
        let wanted = Planner { kv_tokens: Some(kv_tokens), ..planner(&spec, &devices, Workload::default()) };
        let lens = planned(&wanted);
        assert!(wanted.predict(&wanted.plan(2).unwrap()).unwrap().kv_tokens >= kv_tokens);
        lens[1]
    };
    // 2 KiB a token and layer: three million tokens leave the large one no room for its last layer.
    assert!(at(3_070_000) > at(16), "{} and {}", at(3_070_000), at(16));
}

#[test]
fn case_9_a_tied_embedding_counts_twice_where_it_is_on_two_devices() {
    let (spec, one) = (shape("llama-3.2-1b"), devices("one:mem=3.2g,free=2.48g,bw=1t,bf16=100t"));
    // 2.47 GB: 1.94 of layers, and the embedding once.
    assert_eq!(planned(&planner(&spec, &one, ANSWERS)), [16]);
    let two = devices("2xtwo:mem=2g,free=1.51g,bw=1t,bf16=100t");
    assert_eq!(planned(&planner(&spec, &two, ANSWERS)).iter().sum::<usize>(), 16);
    let told = planner(&spec, &devices("2xtwo:mem=2g,free=1.45g,bw=1t,bf16=100t"), ANSWERS).plan(2);
    assert!(told.unwrap_err().to_string().contains("does not fit"));
}

#[test]
fn case_10_the_small_device_goes_to_the_middle_if_any_order_will_do() {
    let spec = shape("7b");
    let devices = devices("small:mem=1.7g,free=1.5g,bw=1t,bf16=100t,2xl4");
    let planner = planner(&spec, &devices, Workload::default());
    let layout = planner.plan_any_order(3).unwrap();
    assert_eq!(layout.stages()[1].device.to_string(), "cuda:0", "{layout}");
    let rate = planner.predict(&layout).unwrap().requests_per_s;
    assert!(rate >= best_rate(&planner, 3) * (1.0 - 1e-6), "{layout}");
}

#[test]
fn case_11_a_device_that_only_delays_is_left_out() {
    let (spec, devices) = (shape("7b"), devices("2xh200-141g,slow:mem=80g,bw=5g,bf16=1t"));
    let planner = planner(&spec, &devices, Workload::default());
    let layout = planner.plan_auto().unwrap();
    assert_eq!(layout.stages().len(), 2, "{layout}");
    let rate = planner.predict(&layout).unwrap().requests_per_s;
    let best = (1..=3).map(|count| best_rate(&planner, count)).fold(0.0, f64::max);
    assert!(rate >= 0.99 * best, "{layout}: {rate} of {best}");
}

#[test]
fn case_12_two_stages_on_each_device() {
    let (spec, devices) = (shape("7b"), devices("h200-141g,h200-141g:bw=2t,bf16=345t"));
    let planner = planner(&spec, &devices, Workload::default());
    let stages = planner.plan(4).unwrap();
    let lens = lens(&stages);
    let of_devices = [lens[0] + lens[1], lens[2] + lens[3]];
    let (_, by_force) = best(&planner, &[0, 1], 2).unwrap();
    assert_eq!(of_devices[..], by_force[..], "{stages}");
    assert!(lens[0].abs_diff(lens[1]) <= 1 && lens[2].abs_diff(lens[3]) <= 1, "{stages}");
}

#[test]
fn case_13_layers_with_windows_are_cheaper_to_attend_in() {
    let mut spec = shape("mistral-7b");
    let windows = |i: usize| LayerSpec { window: (i >= 16).then_some(256) };
    spec.layers = (0..32).map(windows).collect();
    let devices = devices("2xh200-141g");
    let long = Workload { running: 64, prompt: 1, new: 30_000, chunk: 2048 };
    let lens = planned(&planner(&spec, &devices, long));
    assert!(lens[0] < lens[1], "{lens:?}");
}

#[test]
fn case_14_more_stages_than_layers_are_refused() {
    let (spec, devices) = (shape("7b"), devices("29xl4"));
    let told = planner(&spec, &devices, ANSWERS).plan(29).unwrap_err().to_string();
    assert_eq!(told, "--stages: 29 stages for a model of 28 layers: a stage would be empty");
    assert_eq!(planned(&planner(&spec, &devices[..28], ANSWERS)), [1; 28]);
}

#[test]
fn case_15_what_would_make_it_fit_does_and_less_does_not() {
    let (spec, given) = (shape("72b"), devices("2xh100-80g"));
    let wanted = Planner { kv_tokens: Some(1_000_000), ..planner(&spec, &given, Workload::default()) };
    let told = wanted.plan(2).unwrap_err().to_string();
    let after = |text: &str| -> usize {
        told.split(text).nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    let (tokens, more) = (after("--kv-tokens "), after("or with "));
    let fits = |devices: &[DeviceSpec], kv_tokens: usize| {
        let wanted = Planner { kv_tokens: Some(kv_tokens), ..planner(&spec, devices, Workload::default()) };
        let order: Vec<usize> = (0..devices.len()).collect();
        // 80 layers over four devices and more are too many cuts to try: lengths differ by little where all are alike.
        let even = Layout::even(devices.len(), 80, pipeline_infer::layout::Device::Cpu).unwrap();
        match devices.len() {
            2 => best(&wanted, &order, 1).is_some(),
            _ => taken(&wanted, &order, 1, &lens(&even)).is_some(),
        }
    };
    assert!(fits(&given, tokens) && !fits(&given, tokens + 16), "{told}");
    let with = |more: usize| vec![given[0].clone(); 2 + more];
    assert!(fits(&with(more), 1_000_000) && !fits(&with(more - 1), 1_000_000), "{told}");
}

#[test]
fn case_13_devices_that_share_the_head() {
    let spec = shape("7b");
    for text in ["4xh200-141g", "2xh200-141g,h100-80g,a100-80g", "a:mem=10g,bw=2t,bf16=400t,2xh100-80g"] {
        let devices = devices(text);
        for workload in [ANSWERS, Workload::default(), PROMPTS] {
            let of = |split_head| Planner { split_head, ..planner(&spec, &devices, workload) };
            let split = planned(&of(Some(true)));
            // Which of both it is, if nobody says, is what reaches more.
            let rate = |of: Planner<'_>| {
                let layout = of.plan(devices.len()).unwrap();
                (of.predict(&layout).unwrap().requests_per_s, layout.splits_head())
            };
            let (whole, parts, best) = (rate(of(Some(false))), rate(of(Some(true))), rate(of(None)));
            assert!(parts.1 && !whole.1 && best.0 >= whole.0.max(parts.0) * 0.99, "{text}: {split:?}");
        }
    }
}
