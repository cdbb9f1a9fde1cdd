//! What the hosts `tenants` and `otel` are there for.

use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::InMemoryMetricExporter;
use opentelemetry_sdk::metrics::data::{
    AggregatedMetrics, GaugeDataPoint, MetricData, ScopeMetrics, SumDataPoint,
};
use wasi_uring::{Quota, Uring};
use wasmtime::Store;
use wasmtime::component::Component;
use wasmtime_wasi::WasiCtx;

use crate::common::{engine, eventually};
use crate::otel;
use crate::tenants::{Tenant, Workload, linker, run};

/// The command's guest, which sends a datagram each way between two sockets so many times.
const GUEST: &str = include_str!("../../src/cli/guests/cycle2.wat");

fn echoing(times: usize) -> WasiCtx {
    let mut wasi = WasiCtx::builder();
    wasi.args(&["guest", "echo", &times.to_string(), "0", "64", "16"]);
    wasi.build()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_of_one_store_have_rules_quotas_and_counters_of_their_own() {
    let engine = engine();
    let component = Component::new(engine, GUEST).unwrap();
    let (uring, host) = (Uring::builder().sockets(64).build().unwrap(), Quota::new(64));
    let [good, bad] = [(); 2].map(|()| Tenant::new(&uring, &host));
    bad.suspend();
    let linker = linker(engine).unwrap();
    let mut store = Store::new(engine, Workload::default());
    let parts = [(&good, 5), (&bad, 5), (&good, 7)]
        .map(|(tenant, times)| store.data_mut().add(tenant, echoing(times)));
    let mut ended = Vec::new();
    for part in parts {
        ended.push(run(&mut store, &linker, &component, part).await);
    }
    assert!(matches!(ended[..], [Ok(Ok(())), Err(_) | Ok(Err(())), Ok(Ok(()))]), "{ended:?}");
    // Reaps what has come.
    let _ = uring.stats();
    let stats = parts.map(|part| store.data().parts[part].udp.stats());
    assert_eq!(stats.each_ref().map(|stats| stats.datagrams_sent), [10, 0, 14]);
    assert_eq!(stats.each_ref().map(|stats| stats.denials.len()), [0, 1, 0]);
    assert_eq!(stats[1].denials[0].reason, "tenant is suspended");
    // A tenant has its quota for all its stores.
    let refused = host.refusals();
    let mut another = Store::new(engine, Workload::default());
    let part = another.data_mut().add(&good, echoing(3));
    run(&mut another, &linker, &component, part).await.unwrap().unwrap();
    assert_eq!(host.refusals(), refused);
    drop((store, another));
    eventually("all are back", || {
        let _ = uring.stats();
        host.in_use() == 0
    })
    .await;
    assert_eq!(good.quota.in_use(), 0);
}

/// The values of an instrument, of which the last export has some.
pub(crate) fn exported(exporter: &InMemoryMetricExporter, name: &str) -> Vec<u64> {
    let all = exporter.get_finished_metrics().unwrap();
    let metrics = all.last().unwrap().scope_metrics().flat_map(ScopeMetrics::metrics);
    let metric = { metrics }.find(|metric| metric.name() == name).expect("it is observed");
    let AggregatedMetrics::U64(data) = metric.data() else { panic!("{name} is no u64") };
    match data {
        MetricData::Sum(sum) => sum.data_points().map(SumDataPoint::value).collect(),
        MetricData::Gauge(gauge) => gauge.data_points().map(GaugeDataPoint::value).collect(),
        MetricData::Histogram(_) | MetricData::ExponentialHistogram(_) => panic!("{name}"),
    }
}

#[tokio::test]
async fn open_telemetry_sees_what_the_rings_have_counted() {
    let engine = engine();
    let component = Component::new(engine, GUEST).unwrap();
    let uring = Uring::builder().sockets(16).build().unwrap();
    let (provider, exporter) = otel::provider();
    otel::observe(&provider.meter("test"), &uring);
    let tenant = Tenant::new(&uring, &Quota::new(16));
    let mut store = Store::new(engine, Workload::default());
    let part = store.data_mut().add(&tenant, echoing(9));
    run(&mut store, &linker(engine).unwrap(), &component, part).await.unwrap().unwrap();
    provider.force_flush().unwrap();
    let values = |name| exported(&exporter, name);
    assert_eq!(values("wasi_uring.datagrams.sent"), [18]);
    assert_eq!(values("wasi_uring.datagrams.received"), [18]);
    assert_eq!(values("wasi_uring.received"), [18 * 64]);
    assert_eq!(values("wasi_uring.datagrams.dropped"), [0; 6]);
    assert_eq!(values("wasi_uring.sockets.open").len(), 1);
    drop(store);
}
