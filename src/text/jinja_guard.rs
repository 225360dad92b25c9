//! Rewrites the expressions of a chat template so that each operator that can make a large value is checked first.
//!
//! The engine has no hook for operators. So the operands of `a + b`, `a ~ b` and `a * b` are each put through a
//! filter, `(a)|__first_add + (b)|__last_add`, that sees their sizes before the operator makes its value, and
//! lists and maps written out are put through the filter that bounds remembered values.

/// The filter that bounds a value.
pub(super) const GUARD: &str = "__bounded";
/// Deeper brackets are left alone: the engine's parser refuses them, at 150.
const BRACKETS_MAX: usize = 200;

/// What is between a tag's marks, guarded.
pub(super) fn guard_expression(text: &str) -> String {
    let tokens = tokens(text);
    let mut at = 0;
    guard_level(&tokens, &mut at, 0).0
}

/// Where an assignment's value begins in what follows `set`; `None` if it opens a block.
pub(super) fn assignment(text: &str) -> Option<usize> {
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
                push(&mut pieces, &guard_brackets(tokens, at, depth, operand));
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

/// A bracket, what is in it, and its closing mark. What follows an operand is a call or a subscript, not a list.
fn guard_brackets(tokens: &[Token<'_>], at: &mut usize, depth: usize, operand: bool) -> String {
    let open = tokens[*at];
    *at += 1;
    let (inner, named, comma) = guard_level(tokens, at, depth + 1);
    let close = tokens.get(*at).map_or("", |token| token.0);
    *at += 1;
    let makes_list = !operand && named && (comma || open.word() != "(");
    let space = &open.0[..open.0.len() - open.word().len()];
    if makes_list && !close.is_empty() {
        format!("{space}({}{inner}{close}|{GUARD})", open.word())
    } else {
        format!("{}{inner}{close}", open.0)
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
            out.push_str(&format!("{}({})|__{place}_{kind}", &operand[..space], &operand[space..]));
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
