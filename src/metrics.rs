//! Feature `metrics`: the rings' counters for the facade of that name, for whichever exporter the host has
//! installed. Nothing is counted twice or on the way: they are set when the host asks, which is before it
//! is scraped.

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

use crate::stats::Stats;
use crate::uring::Uring;

/// What a reason's name is in the label, if there are several, and where its value is.
type Value = (&'static str, fn(&Stats) -> u64);

/// A metric and where its value is.
struct Metric {
    name: &'static str,
    kind: Kind,
    description: &'static str,
    /// By the value of the label `reason`, which a metric of one value does not have.
    values: &'static [Value],
}

#[derive(PartialEq, Eq)]
enum Kind {
    /// Only grows.
    Total,
    Now,
}

const fn total(name: &'static str, description: &'static str, values: &'static [Value]) -> Metric {
    Metric { name, kind: Kind::Total, description, values }
}

const fn now(name: &'static str, description: &'static str, values: &'static [Value]) -> Metric {
    Metric { name, kind: Kind::Now, description, values }
}

/// All. `Uring::record_metrics` has the list for hosts.
const METRICS: [Metric; 22] = [
    now("wasi_uring_rings", "rings that have been built", &[("", |stats| stats.rings)]),
    total("wasi_uring_enters_total", "io_uring_enter calls", &[("", |stats| stats.enters)]),
    total(
        "wasi_uring_enters_overdue_total",
        "io_uring_enter calls of the rings' own threads",
        &[("", |stats| stats.enters_overdue)],
    ),
    total(
        "wasi_uring_interrupts_total",
        "interrupts of threads that computed while guests waited",
        &[("", |stats| stats.interrupts)],
    ),
    total(
        "wasi_uring_submissions_total",
        "submission queue entries that the kernel took",
        &[("", |stats| stats.submissions)],
    ),
    total(
        "wasi_uring_completions_total",
        "completion queue entries",
        &[("", |stats| stats.completions)],
    ),
    total(
        "wasi_uring_sockets_created_total",
        "sockets that guests were given",
        &[("", |stats| stats.sockets_created)],
    ),
    now("wasi_uring_sockets_open", "sockets in use", &[("", |stats| stats.sockets_open)]),
    total(
        "wasi_uring_sockets_recycled_total",
        "sockets that had another owner before",
        &[("", |stats| stats.sockets_recycled)],
    ),
    now(
        "wasi_uring_sockets_cached",
        "closed sockets kept for new owners",
        &[("", |stats| stats.sockets_cached)],
    ),
    total(
        "wasi_uring_sockets_closed_instead_total",
        "sockets that were closed although the ring recycles",
        &[
            ("named_port", |stats| stats.closed_instead.named_port),
            ("options", |stats| stats.closed_instead.options),
            ("connected", |stats| stats.closed_instead.connected),
            ("error", |stats| stats.closed_instead.error),
            ("busy", |stats| stats.closed_instead.busy),
            ("no_room", |stats| stats.closed_instead.no_room),
            ("unread", |stats| stats.closed_instead.unread),
            ("unclean", |stats| stats.closed_instead.unclean),
            ("idle", |stats| stats.closed_instead.idle),
        ],
    ),
    total(
        "wasi_uring_datagrams_sent_total",
        "datagrams that the kernel took from guests",
        &[("", |stats| stats.datagrams_sent)],
    ),
    total(
        "wasi_uring_datagrams_coalesced_total",
        "datagrams sent with others in one message",
        &[("", |stats| stats.datagrams_coalesced)],
    ),
    total(
        "wasi_uring_datagrams_deferred_total",
        "datagrams whose sends were answered before they were submitted",
        &[("", |stats| stats.datagrams_deferred)],
    ),
    total(
        "wasi_uring_gso_refusals_total",
        "messages of several datagrams that the kernel refused",
        &[("", |stats| stats.gso_refusals)],
    ),
    total(
        "wasi_uring_sent_bytes_total",
        "payload bytes that the kernel took from guests",
        &[("", |stats| stats.bytes_sent)],
    ),
    total(
        "wasi_uring_datagrams_received_total",
        "datagrams that came for guests",
        &[("", |stats| stats.datagrams_received)],
    ),
    total(
        "wasi_uring_datagrams_split_total",
        "datagrams that came with others in one message",
        &[("", |stats| stats.datagrams_split)],
    ),
    total(
        "wasi_uring_received_bytes_total",
        "payload bytes that came for guests",
        &[("", |stats| stats.bytes_received)],
    ),
    total(
        "wasi_uring_rearms_total",
        "receives that were armed again",
        &[("", |stats| stats.rearms)],
    ),
    total(
        "wasi_uring_pauses_total",
        "receives paused because their queue was full",
        &[("", |stats| stats.pauses)],
    ),
    total(
        "wasi_uring_datagrams_dropped_total",
        "datagrams that came and no guest got",
        &[
            ("policy", |stats| stats.dropped_by_policy),
            ("not_from_peer", |stats| stats.dropped_not_from_peer),
            ("at_close", |stats| stats.dropped_at_close),
            ("kernel", |stats| stats.dropped_by_kernel),
            ("queue", |stats| stats.dropped_by_queue),
            ("malformed", |stats| stats.dropped_malformed),
        ],
    ),
];

impl Metric {
    fn unit(&self) -> Unit {
        if self.name.contains("_bytes_") { Unit::Bytes } else { Unit::Count }
    }
}

/// Of the feature `metrics`.
impl Uring {
    /// Describes the metrics that [`record_metrics`](Self::record_metrics) sets to the recorder that the
    /// host has installed. Once is enough.
    pub fn describe_metrics() {
        for metric in METRICS {
            let unit = metric.unit();
            match metric.kind {
                Kind::Total => describe_counter!(metric.name, unit, metric.description),
                Kind::Now => describe_gauge!(metric.name, unit, metric.description),
            }
        }
    }

    /// Sets the metrics of this host's rings in its recorder of the `metrics` facade to what
    /// [`stats`](Self::stats) has now. To be called before a scrape, or every few seconds; for one
    /// `Uring` of a process, since a second one's values would take the places of the first's.
    ///
    /// Counters: `wasi_uring_` with `enters_total`, `enters_overdue_total`, `interrupts_total`,
    /// `submissions_total`, `completions_total`, `sockets_created_total`, `sockets_recycled_total`,
    /// `sockets_closed_instead_total` (by `reason`, as in [`ClosedInstead`](crate::ClosedInstead)),
    /// `datagrams_sent_total`, `datagrams_coalesced_total`,
    /// `datagrams_deferred_total`, `gso_refusals_total`, `sent_bytes_total`,
    /// `datagrams_received_total`, `datagrams_split_total`, `received_bytes_total`, `rearms_total`, `pauses_total`
    /// and `datagrams_dropped_total` (by `reason`: `policy`, `not_from_peer`, `at_close`, `kernel`, `queue`,
    /// `malformed`). Gauges: `rings`, `sockets_open` and `sockets_cached`. What each counts is said at the
    /// field of [`Stats`] of nearly that name.
    pub fn record_metrics(&self) {
        let stats = self.stats();
        for Metric { name, kind, values, .. } in METRICS {
            for (reason, value) in values {
                let (value, labels) = (value(&stats), [("reason", *reason)]);
                let labels = if reason.is_empty() { &[][..] } else { &labels[..] };
                match kind {
                    Kind::Total => counter!(name, labels).absolute(value),
                    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 at once")]
                    Kind::Now => gauge!(name, labels).set(value as f64),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet, HashSet};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use metrics::{
        Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString,
        with_local_recorder,
    };

    use super::*;
    use crate::UdpCtx;
    use crate::datagram::Family;

    /// What a recorder is told.
    #[derive(Default)]
    struct Recorded {
        described: Mutex<BTreeSet<String>>,
        values: Mutex<BTreeMap<(String, String), Arc<AtomicU64>>>,
    }

    impl Recorded {
        fn describe(&self, name: &KeyName) {
            assert!(self.described.lock().unwrap().insert(name.as_str().to_owned()));
        }

        fn value(&self, key: &Key) -> Arc<AtomicU64> {
            let reason = key.labels().map(|label| label.value().to_owned()).collect();
            let key = (key.name().to_owned(), reason);
            Arc::clone(self.values.lock().unwrap().entry(key).or_default())
        }
    }

    impl Recorder for Recorded {
        fn describe_counter(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(&name);
        }

        fn describe_gauge(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
            self.describe(&name);
        }

        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
            Counter::from_arc(self.value(key))
        }

        fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::from_arc(self.value(key))
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::noop()
        }
    }

    #[test]
    fn a_recorder_is_told_what_the_rings_have_counted() {
        let uring = Uring::builder().sockets(4).build().unwrap();
        let mut ctx = UdpCtx::builder(&uring).allow(|_, _| true).build();
        let recorded = Recorded::default();
        let value = |name: &str, reason: &str| {
            let values = recorded.values.lock().unwrap();
            values[&(format!("wasi_uring_{name}"), reason.to_owned())].load(Ordering::Relaxed)
        };
        with_local_recorder(&recorded, || {
            Uring::describe_metrics();
            let sockets = [(); 2].map(|()| ctx.new_socket(Family::V4).unwrap());
            uring.record_metrics();
            assert_eq!(value("sockets_created_total", ""), 2);
            assert_eq!(value("sockets_open", ""), 2_f64.to_bits());
            drop(sockets);
            uring.record_metrics();
        });
        assert_eq!(value("sockets_created_total", ""), 2);
        assert_eq!(value("sockets_open", ""), 0_f64.to_bits());
        assert_eq!(value("datagrams_dropped_total", "kernel"), 0);
        let values = recorded.values.lock().unwrap();
        let names: BTreeSet<_> = values.keys().map(|(name, _)| name.clone()).collect();
        assert_eq!(*recorded.described.lock().unwrap(), names);
    }

    /// Kills: a counter that the list has twice, or not.
    #[test]
    fn each_counter_is_one_metric() {
        let numbered = |text: &str| text.matches(": ").count();
        let fields = format!("{:?}", Stats::default());
        let values: Vec<_> = METRICS.iter().flat_map(|metric| metric.values).collect();
        // `closed_instead` has a name, too, and is none.
        assert_eq!(values.len(), numbered(&fields) - 1);
        let names: HashSet<_> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
        let is_total = |metric: &Metric| metric.kind == Kind::Total;
        assert!(METRICS.iter().all(|metric| metric.name.ends_with("_total") == is_total(metric)));
    }
}
