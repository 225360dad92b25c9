//! Writes the pipeline's files again, once for each bug, with the bug in them.

use std::{env, fs, path::Path};

#[path = "src/bugs.rs"]
mod bugs;

fn main() {
    let here = env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let out = env::var("OUT_DIR").expect("cargo sets it");
    let (here, out) = (Path::new(&here), Path::new(&out));
    let sources = here.join("../../src");
    let (mut modules, mut names) = (String::new(), String::new());
    for bug in bugs::BUGS {
        let name = bug.name;
        let folder = out.join(name);
        for part in ["pipeline", "transport"] {
            fs::create_dir_all(folder.join(part)).expect("the build folder can be written to");
            println!("cargo::rerun-if-changed={}", sources.join(part).display());
            for entry in fs::read_dir(sources.join(part)).expect("the pipeline's folders are there") {
                let path = entry.expect("they can be read").path();
                let file = format!("{part}/{}", path.file_name().expect("a file").to_string_lossy());
                let edits = if file == bug.file { bug.edits } else { &[] };
                fs::write(folder.join(&file), seed(&path, name, edits)).expect("as above");
            }
        }
        fs::write(folder.join("wiring.rs"), seed(&here.join("src/wiring.rs"), name, &[])).expect("as above");
        let module = |file: &str, module: &str| {
            format!("#[path = {:?}]\npub mod {module};\n", folder.join(file).display().to_string())
        };
        modules += &format!("#[allow(clippy::all, unused)]\npub mod {name} {{\n");
        modules += "pub use crate::{Setup, Way, Wired, backend, batch, error, model, sync, world};\n";
        modules += &module("pipeline/mod.rs", "pipeline");
        modules += &module("transport/mod.rs", "transport");
        modules += &module("wiring.rs", "wiring");
        modules += "}\n";
        names += &format!("({name:?}, {name}::wiring::wire),\n");
    }
    modules += &format!("pub const SEEDED: &[(&str, crate::Wire)] = &[\n{names}];\n");
    fs::write(out.join("seeded.rs"), modules).expect("as above");
    println!("cargo::rerun-if-changed=src/bugs.rs");
    println!("cargo::rerun-if-changed=src/wiring.rs");
    println!("cargo::rerun-if-changed=build.rs");
}

/// A file under another root, with edits.
fn seed(path: &Path, name: &str, edits: &[(&str, &str)]) -> String {
    let mut text = fs::read_to_string(path).expect("the pipeline's files are text");
    for (from, to) in edits {
        let times = text.matches(from).count();
        let path = path.display();
        assert!(
            times == 1,
            "{path}: the edit for {name} in src/bugs.rs finds its text {times} times: {from}"
        );
        text = text.replace(from, to);
    }
    text.replace("crate::", &format!("crate::seeded::{name}::"))
}
