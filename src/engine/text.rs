//! The thread that makes text of tokens and sends events, so that neither keeps a step waiting.
//!
//! It learns of everything through one channel, in the order in which it happened, and alone sends a request's events:
//! each ends once. What it alone can see, a stop string or a client that has gone, it tells the engine's thread, which is
//! some tokens further by then; those are dropped here.

use std::{collections::HashMap, thread::JoinHandle, time::Instant};

use crossbeam_channel as channel;

use super::{answer::Answer, worker::Command};
use crate::{
    batch::{Sampled, SeqId},
    error::{Error, Result, quiet_panic},
    request::Event,
};

/// From the engine's thread.
pub(super) enum Say {
    /// A request has come, with the answers that are to be made.
    New { request: u64, events: channel::Sender<Event>, answers: Vec<(SeqId, Answer)> },
    /// Their first steps have been planned.
    Started(Vec<SeqId>, Instant),
    /// A step has brought these tokens.
    Tokens(Vec<Sampled>, Instant),
    /// The client wants no more.
    Cancelled(u64),
    /// Nothing more will come.
    Failed(u64, Error),
}

/// Starts the thread. It ends when all that can tell it something are gone.
pub(super) fn spawn(commands: channel::Sender<Command>) -> Result<(channel::Sender<Say>, JoinHandle<()>)> {
    let (sender, says) = channel::unbounded();
    let run = move || {
        let mut clients = Clients { answers: HashMap::new(), requests: HashMap::new(), commands };
        says.into_iter().for_each(|say| clients.take(say));
    };
    let thread = std::thread::Builder::new()
        .name("text".into())
        .spawn(run)
        .map_err(|e| Error::Engine(format!("text: no thread: {e}")))?;
    Ok((sender, thread))
}

/// What clients wait for.
struct Clients {
    /// Samples by sequence, each with the request that it belongs to.
    answers: HashMap<SeqId, (u64, Answer)>,
    requests: HashMap<u64, Client>,
    commands: channel::Sender<Command>,
}

struct Client {
    events: channel::Sender<Event>,
    seqs: Vec<SeqId>,
}

impl Clients {
    fn take(&mut self, say: Say) {
        match say {
            Say::New { request, events, answers } => {
                let seqs = answers.iter().map(|(seq, _)| *seq).collect();
                self.requests.insert(request, Client { events, seqs });
                self.answers.extend(answers.into_iter().map(|(seq, answer)| (seq, (request, answer))));
            }
            Say::Started(seqs, at) => {
                for seq in seqs {
                    if let Some((_, answer)) = self.answers.get_mut(&seq) {
                        answer.started(at);
                    }
                }
            }
            Say::Tokens(tokens, at) => tokens.into_iter().for_each(|token| self.token(token, at)),
            Say::Cancelled(request) => self.cancel(request),
            Say::Failed(request, error) => self.fail(request, error),
        }
    }

    fn token(&mut self, token: Sampled, at: Instant) {
        let seq = token.seq;
        // It may be past a stop string, or its client has gone.
        let Some((request, answer)) = self.answers.get_mut(&seq) else { return };
        let request = *request;
        let told = match guard(|| answer.push(token, at)) {
            Ok(told) => told,
            Err(error) => {
                self.fail(request, error);
                return self.tell(Command::Cancel(request));
            }
        };
        let client = self.requests.get_mut(&request).expect("an answer without its client; this is a bug");
        if told.events.into_iter().any(|event| client.events.send(event).is_err()) {
            self.forget(request);
            return self.tell(Command::Cancel(request));
        }
        if told.ended {
            client.seqs.retain(|&s| s != seq);
            if client.seqs.is_empty() {
                self.requests.remove(&request);
            }
            self.answers.remove(&seq);
            self.tell(Command::Ended(seq));
        }
    }

    fn cancel(&mut self, request: u64) {
        let Some(client) = self.requests.get(&request) else { return };
        for seq in &client.seqs {
            let (_, answer) = self.answers.get_mut(seq).expect("a sample without its answer; this is a bug");
            // A client that has gone needs no last event.
            let _ = client.events.send(guard(|| Ok(answer.cancel())).unwrap_or_else(Event::Error));
        }
        self.forget(request);
    }

    fn fail(&mut self, request: u64, error: Error) {
        if let Some(client) = self.requests.get(&request) {
            let _ = client.events.send(Event::Error(error));
            self.forget(request);
        }
    }

    fn forget(&mut self, request: u64) {
        let client = self.requests.remove(&request).expect("a request forgotten twice; this is a bug");
        client.seqs.iter().for_each(|seq| _ = self.answers.remove(seq));
    }

    fn tell(&self, command: Command) {
        // An engine that has ended has ended everything.
        let _ = self.commands.send(command);
    }
}

/// Tokenizers are programs of others: a panic in one ends a request, and not all of them.
fn guard<T>(make: impl FnOnce() -> Result<T>) -> Result<T> {
    quiet_panic(make).unwrap_or_else(|_| {
        Err(Error::Engine("tokens could not be made text: the tokenizer panicked; this is a bug".into()))
    })
}
