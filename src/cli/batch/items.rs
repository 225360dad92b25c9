//! The items of a batch, in order: an image with a question each, or a line of a file each.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    sync::Arc,
};

use glob::MatchOptions;
use serde_json::Value;

use crate::{
    cli::{
        media::{self, Source, Wanted},
        prompts::{self, Asked, Content, Line, Lines},
    },
    error::{Error, Result},
};

/// Folders within folders, at most: deeper ones are a loop.
const DEPTH_MAX: usize = 64;

/// One thing to be answered: a line of the results.
#[derive(Debug, Clone)]
pub(super) struct Item {
    /// A string or a number.
    pub(super) id: Value,
    /// Of an item of `--images`: the image, and the question.
    pub(super) image: Option<String>,
    pub(super) question: Option<String>,
    /// What tells it from others, and the same item of another run from this one's.
    pub(super) key: String,
    /// Of its line, which may bring images along.
    pub(super) bytes: usize,
    /// What is asked, or what is wrong with it.
    pub(super) asked: Result<Asked>,
}

/// Items, and how many there are if that is known.
pub(super) struct Listed {
    pub(super) items: Items,
    pub(super) total: Option<usize>,
}

/// Items one after another. Those that follow each other may be about the same image.
pub(super) struct Items(Box<dyn Iterator<Item = Item> + Send>);

impl Iterator for Items {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        self.0.next()
    }
}

impl Items {
    /// Each question about each image of folders, globs and files.
    pub(super) fn of_images(named: &[String], questions: &[String], settings: String) -> Result<Listed> {
        let mut images = Vec::new();
        for name in named {
            images.extend(find(name, named.len() == 1)?);
        }
        let questions: Arc<[String]> = questions.into();
        let total = Some(images.len() * questions.len());
        let items = images.into_iter().flat_map(move |image| {
            let (questions, settings) = (questions.clone(), settings.clone());
            (0..questions.len()).map(move |q| about(&image, (&questions, q), &settings))
        });
        Ok(Listed { items: Items(Box::new(items)), total })
    }

    /// The lines of a file; `-` is stdin. Of a pipe nobody knows how many there are.
    pub(super) fn of_lines(path: &Path, settings: String) -> Result<Listed> {
        let lines = Lines::open(path)?;
        // What is no file can be read once.
        let total = match path != Path::new("-") && path.is_file() {
            true => match count(path)? {
                0 => return Err(Error::data(path, "holds no requests")),
                lines => Some(lines),
            },
            false => None,
        };
        let (name, dir) = (lines.name.clone(), prompts::folder_of(path));
        let mut number = 0;
        let items = lines.map(move |line| {
            number += 1;
            match line {
                Ok(line) => of_line(&line, &name, &dir, &settings),
                // It has no text of its own.
                Err(e) => unreadable(number, e, &settings),
            }
        });
        Ok(Listed { items: Items(Box::new(items)), total })
    }
}

/// An image that was found: what it is called in the results, and where it is.
struct Image {
    name: String,
    path: PathBuf,
}

/// The images that a flag's value stands for. Those of the only folder are called by their names in it.
fn find(named: &str, only: bool) -> Result<Vec<Image>> {
    let path = Path::new(named);
    let called = |path: &Path| Image { name: path.to_string_lossy().into_owned(), path: path.to_path_buf() };
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {
            let mut files = Vec::new();
            walk(path, 0, &mut files)?;
            if files.is_empty() {
                return Err(media::none_in(path));
            }
            files.sort_by(|a, b| media::natural(a, b));
            let within = |file: PathBuf| match file.strip_prefix(path) {
                Ok(name) if only => Image { name: name.to_string_lossy().into_owned(), path: file },
                _ => called(&file),
            };
            Ok(files.into_iter().map(within).collect())
        }
        // It may be unreadable, which is its line's error.
        Ok(_) => Ok(vec![called(path)]),
        Err(e) if !named.contains(['*', '?', '[']) => Err(Error::io(path, e)),
        Err(_) => matches(named).map(|files| files.iter().map(|file| called(file)).collect()),
    }
}

/// The image files that match a glob, in their natural order.
fn matches(pattern: &str) -> Result<Vec<PathBuf>> {
    // As in a shell, hidden files have to be asked for.
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
    let paths = glob::glob_with(pattern, options)
        .map_err(|e| Error::usage(format!("--images {pattern}"), e.to_string()))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|e| Error::io(e.path(), e.error()))?;
        if media::is_image(&path) && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort_by(|a, b| media::natural(a, b));
    match files.is_empty() {
        true => Err(Error::data(pattern, "matches no image files")),
        false => Ok(files),
    }
}

/// The image files in a folder and in those within it, but for hidden ones. Links to folders are not followed.
fn walk(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    if depth > DEPTH_MAX {
        return Err(Error::io(dir, format!("is more than {DEPTH_MAX} folders deep")));
    }
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        let path = entry.path();
        if media::is_hidden(&path) {
            continue;
        }
        let kind = entry.file_type().map_err(|e| Error::io(&path, e))?;
        if kind.is_dir() {
            walk(&path, depth + 1, files)?;
        } else if media::is_image(&path) && !path.is_dir() {
            files.push(path);
        }
    }
    Ok(())
}

/// A question about an image. Of several, each has a number in its item's id.
fn about(image: &Image, (questions, q): (&[String], usize), settings: &str) -> Item {
    let (name, question) = (image.name.clone(), questions[q].clone());
    let id = match questions.len() {
        1 => name.clone(),
        _ => format!("{name}#{}", q + 1),
    };
    let content = Content::Text(question.clone());
    let asked = Asked { media: vec![Wanted::first(Source::Image(image.path.clone()))], ..content.into() };
    let key = key(&[settings, &question]);
    Item { id: id.into(), image: Some(name), question: Some(question), key, bytes: 0, asked: Ok(asked) }
}

/// What a line asks. Its id is its own or, without one, the line's number.
fn of_line(line: &Line, name: &str, dir: &Path, settings: &str) -> Item {
    let (id, asked) = match serde_json::from_str(&line.text) {
        Ok(Value::Object(mut fields)) => match fields.shift_remove("id") {
            None | Some(Value::Null) => (None, prompts::object(fields, dir)),
            Some(id @ (Value::String(_) | Value::Number(_))) => (Some(id), prompts::object(fields, dir)),
            Some(_) => (None, Err("id is neither a string nor a number".into())),
        },
        Ok(Value::String(text)) => (None, Ok(Content::Text(text).into())),
        Ok(_) => (None, Err("it is neither a string nor an object".into())),
        Err(e) => (None, Err(prompts::told(&e))),
    };
    let asked = asked.map_err(|why: String| prompts::wrong(name, line.number, &why));
    let id = id.unwrap_or_else(|| line.number.into());
    let key = key(&[settings, line.text.trim()]);
    Item { id, image: None, question: None, key, bytes: line.text.len(), asked }
}

fn unreadable(number: usize, why: Error, settings: &str) -> Item {
    let key = key(&[settings, "?"]);
    Item { id: number.into(), image: None, question: None, key, bytes: 0, asked: Err(why) }
}

/// The lines of a file that are not blank, as [`Lines`] has them.
fn count(path: &Path) -> Result<usize> {
    let failed = |e| Error::io(path, e);
    let mut reader = BufReader::new(File::open(path).map_err(failed)?);
    let (mut lines, mut blank) = (0, true);
    loop {
        let bytes = reader.fill_buf().map_err(failed)?;
        if bytes.is_empty() {
            return Ok(lines + usize::from(!blank));
        }
        for &byte in bytes {
            match byte {
                b'\n' => {
                    lines += usize::from(!blank);
                    blank = true;
                }
                byte => blank &= byte.is_ascii_whitespace(),
            }
        }
        let len = bytes.len();
        reader.consume(len);
    }
}

/// A hash of texts that is the same on every machine (FNV-1a, 64 bits).
fn key(texts: &[&str]) -> String {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0xff]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_settings_and_items_apart() {
        assert_eq!(key(&[]), "cbf29ce484222325");
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab"]));
        assert_ne!(key(&["a", "b"]), key(&["a", "bb"]));
    }

    #[test]
    fn lines_have_their_own_ids_or_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        let lines = "{\"id\": \"x\", \"prompt\": \"a\"}\n\n\"b\"\n{\"id\": 7, \"prmpt\": \"c\"}\n{\"id\": []}\n  \nno";
        fs::write(&path, lines).unwrap();
        let Listed { items, total } = Items::of_lines(&path, "s".into()).unwrap();
        let items: Vec<Item> = items.collect();
        assert_eq!(total, Some(5));
        let ids: Vec<String> = items.iter().map(|item| item.id.to_string()).collect();
        assert_eq!(ids, ["\"x\"", "3", "7", "5", "7"]);
        let why = |i: usize| items[i].asked.as_ref().unwrap_err().to_string();
        assert!(items[1].asked.is_ok() && why(2).contains("line 4: it has none of prompt"), "{}", why(2));
        assert!(why(3).contains("id is neither") && why(4).contains("line 7: "), "{}", why(4));
    }

    #[test]
    fn a_folders_images_are_in_their_natural_order() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("b/.hidden")).unwrap();
        for name in ["10.png", "9.JPG", "b/1.webp", "b/.hidden/x.png", ".x.png", "notes.txt", "b/x.json"] {
            fs::write(root.join(name), "").unwrap();
        }
        let (path, questions) = (root.to_str().unwrap().to_owned(), ["p".to_owned(), "q".to_owned()]);
        let listed = Items::of_images(std::slice::from_ref(&path), &questions, String::new()).unwrap();
        let ids: Vec<String> = listed.items.map(|item| item.id.as_str().unwrap().to_owned()).collect();
        assert_eq!(ids, ["9.JPG#1", "9.JPG#2", "10.png#1", "10.png#2", "b/1.webp#1", "b/1.webp#2"]);
        assert_eq!(listed.total, Some(6));
        let names = |named: &[String]| {
            let listed =
                Items::of_images(named, &questions[..1], String::new()).map_err(|e| e.to_string())?;
            Ok::<_, String>(listed.items.map(|item| item.image.unwrap()).collect::<Vec<_>>())
        };
        assert_eq!(
            names(&[format!("{path}/*.*")]),
            Ok(vec![format!("{path}/9.JPG"), format!("{path}/10.png")])
        );
        let several = [format!("{path}/b"), format!("{path}/notes.txt")];
        assert_eq!(names(&several), Ok(vec![format!("{path}/b/1.webp"), format!("{path}/notes.txt")]));
        let empty = format!("{path}/b/.hidden");
        fs::remove_file(root.join("b/.hidden/x.png")).unwrap();
        assert!(names(&[empty]).unwrap_err().contains(".hidden: holds no images (known by .png, "));
        assert!(names(&[format!("{path}/*.gif")]).unwrap_err().ends_with("*.gif: matches no image files"));
        assert!(names(&[format!("{path}/none")]).unwrap_err().contains("none: No such file"));
    }
}
