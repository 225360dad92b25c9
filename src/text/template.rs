//! Chat templates: a conversation as the text that a model was trained to answer.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use serde_json::Value as Json;

use crate::{
    error::{Error, Result},
    request::Message,
    text::{Tokenizer, jinja, jinja_guard, jinja_limits, read_file},
};

const FILE_BYTES_MAX: u64 = 4 << 20;
const NAME: &str = "chat_template";

/// A model's chat template.
///
/// Templates come with model folders and are not trusted: a render takes a bounded number of steps, and
/// makes a bounded amount of text and lists (see `jinja_limits`).
pub struct Template {
    env: Environment<'static>,
    path: PathBuf,
    /// `bos_token`, `eos_token` and their like, where the folder names them.
    tokens: Vec<(&'static str, String)>,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("path", &self.path).finish()
    }
}

impl Template {
    /// Opens a model folder's chat template: `chat_template.jinja`, else `chat_template.json`, else what
    /// `tokenizer_config.json` holds; `None` if there is none.
    pub fn open(model_dir: &Path, tokenizer: &Tokenizer) -> Result<Option<Template>> {
        let Some((path, source)) = find(model_dir, tokenizer)? else { return Ok(None) };
        let mut env = Environment::new();
        env.set_syntax(jinja::syntax());
        env.set_auto_escape_callback(|_| AutoEscape::None);
        jinja::add_to(&mut env);
        jinja_limits::add_to(&mut env);
        env.set_fuel(Some(jinja_limits::FUEL));
        if source.len() > jinja_limits::SOURCE_MAX {
            let (len, max) = (source.len(), jinja_limits::SOURCE_MAX);
            return Err(Error::data(
                &path,
                format!("the chat template has {len} bytes; at most {max} are read"),
            ));
        }
        let guarded = jinja_guard::guard_source(&source).map_err(|e| describe(&path, &e))?;
        env.add_template_owned(NAME, guarded).map_err(|e| describe(&path, &e))?;
        let config = tokenizer.config();
        let tokens = [
            ("bos_token", &config.bos_token),
            ("eos_token", &config.eos_token),
            ("pad_token", &config.pad_token),
            ("unk_token", &config.unk_token),
        ];
        let tokens = tokens.into_iter().filter_map(|(name, token)| Some((name, token.clone()?))).collect();
        Ok(Some(Template { env, path, tokens }))
    }

    /// The conversation's text. `add_generation_prompt` ends it where the assistant's answer begins.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let failed = |e: minijinja::Error| describe(&self.path, &e);
        let template = self.env.get_template(NAME).map_err(failed)?;
        let size = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let messages = messages
            .iter()
            .map(|m| Value::from_pairs([("role", Value::from(m.role.as_str())), ("content", content(m))]));
        let mut variables = vec![
            ("messages", messages.collect()),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        variables.extend(self.tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str()))));
        let mut out = Limited(Vec::new());
        jinja_limits::begin(size);
        template.render_captured_to(Value::from_pairs(variables), &mut out).map_err(failed)?;
        String::from_utf8(out.0).map_err(|e| Error::data(&self.path, e.to_string()))
    }
}

/// A message's text, or the list of its parts where there are images, as templates that know them want it.
fn content(message: &Message) -> Value {
    let text = message.content.as_str();
    if message.media.is_empty() {
        return Value::from(text);
    }
    let part = |kind, text: Option<&str>| {
        let pairs = [("type", Some(kind)), ("text", text)];
        Value::from_pairs(pairs.into_iter().filter_map(|(key, value)| Some((key, value?))))
    };
    let (mut parts, mut from) = (Vec::new(), 0);
    let mut push = |parts: &mut Vec<Value>, to: usize| {
        let between = text.get(from..to).filter(|between| !between.is_empty());
        parts.extend(between.map(|between| part("text", Some(between))));
        from = to;
    };
    for inset in &message.media {
        push(&mut parts, inset.at);
        parts.push(part(if inset.media.seconds.is_some() { "video" } else { "image" }, None));
    }
    push(&mut parts, text.len());
    Value::from(parts)
}

/// Where the template is, and its text.
fn find(model_dir: &Path, tokenizer: &Tokenizer) -> Result<Option<(PathBuf, String)>> {
    let path = model_dir.join("chat_template.jinja");
    if let Some(bytes) = read_file(&path, FILE_BYTES_MAX)? {
        let source = String::from_utf8(bytes).map_err(|e| Error::data(&path, e.to_string()))?;
        return Ok(Some((path, source)));
    }
    let path = model_dir.join("chat_template.json");
    if let Some(bytes) = read_file(&path, FILE_BYTES_MAX)? {
        let json: Json = serde_json::from_slice(&bytes).map_err(|e| Error::data(&path, e.to_string()))?;
        let source = choose(&path, json.get("chat_template"))?;
        return match source {
            Some(source) => Ok(Some((path, source))),
            None => Err(Error::data(&path, "has no chat_template")),
        };
    }
    let path = model_dir.join("tokenizer_config.json");
    Ok(choose(&path, tokenizer.config().chat_template.as_ref())?.map(|source| (path, source)))
}

/// A template is a string, or one of a list of `{name, template}`: the one named `default`, or the only one.
fn choose(path: &Path, template: Option<&Json>) -> Result<Option<String>> {
    let text = |json: &Json| json.as_str().map(str::to_owned);
    match template {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(source)) => Ok(Some(source.clone())),
        Some(Json::Array(list)) => {
            let default = list.iter().find(|t| t["name"] == "default");
            let only = list.first().filter(|_| list.len() == 1);
            match default.or(only).and_then(|t| text(&t["template"])) {
                Some(source) => Ok(Some(source)),
                None => Err(Error::data(path, "chat_template: the list has no template named \"default\"")),
            }
        }
        Some(_) => Err(Error::data(path, "chat_template is neither a string nor a list")),
    }
}

/// A template's error in one line. What the template itself raises is the request's fault, not the file's.
fn describe(path: &Path, error: &minijinja::Error) -> Error {
    if let Some(said) = jinja::raised(error) {
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        return Error::Request(format!("{}: the chat template refuses: {said}", path.display()));
    }
    let why = match error.kind() {
        ErrorKind::OutOfFuel => "the chat template takes too many steps".to_owned(),
        ErrorKind::WriteFailure => {
            format!("the chat template makes more than {} MiB of text", jinja_limits::OUTPUT_MAX >> 20)
        }
        kind => match error.detail() {
            Some(detail) => format!("chat template: {kind}: {detail}"),
            None => format!("chat template: {kind}"),
        },
    };
    match error.line() {
        Some(line) => Error::data(path, format!("{why} (line {line} of the template)")),
        None => Error::data(path, why),
    }
}

/// Takes at most `OUTPUT_MAX` bytes.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > jinja_limits::OUTPUT_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixtures::{byte_level, folder, open};
    use serde::Deserialize;

    const TOKENS: &str = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;

    fn template(source: &str) -> Result<Template> {
        let tokenizer = byte_level().to_string();
        let dir = folder(&[
            ("tokenizer.json", &tokenizer),
            ("tokenizer_config.json", TOKENS),
            ("chat_template.jinja", source),
        ]);
        Ok(Template::open(dir.path(), &open(dir.path()))?.expect("there is a template"))
    }

    fn render(source: &str) -> Result<String> {
        template(source)?.render(&[Message::new("user", "Hi"), Message::new("assistant", "Yes")], true)
    }

    fn error(source: &str) -> String {
        let error = render(source).expect_err(&source[..source.len().min(200)]).to_string();
        assert!(error.contains("chat_template.jinja: ") && !error.contains('\n'), "{error}");
        error.rsplit_once("chat_template.jinja: ").unwrap().1.to_owned()
    }

    #[derive(Deserialize)]
    struct Case {
        template: String,
        add_generation_prompt: bool,
        messages: Vec<Message>,
        expected: Option<String>,
    }

    #[test]
    fn published_templates_render_as_in_transformers() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/text/testdata");
        let cases: Vec<Case> =
            serde_json::from_slice(&std::fs::read(dir.join("chat.json")).unwrap()).unwrap();
        assert!(cases.len() >= 15);
        for case in cases {
            let source = std::fs::read_to_string(dir.join(&case.template)).unwrap();
            let got = template(&source).and_then(|t| t.render(&case.messages, case.add_generation_prompt));
            match case.expected {
                Some(expected) => assert_eq!(got.unwrap(), expected, "{}", case.template),
                None => assert!(got.is_err(), "{}", case.template),
            }
        }
    }

    #[test]
    fn a_template_is_found_in_any_of_its_files() {
        let tokenizer = byte_level().to_string();
        let find = |files: &[(&str, &str)]| {
            let dir = folder(&[&[("tokenizer.json", tokenizer.as_str())], files].concat());
            let found = Template::open(dir.path(), &open(dir.path()));
            found.map(|t| t.map(|t| t.render(&[], false).unwrap())).map_err(|e| e.to_string())
        };
        let config = ("tokenizer_config.json", r#"{"chat_template": "config"}"#);
        let json = ("chat_template.json", r#"{"chat_template": "json"}"#);
        assert_eq!(find(&[]), Ok(None));
        assert_eq!(find(&[config]), Ok(Some("config".into())));
        assert_eq!(find(&[config, json]), Ok(Some("json".into())));
        assert_eq!(find(&[config, json, ("chat_template.jinja", "jinja")]), Ok(Some("jinja".into())));
        let list = |text| find(&[("tokenizer_config.json", text)]);
        let two =
            r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(list(two), Ok(Some("d".into())));
        assert_eq!(list(r#"{"chat_template": [{"name": "only", "template": "o"}]}"#), Ok(Some("o".into())));
        for bad in [
            r#"{"chat_template": []}"#,
            r#"{"chat_template": 3}"#,
            r#"{"chat_template": [{"name": "default"}]}"#,
        ] {
            assert!(list(bad).unwrap_err().contains("tokenizer_config.json: chat_template"));
        }
        assert!(find(&[("chat_template.json", "{}")]).unwrap_err().contains("chat_template.json: has no"));
        assert!(find(&[("chat_template.json", "{")]).unwrap_err().contains("chat_template.json: "));
    }

    #[test]
    fn python_and_its_tools_are_understood() {
        let ok = |source: &str| render(source).unwrap();
        assert_eq!(ok("{{ bos_token }}{{ messages[0]['content'].upper() }}{{ eos_token }}"), "<s>HI</s>");
        assert_eq!(
            ok("{{ pad_token }}|{{ tools is none }}|{{ add_generation_prompt }}|{{ none }}"),
            "|True|True|None"
        );
        assert_eq!(ok("  {% if true %}\n a\n  {%- endif %}\n"), " a");
        assert_eq!(
            ok(
                "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}"
            ),
            "assistant"
        );
        assert_eq!(
            ok("{{ messages | tojson }}"),
            r#"[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]"#
        );
        assert_eq!(
            ok("{{ 'a,b'.split(',')[-1].strip() }}{{ {'a': 1}.get('b', 2) }}{{ 'x'.join(['1', '2']) }}"),
            "b21x2"
        );
        assert_eq!(ok("{{ tools is iterable }}{{ 'a' is iterable }}{{ x is iterable }}"), "FalseTrueTrue");
        assert_eq!(ok("{{ tools is sequence }}{{ 'a' is sequence }}{{ {} is sequence }}"), "FalseTrueTrue");
        assert_eq!(ok("{{ strftime_now('%Y') | int > 2020 }}"), "True");
        assert_eq!(ok("{%- generation -%} a {%- endgeneration -%}"), "a");
        assert_eq!(
            ok(
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
            ),
            "2"
        );
        assert_eq!(ok("{% set a, b = 1, 'x=y' %}{% set c = a if a == 2 else b %}{{ a }}{{ c }}"), "1x=y");
        assert_eq!(ok("{% set x %}b{{ 1 }}{% endset %}{%set y='%}'-%}  {{ x + y }}"), "b1%}");
        assert_eq!(
            ok("{% raw %}{% set x = 1 %}{{ x }}{% endraw %}{# {% set #}{{ '{% set x = 1 %}' }}"),
            "{% set x = 1 %}{{ x }}{% set x = 1 %}"
        );
        assert_eq!(ok("{{ {'a': {'b': 1}}['a']['b'] }}{% set d = {'k': {}} %}{{ d.k | length }}"), "10");
        assert_eq!(ok("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m(x='b') }}"), "<a><b>");
    }

    #[test]
    fn a_template_can_refuse() {
        let error = render("{{ raise_exception('roles must\nalternate') }}").unwrap_err();
        assert!(matches!(&error, Error::Request(_)));
        assert!(
            error
                .to_string()
                .ends_with("chat_template.jinja: the chat template refuses: roles must alternate")
        );
    }

    #[test]
    fn syntax_errors_name_the_line() {
        assert!(error("a\nb {{ 1 + }}").ends_with("(line 2 of the template)"));
        assert!(error("\n\n{% if %}").ends_with("(line 3 of the template)"));
        for source in [
            "{%",
            "{{",
            "{#",
            "{% set x = %}",
            "{% set",
            "{% nothing %}",
            "{{ 'a }}",
            "{%-%}",
            "{% set =%}",
            "{{ \"\\",
        ] {
            error(source);
        }
        error(&"{{ (".repeat(20_000));
        error(&format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)));
        error(&"{% if 1 %}".repeat(50_000));
        assert!(error("\n{{ messages[0].nothing.more }}").ends_with("(line 2 of the template)"));
        error("{{ undefined_function() }}");
        error("{% include 'x' %}");
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let forever = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        assert!(error(forever).contains("too many steps"));
        error("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
        error("{% for x in range(10**9) %}{% endfor %}");
    }

    #[test]
    fn a_template_that_explodes_is_stopped() {
        assert!(
            error("{% for a in range(100000) %}{{ 'x' * 1000 }}{% endfor %}").contains("more than 64 MiB")
        );
        let raw = format!("{{% for a in range(100000) %}}{}{{% endfor %}}", "x".repeat(1000));
        assert!(error(&raw).contains("more than 64 MiB"));
        let grows = |value: &str| {
            error(&format!(
                "{{% set ns = namespace(s='xxxxxxxx', l=['x']) %}}{{% for a in range(99) %}}{{% set {value} %}}{{% endfor %}}"
            ))
        };
        for value in [
            "ns.s = ns.s ~ ns.s",
            "ns.s = ns.s + ns.s",
            "ns.s = ns.s * 9",
            "ns.s = ns.s | replace('x', 'xx')",
            "ns.s = ns.s.replace('x', 'xx')",
            "ns.s = [ns.s, ns.s] | join('-')",
            "ns.s = ''.join([ns.s, ns.s])",
            "ns.s = '%s%s' | format(ns.s, ns.s)",
            "ns.s = '{}{}'.format(ns.s, ns.s)",
            "ns.l = ns.l + ns.l",
            "ns.l = [ns.l, ns.l]",
            "ns.l = [ns.l]",
            "ns.l = {'a': ns.l, 'b': ns.l}",
        ] {
            assert!(grows(value).contains("beyond all bounds"), "{value}");
        }
        for once in [
            "'x' * 10**9",
            "'x' * 100000000",
            "'x' * 10**7 | replace('x', 'y' * 1000)",
            "('x' * 10**7).replace('x', 'y' * 1000)",
            "('\\n' * 10**6) | indent(10**6)",
            "'x' | indent(width=10**9, first=true)",
            "'%1000000000d' | format(1)",
            "'%*d' | format(1000000000, 1)",
            "'{:1000000000}'.format(1)",
            "range(10**9) | list",
            "[0] * 10**9 | list",
        ] {
            error(&format!("{{% set s = {once} %}}"));
        }
        let text = "x".repeat(10_000);
        let plain = format!(
            "{{% set s %}}{{% for a in range(100000) %}}{{% for b in range(9) %}}{text}{{% endfor %}}{{% endfor %}}{{% endset %}}"
        );
        assert!(error(&plain).contains("more than 64 MiB"));
        let captured = "{% set s %}{% for a in range(100000) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}";
        assert!(error(captured).contains("more than 64 MiB"));
    }

    #[test]
    fn growth_without_assignment_is_stopped() {
        let nest = |open: &str, body: &str, close: &str| {
            let opened: String = (0..60)
                .map(|i| open.replace("NEW", &format!("a{}", i + 1)).replace("OLD", &format!("a{i}")))
                .collect();
            format!("{{% set a0 = 'x' * 1000 %}}{opened}{body}{}", close.repeat(60))
        };
        for source in [
            "{% with a0='x'*90000000 %}{% with a1=a0~a0 %}{{ a1 | length }}{% endwith %}{% endwith %}"
                .to_owned(),
            nest("{% with NEW=OLD~OLD %}", "1", "{% endwith %}"),
            nest("{% with NEW=OLD+OLD %}", "1", "{% endwith %}"),
            nest("{% with NEW=OLD*9 %}", "1", "{% endwith %}"),
            nest("{% with NEW=[OLD,OLD] %}", "1", "{% endwith %}"),
            nest("{% for NEW in [OLD~OLD] %}", "1", "{% endfor %}"),
            "{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('x' * 1000) }}".into(),
            "{% macro m(x) %}{{ m(x + x) }}{% endmacro %}{{ m(['x'] * 1000) }}".into(),
            "{{ ('x' * 10**8) | length }}".into(),
            "{{ (10**8 // 1 * 'x') | length }}".into(),
            "{{ (1 / 0.00000001 * 'x') | length }}".into(),
            format!("{{{{ [{}] | length }}}}", "'x' * 9000000, ".repeat(40)),
            format!(
                "{{% with x = 'x' * 9000000 %}}{{{{ [{}] | length }}}}{{% endwith %}}",
                "x.upper(), ".repeat(40)
            ),
            format!(
                "{{% with x = 'x' * 9000000 %}}{{{{ [{}] | length }}}}{{% endwith %}}",
                "x | upper, ".repeat(40)
            ),
        ] {
            let error = error(&source);
            assert!(error.contains("beyond all bounds"), "{error}: {source:.200}");
        }
    }

    #[test]
    fn guarded_expressions_mean_what_they_meant() {
        let ok = |source: &str| render(source).unwrap_or_else(|e| panic!("{source}: {e}"));
        for (source, expected) in [
            (
                "{{ 1 + 2 * 3 - 4 }}|{{ 7 - 2 + 1 }}|{{ 2 * 3 ** 2 }}|{{ -2 * -3 }}|{{ 9 // 2 * 2 }}",
                "3|6|18|6|8",
            ),
            ("{{ 'a' ~ 1 + 2 if false else 'b' ~ 'c' * 2 }}", "bcc"),
            (
                "{% set x = 3 %}{{ x * x + x }}|{{ x is odd and (x - 1) is eq 2 }}|{{ x is eq -3 }}",
                "12|True|False",
            ),
            ("{{ 'a' ~ x is defined }}|{{ 'a' ~ 'b' | upper ~ 'c' }}", "aFalse|aBc"),
            ("{{ ([1] + [2, 3])[1:][0] }}|{{ [bos_token, 'b'][0] ~ {'k': bos_token}.k }}", "2|<s><s>"),
            ("{% set x | replace(\"=\", \"-\") %}a=b{% endset %}{{ x }}", "a-b"),
            ("{% set x = 'a' if 1 == 1 else 'b' %}{{ x }}", "a"),
            (
                "{% macro m(a, b='=' * 3) %}{{ a ~ b }}{% endmacro %}{{ m(*['x']) }}{{ m(a='y' + 'z') }}",
                "x===yz===",
            ),
            ("{% for k, v in {'a': 1, 'b': 2}.items() if v + 1 > 2 %}{{ k ~ v }}{% endfor %}", "b2"),
            ("{{ (messages | length) * 'é' ~ (1, bos_token)[1] }}", "éé<s>"),
            (
                "{{ 'a\nb' | indent(width=2) }}|{{ [2, 1] | sort(reverse=true) }}|{{ ['a'] | join(d='-') }}",
                "a\n  b|[2, 1]|a",
            ),
        ] {
            assert_eq!(ok(source), expected, "{source}");
        }
    }

    #[test]
    fn renders_do_not_share_their_bounds() {
        let t = template("{% for a in range(50) %}{{ 'x' * 1000000 }}{% endfor %}").unwrap();
        for _ in 0..3 {
            assert_eq!(t.render(&[], true).unwrap().len(), 50_000_000);
        }
    }

    #[test]
    fn a_long_conversation_has_fuel_enough() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/text/testdata");
        let t = template(&std::fs::read_to_string(dir.join("qwen3.jinja")).unwrap()).unwrap();
        let turn = [Message::new("user", "?"), Message::new("assistant", "!")];
        let messages: Vec<Message> = turn.into_iter().cycle().take(20_000).collect();
        assert!(t.render(&messages, true).unwrap().len() > 20_000 * 20);
    }
}
