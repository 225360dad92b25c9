//! The examples do what they say, on a small checkpoint of the tests.

#[path = "../examples/custom_layout.rs"]
#[allow(dead_code, missing_docs, reason = "its main is not called here")]
mod custom_layout;

use std::path::Path;

#[test]
fn a_layout_of_ones_own_is_planned_written_run_and_compared() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat-llama");
    let text = custom_layout::show(&model).unwrap();
    for part in [
        "auto: 0-3@",
        "planned: ",
        "even: 0-1@cuda:0,2@cuda:1,3@cuda:2",
        "split head: 0-1@cuda:0,2@cuda:1,3@cuda:2,head@all",
        "running 0@cpu,1-3@cpu",
        // On one device all units are where they were.
        "now 0-1@cpu,2-3@cpu; 0 units moved, ",
        "0 of 1 changes of the layout by the balancer",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    for i in 0..4 {
        assert!(text.contains(&format!("request {i}: 40 tokens")), "{text}");
    }
    for stage in ["stage 0, ", "stage 1, "] {
        assert!(
            text.lines().any(|line| line.trim().starts_with(stage) && line.ends_with("ms measured")),
            "{text}"
        );
    }
}
