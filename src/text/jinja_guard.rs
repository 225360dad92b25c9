//! Rewrites the expressions of a chat template so that each operator that can make a large value is checked first.
//!
//! The engine has no hook for operators. So the operands of `a + b`, `a ~ b` and `a * b` are each put through a
//! filter, `(a)|__pi_first_add + (b)|__pi_last_add`, that sees their sizes before the operator makes its value;
//! lists and maps written out are put through the filter that bounds remembered values, and slices through one
//! that counts them.

use std::fmt::Write;

use minijinja::{Error, ErrorKind};

/// What the names of all guards begin with, and nothing in a template may contain.
pub(super) const PREFIX: &str = "__pi_";
/// The filter that bounds a value.
pub(super) const GUARD: &str = "__pi_bounded";
/// The filter that bounds a value for a namespace.
pub(super) const KEEP: &str = "__pi_kept";
/// The filter that counts a slice.
pub(super) const SLICE: &str = "__pi_slice";
const WRITES: &str = "writing to a String cannot fail; this is a bug";
/// Tokens of a tag, and `elif`s of a template, at most. The engine walks chains of operators and of `elif`s by
/// recursion: in 2 MiB of stack it takes 4,000 of the ones, and 1,000 of the others.
const TOKENS_MAX: usize = 2000;
const ELIFS_MAX: usize = 200;
/// Deeper brackets are left alone: the engine's parser refuses them, at 150.
const BRACKETS_MAX: usize = 200;

/// The template with guards, and without the marks that say which parts an assistant has written
/// (`{% generation %}`), which only training needs.
pub(super) fn guard_source(source: &str) -> Result<String, Error> {
    if source.contains(PREFIX) {
        return Err(Error::new(ErrorKind::SyntaxError, format!("the name {PREFIX} is not for templates")));
    }
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let (mut rest, mut elifs) = (source, 0);
    while let Some(at) = next_tag(rest) {
        let (text, from) = rest.split_at(at);
        out.push_str(text);
        let end = match &from[..2] {
            "{#" => from.find("#}").map(|end| end + 2),
            "{{" => tag_end(from, "}}"),
            _ => tag_end(from, "%}"),
        };
        rest = from;
        let Some(end) = end else { break }; // the engine's parser will say what is wrong
        let (tag, after) = from.split_at(end);
        rest = after;
        elifs += usize::from(tag_words(tag).1 == "elif");
        if !tag.starts_with("{#") && (elifs > ELIFS_MAX || tokens(tag).len() > TOKENS_MAX) {
            let why = format!("more than {TOKENS_MAX} tokens in a tag, or {ELIFS_MAX} elifs");
            return Err(Error::new(ErrorKind::SyntaxError, why));
        }
        if tag.starts_with("{#") {
            push_plain(&mut out, tag, text.len());
            out.push_str(tag);
        } else if tag.starts_with("{{") {
            push_plain(&mut out, tag, text.len());
            let (open, _, _, close) = tag_words(tag);
            let inner = &tag[open.len()..tag.len() - close.len()];
            write!(out, "{open}{}{close}", guard_expression(inner)).expect(WRITES);
        } else if tag_words(tag).1 == "raw" {
            let (raw, after) = after.split_at(end_of_raw(after));
            push_plain(&mut out, tag, text.len() + raw.len());
            out.push_str(tag);
            out.push_str(raw);
            // Its end is no text's: nothing may come between.
            let end = tag_end(after, "%}").unwrap_or(after.len());
            out.push_str(&after[..end]);
            rest = &after[end..];
        } else {
            push_plain(&mut out, tag, text.len());
            push_block_tag(&mut out, tag);
        }
    }
    // What follows the last tag is printed once.
    out.push_str(rest);
    Ok(out)
}

/// Counts the text before a tag. The mark does to the white space before it what the tag's own did.
fn push_plain(out: &mut String, tag: &str, size: usize) {
    let open = tag_words(tag).0;
    let pushed = match (size, &open[..2]) {
        (0, _) => Ok(()),
        (_, "{{") => write!(out, "{open} {PREFIX}plain({size}) }}}}"),
        _ => write!(out, "{{%{} if {PREFIX}plain({size}) %}}{{% endif %}}", &open[2..]),
    };
    pushed.expect(WRITES);
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
            let guard = if target.contains('.') { KEEP } else { GUARD };
            write!(out, "{open}{space}set{target}({value})|{guard} {close}")
        }
        ("generation", _) => write!(out, "{open}{space}if true{rest}{close}"),
        ("endgeneration", _) => write!(out, "{open}{space}endif{rest}{close}"),
        // A turn of a loop takes time even if it prints and makes nothing.
        ("for", _) => {
            let rest = guard_expression(rest);
            write!(out, "{open}{space}{word}{rest}%}}{{% if {PREFIX}plain(0) %}}{{% endif {close}")
        }
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

/// What is between a tag's marks, guarded.
fn guard_expression(text: &str) -> String {
    let tokens = tokens(text);
    let mut at = 0;
    guard_level(&tokens, &mut at, 0).0
}

/// Where an assignment's value begins in what follows `set`; `None` if it opens a block.
fn assignment(text: &str) -> Option<usize> {
    let (mut at, mut depth) = (0, 0usize);
    for token in tokens(text) {
        match token.word() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            "=" if depth == 0 => return Some(at + token.0.len()),
            "|" if depth == 0 => return None,
            _ => {}
        }
        at += token.0.len();
    }
    None
}

/// A token with the white space before it.
#[derive(Clone, Copy)]
struct Token<'a>(&'a str);

impl<'a> Token<'a> {
    fn word(self) -> &'a str {
        self.0.trim_start()
    }
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let (mut tokens, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let space = rest.len() - rest.trim_start().len();
        let (head, tail) = rest.split_at(space + token_len(&rest[space..]));
        tokens.push(Token(head));
        rest = tail;
    }
    tokens
}

fn token_len(text: &str) -> usize {
    let Some(first) = text.chars().next() else { return 0 };
    if matches!(first, '"' | '\'') {
        let mut escaped = false;
        let closes = |&(_, c): &(usize, char)| {
            let closes = !escaped && c == first;
            escaped = !escaped && c == '\\';
            closes
        };
        return text.char_indices().skip(1).find(closes).map_or(text.len(), |(at, _)| at + 1);
    }
    if first.is_alphanumeric() || first == '_' {
        return text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    }
    let two = ["**", "//", "==", "!=", "<=", ">="].iter().any(|two| text.starts_with(two));
    if two { 2 } else { first.len_utf8() }
}

/// What an operand's piece is in its chain of operators.
enum Piece {
    Operand(String),
    Operator(&'static str, String),
    /// Ends a chain: a comma, a comparison, a word such as `and`.
    Break(String),
}

/// Guards up to the bracket that closes this level; also whether there is a name or a comma at this level.
fn guard_level(tokens: &[Token<'_>], at: &mut usize, depth: usize) -> (String, bool, bool) {
    let (mut pieces, mut named, mut comma) = (Vec::new(), false, false);
    let mut operand = false; // whether an operand has just ended
    let start = *at;
    while let Some(token) = tokens.get(*at) {
        let word = token.word();
        let before = |back: usize| {
            let place = at.checked_sub(back).filter(|place| *place >= start);
            place.map_or("", |place| tokens[place].word())
        };
        let tested = before(2) == "is" || before(2) == "not" && before(3) == "is";
        let attribute = before(1) == ".";
        match word {
            ")" | "]" | "}" if depth > 0 => break,
            "(" | "[" | "{" if depth < BRACKETS_MAX => {
                let (text, slice) = guard_brackets(tokens, at, depth, operand);
                push(&mut pieces, &text);
                if let (true, Some(Piece::Operand(sliced))) = (slice, pieces.last_mut()) {
                    let space = sliced.len() - sliced.trim_start().len();
                    *sliced = format!("{}({}|{SLICE})", &sliced[..space], &sliced[space..]);
                }
                (operand, named) = (true, true);
                continue;
            }
            "+" | "-" | "~" | "*" | "/" | "//" | "%" if operand && !(tested && word == "-") => {
                let kind = match word {
                    "+" | "-" => "add",
                    "~" => "join",
                    _ => "times",
                };
                pieces.push(Piece::Operator(kind, token.0.to_owned()));
                operand = false;
            }
            "not" if before(1) == "is" => push(&mut pieces, token.0),
            "," | ":" | "=" | "==" | "!=" | "<" | ">" | "<=" | ">=" => {
                comma |= word == ",";
                pieces.push(Piece::Break(token.0.to_owned()));
                operand = false;
            }
            "and" | "or" | "not" | "in" | "if" | "else" | "recursive" if !attribute => {
                pieces.push(Piece::Break(token.0.to_owned()));
                operand = false;
            }
            _ => {
                push(&mut pieces, token.0);
                operand = word.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '"' | '\''))
                    && word != "is";
                named |= word.starts_with(|c: char| c.is_alphabetic() || c == '_');
            }
        }
        *at += 1;
    }
    (guard_pieces(&pieces), named, comma)
}

fn push(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        Some(Piece::Operand(operand)) => operand.push_str(text),
        _ => pieces.push(Piece::Operand(text.to_owned())),
    }
}

/// A bracket, what is in it, and its closing mark; also whether it makes a slice of what is before it. What
/// follows an operand is a call or a subscript, not a list.
fn guard_brackets(tokens: &[Token<'_>], at: &mut usize, depth: usize, operand: bool) -> (String, bool) {
    let open = tokens[*at];
    *at += 1;
    let start = *at;
    let (inner, named, comma) = guard_level(tokens, at, depth + 1);
    // A map in the subscript has colons too: a needless guard does no harm.
    let slice = operand && open.word() == "[" && tokens[start..*at].iter().any(|token| token.word() == ":");
    let close = tokens.get(*at).map_or("", |token| token.0);
    *at += 1;
    let makes_list = !operand && named && (comma || open.word() != "(");
    let space = &open.0[..open.0.len() - open.word().len()];
    if makes_list && !close.is_empty() {
        (format!("{space}({}{inner}{close}|{GUARD})", open.word()), false)
    } else {
        (format!("{}{inner}{close}", open.0), slice && !close.is_empty())
    }
}

/// The pieces of one level, chain by chain.
fn guard_pieces(pieces: &[Piece]) -> String {
    let mut out = String::new();
    for chain in pieces.split_inclusive(|piece| matches!(piece, Piece::Break(_))) {
        match chain.split_last() {
            Some((Piece::Break(text), chain)) => {
                out.push_str(&guard_chain(chain, &["add", "join", "times"]));
                out.push_str(text);
            }
            _ => out.push_str(&guard_chain(chain, &["add", "join", "times"])),
        }
    }
    out
}

/// A chain of operands, split at the operators that bind least.
fn guard_chain(chain: &[Piece], kinds: &[&str]) -> String {
    let Some((kind, tighter)) = kinds.split_first() else { return chain.iter().map(text_of).collect() };
    let splits = |piece: &Piece| matches!(piece, Piece::Operator(of, _) if of == kind);
    let operands: Vec<String> = chain.split(splits).map(|operand| guard_chain(operand, tighter)).collect();
    let operators: Vec<&str> = chain.iter().filter(|piece| splits(piece)).map(text_of).collect();
    let grows = operators.iter().any(|operator| matches!(operator.trim(), "+" | "~" | "*"));
    let number = |text: &String| text.trim().parse::<f64>().is_ok_and(f64::is_finite);
    // A sum with a number in it is a number.
    let numeric = *kind == "add" && operands.iter().any(number) || operands.iter().all(number);
    let mut out = String::new();
    for (i, operand) in operands.iter().enumerate() {
        let place = match i {
            0 => "first",
            _ if i + 1 == operands.len() => "last",
            _ => "next",
        };
        if !grows || numeric || operand.trim().is_empty() {
            out.push_str(operand);
        } else {
            let space = operand.len() - operand.trim_start().len();
            out.push_str(&format!("{}({})|{PREFIX}{place}_{kind}", &operand[..space], &operand[space..]));
        }
        out.push_str(operators.get(i).copied().unwrap_or_default());
    }
    out
}

fn text_of(piece: &Piece) -> &str {
    match piece {
        Piece::Operand(text) | Piece::Operator(_, text) | Piece::Break(text) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The engine alone is the measure: guards change nothing that is printed, white space included.
    #[test]
    fn what_is_counted_is_printed_as_it_was() {
        let engine = || {
            let mut env = minijinja::Environment::new();
            env.set_syntax(crate::text::jinja::syntax());
            env
        };
        let mut guarded = engine();
        crate::text::jinja_limits::add_to(&mut guarded);
        let marks = [("{%", "%}"), ("{%-", "-%}"), ("{%+", "%}"), ("{%-", "+%}"), ("{%", "-%}")];
        let texts = ["", " ", "a", "\n", " \n ", "\n\n b \n", "\t\n  ", " a\n  "];
        for (open, close) in marks {
            for text in texts {
                for source in [
                    format!("{text}{open} if 1 {close}{text}{open} else {close}x{open} endif {close}{text}"),
                    format!(
                        "{text}{open} for x in 'ab' {close}{text}{{{{ x }}}}{text}{open} endfor {close}{text}."
                    ),
                    format!("{text}{open} raw {close}{text}{{{{{text}{open} endraw {close}{text}."),
                    format!(
                        "{open} macro m() {close}{text}{{# c #}}{text}{open} endmacro {close}{text}{{{{ m() }}}}{text}"
                    ),
                    format!(
                        "{open} set x {close}{text}{{{{- 1 -}}}}{text}{open} endset {close}{{{{ x }}}}{text}{{#- c -#}}{text}"
                    ),
                ] {
                    let expected = engine().render_str(&source, ()).unwrap();
                    let source = guard_source(&source).unwrap();
                    assert_eq!(guarded.render_str(&source, ()).unwrap(), expected, "{source:?}");
                }
            }
        }
    }
}
