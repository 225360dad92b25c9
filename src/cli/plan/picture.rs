//! A layout as bars: how much of its time, and of its memory, each stage takes.

use std::{
    env,
    io::{self, IsTerminal},
};

use super::tables::{percent, units};
use crate::layout::{Prediction, predict::StagePrediction};

/// Columns of a picture that nobody's terminal bounds, and those that any has.
const WIDTH_DEFAULT: usize = 80;
const WIDTH_MIN: usize = 60;
const WIDTH_MAX: usize = 140;

/// How to draw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Picture {
    width: usize,
    unicode: bool,
    colour: bool,
}

/// What bars are made of.
struct Ink {
    full: char,
    half: char,
    none: char,
}

impl Picture {
    /// As stdout can show it: plain ASCII if it is no terminal, or not one for UTF-8; no colours if `NO_COLOR` is set.
    pub(super) fn of_terminal() -> Picture {
        let terminal = io::stdout().is_terminal();
        let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| set(name)).unwrap_or_default();
        let locale = locale.to_uppercase();
        let utf8 = locale.contains("UTF-8") || locale.contains("UTF8");
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        let columns = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        Picture {
            width: columns.filter(|_| terminal).unwrap_or(WIDTH_DEFAULT).clamp(WIDTH_MIN, WIDTH_MAX),
            unicode: terminal && utf8,
            colour: terminal && !dumb && set("NO_COLOR").is_none(),
        }
    }

    /// A line a stage. `kv_tokens` are those that the memory's second part is for.
    pub(super) fn draw(&self, plan: &Prediction, kv_tokens: usize) -> String {
        let ink = match self.unicode {
            true => Ink { full: '█', half: '▒', none: '░' },
            false => Ink { full: '#', half: '=', none: '.' },
        };
        let labels: Vec<String> = plan.stages.iter().map(|s| format!("{}  {}", s.device, units(s))).collect();
        let label = labels.iter().map(String::len).max().unwrap_or(0).min(self.width / 3);
        // Two gaps of two, and a share such as ` 100%`.
        let bars = self.width.saturating_sub(label + 4 + 6).max(20);
        let (time, memory) = (bars / 2, bars - bars / 2);
        let key = |free: &str| format!("{} weights {} KV {} {free}", ink.full, ink.half, ink.none);
        let fits = |key: &String| key.chars().count() <= memory;
        let key = ["free memory", "free"].map(key).into_iter().find(fits).unwrap_or_default();
        let head = format!("{:label$}  {:<past$}  {key}", "", "time", past = time + 6);
        let mut text = format!("{}\n", head.trim_end());
        for (stage, name) in plan.stages.iter().zip(&labels) {
            let name: String = name.chars().take(label).collect();
            let busy = ((stage.share * time as f64).round() as usize).min(time);
            let slowest = stage.share > 0.999;
            let bar = self.paint(if slowest { "33" } else { "32" }, ink.full, busy);
            let rest = " ".repeat(time - busy);
            let share = percent(stage.share);
            let memory = self.memory(stage, kv_tokens, memory, &ink);
            text += &format!("{name:label$}  {bar}{rest} {share:<5}  {memory}\n");
        }
        text
    }

    /// Weights with buffers, then keys and values, of what the stage's device has room for.
    fn memory(&self, stage: &StagePrediction, kv_tokens: usize, width: usize, ink: &Ink) -> String {
        let room = stage.room_bytes.max(1) as f64;
        let cells = |bytes: f64| (bytes / room * width as f64).round() as usize;
        let kept = (stage.weight_bytes + stage.scratch_bytes) as f64;
        let weights = cells(kept).min(width);
        let taken = cells(kept + stage.kv_bytes_per_token as f64 * kv_tokens as f64).clamp(weights, width);
        let weights_bar = self.paint("34", ink.full, weights);
        let kv_bar = self.paint("36", ink.half, taken - weights);
        format!("{weights_bar}{kv_bar}{}", String::from(ink.none).repeat(width - taken))
    }

    fn paint(&self, colour: &str, with: char, count: usize) -> String {
        let bar = String::from(with).repeat(count);
        if self.colour && count > 0 { format!("\x1b[{colour}m{bar}\x1b[0m") } else { bar }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::DType,
        layout::{DeviceSpec, Planner},
        model::shapes,
    };

    fn drawn(picture: Picture) -> String {
        let spec = shapes::find("7b").unwrap().unwrap();
        let devices = DeviceSpec::list("l4,h100-80g,h100-80g").unwrap();
        let planner = Planner::new(&spec, DType::BF16, &devices);
        picture.draw(&planner.predict(&planner.plan(3).unwrap()).unwrap(), 10_000)
    }

    #[test]
    fn it_keeps_to_the_width_and_to_what_the_terminal_shows() {
        for width in [60, 80, 140] {
            let plain = drawn(Picture { width, unicode: false, colour: false });
            assert!(plain.is_ascii() && plain.lines().count() == 4, "{plain}");
            assert!(plain.lines().all(|line| line.len() <= width), "{width}:\n{plain}");
            assert!(plain.contains("100%") && plain.contains('#') && plain.contains('.'), "{plain}");
            assert!(width < 80 || plain.contains('='), "{plain}");
            // Its key is whole, or there is none.
            let head = plain.lines().next().unwrap();
            let key = if width < 80 { "time" } else { " free" };
            assert!(head.ends_with(key) || head.ends_with(" free memory"), "{plain}");
            let rich = drawn(Picture { width, unicode: true, colour: false });
            assert!(rich.contains('█') && !rich.contains('\x1b'));
            assert!(rich.lines().all(|line| line.chars().count() <= width), "{width}:\n{rich}");
        }
        assert!(drawn(Picture { width: 80, unicode: true, colour: true }).contains("\x1b[33m"));
    }
}
