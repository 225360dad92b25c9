//! Images and videos that wait for the next message of a conversation.

use std::path::PathBuf;

use super::{media, media::Source};
use crate::{error::Result, request::Media};

/// Who can open them.
pub(super) trait Opener {
    /// Reads, decodes and resizes.
    fn open(&mut self, source: &Source) -> Result<Media>;
    /// Tokens that the model makes of it.
    fn tokens(&self, media: &Media) -> usize;
}

/// What a line asks of them.
#[derive(Debug, PartialEq)]
pub(super) enum Command {
    Attach(Source),
    List,
    Detach,
    /// It cannot be understood, and why.
    Wrong(&'static str),
}

/// What is attached.
#[derive(Debug, Default)]
pub(super) struct Attached(Vec<One>);

#[derive(Debug)]
struct One {
    told: String,
    media: Media,
}

/// What a line asks, if it is one of these commands.
pub(super) fn command(line: &str, fps: Option<f64>) -> Option<Command> {
    let line = line.trim();
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    Some(match (name, rest.trim()) {
        ("/image", "") => Command::List,
        ("/image", file) => Command::Attach(Source::Image(path(file))),
        ("/video", rest) => video(rest, fps),
        ("/detach", _) => Command::Detach,
        _ => return None,
    })
}

/// `DIR`, or `DIR FPS`.
fn video(rest: &str, fps: Option<f64>) -> Command {
    let last = rest.rsplit_once(char::is_whitespace);
    let named = last.and_then(|(dir, fps)| Some((dir.trim(), media::fps(fps).ok()?)));
    match (named, fps) {
        (Some((dir, fps)), _) => Command::Attach(Source::Folder(path(dir), fps)),
        (None, Some(fps)) if !rest.is_empty() => Command::Attach(Source::Folder(path(rest), fps)),
        _ => Command::Wrong(
            "/video needs a folder of frames, and how many there are a second: /video frames 2",
        ),
    }
}

/// A name as it is typed or dropped on a terminal: in quotes, with escaped blanks, or as it is.
fn path(text: &str) -> PathBuf {
    let quoted = ['\'', '"'].iter().find_map(|&q| text.strip_prefix(q)?.strip_suffix(q));
    let plain = PathBuf::from(text);
    match quoted {
        _ if plain.exists() => plain,
        Some(inner) => inner.into(),
        None => match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
            (Some(rest), Some(home)) => PathBuf::from(home).join(rest.replace("\\ ", " ")),
            _ => text.replace("\\ ", " ").into(),
        },
    }
}

impl Attached {
    /// Attaches one more. What is to be said of it.
    pub(super) fn attach(&mut self, source: &Source, opener: &mut dyn Opener) -> Result<String> {
        let media = opener.open(source)?;
        let name = match source {
            Source::Image(path) | Source::Folder(path, _) => path.display().to_string(),
            _ => "it".into(),
        };
        let frames = match media.seconds {
            Some(_) => format!("{} frames of ", media.frames.len()),
            None => String::new(),
        };
        let tokens = opener.tokens(&media);
        let told = format!("{name}: {frames}{}x{} pixels, {tokens} tokens", media.width, media.height);
        let said = format!("{told}, go with the next message.\n");
        self.0.push(One { told, media });
        Ok(said)
    }

    /// What there is.
    pub(super) fn list(&self) -> String {
        match &self.0[..] {
            [] => "Nothing is attached: /image FILE does it.\n".into(),
            some => some.iter().map(|one| format!("{}\n", one.told)).collect(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes all of it back.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// All of it, in the order in which it was attached.
    pub(super) fn media(&self) -> impl Iterator<Item = Media> {
        self.0.iter().map(|one| one.media.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_have_blanks_and_quotes() {
        let image = |line: &str| match command(line, None) {
            Some(Command::Attach(Source::Image(path))) => path.to_str().unwrap().to_owned(),
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(image("/image a.png"), "a.png");
        assert_eq!(image("  /image\t my cat.png "), "my cat.png");
        assert_eq!(image("/image 'my cat.png'"), "my cat.png");
        assert_eq!(image("/image my\\ cat.png"), "my cat.png");
        assert!(image("/image ~/a.png").ends_with("/a.png") && !image("/image ~/a.png").starts_with('~'));
        assert_eq!(command("/image", None), Some(Command::List));
        assert_eq!(command("/detach", None), Some(Command::Detach));
        assert_eq!(command("/images x", None), None);
        assert_eq!(command("what is /image", None), None);
    }

    #[test]
    fn a_video_needs_its_frames_a_second() {
        let folder = |dir: &str, fps| Some(Command::Attach(Source::Folder(dir.into(), fps)));
        assert_eq!(command("/video frames 0.5", None), folder("frames", 0.5));
        assert_eq!(command("/video my frames 2", Some(4.0)), folder("my frames", 2.0));
        assert_eq!(command("/video my frames", Some(4.0)), folder("my frames", 4.0));
        for line in ["/video", "/video frames", "/video 2"] {
            assert!(matches!(command(line, None), Some(Command::Wrong(_))), "{line}");
        }
    }
}
