//! The tree's own promises: imports go one way, unsafe code stays in its rooms, files stay readable.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Who may import whom: a module imports modules of lower rank, or itself.
const RANKS: &[(&str, u32)] = &[
    ("main", 9),
    ("cli", 8),
    ("telemetry", 7),
    ("engine", 7),
    ("simulate", 6),
    ("text", 5),
    ("vision", 5),
    ("schedule", 5),
    ("pipeline", 5),
    ("transport", 4),
    ("layout", 3),
    ("model", 3),
    ("backend", 2),
    ("batch", 1),
    ("request", 1),
    ("sync", 0),
    ("grid", 1),
    ("error", 0),
];

/// Pairs of the same rank that are meant.
const ALLOWED: &[(&str, &str)] = &[("batch", "request"), ("layout", "model")];

const UNSAFE_ROOMS: &[&str] = &[
    "src/backend/cpu/",
    "src/backend/cuda/",
    "src/transport/peer",
    "src/transport/pinned.rs",
    "src/model/mapped.rs",
];

fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
                false => (),
            }
        }
    }
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_string_lossy().into_owned()
}

fn rank(module: &str) -> Option<u32> {
    RANKS.iter().find(|(name, _)| *name == module).map(|&(_, rank)| rank)
}

/// Modules of the crate that a file names in `crate::…`, braces one level deep included.
fn imports(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in text.split("crate::").skip(1) {
        let names: Vec<&str> = match part.strip_prefix('{') {
            Some(list) => top_level_names(list),
            None => vec![part],
        };
        for name in names {
            if name.is_empty() {
                continue;
            }
            let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len());
            found.push(name[..end].to_string());
        }
    }
    found
}

/// `a::b, c::{d, e}}` gives `a::b` and `c::{d, e}`.
fn top_level_names(list: &str) -> Vec<&str> {
    let (mut depth, mut start, mut names) = (0, 0, Vec::new());
    for (i, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                names.push(list[start..i].trim());
                return names;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(list[start..i].trim());
                start = i + 1;
            }
            _ => (),
        }
    }
    names
}

#[test]
fn imports_go_one_way() {
    let mut upward = Vec::new();
    for path in sources("src") {
        let name = relative(&path);
        let module = name["src/".len()..].split(['/', '.']).next().unwrap().to_string();
        if module == "lib" {
            continue;
        }
        let own =
            rank(&module).unwrap_or_else(|| panic!("{name}: module {module} has no rank in {}", file!()));
        let text = fs::read_to_string(&path).unwrap();
        for import in imports(&text) {
            // Names that lib.rs exports again are types of some module; they start with a capital.
            let Some(other) = rank(&import) else { continue };
            let meant = ALLOWED.contains(&(module.as_str(), import.as_str()));
            if import != module && other >= own && !meant {
                upward.push(format!("{name} imports {import}"));
            }
        }
    }
    assert!(upward.is_empty(), "imports against the direction of ARCHITECTURE.md:\n{}", upward.join("\n"));
}

#[test]
fn the_import_reader_sees_what_there_is() {
    let text = "use crate::{\n    batch::{A, B},\n    model::x,\n};\nuse crate::engine::Engine;";
    assert_eq!(imports(text), ["batch", "model", "engine"]);
}

#[test]
fn schedule_simulate_text_and_vision_know_no_device() {
    for path in ["src/schedule", "src/simulate", "src/text", "src/vision"].into_iter().flat_map(sources) {
        let text = fs::read_to_string(&path).unwrap();
        let devices: Vec<String> =
            imports(&text).into_iter().filter(|i| i == "backend" || i == "model").collect();
        assert!(devices.is_empty(), "{} imports {devices:?}", relative(&path));
    }
}

#[test]
fn unsafe_code_stays_in_its_rooms() {
    for path in sources("src") {
        let name = relative(&path);
        let text = fs::read_to_string(&path).unwrap();
        let allows = text.contains("allow(unsafe_code)");
        let meant = UNSAFE_ROOMS.iter().any(|room| name.starts_with(room));
        assert!(!allows || meant, "{name} allows unsafe code");
    }
}

/// Functions with their numbers of lines, as rustfmt leaves them: from the line that names one to the brace below it.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let (head, name) = match line.split_once("fn ") {
            Some((head, name)) => (head.trim_start(), name),
            None => continue,
        };
        let qualifier = |word: &str| {
            ["pub", "const", "async", "unsafe", "extern"].contains(&word)
                || word.starts_with("pub(")
                || word == "\"C\""
                || word.ends_with(')') && head.contains("pub(in ")
        };
        if !head.split_whitespace().all(qualifier) || line.ends_with('}') || line.ends_with(';') {
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        let ends = |line: &&str| {
            line.strip_prefix(indent).is_some_and(|l| l == "}" || l.starts_with(')') && l.ends_with(';'))
        };
        let len = 1 + lines[first..].iter().position(ends).expect("an end");
        let name = name.split(|c: char| !c.is_alphanumeric() && c != '_').next().expect("a name");
        found.push((name.to_owned(), len));
    }
    found
}

#[test]
fn a_function_fits_a_screen() {
    for folder in ["src", "benches", "examples"] {
        for path in sources(folder) {
            let text = fs::read_to_string(&path).unwrap();
            for (name, lines) in functions(&text) {
                assert!(lines <= 70, "{}: {name} has {lines} lines", relative(&path));
            }
        }
    }
    let seen: usize =
        sources("src").iter().map(|path| functions(&fs::read_to_string(path).unwrap()).len()).sum();
    assert!(seen > 1000, "{seen}");
}

#[test]
fn the_function_reader_sees_what_there_is() {
    let long = format!(
        "    pub(in crate::a) unsafe fn long(\n        x: u32,\n    ) {{\n{}    }}\n",
        "        x;\n".repeat(70)
    );
    let text = format!(
        "fn short() {{\n}}\nfn one() {{}}\nimpl A {{\n{long}    fn gone(&self);\n}}\n// A fn of words\n"
    );
    assert_eq!(functions(&text), [("short".to_owned(), 2), ("long".to_owned(), 74)]);
}

#[test]
fn a_file_is_a_sitting() {
    for folder in ["src", "tests", "benches", "examples"] {
        for path in sources(folder) {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            assert!(lines <= 500, "{}: {lines} lines", relative(&path));
        }
    }
}
