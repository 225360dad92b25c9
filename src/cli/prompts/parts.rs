//! The fields of a line that are the prompt: its text, messages or tokens, and the images and videos in them.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Content, told};
use crate::{
    cli::media::{Source, Wanted},
    error::shown,
    request::Message,
};

/// Takes the one field that holds the prompt, and those that hold images.
pub(super) fn take(fields: &mut Map<String, Value>, dir: &Path) -> Result<(Content, Vec<Wanted>), String> {
    const NAMES: [&str; 4] = ["prompt", "question", "messages", "prompt_ids"];
    let mut beside = Beside::take(fields, dir)?;
    let mut found = NAMES.iter().filter_map(|name| Some((*name, fields.shift_remove(*name)?)));
    let (name, value) = found.next().ok_or("it has none of prompt, messages and prompt_ids")?;
    if let Some((other, _)) = found.next() {
        return Err(format!("it has both {name} and {other}"));
    }
    let named = |why: String| format!("{name}: {why}");
    match name {
        "messages" => {
            let turns: Vec<Turn> = serde_json::from_value(value).map_err(|e| named(told(&e)))?;
            let (messages, media) = conversation(turns, &mut beside, dir).map_err(named)?;
            beside.all_have_places(&media)?;
            Ok((Content::Messages(messages), media))
        }
        "prompt_ids" => {
            let ids = serde_json::from_value(value).map_err(|e| named(told(&e)))?;
            Ok((Content::Ids(ids), beside.all()))
        }
        _ => {
            let text = serde_json::from_value(value).map_err(|e| named(told(&e)))?;
            Ok((Content::Text(text), beside.all()))
        }
    }
}

/// A message, whose content is a text or a list of parts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn {
    role: String,
    content: Value,
}

/// Images and videos that stand beside the prompt, each kind in the order of its places.
struct Beside {
    images: VecDeque<Source>,
    videos: VecDeque<Source>,
}

/// A part of a message.
enum Piece {
    Text(String),
    Media(Source),
    /// The next of those beside the prompt.
    Image,
    Video,
}

impl Beside {
    fn take(fields: &mut Map<String, Value>, dir: &Path) -> Result<Beside, String> {
        let mut list = |one: &str, many: &str| match (fields.shift_remove(one), fields.shift_remove(many)) {
            (Some(_), Some(_)) => Err(format!("it has both {one} and {many}")),
            (None, None) | (Some(Value::Null), None) | (None, Some(Value::Null)) => Ok(Vec::new()),
            (Some(value), None) => Ok(vec![value]),
            (None, Some(Value::Array(values))) => Ok(values),
            (None, Some(_)) => Err(format!("{many}: it is no list")),
        };
        let (images, videos) = (list("image", "images")?, list("video", "videos")?);
        let images = images.iter().map(|value| image(value, dir));
        let videos = videos.iter().map(|value| match value {
            Value::Object(fields) => video(fields, dir),
            _ => Err("it is no object with frames and fps".into()),
        });
        Ok(Beside {
            images: images.collect::<Result<_, _>>().map_err(|why: String| format!("images: {why}"))?,
            videos: videos.collect::<Result<_, _>>().map_err(|why: String| format!("videos: {why}"))?,
        })
    }

    /// Those of a prompt that is no conversation, before its text.
    fn all(self) -> Vec<Wanted> {
        self.images.into_iter().chain(self.videos).map(Wanted::first).collect()
    }

    fn all_have_places(&self, placed: &[Wanted]) -> Result<(), String> {
        for (kind, left) in [("image", self.images.len()), ("video", self.videos.len())] {
            if left > 0 {
                let of_kind = |wanted: &&Wanted| is_video(&wanted.source) == (kind == "video");
                let places = placed.iter().filter(of_kind).count();
                return Err(format!(
                    "{kind}s: {} given, but the messages have places for {places}: each is a part {{\"type\": \"{kind}\"}}",
                    places + left
                ));
            }
        }
        Ok(())
    }
}

fn is_video(source: &Source) -> bool {
    matches!(source, Source::Folder(..) | Source::Frames(..))
}

/// Messages with the images in them.
fn conversation(
    turns: Vec<Turn>,
    beside: &mut Beside,
    dir: &Path,
) -> Result<(Vec<Message>, Vec<Wanted>), String> {
    let (mut messages, mut media) = (Vec::new(), Vec::new());
    for (i, Turn { role, content }) in turns.into_iter().enumerate() {
        let mut message = Message::new(role, "");
        let parts = match content {
            Value::String(text) => {
                message.content = text;
                Vec::new()
            }
            Value::Array(parts) => parts,
            _ => return Err(format!("message {i}: content is neither a string nor a list of parts")),
        };
        for (n, part) in parts.into_iter().enumerate() {
            let within = |why: String| format!("message {i}: part {n}: {why}");
            let none = |kind: &str| within(format!("there is no {kind} left for it"));
            let source = match piece(part, dir).map_err(within)? {
                Piece::Text(text) => {
                    message.content.push_str(&text);
                    continue;
                }
                Piece::Media(source) => source,
                Piece::Image => beside.images.pop_front().ok_or_else(|| none("image"))?,
                Piece::Video => beside.videos.pop_front().ok_or_else(|| none("video"))?,
            };
            media.push(Wanted { message: i, at: message.content.len(), source });
        }
        messages.push(message);
    }
    Ok((messages, media))
}

/// `{"type": "text", "text": …}`, `{"type": "image", "image": FILE}`, `{"type": "image_url", "image_url": {"url": …}}`,
/// `{"type": "video", "video": FOLDER, "fps": N}`.
fn piece(part: Value, dir: &Path) -> Result<Piece, String> {
    let Value::Object(mut fields) = part else { return Err("it is no object".into()) };
    let kind = fields.shift_remove("type");
    let kind = kind.as_ref().and_then(Value::as_str).ok_or("it has no type")?.to_owned();
    let piece = match &kind[..] {
        "text" => match fields.shift_remove("text") {
            Some(Value::String(text)) => Piece::Text(text),
            _ => return Err("its text is no string".into()),
        },
        "image" => match fields.shift_remove("image") {
            Some(value) => Piece::Media(image(&value, dir)?),
            None => Piece::Image,
        },
        "image_url" => {
            let url = fields.shift_remove("image_url").ok_or("it has no image_url")?;
            // What a larger or smaller image would cost elsewhere is no matter here.
            Piece::Media(image(url.get("url").unwrap_or(&url), dir)?)
        }
        "video" if fields.is_empty() => Piece::Video,
        "video" => return Ok(Piece::Media(video(&fields, dir)?)),
        other => {
            return Err(format!("type {:?} is none of text, image, image_url and video", shown(other)));
        }
    };
    match fields.keys().next() {
        Some(key) => Err(format!("a part of type {kind} has no field {:?}", shown(key))),
        None => Ok(piece),
    }
}

/// The name of a file, a `file:` URL, or a `data:` URL.
fn image(value: &Value, dir: &Path) -> Result<Source, String> {
    let text = value.as_str().ok_or("an image is no string")?;
    let Some((scheme, rest)) = text.split_once(':') else { return path(text, dir).map(Source::Image) };
    match scheme.to_ascii_lowercase().as_str() {
        "data" => {
            let (kind, coded) = rest.split_once(',').ok_or("a data URL has no comma")?;
            let kind = kind.strip_suffix(";base64").ok_or("a data URL is not in base64")?;
            let bytes = BASE64_STANDARD.decode(coded.trim()).map_err(|e| format!("a data URL: {e}"))?;
            Ok(Source::Bytes(format!("data:{}", shown(kind)), bytes.into()))
        }
        "http" | "https" => Err(format!("{}: images are read from files, not fetched", shown(text))),
        "file" => {
            let rest = rest.strip_prefix("//").unwrap_or(rest);
            let rest = rest.strip_prefix("localhost/").map_or(rest.to_owned(), |rest| format!("/{rest}"));
            path(&unescaped(&rest)?, dir).map(Source::Image)
        }
        _ => path(text, dir).map(Source::Image),
    }
}

/// `frames` or `video`, a folder or a list of files, and `fps`.
fn video(fields: &Map<String, Value>, dir: &Path) -> Result<Source, String> {
    if let Some(key) = fields.keys().find(|key| !["frames", "video", "fps"].contains(&key.as_str())) {
        return Err(format!("a video has no field {:?}", shown(key)));
    }
    let fps = fields.get("fps").and_then(Value::as_f64).filter(|fps| *fps > 0.0);
    let fps = fps.ok_or("a video needs fps, the number of its frames a second")?;
    match fields.get("frames").or(fields.get("video")) {
        Some(Value::String(folder)) => Ok(Source::Folder(path(folder, dir)?, fps)),
        Some(Value::Array(files)) => {
            let file = |file: &Value| path(file.as_str().ok_or("a frame is no string")?, dir);
            Ok(Source::Frames(files.iter().map(file).collect::<Result<_, String>>()?, fps))
        }
        _ => Err("a video needs frames: a folder, or a list of files".into()),
    }
}

fn path(name: &str, dir: &Path) -> Result<PathBuf, String> {
    match name.is_empty() {
        true => Err("the name of a file is empty".into()),
        false => Ok(dir.join(name)),
    }
}

/// Without the `%20` and their like of URLs.
fn unescaped(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut parts = text.split('%');
    bytes.extend(parts.next().unwrap_or_default().bytes());
    for part in parts {
        let code = part.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(code.ok_or_else(|| format!("{}: a % without two digits", shown(text)))?);
        bytes.extend(part[2..].bytes());
    }
    String::from_utf8(bytes).map_err(|_| format!("{}: it is not UTF-8", shown(text)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn taken(line: Value) -> Result<(Content, Vec<Wanted>), String> {
        let Value::Object(mut fields) = line else { panic!("{line}") };
        take(&mut fields, Path::new("dir"))
    }

    fn file(name: &str) -> Source {
        Source::Image(name.into())
    }

    #[test]
    fn images_stand_before_a_prompt_or_within_messages() {
        let (content, media) = taken(json!({"image": "a.png", "question": "What?"})).unwrap();
        assert_eq!((content, media), (Content::Text("What?".into()), vec![Wanted::first(file("dir/a.png"))]));
        let (_, media) = taken(json!({"images": ["a", "/b"], "videos": [{"frames": "v", "fps": 2}],
            "prompt_ids": [1]}))
        .unwrap();
        let sources: Vec<Source> = media.into_iter().map(|wanted| wanted.source).collect();
        assert_eq!(sources, [file("dir/a"), file("/b"), Source::Folder("dir/v".into(), 2.0)]);
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "The "},
                {"type": "image"},
                {"type": "text", "text": "and"},
                {"type": "image_url", "image_url": {"url": "file:///x/a%20b.png"}},
                {"type": "image_url", "image_url": "data:image/png;base64,AAEC"},
                {"type": "video", "video": ["f0", "f1"], "fps": 1.5},
                {"type": "image"}
            ]}
        ]);
        let (content, media) = taken(json!({"messages": messages, "images": ["1", "2"]})).unwrap();
        let Content::Messages(messages) = content else { panic!("{content:?}") };
        assert_eq!(messages[1], Message::new("user", "The and"));
        let places: Vec<(usize, usize)> = media.iter().map(|w| (w.message, w.at)).collect();
        assert_eq!(places, [(1, 4), (1, 7), (1, 7), (1, 7), (1, 7)]);
        assert_eq!(media[0].source, file("dir/1"));
        assert_eq!(media[1].source, file("/x/a b.png"));
        assert_eq!(media[2].source, Source::Bytes("data:image/png".into(), [0, 1, 2].into()));
        assert_eq!(media[3].source, Source::Frames(vec!["dir/f0".into(), "dir/f1".into()], 1.5));
        assert_eq!(media[4].source, file("dir/2"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let part = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
        for (line, why) in [
            (json!({"prompt": "a", "image": "b", "images": []}), "it has both image and images"),
            (json!({"prompt": "a", "images": "b"}), "images: it is no list"),
            (json!({"prompt": "a", "images": [3]}), "images: an image is no string"),
            (json!({"prompt": "a", "image": ""}), "images: the name of a file is empty"),
            (json!({"prompt": "a", "image": "https://x/a.png"}), "not fetched"),
            (json!({"prompt": "a", "image": "data:image/png,x"}), "not in base64"),
            (json!({"prompt": "a", "image": "data:image/png;base64,!"}), "a data URL: "),
            (json!({"prompt": "a", "image": "file:///%zz"}), "a % without two digits"),
            (json!({"prompt": "a", "videos": [{"frames": "d"}]}), "videos: a video needs fps"),
            (json!({"prompt": "a", "videos": [{"fps": 1}]}), "videos: a video needs frames"),
            (json!({"prompt": "a", "videos": ["d"]}), "videos: it is no object"),
            (json!({"messages": [{"role": "user", "content": 3}]}), "message 0: content is neither"),
            (
                json!({"messages": [{"role": "user", "content": "a"}], "images": ["b"]}),
                "images: 1 given, but the messages have places for 0",
            ),
            (part(json!({"type": "image"})), "message 0: part 0: there is no image left for it"),
            (part(json!({"type": "audio"})), "\"audio\" is none of text, image"),
            (part(json!({"type": "image", "imge": "x"})), "has no field \"imge\""),
            (part(json!("a")), "part 0: it is no object"),
            (part(json!({"text": "a"})), "part 0: it has no type"),
        ] {
            let told = taken(line.clone()).unwrap_err();
            assert!(told.contains(why), "{line}: {told}");
        }
    }
}
