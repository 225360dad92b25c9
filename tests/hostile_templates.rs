//! A chat template from anywhere takes a bounded amount of memory and time, whatever it says.

mod common;

use std::time::{Duration, Instant};

use common::chat_llama;
use pipeline_infer::{
    Message,
    text::{Template, Tokenizer},
};

/// Bytes that this process may take: a render may make 128 MiB of texts and lists, and print 64 MiB; it has one
/// value of 32 MiB more at a time, and it takes some room to say so.
const MEMORY_MAX: usize = 400 << 20;

/// Long enough for a text or a list to grow beyond any memory, if nothing stops it.
const LONG: &str = "for i in range(100000)";

fn render(source: &str) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(chat_llama().join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    let tokenizer = Tokenizer::open(dir.path()).unwrap().unwrap();
    let template = Template::open(dir.path(), &tokenizer).map_err(|e| e.to_string())?.unwrap();
    template.render(&[Message::new("user", "Hi")], true).map_err(|e| e.to_string())
}

/// The most memory that this process has ever had, where that can be told.
fn memory_max() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or(0, |kib| kib.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10)
}

/// Renders it, to an end or to an error in one line. All in one test: the memory is the process's.
fn survives(source: &str) {
    let (begin, said) = (Instant::now(), render(source));
    let shown = &source[..source.len().min(120)];
    let told = match &said {
        Ok(text) => format!("{} bytes", text.len()),
        Err(line) => line.rsplit('/').next().unwrap_or_default().chars().take(100).collect(),
    };
    println!("{:6} ms {:5} MiB {shown:?}: {told}", begin.elapsed().as_millis(), memory_max() >> 20);
    assert!(said.err().is_none_or(|line| !line.contains('\n')), "{shown}");
    assert!(memory_max() < MEMORY_MAX, "{} MiB, after {shown}", memory_max() >> 20);
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}: {shown}", begin.elapsed());
}

#[test]
fn templates_that_grow_are_stopped() {
    let plain = "x".repeat(100_000);
    let spaces = " ".repeat(100_000);
    let big = "{% set b = 'x' * 10000000 %}{% set l = [0] * 200000 %}";
    let names = |value: &str| -> String { (0..60).map(|i| format!("{{% set n{i} = {value} %}}")).collect() };
    let kept = |value: &str| format!("{big}{}", names(value));
    let namespace = |value: &str| {
        format!(
            "{{% set ns = namespace(s='x', l=[1], d={{}}) %}}{{% {LONG} %}}{{% set {value} %}}{{% endfor %}}"
        )
    };
    let mut attacks = vec![
        // Plain text, which no operator makes.
        format!("{{% set a %}}{{% {LONG} %}}{plain}{{% endfor %}}{{% endset %}}"),
        format!("{{% set a %}}{{% {LONG} %}}{spaces}{{% if 1 %}}{{% endif %}}{{% endfor %}}{{% endset %}}"),
        format!("{{% set a %}}{{% {LONG} %}}{{% raw %}}{plain}{{% endraw %}}{{% endfor %}}{{% endset %}}"),
        format!("{{% macro m() %}}{plain}{{% endmacro %}}{{% {LONG} %}}{{% set x = m() %}}{{% endfor %}}"),
        format!("{{% macro m() %}}{plain}{{% endmacro %}}{}", names("[m(), m(), m(), m(), m(), m(), m()]")),
        format!("{{% macro m(n) %}}{plain}{{{{ m(n) ~ m(n) }}}}{{% endmacro %}}{{{{ m(1) }}}}"),
        format!("{{% filter upper %}}{{% {LONG} %}}{plain}{{% endfor %}}{{% endfilter %}}"),
        // The guards' own names.
        format!("{big}{{{{ ('a' * 100000) | __replace('a', b) | length }}}}"),
        format!("{big}{{{{ [['a' * 100000, 'a', b]] | map('__replace', 'a', b) | list | length }}}}"),
        format!("{big}{{{{ [b] | map('__j' ~ 'oin', b) | list | length }}}}"),
        // What makes much in one step.
        format!("{big}{{{{ {}1{} | tojson(indent=b) | length }}}}", "[".repeat(25), "]".repeat(25)),
        format!("{big}{{{{ ([1] * 100000) | tojson(separators=(b, b)) | length }}}}"),
        format!("{{{{ [{}] | length }}}}", "strftime_now('%B' * 1000000),".repeat(50)),
        "{% block a %}x{{ self.a() ~ self.a() }}{% endblock %}".into(),
        "x{% include 'chat_template' %}{% include 'chat_template' %}".into(),
        "x{% import 'chat_template' as t %}{{ t.x }}{% set x = 'x' * 30000000 %}".into(),
        "{% extends 'chat_template' %}".into(),
        format!("{big}{{{{ ([b] * 100000) | sum(start='') | length }}}}"),
        format!("{big}{{{{ ([[b]] * 100000) | sum(start=[]) | length }}}}"),
        format!("{big}{{{{ ([{{'a': b, 'c': 1}}] * 10000) | sort(attribute='a,c') | length }}}}"),
        format!("{big}{{{{ ([l] * 10000) | map('reverse') | map('list') | list | length }}}}"),
        format!("{big}{{{{ ([l] * 10000) | map('sort') | list | length }}}}"),
        format!("{big}{{{{ ([b] * 10000) | map('e') | list | length }}}}"),
        format!("{big}{{{{ ([b] * 10000) | map('safe') | list | length }}}}"),
        format!("{big}{{{{ ([b] * 10000) | map('reverse') | list | length }}}}"),
        format!("{big}{{{{ ([l] * 10000) | pprint | length }}}}"),
        format!("{big}{{{{ debug() | length }}}}"),
        "{{ ('\\n' * 30000000).splitlines() | length }}{{ ('\\n' * 30000000).splitlines() | length }}".into(),
        format!("{{{{ [{}] | length }}}}", "('\\n' * 3000000).splitlines(), ".repeat(100)),
        // Lists in lists, deeper than a stack.
        namespace("ns.l = [ns.l]"),
        namespace("ns.d = dict(a=ns.d)"),
        namespace("ns.d = namespace(a=ns.d)"),
        namespace("ns.d = {'a': ns.d}.items()"),
        namespace("ns.d = ns.d | items | list"),
        namespace("ns.l = ns.l[0:]"),
        namespace("ns.l = ns.l | reverse"),
        namespace("ns.l = ns.l | chain([1])"),
        namespace("ns.l = ns.l | zip"),
        namespace("ns.l = ns.l | chain(ns.l)"),
        namespace("ns.l = ns.l + ns.l"),
        namespace("ns.l = [1] + ns.l"),
        namespace("ns.l = (ns.l, ns.l)"),
        namespace("ns.l = ns.l | groupby('a')"),
        format!("{{{{ [1]{} | length }}}}", "[0:]".repeat(30_000)),
        format!("{{{{ [1]{} | length }}}}", "|reverse".repeat(20_000)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(50_000)),
        format!("{{{{ 'a'{} }}}}", " ~ 'a'".repeat(30_000)),
        format!("{{{{ x{} }}}}", ".a".repeat(100_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(200_000)),
        format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(15_000)),
        format!("{{{{ 1{} }}}}", " ** 1".repeat(40_000)),
        format!("{{{{ 1{} }}}}", " and 1".repeat(30_000)),
        format!("{{{{ 1{} }}}}", " < 1".repeat(30_000)),
        "{% if 0 %}".to_owned() + &"{% elif 0 %}".repeat(20_000) + "{% endif %}",
        "{% for a in b %}{% else %}".repeat(10_000),
        // A namespace in itself is never freed.
        "{% set ns = namespace() %}{% set ns.me = ns %}{% set ns.big = 'x' * 30000000 %}".repeat(3),
        "{% set ns = namespace() %}{% set x = [ns] | reverse %}{% set ns.me = x %}".into(),
        "{% set ns = namespace() %}{% for ns.me in [ns] %}{% endfor %}".into(),
        "{% set ns = namespace() %}{% with ns.me = ns %}{% endwith %}".into(),
        "{% set ns = namespace() %}{% set (ns.me, b) = (ns, 1) %}".into(),
        "{% set ns = namespace() %}{% set ns['me'] = ns %}".into(),
        "{% set ns = namespace() %}{% set ns.me = [[ns]] + [] %}".into(),
        "{% set ns = namespace() %}{% set ns.me = ns.__class__ or dict(a=ns) %}".into(),
        "{% set ns = namespace() %}{% macro m() %}{{ ns }}{% endmacro %}{% set ns.me = m %}".into(),
        "{% set ns = namespace() %}{% set ns.me = {'a': ns}.values() %}".into(),
    ];
    // What is made once, and kept under many names.
    let values = [
        "b[0:]",
        "b[1:]",
        "b[::-1]",
        "l[1:]",
        "l[::-1]",
        "l + l",
        "l * 2",
        "l | list",
        "l | sort",
        "l | reverse",
        "(l,)[0:]",
        "l | reverse | list",
        "l | map('string') | list",
        "l | select('number') | list",
        "l | unique | list",
        "b | list",
        "b | e",
        "b | safe",
        "b | string",
        "b | upper",
        "b.upper()",
        "b.split('x')",
        "b | split('x')",
        "l | tojson",
        "l | string",
        "l | join",
        "b | reverse",
        "b | replace('x', 'yy')",
        "b | indent",
        "b | trim",
        "b.strip()",
        "'%s' | format(b)",
        "'{}'.format(b)",
        "b ~ b",
        "b + b",
        "b * 2",
        "dict(a=b[1:])",
        "namespace(a=b[1:])",
        "[b[1:]]",
        "{'a': b[1:]}",
        "[l[1:] | list, l[2:] | list]",
        "(l + [1])[:]",
        "l | groupby('a')",
        "range(100000) | list",
        "[range(100000) | list] * 100",
        "(b, b[1:])[1]",
        "b[1:] if b else b",
        "b and b[1:]",
        "b | default(b[1:], true)",
        "m(b[1:])",
        "m(l | list)",
        "l | batch(2) | list",
        "l | slice(3) | list",
        "l | zip(l) | list",
        "l | chain(l) | list",
    ];
    attacks
        .extend(values.map(|value| format!("{{% macro m(x) %}}{{{{ x }}}}{{% endmacro %}}{}", kept(value))));
    for attack in &attacks {
        survives(attack);
    }
}
