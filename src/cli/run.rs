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
    asker::{Asker, Manner, Submitted},
    attach::Opener,
    chat::{self, Partner, Terminal, Terms},
    choices::Choices,
    compared, complain, flag_name,
    gate::{Gate, Pass},
    interrupt::Interrupt,
    media::{self, Pixels, Wanted},
    output::{Json, Printer, Text},
    prompts::{self, Asked, Content, Prompts},
    setup::Setup,
    stdout_failed,
    table::{Totals, report},
};
use crate::{
    engine::{Engine, Watch},
    error::{Error, Result},
    request::Media,
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "run", about: "Answers prompts (the default)", flags: RunArgs::augment_args, run };

/// Requests that are submitted and not yet printed: it bounds the memory that a long file of prompts takes.
/// One is printed and one waits for room.
const WINDOW: usize = 1024 - 2;
/// What their images may take before no more are decoded.
const IMAGE_BYTES: usize = 1 << 30;

#[derive(Debug, Clone, Args)]
struct RunArgs {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    input: Input,
    #[command(flatten)]
    pixels: Pixels,
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
    #[command(flatten)]
    manner: Manner,
    /// An image before the prompt's text; repeatable, in order. Without the chat template the prompt itself says where
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_file", help_heading = "Images")]
    image: Vec<PathBuf>,
    /// A video before the prompt's text: a folder of frames, in the natural order of their names; repeatable
    #[arg(
        long,
        value_name = "DIR",
        requires = "fps",
        conflicts_with = "prompt_file",
        help_heading = "Images"
    )]
    video: Vec<PathBuf>,
    /// Frames a second of the videos
    #[arg(long, value_name = "FPS", value_parser = media::fps, help_heading = "Images")]
    fps: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Where prompts come from.
enum Source {
    /// One prompt: its error is the program's.
    One(Asked),
    /// Several: a wrong one does not keep the others from being answered.
    Many(Prompts),
    /// A person at a terminal, who begins with these images.
    Person(Vec<media::Source>),
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = RunArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    args.choices.check(flag_name)?;
    let builder = args.pixels.apply(args.setup.builder()?);
    let media = args.media(matches)?;
    let source = args.source(media)?;
    if let Some(flag) = args.images_flag() {
        args.setup.must_see(flag)?;
    }
    let interrupt = Interrupt::install()?;
    let engine = Arc::new(args.setup.start(builder, args.format == Format::Text)?);
    let watch = (matches.get_count(VERBOSE) > 0).then(|| engine.watch()).transpose()?;
    let asker = Asker::new(engine.clone(), args.input.manner.clone(), args.choices.clone())?;
    let code = match source {
        Source::One(asked) => {
            let run = Run::new(&asker, &interrupt, (args.format, false));
            run.all(Box::new(std::iter::once(Ok(asked))))
        }
        Source::Many(prompts) => Run::new(&asker, &interrupt, (args.format, true)).all(prompts),
        Source::Person(media) => {
            let terms = Terms { chat: asker.chat, media, fps: args.input.fps };
            converse(&asker, &interrupt, terms)
        }
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
    /// The images and videos of the flags, in their order. They are there, whatever they are.
    fn media(&self, matches: &ArgMatches) -> Result<Vec<media::Source>> {
        let Input { image, video, fps, .. } = &self.input;
        let places = |id| matches.indices_of(id).into_iter().flatten();
        let images = image.iter().cloned().map(media::Source::Image);
        let videos = video.iter().cloned().map(|dir| media::Source::Folder(dir, fps.unwrap_or(1.0)));
        let mut placed: Vec<(usize, media::Source)> =
            places("image").zip(images).chain(places("video").zip(videos)).collect();
        placed.sort_by_key(|(place, _)| *place);
        let sources: Vec<media::Source> = placed.into_iter().map(|(_, source)| source).collect();
        sources.iter().try_for_each(media::Source::check)?;
        Ok(sources)
    }

    /// A flag that a model which reads no images has no use for.
    fn images_flag(&self) -> Option<&'static str> {
        let Input { image, video, fps, .. } = &self.input;
        let flags =
            [("--image", !image.is_empty()), ("--video", !video.is_empty()), ("--fps", fps.is_some())];
        let given = flags.iter().find(|(_, given)| *given).map(|(flag, _)| *flag);
        given.or(self.pixels.flag())
    }

    /// Opens what prompts come from, before a model is loaded in vain.
    fn source(&self, media: Vec<media::Source>) -> Result<Source> {
        if self.choices.logprobs() && self.format == Format::Text {
            return Err(Error::usage("--logprobs", "they are shown by --format json alone"));
        }
        let Input { prompt, prompt_file, prompt_ids, .. } = &self.input;
        if let Some(path) = prompt_file {
            return Ok(Source::Many(prompts::file(path)?));
        }
        let with = |content: Content| {
            let media = media.iter().cloned().map(Wanted::first).collect();
            Asked { media, ..content.into() }
        };
        if let Some(ids) = prompt_ids {
            return Ok(Source::One(with(Content::Ids(ids.clone()))));
        }
        match &prompt[..] {
            [] if !io::stdin().is_terminal() => Ok(Source::One(with(prompts::stdin()?))),
            [] if self.format == Format::Json => {
                Err(Error::usage("--format json", "a conversation is text; give a prompt"))
            }
            [] if self.choices.several() => Err(Error::usage("--n", "a conversation has one answer")),
            [] => Ok(Source::Person(media)),
            [one] => Ok(Source::One(with(Content::Text(one.clone())))),
            many => {
                let asked: Vec<Result<Asked>> =
                    many.iter().map(|text| Ok(with(Content::Text(text.clone())))).collect();
                Ok(Source::Many(Box::new(asked.into_iter())))
            }
        }
    }
}

/// A submitted request with its place among those on their way, or what is wrong with the prompt.
type Job = Result<(Submitted, Pass)>;

/// One run over prompts, in order.
struct Run<'a> {
    asker: &'a Asker,
    interrupt: &'a Interrupt,
    format: Format,
    many: bool,
    printer: Box<dyn Printer + 'a>,
    totals: Totals,
    failed: usize,
}

impl<'a> Run<'a> {
    fn new(asker: &'a Asker, interrupt: &'a Interrupt, (format, many): (Format, bool)) -> Self {
        let tokenizer = asker.engine.tokenizer();
        let printer: Box<dyn Printer> = match format {
            Format::Text => Box::new(Text::new(io::stdout(), many, tokenizer.is_none())),
            Format::Json => Box::new(Json::new(io::stdout(), tokenizer.cloned())),
        };
        Run { asker, interrupt, format, many, printer, totals: Totals::default(), failed: 0 }
    }

    fn all(mut self, prompts: Prompts) -> Result<u8> {
        let (started, before) = (Instant::now(), self.asker.engine.stats());
        let (send, jobs) = bounded(WINDOW);
        let (asker, gate) = (self.asker.clone(), Gate::new(usize::MAX, IMAGE_BYTES));
        self.interrupt.listen();
        let waits = gate.clone();
        let submitter = thread::spawn(move || submit_all(&asker, prompts, &waits, &send));
        let printed = self.print_all(jobs);
        gate.close();
        let end = match printed {
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
        if self.format == Format::Text {
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
        begun.iter_mut().flatten().for_each(|(submitted, _)| submitted.cancel());
        for job in begun {
            self.print(which, job)?;
            which += 1;
        }
        Ok(End::Interrupted)
    }

    fn print(&mut self, which: usize, job: Job) -> Result<(), Halt> {
        let (mut submitted, _pass) = match job {
            Ok(job) => job,
            Err(e) => {
                self.printer.begin(which, 1)?;
                return self.fail(e);
            }
        };
        let samples = submitted.samples;
        self.printer.begin(which, samples)?;
        let mut answer = Answer::new(submitted.events.prompt_ids().to_vec(), samples);
        let printer = &mut self.printer;
        match answer.read(&mut submitted, self.interrupt, &mut |answer| printer.grown(answer)) {
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
fn submit_all(asker: &Asker, prompts: Prompts, gate: &Arc<Gate>, jobs: &Sender<Job>) {
    for asked in prompts {
        let Some(mut pass) = gate.enter() else { return };
        let submitted = asked.and_then(|asked| asker.submit(asked));
        let job = submitted.map(|submitted| {
            pass.hold(submitted.bytes);
            (submitted, pass)
        });
        if jobs.send(job).is_err() {
            return;
        }
    }
}

fn converse(asker: &Asker, interrupt: &Interrupt, terms: Terms) -> Result<u8> {
    if asker.engine.tokenizer().is_none() {
        return Err(Error::usage("--prompt-ids", "is needed: the model has no tokenizer"));
    }
    let mut terminal = Terminal::open()?;
    chat::talk(&mut terminal, interrupt, terms, &mut asker.clone())
}

impl Partner for Asker {
    fn ask(&mut self, asked: Asked) -> Result<Box<dyn Stream>> {
        Ok(Box::new(self.submit(asked)?))
    }
}

impl Opener for Asker {
    fn open(&mut self, source: &media::Source) -> Result<Media> {
        source.open(&self.engine)
    }

    fn tokens(&self, media: &Media) -> usize {
        media::tokens(&self.engine, media)
    }
}
