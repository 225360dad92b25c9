//! `pipeline-infer run`, the default: answers prompts, or holds a conversation.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    sync::Arc,
    thread,
    time::Instant,
};

use clap::{ArgAction, ArgMatches, Args, FromArgMatches, ValueEnum};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::{
    EXIT_INTERRUPTED, Subcommand, VERBOSE,
    answer::{Answer, End, Halt, PATIENCE, Stream},
    chat::{self, Terminal},
    choices::Choices,
    compared, complain, flag_name,
    interrupt::Interrupt,
    output::{Json, Printer, Text},
    prompts::{self, Asked, Content, Prompts},
    setup::Setup,
    stdout_failed,
    table::{Totals, report},
};
use crate::{
    engine::{Engine, Events, Watch},
    error::{Error, Result},
    request::{Message, Prompt},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "run", about: "Answers prompts (the default)", flags: RunArgs::augment_args, run };

/// Requests that are submitted and not yet printed: it bounds the memory that a long file of prompts takes.
/// One is printed and one waits for room.
const WINDOW: usize = 1024 - 2;

#[derive(Debug, Clone, Args)]
struct RunArgs {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    input: Input,
    #[command(flatten)]
    choices: Choices,
    /// text streams the answer and reports on stderr; json is one object a prompt
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = "Output")]
    format: Format,
}

/// What to complete.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Prompt")]
struct Input {
    /// A prompt; repeatable
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with_all = ["prompt_file", "prompt_ids"])]
    prompt: Vec<String>,
    /// JSON lines: a string, or an object with prompt, messages or prompt_ids and choices such as
    /// max_tokens, temperature, seed, stop; - is stdin
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_ids")]
    prompt_file: Option<PathBuf>,
    /// Token ids, used unchanged: 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',', action = ArgAction::Set, conflicts_with_all = ["chat", "system"])]
    prompt_ids: Option<Vec<u32>>,
    /// Demands the model's chat template, which is used anyway where there is one
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Takes prompts as they are, without the chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// The system message before each prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Where prompts come from.
enum Source {
    /// One prompt: its error is the program's.
    One(Content),
    /// Several: a wrong one does not keep the others from being answered.
    Many(Prompts),
    /// A person at a terminal.
    Person,
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = RunArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    args.choices.check(flag_name)?;
    let builder = args.setup.builder()?;
    let source = args.source()?;
    let interrupt = Interrupt::install()?;
    let engine = Arc::new(args.setup.start(builder, args.format == Format::Text)?);
    let watch = (matches.get_count(VERBOSE) > 0).then(|| engine.watch()).transpose()?;
    let asker = Asker::new(args.clone(), engine.clone())?;
    let code = match source {
        Source::One(content) => {
            let run = Run::new(&asker, &interrupt, false);
            run.all(Box::new(std::iter::once(Ok(content.into()))))
        }
        Source::Many(prompts) => Run::new(&asker, &interrupt, true).all(prompts),
        Source::Person => converse(&asker, &interrupt),
    }?;
    drop(asker);
    // The answers are out, whatever becomes of the figures.
    if let Some(watch) = watch
        && let Err(error) = compare(&engine, watch, args.format)
    {
        tracing::warn!(%error, "stage times are not told");
    }
    // An interrupted run may leave a thread that waits for prompts, and has it.
    match Arc::into_inner(engine).map_or(Ok(()), Engine::end) {
        Err(e) if code != 0 => complain(&e.to_string()),
        ended => ended?,
    }
    Ok(code)
}

/// Tells what stages took beside what plans say, and keeps it for plans to come.
fn compare(engine: &Engine, watch: Watch, format: Format) -> Result<()> {
    let measured = watch.end();
    let comparison = engine.compare(&measured)?;
    compared::keep(engine, &measured, &comparison);
    match format {
        // Stderr may be gone; the answer is out.
        Format::Text => _ = write!(io::stderr(), "\n{}", compared::table(&comparison)),
        Format::Json => compared::log(&comparison),
    }
    Ok(())
}

impl RunArgs {
    /// Opens what prompts come from, before a model is loaded in vain.
    fn source(&self) -> Result<Source> {
        if self.choices.logprobs() && self.format == Format::Text {
            return Err(Error::usage("--logprobs", "they are shown by --format json alone"));
        }
        let Input { prompt, prompt_file, prompt_ids, .. } = &self.input;
        if let Some(path) = prompt_file {
            return Ok(Source::Many(prompts::file(path)?));
        }
        if let Some(ids) = prompt_ids {
            return Ok(Source::One(Content::Ids(ids.clone())));
        }
        match &prompt[..] {
            [] if !io::stdin().is_terminal() => Ok(Source::One(prompts::stdin()?)),
            [] if self.format == Format::Json => {
                Err(Error::usage("--format json", "a conversation is text; give a prompt"))
            }
            [] if self.choices.several() => Err(Error::usage("--n", "a conversation has one answer")),
            [] => Ok(Source::Person),
            [one] => Ok(Source::One(Content::Text(one.clone()))),
            many => {
                let asked: Vec<Result<Asked>> =
                    many.iter().map(|text| Ok(Content::Text(text.clone()).into())).collect();
                Ok(Source::Many(Box::new(asked.into_iter())))
            }
        }
    }
}

/// Makes requests of what is asked, and submits them.
#[derive(Clone)]
struct Asker {
    engine: Arc<Engine>,
    args: RunArgs,
    /// Whether text goes through the chat template.
    chat: bool,
}

impl Asker {
    fn new(args: RunArgs, engine: Arc<Engine>) -> Result<Self> {
        let has_template = engine.template().is_some();
        let Input { chat, raw, system, .. } = &args.input;
        let demanded = [("--chat", *chat), ("--system", system.is_some())];
        if let Some((flag, _)) = demanded.iter().find(|(_, demanded)| *demanded && !has_template) {
            return Err(Error::usage(*flag, "the model has no chat template"));
        }
        Ok(Asker { chat: has_template && !raw, engine, args })
    }

    /// The events to come, and of how many samples.
    fn submit(&self, asked: Asked) -> Job {
        let prompt = self.prompt(asked.content)?;
        let request = self.args.choices.request(prompt, self.engine.generation(), &asked.choices);
        let samples = request.n;
        // Some wait for long enough to be refused: there is room when one of them starts.
        let events = loop {
            match self.engine.submit(request.clone()) {
                Err(Error::Busy { .. } | Error::BusyTokens { .. }) => thread::sleep(PATIENCE),
                submitted => break submitted?,
            }
        };
        tracing::debug!(prompt_tokens = events.prompt_ids().len(), samples, "submitted");
        Ok((events, samples))
    }

    fn prompt(&self, content: Content) -> Result<Prompt> {
        match content {
            Content::Ids(ids) => Ok(Prompt::Ids(ids)),
            Content::Text(text) if !self.chat => Ok(Prompt::Text(text)),
            Content::Text(text) => Ok(Prompt::Chat(self.with_system(vec![Message::new("user", text)]))),
            Content::Messages(_) if self.args.input.raw => {
                Err(Error::Request("messages need the chat template, which --raw leaves out".into()))
            }
            Content::Messages(messages) => Ok(Prompt::Chat(self.with_system(messages))),
        }
    }

    /// Puts `--system` first, unless the conversation brings its own.
    fn with_system(&self, mut messages: Vec<Message>) -> Vec<Message> {
        if let Some(system) = &self.args.input.system
            && messages.first().is_none_or(|first| first.role != "system")
        {
            messages.insert(0, Message::new("system", system));
        }
        messages
    }
}

/// A submitted request and its number of samples, or what is wrong with the prompt.
type Job = Result<(Events, u32)>;

/// One run over prompts, in order.
struct Run<'a> {
    asker: &'a Asker,
    interrupt: &'a Interrupt,
    many: bool,
    printer: Box<dyn Printer + 'a>,
    totals: Totals,
    failed: usize,
}

impl<'a> Run<'a> {
    fn new(asker: &'a Asker, interrupt: &'a Interrupt, many: bool) -> Self {
        let tokenizer = asker.engine.tokenizer();
        let printer: Box<dyn Printer> = match asker.args.format {
            Format::Text => Box::new(Text::new(io::stdout(), many, tokenizer.is_none())),
            Format::Json => Box::new(Json::new(io::stdout(), tokenizer.cloned())),
        };
        Run { asker, interrupt, many, printer, totals: Totals::default(), failed: 0 }
    }

    fn all(mut self, prompts: Prompts) -> Result<u8> {
        let (started, before) = (Instant::now(), self.asker.engine.stats());
        let (send, jobs) = bounded(WINDOW);
        let asker = self.asker.clone();
        self.interrupt.listen();
        let submitter = thread::spawn(move || submit_all(&asker, prompts, &send));
        let end = match self.print_all(jobs) {
            Ok(end) => end,
            Err(Halt::Stdout(e)) => return stdout_failed(&e),
            Err(Halt::Wrong(e)) => return Err(e),
        };
        self.interrupt.ignore();
        // An interrupted one may still wait for stdin.
        if end == End::Done
            && let Err(panic) = submitter.join()
        {
            std::panic::resume_unwind(panic);
        }
        if self.asker.args.format == Format::Text {
            let after = self.asker.engine.stats();
            let text = report(&self.totals, started.elapsed(), &before, &after);
            tracing::info!(queues = ?after.scheduler, dropped_measurements = after.dropped, "done");
            // Stderr may be gone; the answer is out.
            let _ = write!(io::stderr(), "\n{text}");
        }
        if self.failed > 0 {
            complain(&format!("{} of {} prompts failed", self.failed, self.failed + self.totals.prompts()));
        }
        Ok(match end {
            End::Interrupted => EXIT_INTERRUPTED,
            End::Done => u8::from(self.failed > 0),
        })
    }

    fn print_all(&mut self, jobs: Receiver<Job>) -> Result<End, Halt> {
        let mut which = 0;
        while !self.interrupt.signalled() {
            match jobs.recv_timeout(PATIENCE) {
                Ok(job) => self.print(which, job)?,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(End::Done),
            }
            which += 1;
        }
        // What other prompts have got until now is shown, too. Those that wait behind it have nothing yet.
        let mut begun: Vec<Job> = jobs.try_iter().take(WINDOW).collect();
        drop(jobs);
        begun.iter_mut().flatten().for_each(|(events, _)| events.cancel());
        for job in begun {
            self.print(which, job)?;
            which += 1;
        }
        Ok(End::Interrupted)
    }

    fn print(&mut self, which: usize, job: Job) -> Result<(), Halt> {
        let (mut events, samples) = match job {
            Ok(job) => job,
            Err(e) => {
                self.printer.begin(which, 1)?;
                return self.fail(e);
            }
        };
        self.printer.begin(which, samples)?;
        let mut answer = Answer::new(events.prompt_ids().to_vec(), samples);
        let printer = &mut self.printer;
        match answer.read(&mut events, self.interrupt, &mut |answer| printer.grown(answer)) {
            Ok(_) => {}
            Err(Halt::Wrong(e)) => return self.fail(e),
            Err(stdout) => return Err(stdout),
        }
        self.totals.add(&answer);
        Ok(self.printer.ended(&answer)?)
    }

    fn fail(&mut self, e: Error) -> Result<(), Halt> {
        if !self.many {
            return Err(Halt::Wrong(e));
        }
        self.failed += 1;
        Ok(self.printer.failed(&e)?)
    }
}

/// Submits until nobody listens any more. It runs beside the printing, so that a slow source of prompts does
/// not hold up answers.
fn submit_all(asker: &Asker, prompts: Prompts, jobs: &Sender<Job>) {
    for asked in prompts {
        if jobs.send(asked.and_then(|asked| asker.submit(asked))).is_err() {
            return;
        }
    }
}

fn converse(asker: &Asker, interrupt: &Interrupt) -> Result<u8> {
    if asker.engine.tokenizer().is_none() {
        return Err(Error::usage("--prompt-ids", "is needed: the model has no tokenizer"));
    }
    let mut terminal = Terminal::open()?;
    let mut ask = |content: Content| Ok(Box::new(asker.submit(Asked::from(content))?.0) as Box<dyn Stream>);
    chat::talk(&mut terminal, interrupt, asker.chat, &mut ask)
}
