//! A conversation at a terminal.

use std::io::{self, Write};

use rustyline::{Config, DefaultEditor, error::ReadlineError};

use super::{
    answer::{Answer, End, Halt, Sample, Stream},
    interrupt::Interrupt,
    one_line,
    prompts::Content,
    stdout_failed,
};
use crate::{
    error::{Error, Result},
    request::{FinishReason, Message},
};

const HELP: &str = "\
/reset   forgets the conversation
/help    shows this
Ctrl-C   stops an answer, or clears the line
Ctrl-D   leaves
";

/// What came of asking for a line.
pub(super) enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D.
    End,
}

/// Where the conversation takes place.
pub(super) trait Console {
    /// Asks for a line.
    fn line(&mut self) -> Result<Line>;
    /// Shows text at once.
    fn say(&mut self, text: &str) -> io::Result<()>;
}

/// Submits a prompt.
pub(super) type Ask<'a> = &'a mut dyn FnMut(Content) -> Result<Box<dyn Stream>>;

/// A real terminal.
pub(super) struct Terminal {
    editor: DefaultEditor,
}

impl Terminal {
    pub(super) fn open() -> Result<Self> {
        let config = Config::builder().auto_add_history(true).build();
        let editor = DefaultEditor::with_config(config).map_err(|e| Error::io("terminal", e))?;
        Ok(Terminal { editor })
    }
}

impl Console for Terminal {
    fn line(&mut self) -> Result<Line> {
        match self.editor.readline("> ") {
            Ok(text) => Ok(Line::Text(text)),
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(e) => Err(Error::io("terminal", e)),
        }
    }

    fn say(&mut self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

/// Talks until the console ends. Without `chat` each line is completed for itself.
pub(super) fn talk(console: &mut dyn Console, interrupt: &Interrupt, chat: bool, ask: Ask<'_>) -> Result<u8> {
    let mut talk = Talk { console, interrupt, chat, history: Vec::new() };
    match talk.until_end(ask) {
        Ok(()) => Ok(0),
        Err(Halt::Stdout(e)) => stdout_failed(&e),
        Err(Halt::Wrong(e)) => Err(e),
    }
}

struct Talk<'a> {
    console: &'a mut dyn Console,
    interrupt: &'a Interrupt,
    chat: bool,
    history: Vec<Message>,
}

impl Talk<'_> {
    fn until_end(&mut self, ask: Ask<'_>) -> Result<(), Halt> {
        self.console.say(match self.chat {
            true => "/help lists commands; Ctrl-D leaves.\n",
            false => {
                "No chat template: each line is completed as it is. /help lists commands; Ctrl-D leaves.\n"
            }
        })?;
        loop {
            let line = match self.console.line().map_err(Halt::Wrong)? {
                Line::Text(line) => line,
                Line::Interrupted => continue,
                Line::End => return Ok(()),
            };
            match line.trim() {
                "" => {}
                "/help" => self.console.say(HELP)?,
                "/reset" => {
                    self.history.clear();
                    self.console.say("The conversation is forgotten.\n")?;
                }
                command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                    self.console.say(&format!("{command} is no command; /help lists them.\n"))?;
                }
                _ => self.turn(line, ask)?,
            }
        }
    }

    /// One question and its answer. A question that could not be answered is forgotten.
    fn turn(&mut self, line: String, ask: Ask<'_>) -> Result<(), Halt> {
        let content = if self.chat {
            self.history.push(Message::new("user", line));
            Content::Messages(self.history.clone())
        } else {
            Content::Text(line)
        };
        match ask(content).map_err(Halt::Wrong).and_then(|mut events| self.answer(&mut *events)) {
            Ok(text) if self.chat && !text.is_empty() => self.history.push(Message::new("assistant", text)),
            Ok(_) => drop(self.history.pop()),
            Err(Halt::Wrong(e)) => {
                self.history.pop();
                let hint = if self.history.is_empty() { "" } else { " (/reset starts a new conversation)" };
                self.console.say(&format!("error: {}{hint}\n", one_line(&e.to_string())))?;
            }
            Err(stdout) => return Err(stdout),
        }
        Ok(())
    }

    /// Shows an answer as it comes; Ctrl-C ends it, and what there is of it counts.
    fn answer(&mut self, events: &mut dyn Stream) -> Result<String, Halt> {
        let (mut answer, mut shown) = (Answer::new(Vec::new(), 1), 0);
        let console = &mut *self.console;
        let mut grown = |answer: &Answer| {
            let text = &answer.samples[0].text;
            let new = &text[shown..];
            shown = text.len();
            console.say(new)
        };
        self.interrupt.listen();
        let end = answer.read(events, self.interrupt, &mut grown);
        self.interrupt.ignore();
        self.console.say("\n")?;
        if let Some(note) = end_note(end?, &answer.samples[0]) {
            self.console.say(note)?;
        }
        Ok(answer.samples.remove(0).text)
    }
}

/// An answer that stops in the middle says why.
fn end_note(end: End, sample: &Sample) -> Option<&'static str> {
    match (end, sample.end) {
        (End::Interrupted, _) => Some("(stopped)\n"),
        (_, Some((FinishReason::Length, _))) => {
            Some("(cut off: --max-tokens or the end of the context is reached)\n")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, time::Duration};

    use super::*;
    use crate::{
        engine::TimedOut,
        request::{Event, Usage},
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

    /// Plays the lines; each prompt is answered by `reply`. What was shown and what was asked.
    fn play(
        lines: &[&'static str],
        chat: bool,
        interrupt: &Interrupt,
        mut reply: impl FnMut(usize) -> Result<Box<dyn Stream>>,
    ) -> (String, Vec<Content>) {
        let mut script = Script { lines: lines.iter().copied().collect(), shown: String::new() };
        let mut asked = Vec::new();
        let mut ask = |content: Content| {
            asked.push(content);
            reply(asked.len() - 1)
        };
        assert_eq!(talk(&mut script, interrupt, chat, &mut ask), Ok(0));
        (script.shown, asked)
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
}
