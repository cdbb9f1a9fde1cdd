//! What the linker functions add, and both versions of WASI side by side.

use std::net::Ipv4Addr;

use wasmtime::Store;
use wasmtime::component::Linker;

use crate::common::{
    Backend, ErrorCode as OldCode, Host, IpAddressFamily, LOOPBACK, LOOPBACK_6, Setup, datagram,
    engine, eventually, host, native, payloads, uring_with,
};
use crate::rig::{self, Driver, ErrorCode, Rig3, V4, on, on_both};

/// A linker of the test's own, and a store to serve.
fn bare() -> (Linker<Host>, Store<Host>) {
    let (_, _, store) = host(engine(), Backend::Uring, Setup::default());
    (Linker::new(engine()), store)
}

/// Has a guest create, bind, and send to itself.
async fn is_served(linker: &Linker<Host>, mut store: Store<Host>) -> u64 {
    let guest = Driver::instantiate_async(&mut store, rig::component(), linker).await.unwrap();
    let socket = guest.call_create(&mut store, V4).await.unwrap().unwrap();
    guest.call_bind(&mut store, socket, LOOPBACK.into()).await.unwrap().unwrap();
    let local = guest.call_get_local_address(&mut store, socket).await.unwrap().unwrap();
    let to = Some(local);
    let exchange = async |store: &_| {
        guest.call_send(store, socket, b"x".to_vec(), to).await.unwrap().unwrap();
        guest.call_receive(store, socket).await.unwrap().unwrap().0
    };
    let received = store.run_concurrent(exchange).await.unwrap();
    assert_eq!(received, b"x");
    u64::from(socket)
}

// ---- linkers ------------------------------------------------------------------------------------

/// Kills: an `add_to_linker` that allows shadowing and does not forbid it again.
#[test]
fn a_linker_that_refuses_shadowing_does_so_still_when_wasi_was_added() {
    crate::common::block_on(async {
        let (mut linker, store) = bare();
        wasi_uring::p3::add_to_linker(&mut linker).unwrap();
        wasi_uring::p3::add_udp_to_linker(&mut linker).unwrap_err();
        wasi_uring::p3::add_to_linker(&mut linker).unwrap_err();
        wasmtime_wasi::p3::add_to_linker(&mut linker).unwrap_err();
        wasi_uring::p3::add_udp_to_linker(&mut linker).unwrap_err();
        is_served(&linker, store).await;
    });
}

#[test]
fn a_linker_that_allows_shadowing_does_so_still_when_wasi_was_added() {
    crate::common::block_on(async {
        let (mut linker, store) = bare();
        linker.allow_shadowing(true);
        wasi_uring::p3::add_to_linker(&mut linker).unwrap();
        wasi_uring::p3::add_udp_to_linker(&mut linker).unwrap();
        wasi_uring::p3::add_to_linker(&mut linker).unwrap();
        is_served(&linker, store).await;
    });
}

#[test]
fn udp_alone_serves_a_guest() {
    crate::common::block_on(async {
        let (mut linker, store) = bare();
        wasi_uring::p3::add_udp_to_linker(&mut linker).unwrap();
        is_served(&linker, store).await;
    });
}

#[test]
fn udp_alone_replaces_wasmtime_wasis_where_that_is_allowed() {
    crate::common::block_on(async {
        let uring = uring_with(4);
        let (_, _, store) = host(engine(), Backend::Uring, Setup::of(&uring));
        let mut linker = Linker::new(engine());
        wasmtime_wasi::p3::add_to_linker(&mut linker).unwrap();
        wasi_uring::p3::add_udp_to_linker(&mut linker).unwrap_err();
        linker.allow_shadowing(true);
        wasi_uring::p3::add_udp_to_linker(&mut linker).unwrap();
        is_served(&linker, store).await;
        assert_eq!(uring.stats().sockets_created, 1);
    });
}

#[test]
fn an_engine_without_concurrency_is_refused() {
    let mut config = wasmtime::Config::new();
    config.wasm_component_model_async(false).concurrency_support(false);
    let engine = wasmtime::Engine::new(&config).unwrap();
    let mut linker = Linker::<Host>::new(&engine);
    wasi_uring::p3::add_to_linker(&mut linker).unwrap_err();
    wasi_uring::p3::add_udp_to_linker(&mut linker).unwrap_err();
}

#[test]
fn either_version_can_be_added_first() {
    crate::common::block_on(async {
        for newest_first in [false, true] {
            let (mut linker, store) = bare();
            if newest_first {
                wasi_uring::p3::add_to_linker(&mut linker).unwrap();
                wasi_uring::p2::add_to_linker(&mut linker).unwrap();
            } else {
                wasi_uring::p2::add_to_linker(&mut linker).unwrap();
                wasi_uring::p3::add_to_linker(&mut linker).unwrap();
            }
            is_served(&linker, store).await;
        }
    });
}

// ---- both versions in one store -------------------------------------------------------------------

#[test]
fn sockets_of_both_versions_in_one_store_exchange_datagrams() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let old = rig.rig.endpoint(any).await;
            let (new, new_addr) = rig.bound(any).await;
            // One that waits for the other version's guest.
            let call = rig.waiting_receive(new).await;
            let sent = [datagram(b"from 0.2", Some(new_addr)), datagram(b"2", Some(new_addr))];
            assert_eq!(rig.rig.send_all(old.outgoing, &sent).await, Ok(2));
            assert_eq!(rig.received(call).await, Ok((b"from 0.2".to_vec(), old.local)));
            assert_eq!(rig.receive(new).await.unwrap().0, b"2");
            for data in [&b"from 0.3"[..], b"3"] {
                rig.send(new, data, Some(old.local)).await.unwrap();
            }
            let received = rig.rig.receive_exactly(old.incoming, 2).await;
            assert_eq!(payloads(&received), [&b"from 0.3"[..], b"3"]);
            assert_eq!(crate::common::sender(&received[0]), new_addr);
            rig.drop_socket(new).await;
            rig.rig.close(old).await;
        }
    });
}

#[test]
fn what_a_receive_waits_for_comes_while_the_guest_of_the_other_version_blocks() {
    on_both(Setup::default(), async |rig| {
        let (native, from) = native::socket(Ipv4Addr::LOCALHOST);
        let old = rig.rig.endpoint(LOOPBACK).await;
        let (new, local) = rig.bound(LOOPBACK).await;
        let call = rig.waiting_receive(new).await;
        let sending = async {
            native.send_to(b"new", local).unwrap();
            crate::common::yield_to_others().await;
            native.send_to(b"old", old.local).unwrap();
        };
        let (received, ()) =
            tokio::join!(biased; rig.rig.receive_exactly(old.incoming, 1), sending);
        assert_eq!(payloads(&received), [b"old"]);
        assert_eq!(rig.received(call).await, Ok((b"new".to_vec(), from)));
    });
}

#[test]
fn the_quota_is_common_to_both_versions() {
    let uring = uring_with(16);
    let setup = Setup { sockets_max: 2, ..Setup::of(&uring) };
    on(Backend::Uring, setup, async |rig: &mut Rig3| {
        let old = rig.rig.create(IpAddressFamily::Ipv4).await.unwrap();
        let (new, _) = rig.bound(LOOPBACK).await;
        let limit = Err(ErrorCode::Other(Some("new-socket-limit".to_owned())));
        for _ in 0..3 {
            assert_eq!(rig.create(V4).await, limit);
            let refused = rig.rig.create(IpAddressFamily::Ipv4).await;
            assert_eq!(refused, Err(OldCode::NewSocketLimit));
        }
        rig.rig.drop_socket(old).await;
        let (another, _) = rig.bound(LOOPBACK).await;
        assert_eq!(rig.create(V4).await, limit);
        rig.drop_socket(new).await;
        rig.drop_socket(another).await;
        rig.rig.endpoint(LOOPBACK).await;
        rig.bound(LOOPBACK).await;
        eventually("two are open", || uring.stats().sockets_open == 2).await;
    });
}
