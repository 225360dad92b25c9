//! Panels of lines over axes, one below the other, with a legend beside them.

use super::svg::{Anchor, COLOURS, Svg};

const WIDTH: f64 = 960.0;
const PANEL: f64 = 330.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 290.0;
const TITLE: f64 = 44.0;
const ABOVE: f64 = 26.0;
const BELOW: f64 = 52.0;
/// Series of which the legend tells.
const TOLD_MAX: usize = 14;
/// Values that are further apart get a logarithmic axis.
const LINEAR_MAX: f64 = 30.0;
const TICKS: f64 = 6.0;

/// A picture.
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) panels: Vec<Panel>,
}

/// Lines over the same axes.
pub(super) struct Panel {
    pub(super) x: String,
    pub(super) y: String,
    pub(super) series: Vec<Series>,
}

/// A line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Series {
    pub(super) name: String,
    /// Of all lines that are about the same thing.
    pub(super) colour: usize,
    pub(super) dashed: bool,
    pub(super) points: Vec<Mark>,
}

/// A point, and what it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Mark {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) told: String,
}

/// From values to places.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Chart {
    /// As SVG.
    pub(super) fn draw(&self) -> String {
        let mut svg = Svg::new(WIDTH, TITLE + self.panels.len() as f64 * PANEL);
        svg.text("title", (LEFT, 28.0), Anchor::Start, &self.title);
        for (i, panel) in self.panels.iter().enumerate() {
            panel.draw(&mut svg, TITLE + i as f64 * PANEL, i == 0);
        }
        svg.finish()
    }
}

impl Panel {
    fn draw(&self, svg: &mut Svg, top: f64, legend: bool) {
        let marks = || self.series.iter().flat_map(|series| &series.points);
        let (x, y) = (Axis::of(marks().map(|m| m.x)), Axis::of(marks().map(|m| m.y)));
        let (left, right) = (LEFT, WIDTH - RIGHT);
        let (upper, lower) = (top + ABOVE, top + PANEL - BELOW);
        let place = |mark: &Mark| {
            (left + x.place(mark.x) * (right - left), lower - y.place(mark.y) * (lower - upper))
        };
        for tick in x.ticks() {
            let at = left + x.place(tick) * (right - left);
            svg.line("grid", (at, upper), (at, lower));
            svg.text("small", (at, lower + 16.0), Anchor::Middle, &told(tick));
        }
        for tick in y.ticks() {
            let at = lower - y.place(tick) * (lower - upper);
            svg.line("grid", (left, at), (right, at));
            svg.text("small", (left - 8.0, at + 4.0), Anchor::End, &told(tick));
        }
        svg.path("axis", &[(left, upper), (left, lower), (right, lower)]);
        svg.text("", ((left + right) / 2.0, lower + 36.0), Anchor::Middle, &self.x);
        svg.text_upwards("", (22.0, (upper + lower) / 2.0), &self.y);
        for series in &self.series {
            let points: Vec<(f64, f64)> = series.points.iter().map(place).collect();
            let class = format!("s{}", series.colour % COLOURS);
            let dash = if series.dashed { " dash" } else { "" };
            svg.path(&format!("{class} line{dash}"), &points);
            for (mark, point) in series.points.iter().zip(points) {
                svg.dot(&class, point, &mark.told);
            }
        }
        if legend {
            self.legend(svg, right + 24.0, upper);
        }
    }

    fn legend(&self, svg: &mut Svg, left: f64, top: f64) {
        for (i, series) in self.series.iter().take(TOLD_MAX).enumerate() {
            let y = top + 8.0 + 19.0 * i as f64;
            let dash = if series.dashed { " dash" } else { "" };
            let class = format!("s{} line{dash}", series.colour % COLOURS);
            svg.line(&class, (left, y), (left + 24.0, y));
            svg.text("", (left + 32.0, y + 4.0), Anchor::Start, &cut(&series.name));
        }
        if self.series.len() > TOLD_MAX {
            let y = top + 12.0 + 19.0 * TOLD_MAX as f64;
            svg.text(
                "small",
                (left + 32.0, y),
                Anchor::Start,
                &format!("and {} more", self.series.len() - TOLD_MAX),
            );
        }
    }
}

impl Axis {
    /// Of values: from 0, or logarithmic where they are far apart.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Axis {
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| value.is_finite()) {
            (least, most) = (least.min(value), most.max(value));
        }
        if least > 0.0 && most / least > LINEAR_MAX && most.is_finite() {
            return Axis { from: least / 1.2, to: most * 1.2, logarithmic: true };
        }
        let most = if most > 0.0 { most } else { 1.0 };
        let step = nice(most * 1.05 / TICKS);
        Axis { from: least.min(0.0), to: (most * 1.05 / step).ceil() * step, logarithmic: false }
    }

    /// From 0 to 1.
    pub(super) fn place(&self, value: f64) -> f64 {
        let place = match self.logarithmic {
            true => (value / self.from).ln() / (self.to / self.from).ln(),
            false => (value - self.from) / (self.to - self.from),
        };
        place.clamp(0.0, 1.0)
    }

    /// Where there are numbers.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let within = |tick: &f64| (self.from..=self.to).contains(tick);
        if self.logarithmic {
            let decades = self.from.log10().floor() as i32..=self.to.log10().ceil() as i32;
            let steps: &[f64] = if (self.to / self.from).log10() > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            return decades
                .flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d)))
                .filter(within)
                .collect();
        }
        let step = nice((self.to - self.from) / TICKS);
        let first = (self.from / step).ceil();
        (0..=TICKS as u32 * 3).map(|i| (first + f64::from(i)) * step).take_while(within).collect()
    }
}

/// The least of 1, 2 and 5 times a power of 10 that is as large.
pub(super) fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let found = [1.0, 2.0, 5.0].into_iter().find(|times| times * power >= step * 0.999_999);
    found.unwrap_or(10.0) * power
}

/// A number on an axis.
fn told(value: f64) -> String {
    let magnitude = value.abs();
    let (scaled, unit) = match magnitude {
        m if m >= 1e9 => (value / 1e9, "G"),
        m if m >= 1e6 => (value / 1e6, "M"),
        m if m >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text =
        if scaled.abs() < 1.0 && scaled != 0.0 { format!("{scaled:.4}") } else { format!("{scaled:.2}") };
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// What the legend has room for.
fn cut(name: &str) -> String {
    const CHARS_MAX: usize = 36;
    match name.chars().count() > CHARS_MAX {
        true => name.chars().take(CHARS_MAX - 1).chain(['…']).collect(),
        false => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers_and_begin_at_zero() {
        let axis = Axis::of([3.0, 47.0].into_iter());
        assert_eq!(axis, Axis { from: 0.0, to: 50.0, logarithmic: false });
        assert_eq!(axis.ticks(), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert_eq!((axis.place(25.0), axis.place(99.0)), (0.5, 1.0));
        assert_eq!([nice(0.03), nice(7.0), nice(2.0), nice(1e6)], [0.05, 10.0, 2.0, 1e6]);
    }

    #[test]
    fn values_that_are_far_apart_get_a_logarithmic_axis() {
        let axis = Axis::of([2.0, 900.0].into_iter());
        assert!(axis.logarithmic);
        assert_eq!(axis.ticks(), [2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]);
        assert!((axis.place((2.0f64 * 900.0).sqrt()) - 0.5).abs() < 1e-9);
        assert_eq!(Axis::of([1e-3, 1e5].into_iter()).ticks().len(), 9);
    }

    #[test]
    fn nothing_and_nonsense_have_axes_too() {
        for values in [&[][..], &[0.0], &[f64::NAN, f64::INFINITY], &[5.0], &[1e300, 1.0], &[-3.0, 4.0]] {
            let axis = Axis::of(values.iter().copied());
            let ticks = axis.ticks();
            assert!(
                ticks.iter().all(|tick| axis.place(*tick).is_finite()) && ticks.len() < 400,
                "{values:?}"
            );
        }
        assert_eq!(
            [told(0.0), told(0.05), told(1500.0), told(29_000.0), told(2e6)],
            ["0", "0.05", "1500", "29k", "2M"]
        );
        assert_eq!(cut(&"a".repeat(80)).chars().count(), 36);
    }

    #[test]
    fn every_series_is_drawn() {
        let mark = |x, y| Mark { x, y, told: "here".into() };
        let series = |i: usize| Series {
            name: format!("series {i}"),
            colour: i,
            dashed: i == 1,
            points: vec![mark(1.0, 2.0), mark(3.0, 4.0 + i as f64)],
        };
        let panel = Panel { x: "x".into(), y: "y".into(), series: (0..20).map(series).collect() };
        let text = Chart { title: "a & b".into(), panels: vec![panel] }.draw();
        assert_eq!(text.matches("<circle").count(), 40);
        assert!(
            text.contains("a &amp; b") && text.contains("and 6 more") && text.contains("s1 line dash"),
            "{text}"
        );
    }
}
