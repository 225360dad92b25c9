//! The smallest use of the library.
//!
//! `cargo run --release --example smallest -- MODEL_DIR "a prompt"`

use pipeline_infer::{Engine, Event, Message, Prompt, Request};

fn main() -> pipeline_infer::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(model), Some(prompt)) = (args.next(), args.next()) else {
        eprintln!("usage: smallest MODEL_DIR PROMPT");
        std::process::exit(2);
    };
    let engine = Engine::builder().model(model).build()?;
    let prompt = match engine.template() {
        Some(_) => Prompt::Chat(vec![Message::new("user", prompt)]),
        None => Prompt::Text(prompt),
    };
    let mut request = Request::new(prompt);
    request.stop.max_tokens = Some(64);
    for event in engine.submit(request)? {
        match event {
            Event::Token { text, .. } => print!("{text}"),
            Event::Finished { text, reason, usage, .. } => {
                println!("{text}");
                println!("[{}, {} tokens]", reason.name(), usage.completion_tokens);
            }
            Event::Error(error) => return Err(error),
            _ => (),
        }
    }
    Ok(())
}
