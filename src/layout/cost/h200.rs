//! Passes that stages on H200s were measured with, in bf16, beside what is predicted of them.
//!
//! All that `bench throughput` wrote of runs of 7b and 72b, with and without prompts, of 1 to 4 GPUs: kinds of passes of which
//! a run measured 4 or more (of fewer, hiccups are no measurement). Not among them are those of stages that share a GPU,
//! which take turns on it: each was twice as long as alone.

use super::*;
use crate::{
    batch::PassShape,
    layout::{Compared, Layout, Planner, StageTime, compare},
    model::shapes,
};

/// Kinds of passes of a run.
struct Run {
    /// `model/requests x prompt x new tokens`, as results have it.
    source: &'static str,
    /// Of the model, those that were there: 40 of 72b's 80 fit on two GPUs beside what else was measured.
    layers: usize,
    layout: &'static str,
    passes: &'static [(Pass, &'static [f64])], // milliseconds of the stages
}

const fn single(rows: usize, context: usize) -> Pass {
    Pass::Decode { rows, context }
}

const fn mixed(rows: usize, outputs: usize, attended: usize, read: usize) -> Pass {
    Pass::Batch(PassShape { rows, outputs, attended, read })
}

#[rustfmt::skip]
const RUNS: &[Run] = &[
    Run { source: "7b/1x512x128/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(1, 588), &[3.663]),
    ] },
    Run { source: "7b/1x512x128/s4", layers: 28, layout: "0-6@cuda:0,7-14@cuda:1,15-22@cuda:2,23-27@cuda:3", passes: &[
        (single(1, 578), &[0.860, 0.980, 0.980, 0.882]),
    ] },
    Run { source: "7b/256x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(256, 649), &[9.284]),
    ] },
    Run { source: "7b/64x512x256/s4", layers: 28, layout: "0-6@cuda:0,7-14@cuda:1,15-21@cuda:2,22-27@cuda:3", passes: &[
        (single(16, 654), &[1.081, 1.235, 1.082, 1.208]),
        (mixed(2035, 10, 521_362, 3018), &[10.558, 12.331, 10.586, 8.806]),
    ] },
    Run { source: "7b/256x512x256/s4", layers: 28, layout: "0-6@cuda:0,7-14@cuda:1,15-21@cuda:2,22-27@cuda:3", passes: &[
        (single(64, 742), &[1.199, 1.366, 1.200, 1.338]),
        (mixed(2048, 37, 533_788, 16_954), &[10.435, 13.058, 10.690, 8.882]),
        (mixed(1086, 3, 277_725, 513), &[5.399, 6.107, 5.459, 4.859]),
        (mixed(960, 3, 245_110, 449), &[4.783, 5.452, 4.877, 4.335]),
        (single(60, 761), &[1.199, 1.365, 1.200, 1.334]),
        (single(50, 767), &[1.170, 1.333, 1.171, 1.304]),
        (single(42, 758), &[1.144, 1.303, 1.142, 1.273]),
        (single(34, 768), &[1.127, 1.277, 1.121, 1.251]),
        (single(29, 750), &[1.121, 1.262, 1.106, 1.243]),
        (single(25, 749), &[1.101, 1.241, 1.090, 1.231]),
        (single(21, 748), &[1.080, 1.216, 1.071, 1.213]),
        (single(17, 759), &[1.076, 1.212, 1.065, 1.206]),
        (single(13, 739), &[1.076, 1.230, 1.077, 1.203]),
        (single(9, 732), &[1.051, 1.189, 1.051, 1.198]),
        (single(5, 766), &[1.005, 1.150, 0.995, 1.160]),
    ] },
    Run { source: "7b/32x4096x1/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (mixed(8192, 2, 16_781_312, 0), &[182.848]),
    ] },
    Run { source: "7b/32x4096x1/s4", layers: 28, layout: "0-6@cuda:0,7-13@cuda:1,14-20@cuda:2,21-27@cuda:3", passes: &[
        (mixed(1909, 1, 4_097_299, 0), &[11.712, 11.506, 11.904, 11.599]),
    ] },
    Run { source: "72b/1x512x64/s4", layers: 80, layout: "0-19@cuda:0,20-40@cuda:1,41-60@cuda:2,61-79@cuda:3", passes: &[
        (single(1, 546), &[8.411, 8.854, 8.438, 8.624]),
        (mixed(128, 0, 41_024, 0), &[9.760, 10.225, 9.839, 9.482]),
    ] },
    Run { source: "72b/64x512x128/s4", layers: 80, layout: "0-19@cuda:0,20-40@cuda:1,41-60@cuda:2,61-79@cuda:3", passes: &[
        (single(16, 577), &[8.654, 9.133, 8.702, 8.857]),
        (mixed(2058, 14, 530_387, 5075), &[120.404, 125.981, 125.072, 108.842]),
    ] },
    Run { source: "72b/32x4096x1/s4", layers: 80, layout: "0-19@cuda:0,20-39@cuda:1,40-59@cuda:2,60-79@cuda:3", passes: &[
        (mixed(1972, 0, 4_099_036, 0), &[116.467, 116.338, 119.521, 115.714]),
    ] },
    Run { source: "7b/1x512x128/s4", layers: 28, layout: "0-6@cuda:0,7-14@cuda:1,15-22@cuda:2,23-27@cuda:3", passes: &[
        (single(1, 576), &[0.859, 0.978, 0.982, 0.884]),
    ] },
    Run { source: "7b/256x512x256/s4.0-7+8-14+15-21+22-27", layers: 28, layout: "0-7@cuda:0,8-14@cuda:1,15-21@cuda:2,22-27@cuda:3", passes: &[
        (single(64, 657), &[1.350, 1.183, 1.183, 1.320]),
        (mixed(2048, 37, 532_161, 17_047), &[13.287, 10.277, 10.738, 8.901]),
        (single(62, 759), &[1.366, 1.200, 1.201, 1.337]),
    ] },
    Run { source: "7b/256x512x256/s4.even", layers: 28, layout: "0-6@cuda:0,7-13@cuda:1,14-20@cuda:2,21-27@cuda:3", passes: &[
        (single(64, 659), &[1.181, 1.181, 1.183, 1.496]),
        (mixed(2083, 39, 543_422, 18_110), &[12.130, 11.975, 12.351, 12.182]),
        (single(51, 764), &[1.176, 1.171, 1.173, 1.472]),
        (single(35, 757), &[1.128, 1.129, 1.129, 1.422]),
    ] },
    Run { source: "7b/128x512x512.then8192/s4", layers: 28, layout: "0-6@cuda:0,7-14@cuda:1,15-21@cuda:2,22-27@cuda:3", passes: &[
        (single(32, 884), &[1.139, 1.300, 1.141, 1.258]),
        (mixed(2062, 18, 532_744, 7432), &[11.377, 13.875, 11.397, 9.478]),
        (mixed(72, 32, 286_840, 19_543), &[1.670, 1.898, 1.673, 1.712]),
        (mixed(86, 32, 223_646, 19_048), &[1.580, 1.788, 1.580, 1.638]),
        (mixed(99, 32, 178_363, 18_830), &[1.604, 1.823, 1.601, 1.672]),
    ] },
    Run { source: "7b/64x2112x16.prefix2048/s4", layers: 28, layout: "0-6@cuda:0,7-13@cuda:1,14-20@cuda:2,21-27@cuda:3", passes: &[
        (mixed(2031, 8, 2_172_520, 15_815), &[11.461, 11.364, 11.854, 11.814]),
        (single(16, 2120), &[1.107, 1.108, 1.107, 1.390]),
    ] },
    Run { source: "7b/1x512x128/s2", layers: 28, layout: "0-14@cuda:0,15-27@cuda:1", passes: &[
        (single(1, 572), &[1.822, 1.853]),
    ] },
    Run { source: "7b/256x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(256, 644), &[9.379]),
    ] },
    Run { source: "7b/256x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(256, 643), &[9.375]),
    ] },
    Run { source: "72b/256x512x64/s2.slots4.chunk2048", layers: 40, layout: "0-19@cuda:0,20-39@cuda:1", passes: &[
        (mixed(2077, 33, 540_232, 14_920), &[123.254, 123.138]),
        (single(64, 546), &[9.906, 10.761]),
    ] },
    Run { source: "7b/64x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(64, 639), &[5.052]),
    ] },
    Run { source: "7b/256x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(256, 645), &[9.582]),
        (mixed(8192, 210, 2_149_756, 100_697), &[177.529]),
    ] },
    Run { source: "72b/128x512x128/s2.planned.uneven", layers: 80, layout: "0-45@cuda:0,46-79@cuda:1", passes: &[
        (single(64, 557), &[22.993, 17.404]),
        (mixed(4096, 48, 1_061_123, 20_834), &[517.951, 369.711]),
        (mixed(3136, 11, 797_378, 2309), &[392.119, 284.766]),
    ] },
    Run { source: "72b/128x512x128/s2.even.uneven", layers: 80, layout: "0-39@cuda:0,40-79@cuda:1", passes: &[
        (single(14, 613), &[17.648, 18.287]),
        (single(16, 532), &[17.634, 18.265]),
        (single(5, 560), &[17.450, 18.222]),
        (single(4, 602), &[17.976, 18.597]),
        (mixed(2048, 6, 525_317, 1026), &[223.872, 224.852]),
    ] },
    // With products for up to 128 rows by own kernels.
    Run { source: "7b/16x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(16, 648), &[4.235]),
    ] },
    Run { source: "7b/64x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(64, 626), &[4.997]),
    ] },
    Run { source: "7b/64x8192x128/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(64, 8270), &[11.359]),
        (mixed(8192, 23, 33_568_217, 177_800), &[201.698]),
    ] },
    Run { source: "7b/128x512x256/s1", layers: 28, layout: "0-27@cuda:0", passes: &[
        (single(128, 624), &[6.389]),
    ] },
    Run { source: "7b/64x512x256/s2", layers: 28, layout: "0-14@cuda:0,15-27@cuda:1", passes: &[
        (single(32, 655), &[2.243, 2.219]),
        (mixed(3072, 17, 788_451, 6037), &[33.774, 28.663]),
    ] },
    Run { source: "7b/256x512x256/s2", layers: 28, layout: "0-13@cuda:0,14-27@cuda:1", passes: &[
        (single(128, 656), &[2.871, 3.333]),
        (mixed(3072, 76, 807_322, 36_567), &[32.735, 33.842]),
    ] },
];

#[test]
fn measured_passes_are_predicted_within_a_tenth() {
    let (mut sum, mut count) = (0.0, 0);
    for run in RUNS {
        let model = run.source.split('/').next().unwrap();
        let mut spec = shapes::find(model).unwrap().unwrap();
        spec.layers.truncate(run.layers);
        let layout: Layout = run.layout.parse().unwrap();
        let devices = DeviceSpec::list(&format!("{}xh200-141g", layout.stages().len())).unwrap();
        let planner = Planner::new(&spec, DType::BF16, &devices);
        for &(pass, stages) in run.passes {
            let time = |(stage, ms): (usize, &f64)| StageTime { stage, pass, seconds: ms / 1e3, passes: 4 };
            let times: Vec<StageTime> = stages.iter().enumerate().map(time).collect();
            for told in compare(&planner, &layout, &times).unwrap() {
                let Compared { stage, predicted, measured, error_percent, .. } = told;
                let (source, said, took) = (run.source, 1e3 * predicted, 1e3 * measured);
                let off = format!(
                    "{source}, {pass}, stage {stage}: {said:.3} ms, not {took}: {error_percent:+.1}%"
                );
                println!("{off}");
                assert!(error_percent.abs() < 10.0, "{off}");
                (sum, count) = (sum + error_percent.abs(), count + 1);
            }
        }
    }
    // The mean says more of the model than the worst does.
    assert!(count > 150 && sum / f64::from(count) < 5.0, "{count} passes, {:.2}%", sum / f64::from(count));
}
