//! Orders and positions, and placeholders in a prompt.

use pipeline_infer::{
    grid::{Grid, Spacing, Span, frames, patch_places, positions, windows},
    vision::{Media, Pads, place},
};
use serde_json::Value;

use super::{golden, list};

const SPACING: Spacing = Spacing { merge: 2, tokens_per_second: 2 };
const PADS: Pads = Pads { image: 1000, video: 1001 };

fn grid(value: &Value) -> Grid {
    let [t, h, w] = list(value);
    Grid { t, h, w }
}

#[test]
fn windows_and_places_are_those_of_transformers() {
    for case in golden("windows").as_array().unwrap() {
        let grids: Vec<Grid> = case["grids"].as_array().unwrap().iter().map(grid).collect();
        let windows = windows(&grids, 2, 4);
        assert_eq!(windows.cells, list::<Vec<u32>>(&case["cells"]), "{grids:?}");
        assert_eq!(windows.ends, list::<Vec<u32>>(&case["ends"]), "{grids:?}");
        assert_eq!(frames(&grids), list::<Vec<u32>>(&case["frames"]), "{grids:?}");
        assert_eq!(patch_places(&grids, 2), list::<Vec<[u32; 2]>>(&case["places"]), "{grids:?}");
    }
}

#[test]
fn positions_are_those_of_transformers() {
    for case in golden("positions").as_array().unwrap() {
        let span = |span: &Value| match (&span["text"], &span["image"]) {
            (Value::Null, Value::Null) => {
                Span::Video { grid: grid(&span["video"]), seconds: list(&span["seconds"]) }
            }
            (Value::Null, image) => Span::Image(grid(image)),
            (text, _) => Span::Text(list(text)),
        };
        let spans: Vec<Span> = case["spans"].as_array().unwrap().iter().map(span).collect();
        let found = positions(&spans, SPACING).unwrap();
        assert_eq!(found.rows, list::<Vec<[u32; 3]>>(&case["rows"]), "{spans:?}");
        assert_eq!(found.delta, list::<i64>(&case["delta"]), "{spans:?}");
    }
}

#[test]
fn frames_that_are_years_apart_are_refused() {
    let grid = Grid { t: 9, h: 4, w: 4 };
    for seconds in [1e9, 1e300] {
        let error = positions(&[Span::Video { grid, seconds }], SPACING).unwrap_err().to_string();
        assert_eq!(error, "request: a video's frames are too far apart for its positions");
    }
}

#[test]
fn placeholders_are_repeated() {
    let (a, b) = (Grid { t: 1, h: 2, w: 4 }, Grid { t: 2, h: 2, w: 2 });
    let media = Media { images: &[a], videos: &[(b, 1.0)] };
    let placed = place(&[5, 1000, 6, 6, 1001], PADS, media, 2).unwrap();
    assert_eq!(placed.ids, [5, 1000, 1000, 6, 6, 1001, 1001]);
    let expected = [Span::Text(1), Span::Image(a), Span::Text(2), Span::Video { grid: b, seconds: 1.0 }];
    assert_eq!(placed.spans, expected);
    let found = positions(&placed.spans, SPACING).unwrap();
    assert_eq!(found.rows.len(), placed.ids.len());
}

#[test]
fn images_and_places_have_to_match() {
    let a = Grid { t: 1, h: 2, w: 4 };
    let error = |ids: &[u32], images: &[Grid]| {
        place(ids, PADS, Media { images, videos: &[] }, 2).unwrap_err().to_string()
    };
    assert_eq!(error(&[1, 1000], &[a, a]), "request: images: 2 given, but the prompt has places for 1");
    assert_eq!(error(&[1, 1000], &[]), "request: images: 0 given, but the prompt has places for 1");
    assert_eq!(error(&[1001], &[]), "request: videos: 0 given, but the prompt has places for 1");
}
