//! The rings' counters in OpenTelemetry: observable instruments read [`Uring::stats`] when they are collected,
//! so that nothing is counted twice, and no datagram costs more. The library has no part in this: a host uses
//! the version of OpenTelemetry that it has.
//!
//! ```sh
//! cargo run --example otel
//! ```

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider};
use opentelemetry_sdk::metrics::data::ScopeMetrics;
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use wasi_uring::{Stats, Uring};

/// Has a meter observe the counters of a host's rings. Once for each `Uring`.
pub(crate) fn observe(meter: &Meter, uring: &Uring) {
    let total = |name, unit, value: fn(&Stats) -> u64| {
        let uring = uring.clone();
        let counter = meter.u64_observable_counter(name).with_unit(unit);
        counter.with_callback(move |to| to.observe(value(&uring.stats()), &[])).build();
    };
    total("wasi_uring.enters", "{call}", |stats| stats.enters);
    total("wasi_uring.sockets.created", "{socket}", |stats| stats.sockets_created);
    total("wasi_uring.sockets.recycled", "{socket}", |stats| stats.sockets_recycled);
    total("wasi_uring.datagrams.sent", "{datagram}", |stats| stats.datagrams_sent);
    total("wasi_uring.datagrams.received", "{datagram}", |stats| stats.datagrams_received);
    total("wasi_uring.sent", "By", |stats| stats.bytes_sent);
    total("wasi_uring.received", "By", |stats| stats.bytes_received);

    let now = |name, value: fn(&Stats) -> u64| {
        let uring = uring.clone();
        let gauge = meter.u64_observable_gauge(name).with_unit("{socket}");
        gauge.with_callback(move |to| to.observe(value(&uring.stats()), &[])).build();
    };
    now("wasi_uring.sockets.open", |stats| stats.sockets_open);
    now("wasi_uring.sockets.cached", |stats| stats.sockets_cached);

    // One instrument for all causes, which an attribute tells apart.
    let uring = uring.clone();
    let dropped = meter.u64_observable_counter("wasi_uring.datagrams.dropped");
    let dropped = dropped.with_unit("{datagram}").with_callback(move |to| {
        let stats = uring.stats();
        for (reason, datagrams) in [
            ("policy", stats.dropped_by_policy),
            ("not_from_peer", stats.dropped_not_from_peer),
            ("at_close", stats.dropped_at_close),
            ("kernel", stats.dropped_by_kernel),
            ("queue", stats.dropped_by_queue),
            ("malformed", stats.dropped_malformed),
        ] {
            to.observe(datagrams, &[KeyValue::new("reason", reason)]);
        }
    });
    dropped.build();
}

/// A provider whose exporter the program can read. A real one has an OTLP exporter here.
pub(crate) fn provider() -> (SdkMeterProvider, InMemoryMetricExporter) {
    let exporter = InMemoryMetricExporter::default();
    let reader = PeriodicReader::builder(exporter.clone()).build();
    (SdkMeterProvider::builder().with_reader(reader).build(), exporter)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let uring = Uring::builder().build()?;
    let (provider, exporter) = provider();
    observe(&provider.meter("wasi-uring"), &uring);
    // Guests of this ring would run here.
    provider.force_flush()?;
    for exported in exporter.get_finished_metrics()? {
        for metric in exported.scope_metrics().flat_map(ScopeMetrics::metrics) {
            println!("{}: {:?}", metric.name(), metric.data());
        }
    }
    Ok(provider.shutdown()?)
}
