//! A small writer of SVG. Colours are classes, which follow the reader's light or dark scheme.

use std::fmt::Write;

/// Colours of series and of kinds of bars.
pub(super) const COLOURS: usize = 8;

/// Text in it is 12 high unless its class says otherwise.
const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}.title{font-size:15px;font-weight:600}\
.bg{fill:#fff}.axis{stroke:#57606a;fill:none}.grid{stroke:#d8dee4;fill:none}.line{fill:none;stroke-width:2}.dash{stroke-dasharray:5 4}\
.s0{stroke:#0969da;fill:#0969da}.s1{stroke:#bc4c00;fill:#bc4c00}.s2{stroke:#1a7f37;fill:#1a7f37}.s3{stroke:#8250df;fill:#8250df}\
.s4{stroke:#9a6700;fill:#9a6700}.s5{stroke:#bf3989;fill:#bf3989}.s6{stroke:#1b7c83;fill:#1b7c83}.s7{stroke:#57606a;fill:#57606a}\
.line{fill:none}.bar{stroke:none;shape-rendering:crispEdges}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.bg{fill:#0d1117}.axis{stroke:#9198a1}.grid{stroke:#30363d}\
.s0{stroke:#58a6ff;fill:#58a6ff}.s1{stroke:#f0883e;fill:#f0883e}.s2{stroke:#3fb950;fill:#3fb950}.s3{stroke:#bc8cff;fill:#bc8cff}\
.s4{stroke:#d29922;fill:#d29922}.s5{stroke:#f778ba;fill:#f778ba}.s6{stroke:#56d4dd;fill:#56d4dd}.s7{stroke:#9198a1;fill:#9198a1}\
.line{fill:none}.bar{stroke:none}}";

/// Where a text is, seen from its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture.
pub(super) struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    /// An empty one, with a background: it can be read wherever it is shown.
    pub(super) fn new(width: f64, height: f64) -> Svg {
        let mut svg = Svg { width, height, body: String::new() };
        svg.rect("bg", (0.0, 0.0), (width, height), None);
        svg
    }

    /// A straight line.
    pub(super) fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let (x1, y1, x2, y2) = (short(x1), short(y1), short(x2), short(y2));
        let _ = writeln!(self.body, r#"<line class="{class}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>"#);
    }

    /// Lines from point to point.
    pub(super) fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        let points: Vec<String> = points.iter().map(|&(x, y)| format!("{},{}", short(x), short(y))).collect();
        let _ = writeln!(self.body, r#"<polyline class="{class}" points="{}"/>"#, points.join(" "));
    }

    /// A dot, with what shows under the pointer.
    pub(super) fn dot(&mut self, class: &str, (x, y): (f64, f64), told: &str) {
        let (x, y, told) = (short(x), short(y), escaped(told));
        let _ = writeln!(
            self.body,
            r#"<circle class="{class}" cx="{x}" cy="{y}" r="3.5"><title>{told}</title></circle>"#
        );
    }

    /// A filled rectangle, from its upper left corner.
    pub(super) fn rect(
        &mut self,
        class: &str,
        (x, y): (f64, f64),
        (width, height): (f64, f64),
        opacity: Option<f64>,
    ) {
        let opacity = opacity.map_or(String::new(), |share| format!(r#" fill-opacity="{}""#, short(share)));
        let (x, y, width, height) = (short(x), short(y), short(width), short(height));
        let _ = writeln!(
            self.body,
            r#"<rect class="{class}" x="{x}" y="{y}" width="{width}" height="{height}"{opacity}/>"#
        );
    }

    /// A line of text.
    pub(super) fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let (x, y, text) = (short(x), short(y), escaped(text));
        let _ = writeln!(
            self.body,
            r#"<text class="{class}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>"#
        );
    }

    /// Text that is read upwards, with its middle there.
    pub(super) fn text_upwards(&mut self, class: &str, (x, y): (f64, f64), text: &str) {
        let (x, y, text) = (short(x), short(y), escaped(text));
        let _ = writeln!(
            self.body,
            r#"<text class="{class}" transform="translate({x} {y}) rotate(-90)" text-anchor="middle">{text}</text>"#
        );
    }

    /// The file.
    pub(super) fn finish(self) -> String {
        let Svg { width, height, body } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" role=\"img\">\n<style>{STYLE}</style>\n{body}</svg>\n"
        )
    }
}

/// A number with two digits after the point at most.
fn short(number: f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Text may come from files: nothing of it is markup, and what XML does not allow is left out.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars().filter(|c| !c.is_control() && !('\u{fffe}'..='\u{ffff}').contains(c)) {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_no_markup_and_numbers_are_short() {
        assert_eq!(escaped("a<b>&\"\u{7}\n"), "a&lt;b&gt;&amp;&quot;");
        assert_eq!([short(1.0), short(0.126), short(-3.5), short(100.0)], ["1", "0.13", "-3.5", "100"]);
        let mut svg = Svg::new(10.0, 20.0);
        svg.text("t", (1.0, 2.0), Anchor::End, "<script>");
        let text = svg.finish();
        assert!(text.starts_with("<svg xmlns=") && text.ends_with("</svg>\n"), "{text}");
        assert!(text.contains("&lt;script&gt;") && !text.contains("<script>"), "{text}");
        assert!(text.contains("prefers-color-scheme:dark"));
    }
}
