//! What one core serves: a panel for each service.

use std::fs;
use std::io;
use std::path::Path;

use super::page::{Drawn, listed, look_of, rank, scaled};
use super::{BarPanel, FIGURES, GUESTS, Line, draw_panels};

const NATIVES: &str = "tokio: a native program that does the same.";

/// A service's figures.
pub(in super::super) struct Panel {
    pub(in super::super) name: &'static str,
    /// What is counted, in the plural.
    pub(in super::super) counted: &'static str,
    pub(in super::super) axis: &'static str,
    /// By implementation: so many for each second of CPU time, with the relative spread.
    pub(in super::super) per_core: Vec<(String, f64, f64)>,
}

/// Draws them into a file, if there are any; says whether.
///
/// # Errors
///
/// That of the file, if it cannot be written.
pub(in super::super) fn draw(panels: &[Panel], caption: &str, file: &Path) -> io::Result<bool> {
    let Some(svg) = picture(panels, caption).map_err(io::Error::other)? else {
        return Ok(false);
    };
    fs::write(file, svg).map(|()| true)
}

fn picture(panels: &[Panel], caption: &str) -> Drawn<Option<String>> {
    let mut drawn = Vec::new();
    for panel in panels {
        let mut bars: Vec<_> =
            panel.per_core.iter().filter(|(_, value, _)| FIGURES.contains(value)).collect();
        bars.sort_by_key(|(name, ..)| rank(name));
        let line = |(name, value, spread): &&(String, f64, f64)| Line {
            bench: "",
            name: name.clone(),
            value: *value,
            spread: super::bounded(*spread),
            shown: scaled(*value),
            look: look_of(name),
        };
        let lines: Vec<_> = bars.iter().map(line).collect();
        if !lines.is_empty() {
            let what = panel.counted.to_owned();
            drawn.push(BarPanel { name: panel.name, what, axis: panel.axis, lines });
        }
    }
    let names = listed(drawn.iter().flat_map(|panel| &panel.lines).map(|line| &*line.name));
    let natives = if names.contains(&"tokio") { NATIVES } else { "" };
    draw_panels(
        "What one core serves, by backend",
        "Whole services under full load: for each second of the service's CPU time; longer is better. Medians; \
         whiskers: the spread of the rounds. Each panel has its own scale.",
        [GUESTS, natives, caption],
        &drawn,
    )
}
