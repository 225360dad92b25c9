//! A conversation at a terminal.

use std::io::{self, Write};

use crossbeam_channel::Receiver;
use rustyline::{Config, DefaultEditor, error::ReadlineError};

use super::{
    answer::{Answer, Sample},
    interrupt::{Interrupt, Next},
    one_line,
    prompts::Content,
    stdout_failed,
};
use crate::{
    error::{Error, Result},
    request::{Event, FinishReason, Message},
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
pub(super) type Ask<'a> = &'a mut dyn FnMut(Content) -> Result<Receiver<Event>>;

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
        Err(Halt::Console(e)) => Err(e),
    }
}

struct Talk<'a> {
    console: &'a mut dyn Console,
    interrupt: &'a Interrupt,
    chat: bool,
    history: Vec<Message>,
}

enum Halt {
    Stdout(io::Error),
    Console(Error),
}

impl From<io::Error> for Halt {
    fn from(e: io::Error) -> Self {
        Halt::Stdout(e)
    }
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
            let line = match self.console.line().map_err(Halt::Console)? {
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

    /// One question and its answer. A question that could not be asked is forgotten.
    fn turn(&mut self, line: String, ask: Ask<'_>) -> Result<(), Halt> {
        let content = if self.chat {
            self.history.push(Message::new("user", line));
            Content::Messages(self.history.clone())
        } else {
            Content::Text(line)
        };
        let answer = match ask(content) {
            Ok(events) => self.answer(&events)?,
            Err(e) => Err(e),
        };
        match answer {
            Ok(text) if self.chat && !text.is_empty() => self.history.push(Message::new("assistant", text)),
            Ok(_) => {
                self.history.pop();
            }
            Err(e) => {
                self.history.pop();
                let hint = if self.history.is_empty() { "" } else { " (/reset starts a new conversation)" };
                self.console.say(&format!("error: {}{hint}\n", one_line(&e.to_string())))?;
            }
        }
        Ok(())
    }

    /// Shows an answer as it comes; Ctrl-C ends it, and what there is of it counts.
    fn answer(&mut self, events: &Receiver<Event>) -> Result<Result<String>, Halt> {
        self.interrupt.listen(true);
        let shown = self.stream(events);
        self.interrupt.listen(false);
        shown
    }

    fn stream(&mut self, events: &Receiver<Event>) -> Result<Result<String>, Halt> {
        let mut answer = Answer::new(Vec::new(), 1);
        let mut shown = 0;
        let note = loop {
            let event = match self.interrupt.next(events) {
                Next::Value(event) => event,
                Next::End if answer.done() => break end_note(&answer.samples[0]),
                Next::End => return Ok(Err(Answer::cut_short())),
                Next::Interrupted => break "(stopped)\n",
            };
            if let Err(e) = answer.take(event) {
                self.console.say("\n")?;
                return Ok(Err(e));
            }
            let text = &answer.samples[0].text;
            self.console.say(&text[shown..])?;
            shown = text.len();
        };
        self.console.say(&format!("\n{note}"))?;
        let [sample] =
            <[Sample; 1]>::try_from(answer.samples).expect("one sample was asked for; this is a bug");
        Ok(Ok(sample.text))
    }
}

/// An answer that stops in the middle says why.
fn end_note(sample: &Sample) -> &'static str {
    match sample.end {
        Some((FinishReason::Length, _)) => "(cut off: --max-tokens or the end of the context is reached)\n",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use crossbeam_channel::{bounded, unbounded};

    use super::*;
    use crate::request::Usage;

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

    /// Plays the lines; each prompt is answered by `reply`. What was shown and what was asked.
    fn play(
        lines: &[&'static str],
        chat: bool,
        interrupt: &Interrupt,
        mut reply: impl FnMut(usize) -> Result<Receiver<Event>>,
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

    fn events(text: &str, reason: FinishReason) -> Receiver<Event> {
        let (send, receive) = unbounded();
        let text = text.to_owned();
        send.send(Event::Token { sample: 0, id: 1, text, logprobs: None }).unwrap();
        let usage = Usage::default();
        send.send(Event::Finished { sample: 0, reason, text: "!".into(), usage }).unwrap();
        receive
    }

    fn roles(content: &Content) -> Vec<(&str, &str)> {
        let Content::Messages(messages) = content else { panic!("{content:?}") };
        messages.iter().map(|m| (&m.role[..], &m.content[..])).collect()
    }

    #[test]
    fn the_conversation_is_remembered_until_reset() {
        let lines = ["hi", "", "^C", "more", "/reset", "new", "/help", "/what"];
        let (shown, asked) =
            play(&lines, true, &Interrupt::never(), |i| Ok(events(&format!("a{i}"), FinishReason::Stop)));
        assert_eq!(roles(&asked[0]), [("user", "hi")]);
        assert_eq!(roles(&asked[1]), [("user", "hi"), ("assistant", "a0!"), ("user", "more")]);
        assert_eq!(roles(&asked[2]), [("user", "new")]);
        assert_eq!(asked.len(), 3);
        assert!(shown.contains("a1!\n") && shown.contains(HELP) && shown.contains("/what is no command"));
    }

    #[test]
    fn a_failed_question_is_told_and_forgotten() {
        let (shown, asked) = play(&["hi", "long", "short"], true, &Interrupt::never(), |i| match i {
            1 => Err(Error::Request("9 tokens\nare too many".into())),
            _ => Ok(events("a", FinishReason::Length)),
        });
        assert!(shown.contains("error: request: 9 tokens are too many (/reset starts a new conversation)\n"));
        assert_eq!(roles(&asked[2]), [("user", "hi"), ("assistant", "a!"), ("user", "short")]);
        assert!(shown.contains("(cut off: "));
        let cut = |_| Ok(unbounded().1);
        let (shown, _) = play(&["hi"], true, &Interrupt::never(), cut);
        assert!(shown.contains("error: engine: "), "{shown}");
    }

    #[test]
    fn ctrl_c_stops_the_answer_and_keeps_what_there_is() {
        let (signal, signals) = bounded(1);
        let (send, endless) = bounded(0);
        let mut endless = Some(endless);
        let cancelled = std::thread::spawn(move || {
            let event = |text: &str| Event::Token { sample: 0, id: 1, text: text.into(), logprobs: None };
            send.send(event("part")).unwrap();
            // Received, so it is shown before the signal is looked for.
            signal.send(()).unwrap();
            while send.send(event("")).is_ok() {}
        });
        let (shown, asked) = play(&["hi", "more"], true, &Interrupt::by(signals), |i| match i {
            0 => Ok(endless.take().unwrap()),
            _ => Ok(events("b", FinishReason::Stop)),
        });
        cancelled.join().unwrap();
        assert!(shown.contains("part\n(stopped)\n"), "{shown}");
        assert_eq!(roles(&asked[1]), [("user", "hi"), ("assistant", "part"), ("user", "more")]);
    }

    #[test]
    fn without_a_template_lines_are_completed_as_they_are() {
        let (shown, asked) =
            play(&["a ", "b"], false, &Interrupt::never(), |_| Ok(events("x", FinishReason::Stop)));
        assert_eq!(asked, [Content::Text("a ".into()), Content::Text("b".into())]);
        assert!(shown.starts_with("No chat template"));
    }
}
