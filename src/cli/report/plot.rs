//! Plots of a bench's figures, as SVG.
//!
//! Here is what the plots show; [`page`] has what they are made of.

pub(crate) mod buffers;
mod page;
mod services;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use plotters::prelude::*;

use crate::benches::{BENCHES, BYTES_MAX, Bench, Operation};

pub(super) use services::{Panel as ServicePanel, draw as draw_services};

use page::{
    Area, Axis, BAR_HALF, Drawn, GAP, GRID, HEAD_ROOM, HPos, INK, Look, PAPER, Page, SMALL, TEXT,
    VALUE_ROOM, X_ROOM, Y_ROOM, axes, bold, cell, cell_width, counted, fit, float, linear_ticks,
    listed, log_ticks, look_of, mark, pixels, rank, scaled, short, text, wide,
};

/// One implementation's figures in one bench.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub(crate) name: String,
    /// CPU time per operation, µs, median.
    pub(crate) micros: f64,
    /// Half the distance between the quartiles of `micros`, relative to the median.
    pub(crate) spread: f64,
    /// Operations per second of wall time.
    pub(crate) per_second: f64,
    /// Of a guest on the ring: how many times as fast as on stock sockets it was, round by round.
    /// Median and spread.
    pub(crate) times_stock: Option<(f64, f64)>,
}

/// One bench at one number of guests.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) bench: String,
    pub(crate) guests: usize,
    pub(crate) implementations: Vec<Bar>,
}

// Pixels.
const CURVES_HEIGHT: i32 = 284;
const BAR_LINE: i32 = 22;
/// Above the first bar of a bench in the overview.
const BENCH_GAP: i32 = 8;
/// For the name before a bar: in the overview, and at most elsewhere.
const OVERVIEW_NAME_ROOM: i32 = 220;
const NAME_ROOM_MAX: i32 = 150;

/// Most guests of a panel of sockets.
const SOCKETS_GUESTS_MAX: usize = 64;
const PAIRS: [(&str, &str); 2] = [("stock 0.2", "uring 0.2"), ("stock 0.3", "uring 0.3")];
/// Numbers of guests, and sizes of batches, that make a line.
const GUESTS_MIN: usize = 3;
const SIZES_MIN: usize = 2;
/// A panel whose figures differ by more than this has a logarithmic y axis.
const LINEAR_MAX: f64 = 8.0;
/// Groups of the overview that make one column.
const COLUMN_MAX: usize = 12;
/// What is not in here was not measured: it is no number, zero or infinite.
const FIGURES: Range<f64> = 1e-9..1e15;
const GUESTS: &str = "stock, uring: WebAssembly guests of WASI 0.2 or 0.3, on wasmtime-wasi's \
    sockets or on the ring.";
const NATIVES: &str = "std, tokio, tokio-uring: native programs. floor: the bare ring.";
/// No implementation can be better than it; it shall not set the scale.
const FLOOR: &str = "floor";
/// How much longer than the longest other bar the floor's is drawn.
const FLOOR_MAX: f64 = 1.2;

/// What can be drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Picture {
    /// Sockets per second.
    Sockets,
    /// Cost against the number of guests.
    Guests,
    /// Cost against the size of a batch.
    Batch,
    /// How many times as fast as stock the ring is.
    Overview,
}

impl Picture {
    pub(crate) const ALL: [Self; 4] = [Self::Sockets, Self::Guests, Self::Batch, Self::Overview];

    /// Those that need no more than two numbers of guests.
    pub(crate) const OF_FEW_GUESTS: [Self; 3] = [Self::Sockets, Self::Batch, Self::Overview];

    fn file_name(self) -> &'static str {
        match self {
            Self::Sockets => "sockets.svg",
            Self::Guests => "guests.svg",
            Self::Batch => "batch.svg",
            Self::Overview => "overview.svg",
        }
    }

    fn draw(self, rows: &[Row], caption: &str) -> Drawn<Option<String>> {
        match self {
            Self::Sockets => sockets(rows, caption),
            Self::Guests => guests(rows, caption),
            Self::Batch => batch(rows, caption),
            Self::Overview => overview(rows, caption),
        }
    }
}

/// Draws into `dir` those of the pictures that `rows` have the figures for; `caption` says where they
/// were measured. Returns the paths of the files it wrote. The same input gives the same bytes.
///
/// # Errors
///
/// That of the file that could not be written, with its path.
pub(crate) fn draw(
    pictures: &[Picture],
    rows: &[Row],
    caption: &str,
    dir: &Path,
) -> io::Result<Vec<PathBuf>> {
    let drawn = |picture: &Picture| {
        write(dir, picture.file_name(), picture.draw(rows, caption)).transpose()
    };
    pictures.iter().filter_map(drawn).collect()
}

/// Writes a picture, if there is one, and answers where.
fn write(dir: &Path, name: &str, svg: Drawn<Option<String>>) -> io::Result<Option<PathBuf>> {
    let path = dir.join(name);
    let at = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let Some(svg) = svg.map_err(io::Error::other).map_err(at)? else { return Ok(None) };
    fs::create_dir_all(dir).and_then(|()| fs::write(&path, svg)).map_err(at)?;
    Ok(Some(path))
}

/// A horizontal bar, with what stands left and right of it.
struct Line<'a> {
    bench: &'a str,
    name: String,
    value: f64,
    spread: f64,
    shown: String,
    look: Look,
}

/// Sockets per second: a panel per bench, since their scales differ tenfold.
fn sockets(rows: &[Row], caption: &str) -> Drawn<Option<String>> {
    let mut panels = Vec::new();
    let benches = BENCHES.iter().filter(|bench| bench.sockets > 0);
    for Bench { name: bench, what, sockets, .. } in benches {
        let has_figure = |bar: &&Bar| FIGURES.contains(&bar.per_second);
        let rows =
            rows.iter().filter(|row| row.bench == *bench && row.guests <= SOCKETS_GUESTS_MAX);
        let rows = rows.filter(|row| row.implementations.iter().any(|bar| has_figure(&bar)));
        let Some(row) = rows.max_by_key(|row| row.guests) else { continue };
        let mut bars: Vec<_> = row.implementations.iter().filter(has_figure).collect();
        bars.sort_by_key(|bar| rank(&bar.name));
        let line = |bar: &&Bar| {
            let value = bar.per_second * f64::from(*sockets);
            let (name, shown) = (bar.name.clone(), format!("{}/s", scaled(value)));
            Line { bench: "", name, value, spread: 0.0, shown, look: look_of(&bar.name) }
        };
        let what = format!("{what} · {}", counted(row.guests));
        let lines = bars.iter().map(line).collect();
        panels.push(BarPanel { name: bench, what, axis: "sockets per second", lines });
    }
    let names = listed(panels.iter().flat_map(|panel| &panel.lines).map(|line| &*line.name));
    let notes = [GUESTS, natives(&names), caption];
    draw_panels(
        "UDP sockets created per second, by backend",
        "Per second of wall time; longer is better. Each panel has its own scale.",
        notes,
        &panels,
    )
}

/// Panels of bars, each with a scale of its own.
struct BarPanel<'a> {
    name: &'a str,
    what: String,
    axis: &'static str,
    lines: Vec<Line<'a>>,
}

fn draw_panels(
    title: &str,
    subtitle: &str,
    notes: [&str; 3],
    panels: &[BarPanel<'_>],
) -> Drawn<Option<String>> {
    let names = panels.iter().flat_map(|panel| &panel.lines).map(|line| &*line.name);
    let room = names.map(|name| wide(name, TEXT)).max().unwrap_or(0).min(NAME_ROOM_MAX) + 8;
    let columns = panels.len().clamp(1, 2);
    let heights = panels.chunks(columns).map(|panels| {
        panels.iter().map(|panel| bars_height(&panel.lines)).max().unwrap_or(0) + GAP
    });
    let height = heights.clone().sum();
    let page = Page { title, subtitle, legend: Vec::new(), has_bars: true, notes, height };
    page.draw(|root, mut top| {
        for (panels, height) in panels.chunks(columns).zip(heights) {
            for (column, BarPanel { name, what, axis, lines }) in panels.iter().enumerate() {
                let cell = cell(root, column, columns, top, bars_height(lines));
                let most = scale_end(lines);
                let x = Axis::new(0.0..most, linear_ticks(most, 4), axis, X_ROOM, scaled);
                bars(root, &cell, [name, what], lines, x, room)?;
            }
            top += height;
        }
        Ok(())
    })
}

/// Where the axis of sockets ends; a floor that would dwarf all others is cut off.
fn scale_end(lines: &[Line]) -> f64 {
    let (floor, others): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.name == FLOOR);
    let most = |lines: Vec<&Line>| lines.iter().map(|line| line.value).fold(0.0, f64::max);
    let (floor, others) = (most(floor), most(others));
    if others > 0.0 { floor.min(others * FLOOR_MAX).max(others) } else { floor }
}

/// How many times as fast as stock the ring is, for each row and version of WASI that has both.
fn overview(rows: &[Row], caption: &str) -> Drawn<Option<String>> {
    let mut groups: Vec<(&Row, Vec<Line>)> = Vec::new();
    for row in rows {
        let line = |ring: &Bar| {
            let (value, spread) = ring.times_stock?;
            FIGURES.contains(&value).then(|| Line {
                bench: "",
                name: String::new(),
                value,
                spread: bounded(spread),
                shown: if (0.1..10.0).contains(&value) {
                    format!("{value:.2}×")
                } else {
                    scaled(value) + "×"
                },
                look: look_of(&ring.name),
            })
        };
        groups.push((row, row.implementations.iter().filter_map(line).collect()));
    }
    groups.retain(|(_, lines)| !lines.is_empty());
    let benches = listed(rows.iter().map(|row| &*row.bench));
    let place = |row: &Row| benches.iter().position(|bench| *bench == row.bench);
    groups.sort_by_key(|(row, _)| (place(row), row.guests));
    let columns = if groups.len() > COLUMN_MAX { 2 } else { 1 };
    let mut halves = Vec::new();
    let mut half = groups.len().div_ceil(columns);
    // A bench's groups stay together.
    while half > 0 && half < groups.len() && groups[half - 1].0.bench == groups[half].0.bench {
        half += 1;
    }
    let (left, right) = groups.split_at_mut(half);
    for half in [left, right].into_iter().filter(|half| !half.is_empty()) {
        let mut above = None;
        for (row, lines) in &mut *half {
            lines[0].name = counted(row.guests);
            if above.replace(&row.bench) != Some(&row.bench) {
                lines[0].bench = &row.bench;
            }
        }
        halves.push(half.iter_mut().flat_map(|(_, lines)| lines.drain(..)).collect::<Vec<_>>());
    }
    let columns = halves.len();
    let lines = || halves.iter().flatten();
    let low = lines().map(|line| line.value / (1.0 + line.spread)).fold(0.85, f64::min);
    let high = lines().map(|line| line.value * (1.0 + line.spread)).fold(2.1, f64::max);
    let has = |look: Look| lines().any(|line| line.look.color == look.color);
    let page = Page {
        title: "How many times as fast as stock sockets the ring is",
        subtitle: "CPU time per operation, stock / uring: right of 1× the ring is the cheaper. \
            Medians of the rounds' ratios; whiskers: their spread.",
        has_bars: true,
        legend: PAIRS.into_iter().map(|(_, ring)| ring).filter(|ring| has(look_of(ring))).collect(),
        notes: [GUESTS, "", caption],
        height: halves.iter().map(|lines| bars_height(lines)).max().unwrap_or(0) - HEAD_ROOM,
    };
    page.draw(|root, top| {
        for (column, lines) in halves.iter().enumerate() {
            let cell = cell(root, column, columns, top - HEAD_ROOM, bars_height(lines));
            let room = cell_width(columns) - OVERVIEW_NAME_ROOM - VALUE_ROOM;
            let ticks = log_ticks(low, high, room / 34);
            let label = |ratio| short(ratio) + "×";
            let x = Axis::new(low..high, ticks, "times as fast, logarithmic", X_ROOM, label).log();
            bars(root, &cell, ["", ""], lines, x, OVERVIEW_NAME_ROOM)?;
        }
        Ok(())
    })
}

fn bars_height(lines: &[Line]) -> i32 {
    HEAD_ROOM + X_ROOM + lines.iter().map(line_height).sum::<i32>()
}

fn line_height(line: &Line) -> i32 {
    BAR_LINE + if line.bench.is_empty() { 0 } else { BENCH_GAP }
}

/// A panel of bars, which begin at 0 or, on a logarithmic axis, at 1.
fn bars(root: &Area, cell: &Area, head: [&str; 2], lines: &[Line], x: Axis, names: i32) -> Drawn {
    let (origin, most) = (if x.is_log { 1.0 } else { 0.0 }, x.range.end);
    let height = f64::from(bars_height(lines) - HEAD_ROOM - X_ROOM);
    let chart =
        axes(cell, head, x, Axis::new(0.0..height, Vec::new(), "", names, |_| String::new()))?;
    let (left, _) = cell.get_base_pixel();
    let (start, mut top) = chart.backend_coord(&(origin, height));
    let (_, bottom) = chart.backend_coord(&(origin, 0.0));
    let (edge, _) = chart.backend_coord(&(0.0, 0.0));
    let base = [(start, top), (start, bottom)];
    for line in lines {
        top += line_height(line);
        let y = top - BAR_LINE / 2;
        if !line.bench.is_empty() {
            let right = left + i32::try_from(cell.dim_in_pixel().0).unwrap_or(0);
            let above = top - line_height(line) + BENCH_GAP / 2;
            let between = [(left, above), (right, above)];
            root.draw(&PathElement::new(between, GRID.stroke_width(1)))?;
            bold(root, &fit(line.bench, names - 88, TEXT), (left, y), TEXT)?;
        }
        let at = |value: f64| chart.backend_coord(&(value, 0.0)).0;
        let to = at(line.value);
        let (from, to) = (start.min(to), start.max(to));
        let corners = [(from, y - BAR_HALF), (to.max(from + 1), y + BAR_HALF)];
        root.draw(&Rectangle::new(corners, line.look.color.filled()))?;
        let end = at(line.value * (1.0 + line.spread)).max(start);
        if line.value > most {
            let slit = [(to - 14, y + BAR_HALF), (to - 6, y - BAR_HALF)];
            root.draw(&PathElement::new(slit, PAPER.stroke_width(4)))?;
        }
        if line.spread > 0.0 {
            let whisker = [(at(line.value / (1.0 + line.spread)), y), (end, y)];
            root.draw(&PathElement::new(whisker, INK.stroke_width(1)))?;
        }
        text(root, &fit(&line.name, names - 8, TEXT), (edge - 8, y), TEXT, INK, HPos::Right)?;
        text(root, &line.shown, (end + 6, y), TEXT, INK, HPos::Left)?;
    }
    root.draw(&PathElement::new(base, INK.stroke_width(1)))
}

/// A implementation's guests or datagrams, CPU time and relative spread, in ascending order.
type Curve<'a> = (&'a str, Vec<(usize, f64, f64)>);

/// Curves over one bench, or over one number of guests.
struct Panel<'a> {
    name: String,
    curves: Vec<Curve<'a>>,
    xs: Vec<usize>,
}

impl<'a> Panel<'a> {
    /// Of rows, where on the x axis they are, and how many operations their figures are for.
    fn new(name: String, rows: &[(&'a Row, usize, f64)]) -> Self {
        let mut curves = Vec::new();
        let bars = rows.iter().flat_map(|(row, ..)| &row.implementations);
        for implementation in listed(bars.map(|bar| &*bar.name)) {
            let of_row = |(row, x, operations): &(&'a Row, usize, f64)| {
                let bar = row.implementations.iter().find(|bar| bar.name == implementation)?;
                let micros = bar.micros / operations;
                FIGURES.contains(&micros).then(|| (*x, micros, bounded(bar.spread)))
            };
            let mut points: Vec<_> = rows.iter().filter_map(of_row).collect();
            points.sort_by_key(|(x, ..)| *x);
            points.dedup_by_key(|(x, ..)| *x);
            if !points.is_empty() {
                curves.push((implementation, points));
            }
        }
        let mut xs: Vec<_> =
            curves.iter().flat_map(|(_, points)| points).map(|(x, ..)| *x).collect();
        xs.sort_unstable();
        xs.dedup();
        Self { name, curves, xs }
    }
}

/// CPU time against the number of guests, bench by bench.
fn guests(rows: &[Row], caption: &str) -> Drawn<Option<String>> {
    let mut panels = Vec::new();
    for bench in listed(rows.iter().map(|row| &*row.bench)) {
        let rows = rows.iter().filter(|row| row.bench == bench && row.guests > 0);
        let rows: Vec<_> = rows.map(|row| (row, row.guests, 1.0)).collect();
        panels.push(Panel::new(bench.to_owned(), &rows));
    }
    panels.retain(|panel| panel.xs.len() >= GUESTS_MIN);
    let title = "What an operation costs, by the number of guests";
    curves(title, &panels, ["guests", "CPU µs per operation"], caption)
}

/// CPU time per datagram against the datagrams of a batch.
fn batch(rows: &[Row], caption: &str) -> Drawn<Option<String>> {
    let sized = rows.iter().filter_map(|row| {
        let bench = Bench::named(&row.bench)?;
        let is_sized = bench.operation == Operation::Batch && bench.bytes == BYTES_MAX;
        is_sized.then(|| (row, bench.datagrams, float(bench.datagrams)))
    });
    let mut rows: Vec<_> = sized.collect();
    rows.sort_by_key(|(row, ..)| row.guests);
    let mut panels = Vec::new();
    for rows in rows.chunk_by(|(a, ..), (b, ..)| a.guests == b.guests) {
        panels.push(Panel::new(counted(rows[0].0.guests), rows));
    }
    panels.retain(|panel| panel.xs.len() >= SIZES_MIN);
    let title = "What a datagram costs, by the size of the batch";
    curves(title, &panels, ["datagrams per batch", "CPU µs per datagram"], caption)
}

fn curves(
    title: &str,
    panels: &[Panel],
    axes: [&'static str; 2],
    caption: &str,
) -> Drawn<Option<String>> {
    let columns = panels.len().clamp(1, 2);
    let curves = panels.iter().flat_map(|panel| &panel.curves);
    let names = listed(curves.map(|(name, _)| *name));
    let page = Page {
        title,
        subtitle: "Median; the band is half the distance between the quartiles, each way. \
            Lower is better.",
        has_bars: false,
        notes: [GUESTS, natives(&names), caption],
        legend: names,
        height: pixels(panels.len().div_ceil(columns)) * (CURVES_HEIGHT + GAP),
    };
    page.draw(|root, top| {
        for (place, panel) in panels.iter().enumerate() {
            let top = top + pixels(place / columns) * (CURVES_HEIGHT + GAP);
            let cell = cell(root, place % columns, columns, top, CURVES_HEIGHT);
            panel.draw(root, &cell, cell_width(columns), axes)?;
        }
        Ok(())
    })
}

impl Panel<'_> {
    fn draw(&self, root: &Area, cell: &Area, width: i32, [x, y]: [&'static str; 2]) -> Drawn {
        let (left, right) = (float(self.xs[0]), float(self.xs[self.xs.len() - 1]));
        let margin = (right / left).powf(0.04);
        let (left, right) = (left / margin, right * margin);
        let per_pixel = (right / left).ln() / f64::from(width - Y_ROOM);
        let mut ticks: Vec<f64> = Vec::new();
        for tick in self.xs.iter().map(|x| float(*x)) {
            let apart = f64::from(wide(&short(tick), SMALL) + 6) * per_pixel;
            if ticks.last().is_none_or(|last| (tick / last).ln() >= apart) {
                ticks.push(tick);
            }
        }
        let x = Axis::new(left..right, ticks, x, X_ROOM, short).log();

        let points = || self.curves.iter().flat_map(|(_, points)| points);
        let least = points().map(|(_, micros, _)| *micros).fold(f64::INFINITY, f64::min);
        let most = points().map(|(_, micros, _)| *micros).fold(0.0, f64::max);
        let high = points().map(|(_, micros, spread)| micros * (1.0 + spread)).fold(most, f64::max);
        // A wild spread is cut off, lest it flatten the rest.
        let high = high.min(most * 1.5);
        let is_log = most / least > LINEAR_MAX;
        let y = if is_log {
            let (low, high) = (least / 1.3, high * 1.2);
            Axis::new(low..high, log_ticks(low, high, 8), y, Y_ROOM, short).log()
        } else {
            let high = high * 1.05;
            Axis::new(0.0..high, linear_ticks(high, 6), y, Y_ROOM, short)
        };
        let chart = axes(cell, [&self.name, if is_log { "logarithmic scale" } else { "" }], x, y)?;
        let at = |x: &usize, micros: f64| chart.backend_coord(&(float(*x), micros));
        // The ring's come last, hence on top.
        let (ring, others): (Vec<_>, Vec<_>) =
            self.curves.iter().rev().partition(|(name, _)| name.starts_with("uring"));
        for (name, points) in others.into_iter().chain(ring) {
            let look = look_of(name);
            let above = points.iter().map(|(x, micros, spread)| at(x, micros * (1.0 + spread)));
            let below = points.iter().map(|(x, micros, spread)| at(x, micros * (1.0 - spread)));
            let band: Vec<_> = above.chain(below.rev()).collect();
            if points.len() == 1 {
                root.draw(&PathElement::new(band, look.color.stroke_width(1)))?;
            } else {
                root.draw(&Polygon::new(band, look.color.mix(0.14)))?;
            }
            let path: Vec<_> = points.iter().map(|(x, micros, _)| at(x, *micros)).collect();
            root.draw(&PathElement::new(path.clone(), look.color.stroke_width(look.stroke)))?;
            for point in path {
                mark(root, point, look)?;
            }
        }
        Ok(())
    }
}

/// The note on native programs, if there are any.
fn natives(names: &[&str]) -> &'static str {
    let is_guest = |name: &&str| PAIRS.iter().any(|(stock, ring)| [stock, ring].contains(&name));
    if names.iter().all(is_guest) { "" } else { NATIVES }
}

/// Within what can be drawn.
fn bounded(spread: f64) -> f64 {
    if spread.is_finite() { spread.clamp(0.0, 1.0) } else { 0.0 }
}
