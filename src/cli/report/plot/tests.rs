use std::path::Path;
use std::{fs, ops::Range};

use super::buffers::{self, Swept};
use super::page::{WIDTH, linear_ticks, log_ticks};
use super::{Bar, Picture, Row, draw};
use crate::measure::BENCHES;

const NAMES: [&str; 9] = [
    "stock 0.2",
    "uring 0.2",
    "stock 0.3",
    "uring 0.3",
    "std",
    "tokio",
    "tokio-uring",
    "floor",
    "<&\u{1}>",
];

/// All benches at 1, 16 and 64 guests, of implementations with these figures.
fn rows(names: &[&str], micros: f64, spread: f64) -> Vec<Row> {
    let bar = |name: &&str| Bar {
        name: (*name).to_owned(),
        micros,
        spread,
        per_second: 1e6 / micros,
        times_stock: name.starts_with("uring").then_some((micros, spread)),
    };
    let row = |bench: &str, guests| Row {
        bench: bench.to_owned(),
        guests,
        implementations: names.iter().map(bar).collect(),
    };
    let odd = ["tick", "batch_0"];
    let benches: Vec<_> = BENCHES.iter().map(|bench| bench.name).chain(odd).collect();
    benches.iter().flat_map(|bench| [64, 1, 16].map(|guests| row(bench, guests))).collect()
}

/// Draws into a directory of the test's own: the names and contents of what was written.
fn drawn(test: &str, rows: &[Row]) -> Vec<(String, String)> {
    let dir = std::env::temp_dir().join(format!("wasi-uring-plot-{}-{test}", std::process::id()));
    let paths = draw(&Picture::ALL, rows, "Linux <6.18> & \"friends\"", &dir).unwrap();
    let written = dir.read_dir().map_or(0, Iterator::count);
    assert_eq!(written, paths.len());
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let files = paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect();
    let _ = fs::remove_dir_all(&dir);
    files
}

/// The text elements of a document, which has to be well-formed.
fn texts(svg: &str) -> Vec<String> {
    let document = roxmltree::Document::parse(svg).unwrap();
    let texts = document.descendants().filter(|node| node.has_tag_name("text"));
    texts.map(|node| node.text().unwrap_or("").trim().to_owned()).collect()
}

fn names(files: &[(String, String)]) -> Vec<&str> {
    files.iter().map(|(name, _)| &**name).collect()
}

#[test]
fn every_plot_names_every_implementation() {
    let files = drawn("names", &rows(&NAMES, 5.0, 0.1));
    assert_eq!(names(&files), ["sockets.svg", "guests.svg", "batch.svg", "overview.svg"]);
    for (file, svg) in &files {
        let texts = texts(svg);
        for name in NAMES.map(|name| name.replace('\u{1}', " ")) {
            let is_shown = texts.contains(&name);
            assert!(
                is_shown || file == "overview.svg" && !name.starts_with("uring"),
                "{file}: {name}"
            );
        }
        assert!(texts.contains(&"Linux <6.18> & \"friends\"".to_owned()), "{file}: caption");
    }
}

#[test]
fn the_overview_has_every_benchs_whole_name_once() {
    let files = drawn("benches", &rows(&NAMES, 5.0, 0.1));
    let texts = texts(&files.last().unwrap().1);
    for bench in BENCHES {
        let shown = texts.iter().filter(|text| *text == bench.name).count();
        assert_eq!(shown, 1, "{} in {texts:?}", bench.name);
    }
}

#[test]
fn the_same_rows_draw_the_same_bytes() {
    let rows = rows(&NAMES, 5.0, 0.1);
    assert_eq!(drawn("once", &rows), drawn("again", &rows));
}

#[test]
fn no_figures_write_nothing() {
    assert!(drawn("empty", &[]).is_empty());
    assert!(drawn("none_measured", &rows(&[], 5.0, 0.1)).is_empty());
    for none in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0] {
        assert!(drawn("none", &rows(&NAMES, none, 0.1)).is_empty(), "{none}");
    }
}

#[test]
fn a_plot_is_drawn_only_of_its_own_data() {
    let mut rows = rows(&["std"], 5.0, 0.1);
    assert_eq!(names(&drawn("alone", &rows)), ["sockets.svg", "guests.svg", "batch.svg"]);
    rows.retain(|row| row.bench == "tick" && row.guests < 64);
    assert!(drawn("few", &rows).is_empty());
}

#[test]
fn odd_figures_are_drawn_within_the_picture() {
    for spread in [f64::NAN, f64::INFINITY, -1.0, 1e300, 0.0] {
        for micros in [1e-8, 1.0, 1e14] {
            let mut rows = rows(&NAMES, 5.0, 0.1);
            rows[0] = Row { implementations: vec![], ..rows[0].clone() };
            for row in &mut rows[2..] {
                let bar = Bar {
                    micros,
                    spread,
                    per_second: 1e6 / micros,
                    name: "uring 0.2".into(),
                    times_stock: Some((micros, spread)),
                };
                row.implementations.splice(1..6, [bar]);
                row.guests = row.guests.pow(4);
            }
            for (file, svg) in drawn("odd", &rows) {
                let document = roxmltree::Document::parse(&svg).unwrap();
                let ends = ["x", "x1", "x2", "y", "cx", "cy"].map(|name| {
                    let of =
                        document.descendants().filter_map(move |n| n.attribute(name)?.parse().ok());
                    of.fold(0.0..0.0, |r: Range<f64>, at: f64| r.start.min(at)..r.end.max(at))
                });
                let height: f64 =
                    document.root_element().attribute("height").unwrap().parse().unwrap();
                for Range { start, end } in ends {
                    assert!(
                        start >= 0.0 && end <= height.max(f64::from(WIDTH)),
                        "{file}: {start}..{end}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_pair_counts_two_sockets_and_a_batch_its_datagrams() {
    let rows = rows(&["uring 0.2"], 8.0, 0.0);
    let files = drawn("scale", &rows);
    let sockets = texts(&files[0].1);
    let shown: Vec<_> = sockets.iter().filter(|text| text.ends_with("/s")).collect();
    let one = "125 k/s";
    assert_eq!(shown, [one, one, one, "250 k/s", one], "create, bind, bind6, pair, dns");
    assert!(texts(&files[2].1).contains(&"0.5".to_owned()), "8 µs over 16 datagrams");
}

#[test]
fn sockets_are_those_of_the_most_guests_up_to_64_that_have_figures() {
    let mut rows = rows(&["std"], 5.0, 0.1);
    rows.retain(|row| row.bench == "bind");
    rows[0].implementations[0].per_second = f64::NAN; // 64 guests
    rows.push(Row { guests: 65, ..rows[1].clone() });
    let shown = |rows: &[Row]| texts(&drawn("most", rows)[0].1).join(" ");
    assert!(shown(&rows).contains("· 16 guests"));
    rows[0].implementations[0].per_second = 1e5;
    assert!(shown(&rows).contains("· 64 guests"));
}

#[test]
fn a_floor_out_of_reach_does_not_set_the_scale() {
    let mut rows = rows(&["uring 0.2", "floor"], 5.0, 0.1);
    rows.retain(|row| row.bench == "create" && row.guests == 1);
    rows[0].implementations[1].per_second *= 100.0;
    let svg = &drawn("floor", &rows)[0].1;
    let document = roxmltree::Document::parse(svg).unwrap();
    let width = |fill| {
        let bar = document.descendants().find(|node| node.attribute("fill") == Some(fill)).unwrap();
        bar.attribute("width").unwrap().parse::<f64>().unwrap()
    };
    let ratio = width("#282C34") / width("#CC4100");
    assert!((1.1..1.3).contains(&ratio), "{ratio}");
}

#[test]
fn a_failure_names_the_file() {
    let error =
        draw(&Picture::ALL, &rows(&NAMES, 5.0, 0.1), "", Path::new("/proc/version")).unwrap_err();
    assert!(error.to_string().contains("/proc/version/sockets.svg"), "{error}");
}

#[test]
fn ticks_are_few_and_within() {
    for most in [1e-9, 0.3, 1.0, 7.0, 99.0, 1e15] {
        let ticks = linear_ticks(most, 6);
        assert!(
            (2..=7).contains(&ticks.len()) && ticks.iter().all(|tick| *tick <= most),
            "{ticks:?}"
        );
        let ticks = log_ticks(1e-9, most, 6);
        assert!(ticks.len() <= 6 && ticks.iter().all(|tick| *tick <= most), "{ticks:?}");
    }
}

#[test]
fn buffers_are_drawn_where_there_are_several_numbers_of_them() {
    let swept = |name: &str, buffers, per_second| Swept {
        name: name.to_owned(),
        buffers,
        per_second: (per_second, 0.1),
        p99_micros: (5e3, f64::NAN),
    };
    let mut all = vec![swept("stock 0.2", None, 7e4), swept("uring 0.2", Some(16), 6e4)];
    let dir = std::env::temp_dir().join(format!("wasi-uring-plot-{}-buffers", std::process::id()));
    assert!(buffers::draw(&all, "", &dir).unwrap().is_none(), "a line needs two points");
    all.push(swept("uring 0.2", Some(1024), 8e4));
    let path = buffers::draw(&all, "here", &dir).unwrap().unwrap();
    let texts = texts(&fs::read_to_string(path).unwrap());
    for text in ["stock 0.2", "uring 0.2", "throughput", "p99", "16", "1024", "here"] {
        assert!(texts.contains(&text.to_owned()), "{text} in {texts:?}");
    }
    for unknown in [f64::NAN, f64::INFINITY, 0.0] {
        let none = all.iter().map(|one| Swept { per_second: (unknown, 0.0), ..one.clone() });
        assert!(buffers::draw(&none.collect::<Vec<_>>(), "", &dir).unwrap().is_none());
    }
    let _ = fs::remove_dir_all(&dir);
}
