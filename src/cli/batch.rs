//! `pipeline-infer batch`: a folder of images, or a file of requests, into a file of results.

mod flow;
mod items;
mod progress;
mod results;

use std::{path::PathBuf, sync::Arc, time::Instant};

use clap::{ArgMatches, Args, FromArgMatches};

use self::{
    flow::{Ended, Flow},
    items::{Items, Listed},
    progress::Progress,
    results::{Mode, Results},
};
use super::{
    EXIT_INTERRUPTED, Subcommand,
    asker::{Asker, Manner},
    choices::Choices,
    complain, flag_name,
    interrupt::Interrupt,
    media::Pixels,
    setup::Setup,
};
use crate::error::{Error, Result};

pub(super) const SUBCOMMAND: Subcommand = Subcommand {
    name: "batch",
    about: "Answers questions about a folder of images, or a file of requests, into a file of results",
    flags: |command| {
        BatchArgs::augment_args(command).after_help(
            "Results come in the order of the items, a JSON object a line. What is wrong with an item is the error on its line, \
             and the others go on; the exit code is 1 then. Ctrl-C ends it with what is finished written; the same command \
             with --resume goes on.",
        )
    },
    run,
};

#[derive(Debug, Clone, Args)]
struct BatchArgs {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    work: Work,
    #[command(flatten)]
    manner: Manner,
    #[command(flatten)]
    pixels: Pixels,
    #[command(flatten)]
    choices: Choices,
}

/// What is asked, and where the answers go.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Batch")]
struct Work {
    /// A folder, whose images and those of the folders in it are asked about, in the natural order of their names; or a glob,
    /// or files
    #[arg(long, value_name = "DIR|GLOB", num_args = 1.., required_unless_present = "input", requires = "question")]
    images: Vec<String>,
    /// A question about each image; repeatable
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "images")]
    question: Vec<String>,
    /// JSON lines: an object with id, prompt or messages, images (files, relative to this one's folder), and choices such as
    /// max_tokens; - is stdin
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    input: Option<PathBuf>,
    /// The results, JSON lines
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Goes on where an earlier run of the same work was broken off
    #[arg(long)]
    resume: bool,
    /// Begins anew, in the place of the results that there are
    #[arg(long, conflicts_with = "resume")]
    force: bool,
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = BatchArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    args.choices.check(flag_name)?;
    let builder = args.pixels.apply(args.setup.builder()?);
    let Listed { mut items, total } = args.list()?;
    let mut results = Results::open(&args.work.output, args.work.mode())?;
    let done = results.read(&mut items)?;
    if total.is_some_and(|total| total == done.items) {
        results.begin()?;
        return Ok(told(&Ended { items: done.items, failed: done.failed, ..Ended::default() }, None, &args));
    }
    if let Some(flag) = args.images_flag() {
        args.setup.must_see(flag)?;
    }
    let interrupt = Interrupt::install()?;
    let engine = Arc::new(args.setup.start(builder, true)?);
    let asker = Asker::new(engine.clone(), args.manner.clone(), args.choices.clone())?;
    results.begin()?;
    interrupt.listen();
    let (started, progress) = (Instant::now(), Progress::new(total, done));
    let flow = Flow::start(Arc::new(asker), items, &interrupt, progress);
    let ended = flow.write_all(&mut results)?;
    interrupt.ignore();
    let code = told(&ended, Some(started), &args);
    // A thread may still wait for a line of stdin, and has the engine then.
    if let Some(engine) = Arc::into_inner(engine) {
        engine.end()?;
    }
    Ok(code)
}

/// Says how it has ended. The exit code.
fn told(ended: &Ended, started: Option<Instant>, args: &BatchArgs) -> u8 {
    let Ended { items, failed, first_failure, interrupted, new_tokens, answered } = ended;
    let output = args.work.output.display();
    if *interrupted {
        complain(&format!("interrupted: {output} has {items} items; the same command with --resume goes on"));
        return EXIT_INTERRUPTED;
    }
    if *failed > 0 {
        let why =
            first_failure.as_ref().map_or(String::new(), |why| format!("; the first of this run: {why}"));
        complain(&format!("{failed} of {items} items failed, as their lines of {output} say{why}"));
        return 1;
    }
    let rates = started.map_or(String::new(), |started| {
        let seconds = started.elapsed().as_secs_f64();
        let [items, tokens] = [*answered as f64 / seconds, *new_tokens as f64 / seconds];
        format!(": {answered} in {seconds:.1} s, {items:.1} items/s, {tokens:.1} new tokens/s")
    });
    super::say(&format!("{output} has all {items} items{rates}"));
    0
}

impl BatchArgs {
    /// The items, before a model is loaded in vain.
    fn list(&self) -> Result<Listed> {
        if let Some(empty) = self.work.question.iter().find(|question| question.trim().is_empty()) {
            return Err(Error::usage(format!("--question {empty:?}"), "it asks nothing"));
        }
        let settings = self.settings();
        match &self.work.input {
            Some(input) => Items::of_lines(input, settings),
            None => Items::of_images(&self.work.images, &self.work.question, settings),
        }
    }

    /// All that an answer depends on besides its item. Where layers run is not among it.
    fn settings(&self) -> String {
        let BatchArgs { setup, manner, pixels, choices, .. } = self;
        let Manner { raw, system, .. } = manner;
        format!("{} {raw} {system:?} {pixels:?} {choices:?}", setup.answers_as())
    }

    /// A flag that a model which reads no images has no use for.
    fn images_flag(&self) -> Option<&'static str> {
        let images = (!self.work.images.is_empty()).then_some("--images");
        images.or(self.pixels.flag())
    }
}

impl Work {
    fn mode(&self) -> Mode {
        match (self.resume, self.force) {
            (true, _) => Mode::Resume,
            (_, true) => Mode::Force,
            _ => Mode::New,
        }
    }
}
