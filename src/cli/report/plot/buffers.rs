//! Throughput and latency against the receive buffers of a ring.

use std::io;
use std::path::{Path, PathBuf};

use super::page::{GAP, Page, cell, cell_width, listed};
use super::{CURVES_HEIGHT, Drawn, FIGURES, GUESTS, Panel, bounded, write};

const FILE_NAME: &str = "buffers.svg";

/// One implementation's figures with so many buffers, each with its spread.
#[derive(Clone, Debug)]
pub(crate) struct Swept {
    pub(crate) name: String,
    /// `None`: it has none, and its figures are for any number.
    pub(crate) buffers: Option<u16>,
    pub(crate) per_second: (f64, f64),
    pub(crate) p99_micros: (f64, f64),
}

/// Draws the picture into `dir`, if there are figures for it; as [`draw`](super::draw).
///
/// # Errors
///
/// That of the file that could not be written, with its path.
pub(crate) fn draw(swept: &[Swept], caption: &str, dir: &Path) -> io::Result<Option<PathBuf>> {
    write(dir, FILE_NAME, buffers(swept, caption))
}

fn buffers(swept: &[Swept], caption: &str) -> Drawn<Option<String>> {
    let panels = [
        (panel("throughput", swept, |one| one.per_second), "requests per second"),
        (panel("p99", swept, |one| one.p99_micros), "µs"),
    ];
    let is_drawn = panels.iter().all(|(panel, _)| panel.xs.len() > 1);
    let page = Page {
        title: "Throughput and latency, by the buffers of a ring",
        subtitle: "Requests per second, higher is better, and their 99th percentile, lower is better. Median; \
            the band is half the distance between the quartiles, each way.",
        has_bars: false,
        notes: [
            GUESTS,
            "wasmtime-wasi's sockets have no ring: they are the same for all.",
            caption,
        ],
        legend: listed(panels[0].0.curves.iter().map(|(name, _)| *name)),
        height: if is_drawn { CURVES_HEIGHT + GAP } else { 0 },
    };
    page.draw(|root, top| {
        for (place, (panel, y)) in panels.iter().enumerate() {
            let cell = cell(root, place, panels.len(), top, CURVES_HEIGHT);
            panel.draw(root, &cell, cell_width(panels.len()), ["buffers", y])?;
        }
        Ok(())
    })
}

fn panel<'a>(name: &str, swept: &'a [Swept], of: impl Fn(&Swept) -> (f64, f64)) -> Panel<'a> {
    let mut xs: Vec<_> = swept.iter().filter_map(|one| Some(one.buffers?.into())).collect();
    xs.sort_unstable();
    xs.dedup();
    let point = |one: &Swept, x: usize| {
        let (value, spread) = of(one);
        FIGURES.contains(&value).then(|| (x, value, bounded(spread)))
    };
    let curve = |name| {
        let mine = swept.iter().filter(|one| one.name == name);
        let mut points: Vec<_> = mine
            .flat_map(|one| match one.buffers {
                Some(buffers) => vec![point(one, buffers.into())],
                None => xs.iter().map(|x| point(one, *x)).collect(),
            })
            .flatten()
            .collect();
        points.sort_by_key(|(x, ..)| *x);
        (name, points)
    };
    let names = listed(swept.iter().map(|one| &*one.name));
    let mut curves: Vec<_> = names.into_iter().map(curve).collect();
    curves.retain(|(_, points)| !points.is_empty());
    if curves.is_empty() {
        xs.clear();
    }
    Panel { name: name.to_owned(), curves, xs }
}
