//! Flags, their errors, help, completions, the manual page.

use super::*;

/// Every flag of `run`. One that is renamed or goes missing is noticed here, in the help and in the README.
const FLAGS: &[&str] = &[
    "--model",
    "--stages",
    "--split",
    "--layout",
    "--device",
    "--devices",
    "--dtype",
    "--weights",
    "--max-context",
    "--kv-memory",
    "--device-memory",
    "--no-profiles",
    "--slots",
    "--chunk",
    "--running",
    "--balance",
    "--no-prefix-cache",
    "--waiting",
    "--waiting-tokens",
    "--threads",
    "--timeline",
    "--prompt",
    "--prompt-file",
    "--prompt-ids",
    "--chat",
    "--raw",
    "--system",
    "--image",
    "--video",
    "--fps",
    "--max-pixels",
    "--min-pixels",
    "--max-tokens",
    "--temperature",
    "--top-k",
    "--top-p",
    "--min-p",
    "--repetition-penalty",
    "--presence-penalty",
    "--frequency-penalty",
    "--logit-bias",
    "--seed",
    "--stop",
    "--ignore-eos",
    "--n",
    "--priority",
    "--logprobs",
    "--format",
    "--verbose",
    "--log-format",
    "--help",
    "--version",
];

/// The flags that a text names.
fn named(text: &str) -> Vec<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let mut names: Vec<String> = text
        .split(|c| !word(c))
        .filter(|w| w.starts_with("--") && w.len() > 2)
        .map(|w| w.trim_end_matches('-').to_owned())
        .collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn help_and_the_manual_list_every_flag_and_the_readme_too() {
    for args in [&["--help"][..], &["run", "--help"]] {
        let help = good(&run(args));
        let names = named(&help);
        for flag in FLAGS {
            // A subcommand has the program's version.
            let own = *flag != "--version" || args.len() == 1;
            assert!(!own || names.iter().any(|n| n == flag), "{flag} is not in {args:?}:\n{help}");
        }
        for name in &names {
            assert!(FLAGS.contains(&&name[..]), "{name} is not in the list of flags");
        }
    }
    let manual = good(&run(&["man"])).replace("\\-", "-");
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    for flag in FLAGS {
        assert!(manual.contains(flag), "{flag} is not in the manual");
        assert!(named(&readme).iter().any(|n| n == flag), "{flag} is not in README.md");
    }
}

#[test]
fn completions_and_version() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(good(&run(&["completions", shell])).contains("prompt-file"), "{shell}");
    }
    assert!(error(&run(&["completions"]), 2).contains("SHELL"));
    assert!(error(&run(&["completions", "csh"]), 2).contains("csh"));
    let version = good(&run(&["--version"]));
    assert!(version.starts_with(concat!("pipeline-infer ", env!("CARGO_PKG_VERSION"), " (")), "{version}");
    assert!(version.contains("backends: cpu, cuda") && version.contains("oldest Rust"));
    assert_eq!(good(&run(&["-V"])).trim(), concat!("pipeline-infer ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_one_line_and_exit_code_2() {
    let model = ["--model", "x", "--prompt", "a"];
    let cases: &[(&[&str], &str)] = &[
        (&["--max-tokens", "x"], "--max-tokens"),
        (&["--max-tokens", "0"], "--max-tokens"),
        (&["--temperature", "-1"], "--temperature: -1"),
        (&["--temperature", "nan"], "--temperature"),
        (&["--temperature", "hot"], "--temperature"),
        (&["--top-p", "1.5"], "--top-p: 1.5"),
        (&["--min-p", "-0.1"], "--min-p"),
        (&["--top-k", "-1"], "--top-k"),
        (&["--repetition-penalty", "0"], "--repetition-penalty"),
        (&["--presence-penalty", "inf"], "--presence-penalty"),
        (&["--logit-bias", "1=2"], "--logit-bias"),
        (&["--seed", "-1"], "--seed"),
        (&["--stop", ""], "--stop"),
        (&["--n", "0"], "--n"),
        (&["--logprobs", "3"], "--format json"),
        (&["--stages", "0"], "--stages"),
        (&["--stages", "two"], "--stages"),
        (&["--stages", "2", "--layout", "0-1,2-3"], "--layout"),
        (&["--layout", "0-1,3"], "layer 2 is in no stage"),
        (&["--layout", "0-1", "--device", "cpu"], "--device"),
        (&["--device", "tpu"], "--device tpu"),
        (&["--device", "cpu", "--devices", "cpu"], "--device"),
        (&["--layout", "0-1", "--devices", "cpu"], "--layout"),
        (&["--dtype", "int4"], "int4"),
        (&["--weights", "fake"], "fake"),
        (&["--kv-memory", "1X"], "--kv-memory"),
        (&["--kv-memory", "0"], "--kv-memory"),
        (&["--max-context", "0"], "--max-context"),
        (&["--slots", "0"], "--slots"),
        (&["--chunk", "0"], "--chunk"),
        (&["--running", "0"], "--running"),
        (&["--waiting", "0"], "--waiting"),
        (&["--waiting-tokens", "0"], "--waiting-tokens"),
        (&["--threads", "0"], "--threads"),
        (&["--format", "xml"], "xml"),
        (&["--log-format", "xml"], "xml"),
        (&["--chat", "--raw"], "--raw"),
        (&["--raw", "--system", "s"], "--raw"),
        (&["--prompt-file", "f"], "--prompt-file"),
        (&["--prompt-ids", "1,2"], "--prompt-ids"),
        (&["--nonsense"], "--nonsense"),
        (&["--maxtokens", "3"], "'--max-tokens'"),
    ];
    for (args, needle) in cases {
        let told = error(&run(&[&model, *args].concat()), 2);
        assert!(told.contains(needle), "{args:?}: {told}");
    }
    let ids = ["--model", "x", "--prompt-ids", "1"];
    for args in [&["--chat"][..], &["--system", "s"], &["--prompt-file", "f"]] {
        error(&run(&[&ids, args].concat()), 2);
    }
    assert!(error(&run(&["--model", "x", "--prompt-ids", "1,-2"]), 2).contains("--prompt-ids"));
    assert!(error(&run(&[]), 2).contains("--model"));
    assert!(error(&run(&["fly"]), 2).contains("fly"));
    assert!(error(&run(&["--model", "x"]), 2).contains("stdin is empty"));
    let told = error(&program(&model).env("RUST_LOG", "a=b=c").output().unwrap(), 2);
    assert!(told.contains("RUST_LOG"), "{told}");
}

#[test]
fn the_subcommand_run_is_the_default() {
    let args = ["--model", &data("no-such-model"), "--prompt", "a"];
    let told = error(&run(&args), 2);
    assert!(told.contains("no-such-model"), "{told}");
    assert_eq!(error(&run(&[&["run"], &args[..]].concat()), 2), told);
}

#[test]
fn flags_of_all_subcommands_stand_before_and_after_the_name() {
    for args in [&["-v", "--log-format", "json", "completions", "bash"][..], &["completions", "-vv", "bash"]]
    {
        good(&run(args));
    }
    let told = error(&run(&["--stages", "2", "completions", "bash"]), 2);
    assert!(told.contains("--stages: it goes after the subcommand"), "{told}");
}

#[test]
fn logs_are_text_or_json() {
    let flags = ["--model", &model(), "--prompt", "Hello", "--max-tokens", "2", "--format", "json", "-vv"];
    let text = run(&flags);
    good(&text);
    assert!(stderr(&text).contains("loaded") && stderr(&text).contains("submitted"), "{}", stderr(&text));
    let output = run(&[&flags[..], &["--log-format", "json"]].concat());
    for line in stderr(&output).lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["fields"]["message"].is_string());
    }
    assert!(stderr(&output).contains("loaded"));
}

#[test]
fn a_closed_stdout_is_quiet() {
    for args in [&["man"][..], &["completions", "bash"], &["--help"], &["--version"]] {
        let mut child = program(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), &stderr(&output)[..]), (Some(0), ""), "{args:?}");
    }
}
