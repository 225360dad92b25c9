//! Bounds on what a chat template can take: steps, time, text, and the size of what it makes.
//!
//! The engine itself counts steps, and refuses long ranges (100,000) and long repetitions (100,000,000). What a step
//! makes is of a constant size, but for what is guarded here: operators and slices, whose operands or results
//! go through filters (see `jinja_guard`), plain text, which is counted where it ends, and filters, functions and
//! methods, which are wrapped or gone. Texts and lists are counted when they are made, kept or not, and a render
//! may make `MADE_MAX` bytes of them; so what it holds at any time is less than a few times that.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter, filters, functions,
    value::{Rest, ValueKind, ValueOrKwargs},
};
use minijinja_contrib::pycompat;

use super::jinja_guard::{GUARD, KEEP, PREFIX, SLICE};

/// The longest template; published ones have up to 30 KiB. Parsing takes a few hundred times as much memory.
pub(super) const SOURCE_MAX: usize = 256 << 10;
/// The longest text that a template can make, in bytes.
pub(super) const OUTPUT_MAX: usize = 64 << 20;
/// Steps of a render; a long conversation takes a few hundred thousand.
pub(super) const FUEL: u64 = 10_000_000;
/// A render's time. A step can compare long texts, so steps alone are no bound.
const TIME_MAX: Duration = Duration::from_secs(10);
/// The size of a remembered value: bytes of its texts, and `ITEM_SIZE` for each item.
const VALUE_MAX: usize = 32 << 20;
/// Bytes of the texts and lists that a render makes, beyond some copies of the conversation.
const MADE_MAX: usize = 128 << 20;
const MADE_COPIES: usize = 16;
const ITEM_SIZE: usize = 16;
/// The room that an item of a list takes.
const ITEM_BYTES: usize = 24;
/// The room that a pair in a list, or an entry of a map, takes.
const PAIR_BYTES: usize = 128;
/// How deep lists may lie in lists: walking and freeing them takes stack.
pub(super) const DEPTH_MAX: usize = 64;

thread_local! {
    /// Bytes printed by this thread's render so far, to the text or to a `{% set %}` block.
    static PRINTED: Cell<usize> = const { Cell::new(0) };
    /// Bytes of texts and lists that this thread's render may still make.
    static LEFT: Cell<usize> = const { Cell::new(MADE_MAX) };
    /// When this thread's render began.
    static BEGUN: Cell<Option<Instant>> = const { Cell::new(None) };
    /// The chains of operators under way: what their operands make so far.
    static CHAINS: RefCell<Vec<Chain>> = const { RefCell::new(Vec::new()) };
}

/// Adds the bounds.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.set_formatter(print);
    env.add_filter(GUARD, |value: Value| bounded(&value).map(|()| value));
    env.add_filter(KEEP, |value: Value| kept(&value).map(|()| value));
    env.add_filter(SLICE, counted);
    env.add_function(format!("{PREFIX}plain"), plain);
    for (place, first, last) in [("first", true, false), ("next", false, false), ("last", false, true)] {
        for kind in [Kind::Add, Kind::Join, Kind::Times] {
            let name = format!("{PREFIX}{place}_{}", kind.name());
            env.add_filter(name, move |value: Value| operand(&value, kind, first, last).map(|()| value));
        }
    }
    wrap_filters(env);
    for (name, function) in [
        ("dict", Value::from_function(functions::dict)),
        ("namespace", Value::from_function(functions::namespace)),
    ] {
        env.add_function(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            args.iter().try_for_each(|arg| charge(arg.len().unwrap_or(0).saturating_mul(PAIR_BYTES)))?;
            function.call(state, &args)
        });
    }
    env.remove_global("debug");
    env.set_unknown_method_callback(|state, value, method, args| {
        match method {
            "join" => check_join(&[args.first().cloned().unwrap_or_default(), value.clone()])?,
            "format" | "replace" => {
                let all = [std::slice::from_ref(value), args].concat();
                if method == "format" { check_format(&all)? } else { check_replace(&all)? }
            }
            "split" | "splitlines" => charge(pieces_size(value, args.first()))?,
            "items" | "keys" | "values" => charge(value.len().unwrap_or(0).saturating_mul(PAIR_BYTES))?,
            _ => (),
        }
        counted(pycompat::unknown_method_callback(state, value, method, args)?)
    });
}

/// A render begins on this thread, of a conversation of so many bytes.
pub(super) fn begin(size: usize) {
    PRINTED.set(0);
    LEFT.set(size.saturating_mul(MADE_COPIES).saturating_add(MADE_MAX));
    BEGUN.set(Some(Instant::now()));
    CHAINS.take();
}

/// Counts a text or a list that is about to be made.
pub(super) fn charge(size: usize) -> Result<(), Error> {
    let left = LEFT.get().checked_sub(size).ok_or_else(too_large)?;
    LEFT.set(left);
    in_time()
}

fn in_time() -> Result<(), Error> {
    match BEGUN.get() {
        Some(begun) if begun.elapsed() > TIME_MAX => Err(Error::from(ErrorKind::OutOfFuel)),
        _ => Ok(()),
    }
}

/// Counts plain text that has been printed.
fn plain(size: usize) -> Result<Value, Error> {
    in_time()?;
    printed(size).map(|()| Value::from(""))
}

fn printed(size: usize) -> Result<(), Error> {
    PRINTED.set(PRINTED.get().saturating_add(size));
    if PRINTED.get() > OUTPUT_MAX { Err(Error::from(ErrorKind::WriteFailure)) } else { Ok(()) }
}

/// A value that has just been made, counted. What would be made item by item is made at once: such values hold
/// one another, and a chain of many would take stack.
fn counted(value: Value) -> Result<Value, Error> {
    if value.kind() != ValueKind::Iterable {
        charge(value.as_str().map_or(0, str::len))?;
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        charge(ITEM_BYTES)?;
        items.push(item);
    }
    Ok(Value::from(items))
}

/// Checks arguments before a filter takes them: a text that it makes must be of a bounded size, and is counted
/// afterwards; a list is counted here.
type Check = fn(&[Value]) -> Result<(), Error>;

/// The engine's filters whose results are larger than a constant.
fn wrap_filters(env: &mut Environment<'_>) {
    macro_rules! wrap {
        ($($check:ident: $($name:ident)*;)*) => {
            [$($((stringify!($name), $check as Check, Value::from_function(filters::$name)),)*)*]
        };
    }
    let wrapped = wrap! {
        check_copy: upper lower title capitalize trim safe string reverse;
        check_escape: escape;
        check_pieces: split lines list;
        check_list: select reject selectattr rejectattr map groupby dictsort items;
        check_whole: sort unique;
        check_join: join;
        check_replace: replace;
        check_indent: indent;
        check_format: format;
        check_sum: sum;
    };
    for (name, check, filter) in wrapped {
        let wrapper = move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            check(&args)?;
            counted(filter.call(state, &args)?)
        };
        if name == "escape" {
            env.add_filter("e", wrapper.clone());
        }
        env.add_filter(name, wrapper);
    }
    // They are none of Jinja's own, make a list of any length from a short one, or are for debugging.
    for name in ["batch", "slice", "chain", "zip", "pprint"] {
        env.remove_filter(name);
    }
}

/// A copy of a text, or of what a value is written as.
fn check_copy(args: &[Value]) -> Result<(), Error> {
    args.first().map_or(Ok(()), bounded)
}

/// A character becomes six at most.
fn check_escape(args: &[Value]) -> Result<(), Error> {
    args.first().map_or(Ok(()), |value| size_of(value, 0, VALUE_MAX / 6).map(drop))
}

/// A list of pieces of a text, or of a list's items.
fn check_pieces(args: &[Value]) -> Result<(), Error> {
    let Some(value) = args.first() else { return Ok(()) };
    match value.as_str() {
        // Without a separator it may be a list of characters.
        Some(text) if args.len() == 1 => charge(text.len().saturating_mul(ITEM_BYTES + 1)),
        Some(_) => charge(pieces_size(value, args.get(1))),
        None => check_list(args),
    }
}

/// The room that a text takes in pieces.
fn pieces_size(value: &Value, separator: Option<&Value>) -> usize {
    let Some(text) = value.as_str() else { return 0 };
    let pieces = match separator.and_then(Value::as_str) {
        Some(separator) => text.matches(separator).count(),
        None => text.split_whitespace().count() + text.matches(['\n', '\r']).count(),
    };
    (pieces + 1).saturating_mul(ITEM_BYTES).saturating_add(text.len())
}

/// A list of a value's items, or of pairs.
fn check_list(args: &[Value]) -> Result<(), Error> {
    let Some(value) = args.first() else { return Ok(()) };
    if args.iter().any(|arg| arg.as_str().is_some_and(|text| text.starts_with(PREFIX))) {
        return Err(Error::from(ErrorKind::UnknownFilter));
    }
    let size = if value.kind() == ValueKind::Map { PAIR_BYTES } else { ITEM_BYTES };
    charge((value.len().unwrap_or(0) + 4).saturating_mul(size))
}

/// What compares or copies all of a value's texts.
fn check_whole(args: &[Value]) -> Result<(), Error> {
    check_copy(args)?;
    check_list(args)
}

/// Texts and lists are no sums, however they start.
fn check_sum(args: &[Value]) -> Result<(), Error> {
    let named = args.iter().filter_map(|arg| arg.get_attr("start").ok());
    let mut starts = named.chain(args.get(2).filter(|arg| !arg.is_kwargs()).cloned());
    if starts.all(|start| start.is_undefined() || start.is_number()) {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::InvalidOperation, "can only sum numbers"))
    }
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
        None if list => value.len().unwrap_or(VALUE_MAX).max(1) as f64 * ITEM_BYTES as f64,
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
    if !first && (chain.text || chain.list) {
        charge(chain.size as usize)?;
    }
    if !last {
        CHAINS.with_borrow_mut(|chains| chains.push(chain));
    }
    Ok(())
}

/// Prints a value, and counts what is printed: a `{% set %}` block has no other bound.
fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    printed(size_of(value, 0, OUTPUT_MAX)?)?;
    escape_formatter(out, state, value)
}

fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value grows beyond all bounds")
}

fn bounded(value: &Value) -> Result<(), Error> {
    size_of(value, 0, VALUE_MAX).map(drop)
}

/// For a namespace: one that held itself would never be freed.
fn kept(value: &Value) -> Result<(), Error> {
    bounded(value)?;
    if !holds_namespace(value) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidOperation, "a namespace in a namespace is not supported"))
}

/// Of a bounded value.
fn holds_namespace(value: &Value) -> bool {
    let Some(object) = value.as_object() else { return false };
    let inner = || value.try_iter().into_iter().flatten();
    object.type_name().ends_with("::Namespace")
        || inner().any(|key| holds_namespace(&key))
        || value.kind() == ValueKind::Map
            && inner().any(|key| value.get_item(&key).is_ok_and(|item| holds_namespace(&item)))
}

/// The value's size, as `VALUE_MAX` counts it; an error if it is more than `most`.
fn size_of(value: &Value, depth: usize, most: usize) -> Result<usize, Error> {
    if depth > DEPTH_MAX {
        return Err(too_large());
    }
    let mut size = value.as_str().map_or(ITEM_SIZE, str::len);
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
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
        _ => {}
    }
    if size > most { Err(too_large()) } else { Ok(size) }
}

/// The items, and what comes between them.
fn check_join(args: &[Value]) -> Result<(), Error> {
    let Some(items) = args.first() else { return Ok(()) };
    let separator = args.get(1).and_then(Value::as_str).map_or(0, str::len);
    let mut size = 0;
    if let Ok(items) = items.try_iter() {
        for item in items {
            size += separator + size_of(&item, 0, VALUE_MAX)?;
            if size > VALUE_MAX {
                return Err(too_large());
            }
        }
    }
    Ok(())
}

/// The text, what is replaced in it, and by what.
fn check_replace(args: &[Value]) -> Result<(), Error> {
    let text = |at: usize| args.get(at).map(Value::to_string).unwrap_or_default();
    args.iter().take(3).try_for_each(bounded)?;
    let (text, from, to) = (text(0), text(1), text(2));
    let size = text.len().saturating_add(text.matches(&from).count().saturating_mul(to.len()));
    if size > VALUE_MAX { Err(too_large()) } else { Ok(()) }
}

/// The first argument is the text; the width is any of the others.
fn check_indent(args: &[Value]) -> Result<(), Error> {
    let Some(text) = args.first().and_then(Value::as_str) else { return Ok(()) };
    let named = args.iter().filter_map(|arg| arg.get_attr("width").ok()?.as_usize()).max();
    let width = args[1..].iter().filter_map(Value::as_usize).max().max(named).unwrap_or(4);
    let size = (text.matches('\n').count() + 1).saturating_mul(width).saturating_add(text.len());
    if size > VALUE_MAX { Err(too_large()) } else { Ok(()) }
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
    if longest > 4 || format.contains("*") || size > VALUE_MAX { Err(too_large()) } else { Ok(()) }
}
