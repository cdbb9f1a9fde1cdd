//! The linker functions with options.

use wasmtime::component::{Component, Linker};
use wasmtime_wasi::{p2, p3};

use crate::common::{Backend, Setup, block_on, engine, host, uring_with};
use crate::rig::{self, Driver, V4};

/// A component that imports what WASI 0.2 has behind `network-error-code`.
const UNSTABLE: &str = r#"
(component
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error))
  (import "wasi:sockets/network@0.2.0" (instance
    (export "error" (type $error' (eq $error)))
    (type $error-code (enum "unknown" "access-denied" "not-supported" "invalid-argument" "out-of-memory" "timeout"
      "concurrency-conflict" "not-in-progress" "would-block" "invalid-state" "new-socket-limit" "address-not-bindable"
      "address-in-use" "remote-unreachable" "connection-refused" "connection-reset" "connection-aborted"
      "datagram-too-large" "name-unresolvable" "temporary-resolver-failure" "permanent-resolver-failure"))
    (export "error-code" (type $error-code' (eq $error-code)))
    (export "network-error-code" (func (param "err" (borrow $error')) (result (option $error-code'))))
  )))
"#;

/// Kills: an `add_to_linker_with_options` that does not look at them.
#[test]
fn unstable_functions_of_0_2_are_there_if_the_options_name_them() {
    let component = Component::new(engine(), UNSTABLE).unwrap();
    let links = |options: &p2::bindings::LinkOptions| {
        let mut linker = Linker::<crate::common::Host>::new(engine());
        wasi_uring::p2::add_to_linker_with_options(&mut linker, options).unwrap();
        linker.instantiate_pre(&component).is_ok()
    };
    let mut options = p2::bindings::LinkOptions::default();
    assert!(!links(&options));
    assert!(links(options.network_error_code(true)));

    let mut linker = Linker::<crate::common::Host>::new(engine());
    wasi_uring::p2::add_to_linker(&mut linker).unwrap();
    linker.instantiate_pre(&component).err().expect("the default names none");
}

#[test]
fn udp_of_0_3_is_the_rings_with_options_too() {
    block_on(async {
        let uring = uring_with(4);
        let (_, _, mut store) = host(engine(), Backend::Uring, Setup::of(&uring));
        let mut linker = Linker::new(engine());
        let options = p3::bindings::LinkOptions::default();
        wasi_uring::p3::add_to_linker_with_options(&mut linker, &options).unwrap();
        let guest = Driver::instantiate_async(&mut store, rig::component(), &linker).await.unwrap();
        guest.call_create(&mut store, V4).await.unwrap().unwrap();
        assert_eq!(uring.stats().sockets_open, 1);
    });
}
