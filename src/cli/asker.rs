//! From what is asked to requests that run.

use std::{sync::Arc, thread, time::Duration};

use clap::Args;

use super::{
    answer::{PATIENCE, Stream},
    choices::Choices,
    media::{self, Wanted},
    prompts::{Asked, Content},
};
use crate::{
    engine::{Engine, Events, TimedOut},
    error::{Error, Result},
    request::{Event, Inset, Media, Message, Prompt},
};

/// How prompts become text.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Prompt")]
pub(super) struct Manner {
    /// Demands the model's chat template, which is used anyway where there is one
    #[arg(long, conflicts_with = "raw")]
    pub(super) chat: bool,
    /// Takes prompts as they are, without the chat template
    #[arg(long, conflicts_with = "system")]
    pub(super) raw: bool,
    /// The system message before each prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) system: Option<String>,
}

/// Makes requests of what is asked, and submits them.
#[derive(Clone)]
pub(super) struct Asker {
    pub(super) engine: Arc<Engine>,
    /// Whether text goes through the chat template.
    pub(super) chat: bool,
    manner: Manner,
    choices: Choices,
}

/// A request on its way.
pub(super) struct Submitted {
    pub(super) events: Events,
    pub(super) samples: u32,
    /// Bytes of its images.
    pub(super) bytes: usize,
}

impl Asker {
    pub(super) fn new(engine: Arc<Engine>, manner: Manner, choices: Choices) -> Result<Self> {
        let has_template = engine.template().is_some();
        let demanded = [("--chat", manner.chat), ("--system", manner.system.is_some())];
        if let Some((flag, _)) = demanded.iter().find(|(_, demanded)| *demanded && !has_template) {
            return Err(Error::usage(*flag, "the model has no chat template"));
        }
        Ok(Asker { chat: has_template && !manner.raw, engine, manner, choices })
    }

    /// Opens its images on this thread, and submits it.
    pub(super) fn submit(&self, asked: Asked) -> Result<Submitted> {
        let Asked { content, media: wanted, choices } = asked;
        let opened = wanted.iter().map(|wanted| wanted.source.open(&self.engine));
        let opened = opened.collect::<Result<Vec<Media>>>()?;
        let bytes = opened.iter().map(media::bytes).sum();
        let (prompt, loose) = self.prompt(content, &wanted, opened)?;
        let mut request = self.choices.request(prompt, self.engine.generation(), &choices);
        request.media = loose;
        let samples = request.n;
        // Some wait for long enough to be refused: there is room when one of them starts.
        let events = loop {
            match self.engine.submit(request.clone()) {
                Err(Error::Busy { .. } | Error::BusyTokens { .. }) => thread::sleep(PATIENCE),
                submitted => break submitted?,
            }
        };
        tracing::debug!(prompt_tokens = events.prompt_ids().len(), samples, "submitted");
        Ok(Submitted { events, samples, bytes })
    }

    /// The prompt, and the images of one that is no conversation.
    fn prompt(
        &self,
        content: Content,
        wanted: &[Wanted],
        opened: Vec<Media>,
    ) -> Result<(Prompt, Vec<Media>)> {
        let mut messages = match content {
            Content::Ids(ids) => return Ok((Prompt::Ids(ids), opened)),
            Content::Text(text) if !self.chat => {
                self.check_places(&text, &opened)?;
                return Ok((Prompt::Text(text), opened));
            }
            Content::Messages(_) if self.manner.raw => {
                return Err(Error::Request("messages need the chat template, which --raw leaves out".into()));
            }
            Content::Text(text) => vec![Message::new("user", text)],
            Content::Messages(messages) => messages,
        };
        for (wanted, media) in wanted.iter().zip(opened) {
            let message = messages.get_mut(wanted.message).expect("a message that is there; this is a bug");
            message.media.push(Inset { at: wanted.at, media });
        }
        Ok((Prompt::Chat(self.with_system(messages)), Vec::new()))
    }

    /// Without a template the prompt itself says where its images are; who does not know hears it.
    fn check_places(&self, text: &str, opened: &[Media]) -> Result<()> {
        let Some(places) = self.places() else { return Ok(()) };
        for (kind, [before, pad, after]) in [("image", places.image), ("video", places.video)] {
            let given = opened.iter().filter(|media| media.seconds.is_some() == (kind == "video")).count();
            if given > 0 && !text.contains(&pad) {
                return Err(Error::Request(format!(
                    "{kind}s: {given} given, and the prompt has no place for one: without the chat template each is {before}{pad}{after} in its text"
                )));
            }
        }
        Ok(())
    }

    /// What stands for an image and for a video in a text.
    fn places(&self) -> Option<Places> {
        let (pads, tokenizer) = (self.engine.spec().pads?, self.engine.tokenizer()?);
        let text = |id| tokenizer.token_text(id).unwrap_or_default();
        let around = |pad| [pads.start, pad, pads.end].map(text);
        Some(Places { image: around(pads.image), video: around(pads.video) })
    }

    /// Puts `--system` first, unless the conversation brings its own.
    fn with_system(&self, mut messages: Vec<Message>) -> Vec<Message> {
        if let Some(system) = &self.manner.system
            && messages.first().is_none_or(|first| first.role != "system")
        {
            messages.insert(0, Message::new("system", system));
        }
        messages
    }
}

/// The text of a place: what is before it, itself, and what is after it.
struct Places {
    image: [String; 3],
    video: [String; 3],
}

impl Stream for Submitted {
    fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Event>, TimedOut> {
        self.events.next_timeout(timeout)
    }

    fn cancel(&mut self) {
        self.events.cancel();
    }
}
