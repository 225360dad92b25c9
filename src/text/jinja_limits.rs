//! Bounds on what a chat template can take: steps, text, and the size of what it remembers.
//!
//! The engine itself counts steps, and refuses long ranges (100,000) and long repetitions (100,000,000).
//! Added here: what an operator makes, and what is assigned, listed, printed, joined, replaced, indented or
//! formatted, has a bounded size, and so have all such texts of a render together, kept or not.

use std::{
    cell::{Cell, RefCell},
    fmt::Write,
};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter, filters,
    value::{Rest, ValueKind},
};
use minijinja_contrib::pycompat;

use super::jinja_guard::{GUARD, assignment, guard_expression};

/// The longest text that a template can make, in bytes.
pub(super) const OUTPUT_MAX: usize = 64 << 20;
/// Steps of a render; a long conversation takes a few hundred thousand.
const FUEL: u64 = 10_000_000;
/// Bytes of the template's plain text that a render can copy, since one step copies one run of it.
const PLAIN_MAX: u64 = 2 << 30;
/// The size of a remembered value: bytes of its texts, and `ITEM_SIZE` for each item.
const VALUE_MAX: usize = 32 << 20;
/// Bytes of the texts that a render makes, beyond some copies of the conversation.
const MADE_MAX: usize = 128 << 20;
const MADE_COPIES: usize = 16;
const ITEM_SIZE: usize = 16;
/// The room that an item of a list takes.
const ITEM_BYTES: usize = 24;
/// How deep lists may lie in lists: walking and freeing them takes stack.
pub(super) const DEPTH_MAX: usize = 64;

const WRITES: &str = "writing to a String cannot fail; this is a bug";

thread_local! {
    /// Bytes printed by this thread's render so far, to the text or to a `{% set %}` block.
    static PRINTED: Cell<usize> = const { Cell::new(0) };
    /// Bytes of text that this thread's render may still make.
    static LEFT: Cell<usize> = const { Cell::new(MADE_MAX) };
    /// The chains of operators under way: what their operands make so far.
    static CHAINS: RefCell<Vec<Chain>> = const { RefCell::new(Vec::new()) };
}

/// Adds the bounds.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.set_formatter(print);
    env.add_filter(GUARD, |value: Value| bounded(&value).map(|()| value));
    for (place, first, last) in [("first", true, false), ("next", false, false), ("last", false, true)] {
        for kind in [Kind::Add, Kind::Join, Kind::Times] {
            let name = format!("__{place}_{}", kind.name());
            env.add_filter(name, move |value: Value| operand(&value, kind, first, last).map(|()| value));
        }
    }
    add_copying(env);
    env.add_filter("__join", filters::join);
    env.add_filter("__replace", filters::replace);
    env.add_filter("__indent", filters::indent);
    env.add_filter("__format", filters::format);
    env.add_filter("join", |state: &mut State, args: Rest<Value>| {
        check_join(args.first(), args.get(1))?;
        state.apply_filter("__join", &args)
    });
    env.add_filter("replace", |state: &mut State, args: Rest<Value>| {
        check_replace(args.first(), args.get(1), args.get(2))?;
        state.apply_filter("__replace", &args)
    });
    env.add_filter("indent", |state: &mut State, args: Rest<Value>| {
        check_indent(&args)?;
        state.apply_filter("__indent", &args)
    });
    env.add_filter("format", |state: &mut State, args: Rest<Value>| {
        check_format(&args)?;
        state.apply_filter("__format", &args)
    });
    // They can make a list of any length from a short one, and templates for chats have no use for them.
    env.remove_filter("batch");
    env.remove_filter("slice");
    env.set_unknown_method_callback(|state, value, method, args| {
        match method {
            "join" => check_join(args.first(), Some(value))?,
            "replace" => check_replace(Some(value), args.first(), args.get(1))?,
            "format" => check_format(&[std::slice::from_ref(value), args].concat())?,
            _ => charge(copy_size(value, args.first()))?,
        }
        pycompat::unknown_method_callback(state, value, method, args)
    });
}

/// A render begins on this thread, of a conversation of so many bytes.
pub(super) fn begin(size: usize) {
    PRINTED.set(0);
    LEFT.set(size.saturating_mul(MADE_COPIES).saturating_add(MADE_MAX));
    CHAINS.take();
}

/// Counts a text that is about to be made.
pub(super) fn charge(size: usize) -> Result<(), Error> {
    let left = LEFT.get().checked_sub(size).ok_or_else(too_large)?;
    LEFT.set(left);
    Ok(())
}

/// The engine's filters that copy their text, or make a list of it.
fn add_copying(env: &mut Environment<'_>) {
    macro_rules! copying {
        ($($name:ident)*) => {$(
            env.add_filter(concat!("__", stringify!($name)), filters::$name);
            env.add_filter(stringify!($name), |state: &mut State, args: Rest<Value>| {
                if let Some(value) = args.first() {
                    size_of(value, 0, VALUE_MAX)?;
                    let lists = matches!(stringify!($name), "list" | "split" | "lines");
                    charge(copy_size(value, args.get(1).filter(|_| lists)))?;
                    if let (true, Some(text)) = (stringify!($name) == "list", value.as_str()) {
                        charge(text.len().saturating_mul(ITEM_BYTES))?;
                    }
                }
                state.apply_filter(concat!("__", stringify!($name)), &args)
            });
        )*};
    }
    copying!(upper lower title capitalize trim escape string list split lines pprint);
}

/// The room that a copy of a text takes, in pieces if it is split.
fn copy_size(value: &Value, separator: Option<&Value>) -> usize {
    let Some(text) = value.as_str() else { return 0 };
    let pieces = match separator.and_then(Value::as_str) {
        Some(separator) => text.matches(separator).count(),
        None => text.split_ascii_whitespace().count(),
    };
    pieces.saturating_mul(ITEM_BYTES).saturating_add(text.len())
}

/// Which operators a chain has.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Add,
    Join,
    Times,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Add => "add",
            Kind::Join => "join",
            Kind::Times => "times",
        }
    }
}

/// What a chain of operators makes so far: its size, and whether it is text or a list, rather than a number.
#[derive(Clone, Copy)]
struct Chain {
    size: f64,
    text: bool,
    list: bool,
}

/// An operand, before the operator takes it.
fn operand(value: &Value, kind: Kind, first: bool, last: bool) -> Result<(), Error> {
    let text = value.as_str().is_some() || kind == Kind::Join;
    let list = !text && matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    let size = match value.as_str() {
        Some(text) => text.len() as f64,
        None if kind == Kind::Join => size_of(value, 0, VALUE_MAX)? as f64,
        None if list => value.len().unwrap_or(0).max(1) as f64 * ITEM_SIZE as f64,
        // A chain of factors may divide, too.
        None if kind == Kind::Times => {
            let number = f64::try_from(value.clone()).unwrap_or(1.0).abs();
            if number > 0.0 { number.max(1.0 / number) } else { 1.0 }
        }
        None => ITEM_SIZE as f64,
    };
    let before = if first { None } else { CHAINS.with_borrow_mut(Vec::pop) };
    let mut chain = Chain { size, text, list };
    if let Some(before) = before {
        chain.size = if kind == Kind::Times { before.size * size.max(1.0) } else { before.size + size };
        chain.text |= before.text;
        chain.list |= before.list;
    }
    if (chain.text || chain.list) && chain.size > VALUE_MAX as f64 {
        return Err(too_large());
    }
    if !first && chain.text {
        charge(chain.size as usize)?;
    }
    if !last {
        CHAINS.with_borrow_mut(|chains| chains.push(chain));
    }
    Ok(())
}

/// The template with `{% set name = … %}` guarded against values that grow without bound, and without the
/// marks that say which parts an assistant has written (`{% generation %}`), which only training needs.
/// Also the steps that a render may take.
pub(super) fn guard_source(source: &str) -> (String, u64) {
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let (mut rest, mut longest) = (source, 0);
    while let Some(at) = next_tag(rest) {
        out.push_str(&rest[..at]);
        longest = longest.max(at);
        rest = &rest[at..];
        let end = match &rest[..2] {
            "{#" => rest.find("#}").map(|end| end + 2),
            "{{" => tag_end(rest, "}}"),
            _ => tag_end(rest, "%}"),
        };
        let Some(end) = end else { break }; // the engine's parser will say what is wrong
        let (tag, after) = rest.split_at(end);
        rest = after;
        if tag.starts_with("{%") {
            push_block_tag(&mut out, tag);
            if tag_words(tag).1 == "raw" {
                let raw = end_of_raw(rest);
                out.push_str(&rest[..raw]);
                longest = longest.max(raw);
                rest = &rest[raw..];
            }
        } else if tag.starts_with("{{") {
            let (open, _, _, close) = tag_words(tag);
            let inner = &tag[open.len()..tag.len() - close.len()];
            write!(out, "{open}{}{close}", guard_expression(inner)).expect(WRITES);
        } else {
            out.push_str(tag);
        }
    }
    out.push_str(rest);
    (out, FUEL.min(PLAIN_MAX / longest.max(1) as u64))
}

fn next_tag(text: &str) -> Option<usize> {
    let opens = |&at: &usize| matches!(text.as_bytes().get(at + 1), Some(b'%' | b'{' | b'#'));
    text.bytes().enumerate().filter(|&(_, byte)| byte == b'{').map(|(at, _)| at).find(opens)
}

/// How many bytes a tag has that begins here, its closing mark included: marks in strings and brackets do not count.
fn tag_end(text: &str, close: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (2, 0usize);
    while at < bytes.len() {
        if depth == 0 && bytes[at..].starts_with(close.as_bytes()) {
            return Some(at + 2);
        }
        match bytes[at] {
            b'{' => depth += 1,
            b'}' => depth = depth.saturating_sub(1),
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// A block tag's opening mark, its first word, and the rest up to its closing mark, and that.
fn tag_words(tag: &str) -> (&str, &str, &str, &str) {
    let open = if tag[2..].starts_with(['-', '+']) { 3 } else { 2 };
    let close = tag.len() - 2;
    let close = if close > open && tag[..close].ends_with(['-', '+']) { close - 1 } else { close };
    let inner = &tag[open.min(close)..close];
    let trimmed = inner.trim_start();
    let word = trimmed.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    (&tag[..open.min(close)], word, &trimmed[word.len()..], &tag[close..])
}

fn push_block_tag(out: &mut String, tag: &str) {
    let (open, word, rest, close) = tag_words(tag);
    let space = &tag[open.len()..tag.len() - close.len() - word.len() - rest.len()];
    // What comes before the assignment's sign is a name, names, or a namespace's attribute.
    let pushed = match (word, assignment(rest)) {
        ("set", Some(at)) if !rest[at..].trim().is_empty() => {
            let (target, value) = (&rest[..at], guard_expression(&rest[at..]));
            write!(out, "{open}{space}set{target}({value})|{GUARD} {close}")
        }
        ("generation", _) => write!(out, "{open}{space}if true{rest}{close}"),
        ("endgeneration", _) => write!(out, "{open}{space}endif{rest}{close}"),
        ("raw", _) => write!(out, "{tag}"),
        _ => write!(out, "{open}{space}{word}{}{close}", guard_expression(rest)),
    };
    pushed.expect(WRITES);
}

/// Where the text of a `raw` block ends.
fn end_of_raw(text: &str) -> usize {
    let ends = |&(at, _): &(usize, &str)| {
        text[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw")
    };
    text.match_indices("{%").find(ends).map_or(text.len(), |(at, _)| at)
}

/// Prints a value, and counts what is printed: a `{% set %}` block has no other bound.
fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let size = size_of(value, 0, OUTPUT_MAX)?;
    PRINTED.set(PRINTED.get() + size);
    if PRINTED.get() > OUTPUT_MAX {
        return Err(Error::from(ErrorKind::WriteFailure));
    }
    escape_formatter(out, state, value)
}

fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value grows beyond all bounds")
}

fn bounded(value: &Value) -> Result<(), Error> {
    size_of(value, 0, VALUE_MAX).map(drop)
}

/// The value's size, as `VALUE_MAX` counts it; an error if it is more than `most`.
fn size_of(value: &Value, depth: usize, most: usize) -> Result<usize, Error> {
    if depth > DEPTH_MAX {
        return Err(too_large());
    }
    let mut size = value.as_str().map_or(ITEM_SIZE, str::len);
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => {
            for key in value.try_iter()? {
                size += ITEM_SIZE;
                if value.kind() == ValueKind::Map {
                    size += size_of(&value.get_item(&key)?, depth + 1, most.saturating_sub(size))?;
                }
                size += size_of(&key, depth + 1, most.saturating_sub(size))?;
                if size > most {
                    return Err(too_large());
                }
            }
        }
        // Made item by item when asked: takes no room yet, and steps when it does.
        ValueKind::Iterable => size += value.len().unwrap_or(0).saturating_mul(ITEM_SIZE),
        _ => {}
    }
    if size > most { Err(too_large()) } else { Ok(size) }
}

fn check_join(items: Option<&Value>, separator: Option<&Value>) -> Result<(), Error> {
    let Some(items) = items else { return Ok(()) };
    let separator = separator.and_then(Value::as_str).map_or(0, str::len);
    let mut size = 0;
    if items.as_str().is_none()
        && let Ok(items) = items.try_iter()
    {
        for item in items {
            size += separator + size_of(&item, 0, VALUE_MAX)?;
            if size > VALUE_MAX {
                return Err(too_large());
            }
        }
    }
    charge(size)
}

fn check_replace(text: Option<&Value>, from: Option<&Value>, to: Option<&Value>) -> Result<(), Error> {
    let str = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    if let (Some(text), Some(from), Some(to)) = (str(text), str(from), str(to)) {
        let size = text.len().saturating_add(text.matches(&from).count().saturating_mul(to.len()));
        return if size > VALUE_MAX { Err(too_large()) } else { charge(size) };
    }
    Ok(())
}

/// The first argument is the text; the width is any of the others.
fn check_indent(args: &[Value]) -> Result<(), Error> {
    let Some(text) = args.first().and_then(Value::as_str) else { return Ok(()) };
    let named = args.iter().filter_map(|arg| arg.get_attr("width").ok()?.as_usize()).max();
    let width = args[1..].iter().filter_map(Value::as_usize).max().max(named).unwrap_or(4);
    let size = (text.matches('\n').count() + 1).saturating_mul(width).saturating_add(text.len());
    if size > VALUE_MAX { Err(too_large()) } else { charge(size) }
}

/// Widths of five digits and more, and widths from arguments, are refused.
fn check_format(args: &[Value]) -> Result<(), Error> {
    let Some(format) = args.first().and_then(Value::as_str) else { return Ok(()) };
    let longest = format.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
    let marks = format.matches(['%', '{']).count();
    let mut size = format.len();
    for arg in &args[1..] {
        size = size.saturating_add(size_of(arg, 0, VALUE_MAX)?.saturating_mul(marks));
    }
    size = size.saturating_add(marks.saturating_mul(10_000));
    if longest > 4 || format.contains("*") || size > VALUE_MAX {
        Err(too_large())
    } else {
        charge(format.len())
    }
}
