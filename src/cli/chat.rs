//! A conversation at a terminal.

use std::io::{self, Write};

use rustyline::{Config, DefaultEditor, error::ReadlineError};

use super::{
    answer::{Answer, End, Halt, Sample, Stream},
    attach::{self, Attached, Opener},
    interrupt::Interrupt,
    media::{Source, Wanted},
    one_line,
    prompts::{Asked, Content},
    stdout_failed,
};
use crate::{
    error::{Error, Result},
    request::{FinishReason, Message, Part},
};

const HELP: &str = "\
/image FILE      shows an image with the next message; without a name lists what is attached
/video DIR FPS   shows a folder's frames, so many a second
/detach          takes back what is attached
/reset           forgets the conversation, and what is attached
/help            shows this
Ctrl-C           stops an answer, or clears the line
Ctrl-D           leaves
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

/// Who answers.
pub(super) trait Partner: Opener {
    /// Submits a prompt.
    fn ask(&mut self, asked: Asked) -> Result<Box<dyn Stream>>;
}

/// How a conversation goes.
pub(super) struct Terms {
    /// Through the chat template. Without it each line is completed for itself.
    pub(super) chat: bool,
    /// Shown with the first message.
    pub(super) media: Vec<Source>,
    /// Frames a second, where `/video` does not say.
    pub(super) fps: Option<f64>,
}

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

/// Talks until the console ends.
pub(super) fn talk(
    console: &mut dyn Console,
    interrupt: &Interrupt,
    terms: Terms,
    partner: &mut dyn Partner,
) -> Result<u8> {
    let Terms { chat, media, fps } = terms;
    let mut talk = Talk { console, interrupt, chat, fps, history: Vec::new(), attached: Attached::default() };
    match talk.begin(&media, partner).and_then(|()| talk.until_end(partner)) {
        Ok(()) => Ok(0),
        Err(Halt::Stdout(e)) => stdout_failed(&e),
        Err(Halt::Wrong(e)) => Err(e),
    }
}

struct Talk<'a> {
    console: &'a mut dyn Console,
    interrupt: &'a Interrupt,
    chat: bool,
    fps: Option<f64>,
    history: Vec<Message>,
    attached: Attached,
}

impl Talk<'_> {
    /// Says how it goes, and attaches what the flags name.
    fn begin(&mut self, media: &[Source], partner: &mut dyn Partner) -> Result<(), Halt> {
        self.console.say(match self.chat {
            true => "/help lists commands; Ctrl-D leaves.\n",
            false => {
                "No chat template: each line is completed as it is. /help lists commands; Ctrl-D leaves.\n"
            }
        })?;
        for source in media {
            let said = self.attached.attach(source, partner).map_err(Halt::Wrong)?;
            self.console.say(&said)?;
        }
        Ok(())
    }

    fn until_end(&mut self, partner: &mut dyn Partner) -> Result<(), Halt> {
        loop {
            let line = match self.console.line().map_err(Halt::Wrong)? {
                Line::Text(line) => line,
                Line::Interrupted => continue,
                Line::End => return Ok(()),
            };
            if let Some(command) = attach::command(&line, self.fps) {
                self.attach(command, partner)?;
                continue;
            }
            match line.trim() {
                "" => {}
                "/help" => self.console.say(HELP)?,
                "/reset" => {
                    self.history.clear();
                    self.attached.clear();
                    self.console.say("The conversation is forgotten.\n")?;
                }
                command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                    self.console.say(&format!("{command} is no command; /help lists them.\n"))?;
                }
                _ => self.turn(line, partner)?,
            }
        }
    }

    fn attach(&mut self, command: attach::Command, partner: &mut dyn Partner) -> Result<(), Halt> {
        let said = match command {
            attach::Command::List => self.attached.list(),
            attach::Command::Detach => {
                self.attached.clear();
                "Nothing is attached any more.\n".into()
            }
            attach::Command::Wrong(why) => format!("{why}\n"),
            attach::Command::Attach(source) => match self.attached.attach(&source, partner) {
                Ok(said) => said,
                Err(e) => format!("error: {}\n", one_line(&e.to_string())),
            },
        };
        Ok(self.console.say(&said)?)
    }

    /// One question and its answer. A question that could not be answered is forgotten; what was attached to it stays so.
    fn turn(&mut self, line: String, partner: &mut dyn Partner) -> Result<(), Halt> {
        let asked = self.asked(line);
        match partner.ask(asked).map_err(Halt::Wrong).and_then(|mut events| self.answer(&mut *events)) {
            Ok(text) => {
                self.attached.clear();
                match self.chat && !text.is_empty() {
                    true => self.history.push(Message::new("assistant", text)),
                    false => drop(self.history.pop()),
                }
            }
            Err(Halt::Wrong(e)) => {
                self.history.pop();
                let hint = match (self.attached.is_empty(), self.history.is_empty()) {
                    (false, _) => " (/detach takes back what is attached)",
                    (true, false) => " (/reset starts a new conversation)",
                    (true, true) => "",
                };
                self.console.say(&format!("error: {}{hint}\n", one_line(&e.to_string())))?;
            }
            Err(stdout) => return Err(stdout),
        }
        Ok(())
    }

    /// A line, with what is attached before its text, and with what was said before it.
    fn asked(&mut self, line: String) -> Asked {
        let media = self.attached.media();
        if self.chat {
            let parts = media.map(Part::Media).chain([Part::Text(line)]);
            self.history.push(Message::of_parts("user", parts));
            return Content::Messages(self.history.clone()).into();
        }
        let media = media.map(|media| Wanted::first(Source::Ready(media))).collect();
        Asked { media, ..Content::Text(line).into() }
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
mod tests;
