//! The app-wide limit of `generic_store`, under guests of both versions in stores of two kinds.

use std::sync::Arc;

use tokio::sync::Semaphore;
use wasmtime::Store;
use wasmtime::component::Component;
use wasmtime_wasi::WasiCtx;

use crate::common::driver::{Driver, ErrorCode, IpAddressFamily};
use crate::common::{block_on, engine, uring_with};
use crate::generic_store::{State, linker};
use crate::rig;

/// Kills: a wrapper that keeps no permit, that never gives one back, or that waits for one.
#[test]
fn a_socket_beyond_the_apps_limit_is_refused_at_once_until_one_is_dropped() {
    block_on(async {
        let uring = uring_with(16);
        let sockets = Arc::new(Semaphore::new(2));
        let wasi = WasiCtx::default;

        let state = State::new("an app that is a word", wasi(), &uring, &sockets);
        let mut store = Store::new(engine(), state);
        let text = include_str!("../guests/driver.wat");
        let component = Component::new(engine(), text).unwrap();
        let words = linker(engine()).unwrap();
        let old = Driver::instantiate_async(&mut store, &component, &words).await.unwrap();

        let state = State::new(3_u32, wasi(), &uring, &sockets);
        let mut store_3 = Store::new(engine(), state);
        let numbers = linker(engine()).unwrap();
        let new = rig::Driver::instantiate_async(&mut store_3, rig::component(), &numbers);
        let new = new.await.unwrap();

        let v4 = IpAddressFamily::Ipv4;
        let first = old.call_create_udp_socket(&mut store, v4).await.unwrap().unwrap();
        let second = new.call_create(&mut store_3, rig::V4).await.unwrap().unwrap();
        let limit_3 = rig::ErrorCode::Other(Some("new-socket-limit".to_owned()));
        for _ in 0..2 {
            let refused = old.call_create_udp_socket(&mut store, v4).await.unwrap();
            assert_eq!(refused, Err(ErrorCode::NewSocketLimit));
            assert_eq!(new.call_create(&mut store_3, rig::V4).await.unwrap(), Err(limit_3.clone()));
        }
        assert_eq!(uring.stats().sockets_open, 2);

        old.call_drop_socket(&mut store, first).await.unwrap();
        new.call_create(&mut store_3, rig::V4).await.unwrap().unwrap();
        let refused = old.call_create_udp_socket(&mut store, v4).await.unwrap();
        assert_eq!(refused, Err(ErrorCode::NewSocketLimit));
        new.call_drop_socket(&mut store_3, second).await.unwrap();
        old.call_create_udp_socket(&mut store, v4).await.unwrap().unwrap();
        assert_eq!(sockets.available_permits(), 0);

        // A store that goes takes its sockets with it.
        drop(store);
        assert_eq!(sockets.available_permits(), 1);
        drop(store_3);
        assert_eq!(sockets.available_permits(), 2);
    });
}
