use std::{collections::VecDeque, time::Duration};

use super::*;
use crate::{
    engine::TimedOut,
    request::{Event, Media, Usage},
};

/// Types lines; `^C` is Ctrl-C.
struct Script {
    lines: VecDeque<&'static str>,
    shown: String,
}

impl Console for Script {
    fn line(&mut self) -> Result<Line> {
        Ok(match self.lines.pop_front() {
            None => Line::End,
            Some("^C") => Line::Interrupted,
            Some(text) => Line::Text(text.into()),
        })
    }

    fn say(&mut self, text: &str) -> io::Result<()> {
        self.shown.push_str(text);
        Ok(())
    }
}

/// Events that are known beforehand; endless ones repeat the last.
struct Known {
    events: VecDeque<Event>,
    /// Signals after so many events, and ends when it is cancelled.
    interrupt: Option<(usize, Interrupt)>,
}

impl Stream for Known {
    fn next_timeout(&mut self, _: Duration) -> Result<Option<Event>, TimedOut> {
        let Some((left, interrupt)) = &mut self.interrupt else { return Ok(self.events.pop_front()) };
        match left.checked_sub(1) {
            Some(less) => *left = less,
            None => {
                assert!(interrupt.signal());
                return Err(TimedOut);
            }
        }
        Ok(self.events.front().cloned())
    }

    fn cancel(&mut self) {
        self.interrupt = None;
        self.events = [finished(FinishReason::Cancelled, "")].into();
    }
}

fn finished(reason: FinishReason, text: &str) -> Event {
    Event::Finished { sample: 0, reason, text: text.into(), usage: Usage::default() }
}

/// An answer of the text and an exclamation mark.
fn known(text: &str, reason: FinishReason) -> Box<dyn Stream> {
    let token = Event::Token { sample: 0, id: 1, text: text.into(), logprobs: None };
    Box::new(Known { events: [token, finished(reason, "!")].into(), interrupt: None })
}

/// Answers with `reply`; of images it can open one.
struct Scripted<F> {
    asked: Vec<Asked>,
    reply: F,
}

impl<F> Opener for Scripted<F> {
    fn open(&mut self, source: &Source) -> Result<Media> {
        match source {
            Source::Image(path) if path.ends_with("cat.png") => Ok(cat()),
            _ => Err(Error::io("dog.png", "No such file")),
        }
    }

    fn tokens(&self, _: &Media) -> usize {
        2
    }
}

impl<F: FnMut(usize) -> Result<Box<dyn Stream>>> Partner for Scripted<F> {
    fn ask(&mut self, asked: Asked) -> Result<Box<dyn Stream>> {
        self.asked.push(asked);
        (self.reply)(self.asked.len() - 1)
    }
}

fn cat() -> Media {
    Media { width: 56, height: 28, frames: vec![vec![7; 3 * 56 * 28]].into(), seconds: None }
}

/// Plays the lines; each prompt is answered by `reply`. What was shown and what was asked.
fn play_all(
    lines: &[&'static str],
    terms: Terms,
    interrupt: &Interrupt,
    reply: impl FnMut(usize) -> Result<Box<dyn Stream>>,
) -> (String, Vec<Asked>) {
    let mut script = Script { lines: lines.iter().copied().collect(), shown: String::new() };
    let mut partner = Scripted { asked: Vec::new(), reply };
    assert_eq!(talk(&mut script, interrupt, terms, &mut partner), Ok(0));
    (script.shown, partner.asked)
}

/// The same without images.
fn play(
    lines: &[&'static str],
    chat: bool,
    interrupt: &Interrupt,
    reply: impl FnMut(usize) -> Result<Box<dyn Stream>>,
) -> (String, Vec<Content>) {
    let terms = Terms { chat, media: Vec::new(), fps: None };
    let (shown, asked) = play_all(lines, terms, interrupt, reply);
    (shown, asked.into_iter().map(|asked| asked.content).collect())
}

fn roles(content: &Content) -> Vec<(&str, &str)> {
    let Content::Messages(messages) = content else { panic!("{content:?}") };
    messages.iter().map(|m| (&m.role[..], &m.content[..])).collect()
}

#[test]
fn the_conversation_is_remembered_until_reset() {
    let lines = ["hi", "", "^C", "more", "/reset", "new", "/help", "/what"];
    let (shown, asked) =
        play(&lines, true, &Interrupt::detached(), |i| Ok(known(&format!("a{i}"), FinishReason::Stop)));
    assert_eq!(roles(&asked[0]), [("user", "hi")]);
    assert_eq!(roles(&asked[1]), [("user", "hi"), ("assistant", "a0!"), ("user", "more")]);
    assert_eq!(roles(&asked[2]), [("user", "new")]);
    assert_eq!(asked.len(), 3);
    assert!(shown.contains("a1!\n") && shown.contains(HELP) && shown.contains("/what is no command"));
}

#[test]
fn a_failed_question_is_told_and_forgotten() {
    let (shown, asked) = play(&["hi", "long", "short"], true, &Interrupt::detached(), |i| match i {
        1 => Err(Error::Request("9 tokens\nare too many".into())),
        _ => Ok(known("a", FinishReason::Length)),
    });
    assert!(shown.contains("error: request: 9 tokens are too many (/reset starts a new conversation)\n"));
    assert_eq!(roles(&asked[2]), [("user", "hi"), ("assistant", "a!"), ("user", "short")]);
    assert!(shown.contains("(cut off: "));
    let broken = || [Event::Error(Error::Engine("stage 1 failed".into()))].into();
    let (shown, _) = play(&["hi"], true, &Interrupt::detached(), |_| {
        Ok(Box::new(Known { events: broken(), interrupt: None }))
    });
    assert!(shown.contains("error: engine: stage 1 failed\n"), "{shown}");
}

#[test]
fn ctrl_c_stops_the_answer_and_keeps_what_there_is() {
    let interrupt = Interrupt::detached();
    let (shown, asked) = play(&["hi", "more"], true, &interrupt, |i| match i {
        0 => {
            let token = Event::Token { sample: 0, id: 1, text: "la".into(), logprobs: None };
            Ok(Box::new(Known { events: [token].into(), interrupt: Some((3, interrupt.clone())) }))
        }
        _ => Ok(known("b", FinishReason::Stop)),
    });
    assert!(shown.contains("lalala\n(stopped)\n"), "{shown}");
    assert_eq!(roles(&asked[1]), [("user", "hi"), ("assistant", "lalala"), ("user", "more")]);
}

#[test]
fn without_a_template_lines_are_completed_as_they_are() {
    let (shown, asked) =
        play(&["a ", "b"], false, &Interrupt::detached(), |_| Ok(known("x", FinishReason::Stop)));
    assert_eq!(asked, [Content::Text("a ".into()), Content::Text("b".into())]);
    assert!(shown.starts_with("No chat template"));
}

#[test]
fn what_is_attached_goes_with_the_next_message_alone() {
    let lines = ["/image", "/image cat.png", "/image", "what?", "more", "/image cat.png", "/detach", "none"];
    let terms = Terms { chat: true, media: vec![Source::Image("cat.png".into())], fps: None };
    let (shown, asked) =
        play_all(&lines, terms, &Interrupt::detached(), |_| Ok(known("a", FinishReason::Stop)));
    assert!(shown.contains("cat.png: 56x28 pixels, 2 tokens, go with the next message.\n"), "{shown}");
    assert_eq!(shown.matches("cat.png: 56x28 pixels, 2 tokens\n").count(), 3, "one, then two are listed");
    let media = |asked: &Asked| -> Vec<Vec<usize>> {
        let Content::Messages(messages) = &asked.content else { panic!("{asked:?}") };
        messages.iter().map(|m| m.media.iter().map(|inset| inset.at).collect()).collect()
    };
    assert_eq!(media(&asked[0]), [vec![0, 0]]);
    assert_eq!(media(&asked[1]), [vec![0, 0], vec![], vec![]], "the images stay where they were");
    assert_eq!(media(&asked[2]).last().unwrap().len(), 0, "they were taken back");
}

#[test]
fn what_cannot_be_attached_is_told_and_what_failed_stays() {
    let lines = ["/image dog.png", "/video", "/image cat.png", "one", "two"];
    let terms = Terms { chat: false, media: Vec::new(), fps: None };
    let (shown, asked) = play_all(&lines, terms, &Interrupt::detached(), |i| match i {
        0 => Err(Error::Request("too long".into())),
        _ => Ok(known("a", FinishReason::Stop)),
    });
    assert!(shown.contains("error: dog.png: No such file\n"), "{shown}");
    assert!(shown.contains("/video needs a folder"), "{shown}");
    assert!(shown.contains("too long (/detach takes back what is attached)\n"), "{shown}");
    let wanted = [Wanted::first(Source::Ready(cat()))];
    assert_eq!(asked.iter().map(|asked| &asked.media[..]).collect::<Vec<_>>(), [&wanted, &wanted]);
}
