//! What a run asks: requests of random tokens, all alike, or those of a file.

use std::path::PathBuf;

use clap::{Args, value_parser};
use serde::Serialize;

use super::{
    arrivals::Arrivals,
    drive::{Timed, Work},
    pictures::Pictures,
    random::{Random, Vocab},
    session::Need,
};
use crate::{
    backend::mix,
    batch::KV_BLOCK,
    cli::{
        prompts::{self, Asked, Content},
        setup::Setup,
    },
    engine::Engine,
    error::{Error, Result},
    request::{Message, Prompt, Request},
};

/// Tokens of each request before one more comes, at most: what it disturbs has settled by then.
const SETTLED_TURNS: u32 = 64;
/// Tokens of all requests at most: their prompts are made before the clock starts.
pub(super) const TOKENS_MAX: u64 = 1 << 30;
const REQUESTS_MAX: usize = 1_000_000;
/// Bytes of text for a token, where nothing is known of the text.
const TOKEN_BYTES: usize = 4;

/// How long requests are. They are greedy, and go on past end-of-sequence tokens.
#[derive(Debug, Clone, Copy, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Workload")]
pub(super) struct Lengths {
    /// Prompt tokens of each, drawn from the vocabulary
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = value_parser!(u32).range(1..=100_000_000))]
    pub(super) input_len: u32,
    /// New tokens of each
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = value_parser!(u32).range(1..=100_000_000))]
    pub(super) output_len: u32,
    /// Draws the prompts, and when they come: the same seed, the same prompts
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub(super) seed: u64,
    /// So many tokens of each prompt, from its first on, are the same in all requests of a run
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub(super) shared_prefix: u32,
}

/// Prompts that somebody has written.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
pub(super) struct FromFile {
    /// Takes prompts from a file of JSON lines, as run does, instead of random ones: strings, or objects with prompt,
    /// messages or prompt_ids and choices such as max_tokens [default of max_tokens: --output-len]; - is stdin
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_len", "shared_prefix"])]
    pub(super) prompt_file: Option<PathBuf>,
}

/// A workload, with its description in the order of the JSON object.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Workload {
    pub(super) requests: u32,
    /// Of prompts from a file, `input_len` is the mean.
    #[serde(flatten)]
    pub(super) lengths: Lengths,
    pub(super) then_input_len: Option<u32>,
    pub(super) images: Option<Pictures>,
    pub(super) prompt_file: Option<String>,
    #[serde(flatten)]
    pub(super) arrivals: Arrivals,
    #[serde(skip)]
    given: Vec<Asked>,
    /// Of the file's, once there is an engine.
    #[serde(skip)]
    ready: Vec<Request>,
}

impl Workload {
    /// Random prompts, all at once.
    pub(super) fn random(requests: u32, lengths: Lengths) -> Workload {
        Workload {
            requests,
            lengths,
            then_input_len: None,
            images: None,
            prompt_file: None,
            arrivals: Arrivals::at_once(),
            given: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Random ones (`default` of them, if nobody says how many), or those of a file.
    pub(super) fn new(
        requests: Option<u32>,
        default: u32,
        lengths: Lengths,
        from: &FromFile,
    ) -> Result<Workload> {
        let Some(path) = &from.prompt_file else {
            return Ok(Workload::random(requests.unwrap_or(default), lengths));
        };
        let most = requests.map_or(REQUESTS_MAX, |n| n as usize);
        let (mut given, mut tokens) = (Vec::new(), 0);
        for asked in prompts::file(path)?.take(most) {
            let asked = asked?;
            tokens += guess(&asked.content) as u64;
            if tokens > TOKENS_MAX {
                return Err(Error::data(
                    path,
                    format!("its prompts have more than {TOKENS_MAX} tokens in all"),
                ));
            }
            given.push(asked);
        }
        if let Some(wanted) = requests.filter(|&n| (n as usize) > given.len()) {
            let why = format!("{wanted}, and {} has {} prompts", path.display(), given.len());
            return Err(Error::usage("--requests", why));
        }
        if given.is_empty() {
            return Err(Error::data(path, "there is no prompt in it"));
        }
        if let Some(i) = given.iter().position(|asked| asked.choices.several()) {
            return Err(Error::data(path, format!("prompt {} asks for more than one sample", i + 1)));
        }
        if let Some(i) = given.iter().position(|asked| !asked.media.is_empty()) {
            return Err(Error::data(path, format!("prompt {} has images, which are not measured", i + 1)));
        }
        let prompt_file = Some(path.display().to_string());
        Ok(Workload { prompt_file, given, ..Workload::random(0, lengths) }.sized())
    }

    /// With one more request that comes when the others decode.
    pub(super) fn then(self, then_input_len: Option<u32>) -> Workload {
        Workload { then_input_len, ..self }
    }

    /// With images in each request.
    pub(super) fn with_images(self, images: Option<Pictures>) -> Workload {
        Workload { images, ..self }
    }

    /// With requests that come in their time.
    pub(super) fn arriving(self, arrivals: Arrivals) -> Workload {
        Workload { arrivals, ..self }
    }

    /// With the file's own numbers in the description, as far as they are known.
    fn sized(mut self) -> Workload {
        let tokens: usize = match &self.ready[..] {
            [] => self.given.iter().map(|asked| guess(&asked.content)).sum(),
            ready => ready.iter().map(prompt_tokens).sum(),
        };
        self.requests = self.given.len() as u32;
        self.lengths.input_len = tokens.div_ceil(self.given.len()).min(u32::MAX as usize) as u32;
        self
    }

    /// What an engine must have room for.
    pub(super) fn need(&self) -> Need {
        let Lengths { input_len, output_len, .. } = self.lengths;
        let late = self.then_input_len.map_or(String::new(), |late| format!(" --then-input-len {late}"));
        let random = self.prompt_file.is_none();
        Need {
            at_once: self.requests as usize + usize::from(self.then_input_len.is_some()),
            input_len: input_len as usize + self.image_tokens(),
            output_len: output_len as usize,
            images: self.images,
            context: random.then(|| self.context()),
            kv_tokens: random.then(|| self.kv_tokens()),
            asked: match &self.prompt_file {
                None => {
                    let images = self.images.map_or(String::new(), |images| {
                        format!("--images {} ({} tokens each) ", images.per_request, images.tokens)
                    });
                    format!("{images}--input-len {input_len} --output-len {output_len}{late}")
                }
                Some(path) => format!("--prompt-file {path} --output-len {output_len}"),
            },
        }
    }

    /// Whether a workload makes sense, before a model is loaded.
    pub(super) fn check(&self, max_context: Option<usize>) -> Result<()> {
        let Workload { requests, then_input_len, .. } = *self;
        let Lengths { input_len, output_len, shared_prefix, .. } = self.lengths;
        if self.prompt_file.is_some() {
            return self.arrivals.check(requests);
        }
        if let Some(max) = max_context.filter(|&max| max < self.context()) {
            let late = then_input_len.map_or(String::new(), |len| format!(" and --then-input-len {len}"));
            let images = match self.image_tokens() {
                0 => String::new(),
                tokens => format!("{tokens} tokens of images, "),
            };
            let why = format!(
                "{max} tokens have no room for {images}--input-len {input_len} and --output-len {output_len}{late}"
            );
            return Err(Error::usage("--max-context", why));
        }
        if shared_prefix > input_len {
            let why = format!("{shared_prefix} tokens are more than --input-len {input_len}");
            return Err(Error::usage("--shared-prefix", why));
        }
        let tokens = u64::from(requests) * self.context() as u64;
        if tokens > TOKENS_MAX {
            let why = format!("{requests} requests have {tokens} tokens in all, more than {TOKENS_MAX}");
            return Err(Error::usage("--requests", why));
        }
        self.images.map_or(Ok(()), |images| images.check(requests))?;
        self.arrivals.check(requests)
    }

    /// Whether an engine that is told how much may wait takes all of it, where requests come faster than they start; a warm-up's
    /// always do.
    pub(super) fn check_waiting(&self, setup: &Setup, warms_up: bool) -> Result<()> {
        if self.arrivals.request_rate.is_some() && !warms_up {
            return Ok(());
        }
        let late = self.then_input_len.map(|len| len as usize);
        let all = self.requests as usize + usize::from(late.is_some());
        if let Some(max) = setup.waiting.filter(|&max| max < all) {
            return Err(Error::usage("--waiting", format!("{max}, and {all} requests come at once")));
        }
        // Those of a file are not known yet.
        let random = self.prompt_file.is_none();
        let each = self.lengths.input_len as usize + self.image_tokens();
        let tokens = self.requests as usize * each + late.unwrap_or(0);
        match setup.waiting_tokens.filter(|&max| random && max < tokens) {
            Some(max) => {
                let why = format!("{max}, and prompts of {tokens} tokens come at once");
                Err(Error::usage("--waiting-tokens", why))
            }
            None => Ok(()),
        }
    }

    /// Makes tokens of the file's prompts, before a clock starts.
    pub(super) fn prepare(&mut self, engine: &Engine) -> Result<()> {
        let Some(path) = self.prompt_file.clone() else { return Ok(()) };
        let mut ready = Vec::new();
        for (i, asked) in self.given.iter().enumerate() {
            let wrong = |why: String| Error::data(&path, format!("prompt {}: {why}", i + 1));
            let ids = ids(engine, &asked.content).map_err(|e| wrong(e.to_string()))?;
            let vocab = engine.spec().vocab;
            if let Some((at, id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
                return Err(wrong(format!("token {at} is {id}; the model has {vocab}")));
            }
            let mut request = request(ids, self.lengths.output_len);
            asked.choices.apply(&mut request);
            let (tokens, new) = (prompt_tokens(&request), request.stop.max_tokens.unwrap_or(0) as usize);
            if tokens == 0 || new == 0 {
                return Err(wrong("a prompt and an answer have a token at least".into()));
            }
            if tokens + new > engine.context_max() {
                let room = engine.context_max();
                return Err(wrong(format!(
                    "{tokens} tokens and {new} new ones, and a sequence has room for {room}: --max-context"
                )));
            }
            ready.push(request);
        }
        self.ready = ready;
        *self = std::mem::replace(self, Workload::random(0, self.lengths)).sized();
        Ok(())
    }

    /// What is submitted in a run, and when. Random prompts are no other run's: nothing can be had from an earlier one.
    /// A warm-up takes random ones in any case, all at once.
    pub(super) fn work(&self, run: u64, warms_up: bool, vocab: Vocab) -> Work {
        let requests = match &self.ready[..] {
            [] => self.requests(run, vocab),
            ready if !warms_up => ready.to_vec(),
            ready => {
                let alike = |(i, of): (usize, &Request)| {
                    let random = self.random_of(run, Some(i as u32));
                    request(random.ids(prompt_tokens(of) as u32, vocab), of.stop.max_tokens.unwrap_or(1))
                };
                ready.iter().enumerate().map(alike).collect()
            }
        };
        let moments = match warms_up {
            true => Arrivals::at_once().moments(requests.len(), 0),
            false => self.arrivals.moments(requests.len(), mix(self.lengths.seed) ^ run),
        };
        let settled = (self.lengths.output_len / 4).clamp(1, SETTLED_TURNS);
        Work {
            files: self
                .images
                .map_or(Vec::new(), |images| images.files(self.requests, mix(mix(self.lengths.seed) ^ run))),
            prepared: self.images.is_some_and(|images| images.prepared),
            requests: moments.into_iter().zip(requests).map(|(at, request)| Timed { at, request }).collect(),
            then: self.late_request(run, vocab).map(|request| (settled, request)),
        }
    }

    /// As in an id: `256x512x256`.
    pub(super) fn id(&self) -> String {
        let Lengths { input_len, output_len, shared_prefix, .. } = self.lengths;
        let mut id = format!("{}x{input_len}x{output_len}", self.requests);
        if shared_prefix > 0 {
            id += &format!(".prefix{shared_prefix}");
        }
        id += &self.images.map_or(String::new(), |images| images.id());
        id += &self.then_input_len.map_or(String::new(), |late| format!(".then{late}"));
        id + &self.arrivals.id()
    }

    /// Prompt and answer together, of the longest.
    fn context(&self) -> usize {
        let Lengths { input_len, output_len, .. } = self.lengths;
        let late = self.then_input_len.map_or(0, |input_len| input_len as usize + 1);
        (input_len as usize + self.image_tokens() + output_len as usize).max(late)
    }

    /// Tokens of each prompt beside `input_len`.
    fn image_tokens(&self) -> usize {
        self.images.map_or(0, |images| images.prompt_tokens())
    }

    /// Tokens of the KV cache that all requests hold at once. Nobody's last token is fed.
    fn kv_tokens(&self) -> usize {
        let each = (self.lengths.input_len + self.lengths.output_len - 1) as usize + self.image_tokens();
        let late = self.then_input_len.map_or(0, |input_len| input_len as usize);
        self.requests as usize * each.next_multiple_of(KV_BLOCK) + late.next_multiple_of(KV_BLOCK)
    }

    /// The requests of one run.
    fn requests(&self, run: u64, vocab: Vocab) -> Vec<Request> {
        let Lengths { input_len, output_len, shared_prefix, .. } = self.lengths;
        let shared = self.random_of(run, None).ids(shared_prefix, vocab);
        let request = |i: u32| {
            let own = self.random_of(run, Some(i)).ids(input_len - shared_prefix, vocab);
            let ids = [&shared[..], &own].concat();
            let ids = match self.images {
                Some(images) => images.prompt(&ids),
                None => ids,
            };
            request(ids, output_len)
        };
        (0..self.requests).map(request).collect()
    }

    /// The one that comes later.
    fn late_request(&self, run: u64, vocab: Vocab) -> Option<Request> {
        let input_len = self.then_input_len?;
        Some(request(self.random_of(run, Some(self.requests)).ids(input_len, vocab), 1))
    }

    /// Numbers for one request of a run, or for what all have in common.
    fn random_of(&self, run: u64, request: Option<u32>) -> Random {
        Random::from_state(mix(mix(mix(self.lengths.seed) ^ run) ^ request.map_or(u64::MAX, u64::from)))
    }
}

/// Greedy, and past end-of-sequence tokens.
fn request(ids: Vec<u32>, output_len: u32) -> Request {
    let mut request = Request::new(Prompt::Ids(ids));
    request.stop.max_tokens = Some(output_len);
    request.stop.ignore_eos = true;
    request
}

fn prompt_tokens(request: &Request) -> usize {
    match &request.prompt {
        Prompt::Ids(ids) => ids.len(),
        other => panic!("{other:?} is no tokens; this is a bug"),
    }
}

/// A prompt's tokens, about.
fn guess(content: &Content) -> usize {
    let text = |text: &str| text.len() / TOKEN_BYTES + 1;
    match content {
        Content::Ids(ids) => ids.len(),
        Content::Text(content) => text(content),
        Content::Messages(messages) => messages.iter().map(|message| text(&message.content)).sum(),
    }
}

/// A prompt's tokens: text goes through the chat template if there is one.
fn ids(engine: &Engine, content: &Content) -> Result<Vec<u32>> {
    let tokenizer = || {
        let why = "text needs a tokenizer, and the model folder has no tokenizer.json";
        engine.tokenizer().ok_or_else(|| Error::Request(why.into()))
    };
    let chat = |messages: &[Message]| {
        let why = "messages need a chat template, and the model folder has none";
        let template = engine.template().ok_or_else(|| Error::Request(why.into()))?;
        tokenizer()?.encode(&template.render(messages, true)?, false)
    };
    match content {
        Content::Ids(ids) => Ok(ids.clone()),
        Content::Text(text) if engine.template().is_none() => tokenizer()?.encode(text, true),
        Content::Text(text) => chat(&[Message::new("user", text)]),
        Content::Messages(messages) => chat(messages),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;

    fn prompts(workload: &Workload, run: u64) -> Vec<Prompt> {
        workload.requests(run, Vocab::tests_of(50)).into_iter().map(|r| r.prompt).collect()
    }

    pub(in crate::cli::bench) const LENGTHS: Lengths =
        Lengths { input_len: 40, output_len: 2, seed: 0, shared_prefix: 0 };

    fn three(lengths: Lengths) -> Workload {
        Workload::random(3, lengths)
    }

    #[test]
    fn every_request_of_every_run_has_a_prompt_of_its_own() {
        let mut all: Vec<Prompt> = (0..3).flat_map(|run| prompts(&three(LENGTHS), run)).collect();
        assert_eq!(prompts(&three(LENGTHS), 1), all[3..6]);
        all.extend(prompts(&three(Lengths { seed: 1, ..LENGTHS }), 0));
        let late = Workload { then_input_len: Some(40), ..three(LENGTHS) }
            .late_request(0, Vocab::tests_of(50))
            .unwrap();
        assert_eq!(late.stop.max_tokens, Some(1));
        all.push(late.prompt);
        for (i, prompt) in all.iter().enumerate() {
            let Prompt::Ids(ids) = prompt else { panic!("{prompt:?}") };
            assert!(
                ids.len() == 40 && ids.iter().all(|&id| id < 50) && !all[..i].contains(prompt),
                "{ids:?}"
            );
        }
    }

    #[test]
    fn a_shared_prefix_is_a_runs_own() {
        let workload = three(Lengths { shared_prefix: 30, ..LENGTHS });
        let ids = |run| {
            prompts(&workload, run).into_iter().map(|prompt| match prompt {
                Prompt::Ids(ids) => ids,
                other => panic!("{other:?}"),
            })
        };
        let first: Vec<Vec<u32>> = ids(0).collect();
        assert!(first.iter().all(|ids| ids.len() == 40 && ids[..30] == first[0][..30]));
        assert!(first[0][30..] != first[1][30..] && first[1][30..] != first[2][30..]);
        assert!(ids(1).all(|ids| ids[..16] != first[0][..16]));
    }

    #[test]
    fn a_warm_up_comes_at_once_and_the_rest_when_it_is_due() {
        let arrivals = Arrivals::tests_every(Duration::from_millis(250));
        let workload = Workload { arrivals, ..three(LENGTHS) };
        let moments = |warms_up| {
            workload
                .work(0, warms_up, Vocab::tests_of(50))
                .requests
                .iter()
                .map(|r| r.at.as_millis())
                .collect::<Vec<_>>()
        };
        assert_eq!(moments(true), [0, 0, 0]);
        assert_eq!(moments(false), [0, 250, 500]);
        assert_eq!(workload.id(), "3x40x2@4rps.even");
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let workload = Workload::random(2, Lengths { input_len: 60, output_len: 5, ..LENGTHS });
        workload.check(None).unwrap();
        workload.check(Some(65)).unwrap();
        let told = workload.check(Some(64)).unwrap_err().to_string();
        assert_eq!(told, "--max-context: 64 tokens have no room for --input-len 60 and --output-len 5");
        let many = Workload::random(1_000_000, Lengths { input_len: 100_000_000, ..LENGTHS });
        assert!(many.check(None).unwrap_err().to_string().starts_with("--requests: "));
        let late = Workload { then_input_len: Some(65), ..workload.clone() };
        assert!(late.check(Some(65)).unwrap_err().to_string().ends_with("and --then-input-len 65"));
        late.check(Some(66)).unwrap();
        assert_eq!((workload.kv_tokens(), late.kv_tokens()), (128, 208));
        assert_eq!((workload.id(), late.id()), ("2x60x5".into(), "2x60x5.then65".into()));
        let shared = Workload::random(2, Lengths { shared_prefix: 61, input_len: 60, ..LENGTHS });
        assert!(shared.check(None).unwrap_err().to_string().starts_with("--shared-prefix: 61 tokens"));
    }
}
