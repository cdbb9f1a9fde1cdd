//! What plots are made of: the page around them, axes, marks, text, ticks.
//!
//! Fonts are whatever the reader has, and differ by a third in width. So text is anchored where it
//! must not run over (names end where bars begin, values begin where bars end), and what has to
//! fit is measured as if set in a wide font.

use std::io;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{Pos, VPos};

pub(super) use plotters::style::text_anchor::HPos;

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(super) type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Axis, Axis>>;
pub(super) type Drawn<T = ()> = Result<T, DrawingAreaErrorKind<io::Error>>;

// Pixels; as wide as a README shows a picture.
pub(super) const WIDTH: i32 = 900;
const PADDING: i32 = 22;
pub(super) const BODY_WIDTH: i32 = WIDTH - 2 * PADDING;
pub(super) const GAP: i32 = 24;
const TEXT_LINE: i32 = 18;
const LEGEND_LINE: i32 = 22;
pub(super) const HEAD_ROOM: i32 = 30;
pub(super) const X_ROOM: i32 = 42;
pub(super) const Y_ROOM: i32 = 64;
pub(super) const BAR_HALF: i32 = 8;
/// For the value at a bar's end.
pub(super) const VALUE_ROOM: i32 = 74;

// Sizes of text, pixels.
const TITLE: i32 = 21;
const HEAD: i32 = 15;
pub(super) const TEXT: i32 = 13;
pub(super) const SMALL: i32 = 12;

pub(super) const PAPER: RGBColor = RGBColor(252, 252, 250);
pub(super) const INK: RGBColor = RGBColor(31, 35, 40);
const FAINT: RGBColor = RGBColor(89, 96, 105);
pub(super) const GRID: RGBColor = RGBColor(226, 228, 231);
const AXIS: RGBColor = RGBColor(140, 146, 153);

/// How an implementation looks in every plot. Marks distinguish what some eyes see in one colour.
#[derive(Clone, Copy)]
pub(super) struct Look {
    pub(super) color: RGBColor,
    pub(super) stroke: u32,
    mark: &'static [(i32, i32)],
    is_hollow: bool,
}

/// No corners.
const CIRCLE: &[(i32, i32)] = &[];
const SQUARE: &[(i32, i32)] = &[(-4, -4), (4, -4), (4, 4), (-4, 4)];
const TRIANGLE: &[(i32, i32)] = &[(0, -6), (5, 4), (-5, 4)];
const DIAMOND: &[(i32, i32)] = &[(0, -6), (6, 0), (0, 6), (-6, 0)];
const DASH: &[(i32, i32)] = &[(-5, -1), (5, -1), (5, 1), (-5, 1)];

const fn look(rgb: [u8; 3], stroke: u32, mark: &'static [(i32, i32)], is_hollow: bool) -> Look {
    Look { color: RGBColor(rgb[0], rgb[1], rgb[2]), stroke, mark, is_hollow }
}

/// In the order they are listed.
const IMPLEMENTATIONS: [(&str, Look); 8] = [
    ("stock 0.2", look([98, 105, 115], 2, SQUARE, false)),
    ("uring 0.2", look([204, 65, 0], 3, CIRCLE, false)),
    ("stock 0.3", look([160, 167, 176], 2, SQUARE, true)),
    ("uring 0.3", look([245, 150, 60], 3, CIRCLE, true)),
    ("std", look([74, 111, 165], 2, TRIANGLE, false)),
    ("tokio", look([72, 143, 137], 2, TRIANGLE, true)),
    ("tokio-uring", look([120, 180, 172], 2, DIAMOND, true)),
    ("floor", look([40, 44, 52], 1, DASH, false)),
];
const STRANGER: Look = look([150, 110, 130], 2, DASH, false);

pub(super) fn rank(name: &str) -> usize {
    IMPLEMENTATIONS.iter().position(|(known, _)| *known == name).unwrap_or(IMPLEMENTATIONS.len())
}

pub(super) fn look_of(name: &str) -> Look {
    IMPLEMENTATIONS.get(rank(name)).map_or(STRANGER, |(_, look)| *look)
}

/// What surrounds every plot.
pub(super) struct Page<'a> {
    pub(super) title: &'a str,
    pub(super) subtitle: &'a str,
    pub(super) legend: Vec<&'a str>,
    pub(super) has_bars: bool,
    pub(super) notes: [&'a str; 3],
    /// Of the body; none, no plot.
    pub(super) height: i32,
}

impl Page<'_> {
    /// The document; `body` gets the position of its top.
    pub(super) fn draw(self, body: impl FnOnce(&Area, i32) -> Drawn) -> Drawn<Option<String>> {
        if self.height <= 0 {
            return Ok(None);
        }
        let subtitle = wrapped(self.subtitle, TEXT);
        let notes: Vec<_> = self.notes.iter().flat_map(|note| wrapped(note, SMALL)).collect();
        let entry = self.legend.iter().map(|name| wide(name, TEXT)).max().unwrap_or(0) + 52;
        let per_line = (BODY_WIDTH / entry).max(1);
        let legend_top = PADDING + 36 + pixels(subtitle.len()) * TEXT_LINE;
        let legend_lines = (pixels(self.legend.len()) + per_line - 1) / per_line;
        let top = legend_top + legend_lines * LEGEND_LINE + 14;
        let notes_top = top + self.height + 22;
        let height = notes_top + pixels(notes.len()) * TEXT_LINE + PADDING - 10;
        let mut svg = String::new();
        {
            let size = (WIDTH.unsigned_abs(), height.unsigned_abs());
            let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            bold(&root, self.title, (PADDING, PADDING + 8), TITLE)?;
            for (line, subtitle) in (0..).zip(&subtitle) {
                let at = (PADDING, PADDING + 36 + line * TEXT_LINE);
                text(&root, subtitle, at, TEXT, FAINT, HPos::Left)?;
            }
            for (place, name) in (0..).zip(&self.legend) {
                let x = PADDING + place % per_line * entry;
                let y = legend_top + place / per_line * LEGEND_LINE + 8;
                let look = look_of(name);
                if self.has_bars {
                    let sample = [(x, y - BAR_HALF + 1), (x + 28, y + BAR_HALF - 1)];
                    root.draw(&Rectangle::new(sample, look.color.filled()))?;
                } else {
                    let sample = [(x, y), (x + 28, y)];
                    root.draw(&PathElement::new(sample, look.color.stroke_width(look.stroke)))?;
                    mark(&root, (x + 14, y), look)?;
                }
                text(&root, &fit(name, BODY_WIDTH - 36, TEXT), (x + 36, y), TEXT, INK, HPos::Left)?;
            }
            body(&root, top)?;
            for (line, note) in (0..).zip(&notes) {
                let at = (PADDING, notes_top + line * TEXT_LINE);
                text(&root, note, at, SMALL, FAINT, HPos::Left)?;
            }
            root.present()?;
        }
        // Opaque, so that dark pages do not swallow the text.
        let RGBColor(r, g, b) = PAPER;
        let paper =
            format!(r#"<rect width="100%" height="100%" rx="10" fill="rgb({r},{g},{b})"/>"#);
        Ok(Some(svg.replacen('>', &format!(">\n{paper}"), 1)))
    }
}

/// An axis that labels exactly its ticks.
pub(super) struct Axis {
    pub(super) range: Range<f64>,
    ticks: Vec<f64>,
    pub(super) title: &'static str,
    /// For the labels and the title, pixels.
    room: i32,
    label: fn(f64) -> String,
    pub(super) is_log: bool,
}

impl Axis {
    pub(super) fn new(
        range: Range<f64>,
        ticks: Vec<f64>,
        title: &'static str,
        room: i32,
        label: fn(f64) -> String,
    ) -> Self {
        Self { range, ticks, title, room, label, is_log: false }
    }

    pub(super) fn log(self) -> Self {
        Self { is_log: true, ..self }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let Range { start, end } = self.range;
        let scale = |value: f64| if self.is_log { value.ln() } else { value };
        let part = (scale(value.clamp(start, end)) - scale(start)) / (scale(end) - scale(start));
        #[expect(clippy::cast_possible_truncation, reason = "a part of a span of pixels")]
        let offset = (part * f64::from(to - from)).round() as i32;
        from + offset
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.label)(*value)
    }
}

/// A panel's name, axes and grid; a y axis without ticks is that of bars.
pub(super) fn axes<'a>(
    cell: &Area<'a>,
    [name, note]: [&str; 2],
    x: Axis,
    y: Axis,
) -> Drawn<Chart<'a>> {
    let name = fit(name, BODY_WIDTH / 3, HEAD);
    bold(cell, &name, (0, 8), HEAD)?;
    text(cell, note, (wide(&name, HEAD) + 14, 9), SMALL, FAINT, HPos::Left)?;
    let (titles, is_bars) = ([x.title, y.title], y.ticks.is_empty());
    let mut chart = ChartBuilder::on(cell)
        .margin_top(HEAD_ROOM)
        .margin_right(if is_bars { VALUE_ROOM } else { 0 })
        .x_label_area_size(x.room)
        .y_label_area_size(y.room)
        .build_cartesian_2d(x, y)?;
    let mut mesh = chart.configure_mesh();
    if is_bars {
        mesh.disable_y_axis();
    }
    mesh.set_all_tick_mark_size(5)
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(AXIS)
        .label_style(style(SMALL, FontStyle::Normal, INK))
        .axis_desc_style(style(SMALL, FontStyle::Normal, FAINT))
        .x_desc(titles[0])
        .y_desc(titles[1])
        .draw()?;
    Ok(chart)
}

pub(super) fn cell_width(columns: usize) -> i32 {
    if columns > 1 { (BODY_WIDTH - GAP) / 2 } else { BODY_WIDTH }
}

pub(super) fn cell<'a>(
    root: &Area<'a>,
    column: usize,
    columns: usize,
    top: i32,
    height: i32,
) -> Area<'a> {
    let width = cell_width(columns);
    root.clone().shrink((PADDING + pixels(column) * (width + GAP), top), (width, height))
}

pub(super) fn mark(
    root: &Area,
    (x, y): (i32, i32),
    Look { color, mark, is_hollow, .. }: Look,
) -> Drawn {
    let fill = if is_hollow { PAPER } else { color };
    if mark == CIRCLE {
        root.draw(&Circle::new((x, y), 5, color.filled()))?;
        return root.draw(&Circle::new((x, y), 3, fill.filled()));
    }
    // Around, and on to the second corner, so that the first is as sharp as the others.
    let corners = mark.iter().cycle().take(mark.len() + 2).map(|(dx, dy)| (x + dx, y + dy));
    let corners: Vec<_> = corners.collect();
    root.draw(&Polygon::new(corners.clone(), fill))?;
    root.draw(&PathElement::new(corners, color.stroke_width(2)))
}

/// The size is in pixels; plotters' SVG backend divides what it is given by 1.24.
fn style<'a>(size: i32, weight: FontStyle, color: RGBColor) -> TextStyle<'a> {
    ("sans-serif", f64::from(size) * 1.24, weight).into_font().color(&color)
}

pub(super) fn text(
    area: &Area,
    text: &str,
    at: (i32, i32),
    size: i32,
    color: RGBColor,
    to: HPos,
) -> Drawn {
    let style = style(size, FontStyle::Normal, color).pos(Pos::new(to, VPos::Center));
    area.draw_text(&text.replace(char::is_control, " "), &style, at)
}

pub(super) fn bold(area: &Area, text: &str, at: (i32, i32), size: i32) -> Drawn {
    let style = style(size, FontStyle::Bold, INK).pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(&text.replace(char::is_control, " "), &style, at)
}

/// How wide a name gets in a wide font, pixels.
pub(super) fn wide(name: &str, size: i32) -> i32 {
    pixels(name.chars().count()) * size * 66 / 100
}

/// As much of `name` as has room.
pub(super) fn fit(name: &str, room: i32, size: i32) -> String {
    if wide(name, size) <= room {
        return name.to_owned();
    }
    let most = usize::try_from(room * 100 / (size * 66)).unwrap_or(0);
    name.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// Lines as wide as the body. Prose is narrower than names are.
fn wrapped(prose: &str, size: i32) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in prose.split_whitespace() {
        match lines.last_mut() {
            Some(line) if wide(line, size) + wide(word, size) < BODY_WIDTH * 115 / 100 => {
                *line += " ";
                *line += word;
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// At most `count` steps from 0 to `most`, of 1, 2 or 5 times a power of ten.
pub(super) fn linear_ticks(most: f64, count: i32) -> Vec<f64> {
    let least = most / f64::from(count.max(1));
    let decade = 10_f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|digit| digit * decade);
    let step = steps.into_iter().find(|step| *step >= least).unwrap_or(10.0 * decade);
    (0..=count).map(|n| f64::from(n) * step).filter(|tick| *tick <= most).collect()
}

/// At most `count` ticks, at 1, 2 and 5 times powers of ten if those are not too many.
pub(super) fn log_ticks(low: f64, high: f64, count: i32) -> Vec<f64> {
    let mut ticks = Vec::new();
    let choices: [(&[f64], i32); 4] =
        [(&[1.0, 2.0, 5.0], 1), (&[1.0, 3.0], 1), (&[1.0], 1), (&[1.0], 6)];
    for (digits, stride) in choices {
        let decades =
            (-30..30).filter(|decade| decade % stride == 0).map(|decade| 10_f64.powi(decade));
        ticks = decades.flat_map(|decade| digits.iter().map(move |digit| digit * decade)).collect();
        ticks.retain(|tick| (low..=high).contains(tick));
        if pixels(ticks.len()) <= count {
            break;
        }
    }
    ticks
}

/// In at most three digits: 212 k.
pub(super) fn scaled(value: f64) -> String {
    let units = [(1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")];
    let (unit, prefix) = units.into_iter().find(|(unit, _)| value >= *unit).unwrap_or((1.0, ""));
    if value >= 1e15 || (value > 0.0 && value < 0.1) {
        return format!("{value:.0e}");
    }
    let digits = usize::from(value / unit < 9.95 && value > 0.0);
    format!("{:.digits$}{prefix}", value / unit)
}

/// Of a tick, without needless digits.
pub(super) fn short(value: f64) -> String {
    if value >= 1e5 || (value > 0.0 && value < 1e-4) {
        return format!("{value:.0e}");
    }
    format!("{value:.5}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

pub(super) fn counted(guests: usize) -> String {
    match guests {
        1 => "1 guest".to_owned(),
        ..100_000 => format!("{guests} guests"),
        _ => scaled(float(guests)) + " guests",
    }
}

/// Each name once: implementations as they are ranked, others as they come.
pub(super) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut listed = Vec::new();
    for name in names {
        if !listed.contains(&name) {
            listed.push(name);
        }
    }
    listed.sort_by_key(|name| rank(name));
    listed
}

pub(super) fn pixels(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

pub(super) fn float(count: usize) -> f64 {
    u32::try_from(count).unwrap_or(u32::MAX).into()
}
