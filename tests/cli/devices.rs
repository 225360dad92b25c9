//! `devices`, on machines with GPUs and without.

use super::*;

#[test]
fn the_processor_is_always_there_and_the_lack_of_gpus_has_a_reason() {
    let machine = json(&run(&["devices", "--no-measure", "--format", "json"]));
    assert!(machine["cpu"]["cores"].as_u64().unwrap() > 0);
    assert!(machine["cpu"]["name"].is_string() && machine["cpu"]["instructions"].is_string());
    let gpus = machine["gpus"].as_array().unwrap();
    assert_eq!(gpus.is_empty(), machine["no_gpu"].is_string());
    assert_eq!(machine["links"].as_array().unwrap().len(), gpus.len() * gpus.len().saturating_sub(1));
    assert!(gpus.iter().all(|gpu| gpu["copy_gb_per_s"].is_null()));
    let text = good(&run(&["devices", "--no-measure"]));
    assert!(text.starts_with("cpu  "), "{text}");
    assert_eq!(text.lines().any(|line| line.starts_with("no GPU: ")), gpus.is_empty(), "{text}");
    if gpus.is_empty() {
        assert_eq!(text.lines().count(), 2, "{text}");
        assert_eq!(good(&run(&["devices"])), text, "nothing is measured");
    }
}

#[test]
fn wrong_flags_are_one_line() {
    for (args, needle) in [(&["--format", "xml"][..], "xml"), (&["--measure"], "--measure"), (&["x"], "x")] {
        let told = error(&run(&[&["devices"], args].concat()), 2);
        assert!(told.contains(needle), "{told}");
    }
}
