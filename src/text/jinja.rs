//! What chat templates expect of Jinja beyond the engine: Python's methods and spellings, and the functions
//! that model makers' tools add.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{
    Environment, Error, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};

use super::jinja_limits::{DEPTH_MAX, OUTPUT_MAX, charge};

/// Bytes between two items of JSON, and of a level of its indentation.
const SPACE_MAX: usize = 64;
/// Bytes of a date's format.
const FORMAT_MAX: usize = 1 << 10;

/// How model makers' tools set Jinja up: a block's line leaves nothing behind.
pub(super) fn syntax() -> SyntaxConfig {
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    syntax.build().expect("the default marks are valid; this is a bug")
}

/// Adds the functions, filters and tests.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", |format: &str| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(format, now.as_secs())
    });
    env.add_filter("tojson", tojson);
    // The engine takes none for an empty list here, and texts and maps for no sequences; Python does not.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
}

/// What the template has raised, if that is the error.
pub(super) fn raised(error: &Error) -> Option<&str> {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return Some(message);
        }
        source = inner.source();
    }
    None
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

/// `json.dumps`: unlike Jinja's own filter it escapes nothing for HTML, and it separates with spaces.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        Some(indent) if !indent.is_none() => match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) if text.len() <= SPACE_MAX => Some(text.to_owned()),
            (None, Some(spaces)) if spaces <= SPACE_MAX => Some(" ".repeat(spaces)),
            _ => return Err(not_json("indent is neither a short text nor a number up to 64")),
        },
        _ => None,
    };
    let (item, key) = match kwargs.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => {
            let part = |place: usize| pair.get_item(&Value::from(place)).map(|part| part.to_string());
            (part(0)?, part(1)?)
        }
        _ => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    if item.len().max(key.len()) > SPACE_MAX {
        return Err(not_json("separators are long"));
    }
    let sort = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut json = Json { out: String::new(), indent, item, key, sort, ascii };
    json.write(value, 0)?;
    charge(json.out.len())?;
    Ok(Value::from(json.out))
}

fn not_json(why: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {why}"))
}

/// JSON as `json.dumps` lays it out.
struct Json {
    out: String,
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
    ascii: bool,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if self.out.len() > OUTPUT_MAX || depth > DEPTH_MAX {
            return Err(not_json("too much"));
        }
        match value.kind() {
            ValueKind::Undefined => return Err(not_json("an undefined value")),
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::Map => self.write_map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item));
                self.write_items(['[', ']'], items, depth)?;
            }
            _ => {
                self.write_text(value.as_str().ok_or_else(|| not_json("neither text, number, list nor map"))?)
            }
        }
        Ok(())
    }

    fn write_map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut pairs = Vec::new();
        for key in map.try_iter()? {
            pairs.push((Some(key.to_string()), map.get_item(&key)?));
        }
        if self.sort {
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.write_items(['{', '}'], pairs.into_iter(), depth)
    }

    fn write_items(
        &mut self,
        [open, close]: [char; 2],
        items: impl Iterator<Item = (Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut empty = true;
        for (key, value) in items {
            if !empty {
                self.out.push_str(&self.item);
            }
            empty = false;
            self.break_line(depth + 1);
            if let Some(key) = key {
                self.write_text(&key);
                self.out.push_str(&self.key);
            }
            self.write(&value, depth + 1)?;
        }
        if !empty {
            self.break_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn break_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn write_text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !c.is_ascii()) => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units)
                        .iter()
                        .for_each(|unit| self.out.push_str(&format!("\\u{unit:04x}")));
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// The time (UTC, in seconds since 1970) in the C library's format. There is no portable way to the local
/// time zone without more dependencies; templates ask for the date.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    if format.len() > FORMAT_MAX {
        return Err(Error::new(ErrorKind::InvalidOperation, "strftime_now: a long format"));
    }
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let weekday = (days % 7) as usize;
    let month_name = MONTHS[month as usize - 1];
    let hour_12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let (padded, spec) = match chars.next() {
            Some('-') => (false, chars.next()),
            spec => (true, spec),
        };
        let two = |n: u64| if padded { format!("{n:02}") } else { n.to_string() };
        out.push_str(&match spec {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('H') => two(hour),
            Some('I') => two(hour_12),
            Some('M') => two(minute),
            Some('S') => two(second % 60),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => DAYS[weekday].to_owned(),
            Some('a') => DAYS[weekday][..3].to_owned(),
            Some('j') => format!("{:03}", days - days_before(year) + 1),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let spec: String = other.into_iter().collect();
                let why = format!("strftime_now: %{spec} is not known");
                return Err(Error::new(ErrorKind::InvalidOperation, why));
            }
        });
    }
    Ok(out)
}

/// Days from 1970 to the first of January of a later year.
fn days_before(year: u64) -> u64 {
    let y = year - 1;
    (year - 1970) * 365 + (y / 4 - y / 100 + y / 400) - (1969 / 4 - 1969 / 100 + 1969 / 400)
}

/// Year, month and day of a day counted from 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    // Never too late a year: a year has at most 366 days.
    let mut year = 1970 + days / 366;
    while days_before(year + 1) <= days {
        year += 1;
    }
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut day = days - days_before(year);
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(source: &str) -> String {
        let mut env = Environment::new();
        add_to(&mut env);
        let map = "{% set v = {'b': [1, 2.5, none, true], 'a': {'k': 'é<\"\\'\n'}, 'e': [], 'o': {}} %}";
        env.render_str(&format!("{map}{source}"), ()).unwrap()
    }

    #[test]
    fn tojson_is_like_json_dumps() {
        assert_eq!(
            eval("{{ v | tojson }}"),
            r#"{"b": [1, 2.5, null, true], "a": {"k": "é<\"'\n"}, "e": [], "o": {}}"#
        );
        assert_eq!(
            eval("{{ v | tojson(indent=2) }}"),
            "{\n  \"b\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"a\": {\n    \"k\": \"é<\\\"'\\n\"\n  },\n  \"e\": [],\n  \"o\": {}\n}"
        );
        assert_eq!(eval("{{ v.a | tojson(ensure_ascii=true) }}"), r#"{"k": "\u00e9<\"'\n"}"#);
        assert_eq!(eval("{{ '😀' | tojson(ensure_ascii=true) }}"), r#""\ud83d\ude00""#);
        assert_eq!(eval("{{ v.b | tojson(separators=(',', ':')) }}"), "[1,2.5,null,true]");
        assert_eq!(
            eval("{{ v | tojson(sort_keys=true) }}"),
            r#"{"a": {"k": "é<\"'\n"}, "b": [1, 2.5, null, true], "e": [], "o": {}}"#
        );
    }

    #[test]
    fn strftime_knows_the_calendar() {
        // `date -u -d @N +FORMAT`
        assert_eq!(strftime("%d %b %Y", 0).unwrap(), "01 Jan 1970");
        assert_eq!(
            strftime("%A, %B %d, %Y %H:%M:%S %p", 1_709_210_096).unwrap(),
            "Thursday, February 29, 2024 12:34:56 PM"
        );
        assert_eq!(
            strftime("%F %T %j %a %y %-d %e %I%%", 1_735_689_599).unwrap(),
            "2024-12-31 23:59:59 366 Tue 24 31 31 11%"
        );
        assert_eq!(strftime("%F", 4_107_542_400).unwrap(), "2100-03-01");
        assert_eq!(strftime("%F", 951_782_400).unwrap(), "2000-02-29");
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
    }
}
