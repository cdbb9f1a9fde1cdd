//! What a host can read about one guest, and the quotas that guests share.

use wasi_uring::{GuestStats, Quota};

use crate::common::{
    Backend, ErrorCode, IpAddressFamily, LOOPBACK, Setup, block_on, eventually, native, own_ip,
    uring_with,
};
use crate::guest::{Guest, on};

in_both!(what_a_guest_does_is_counted_for_it_and_can_be_read_when_it_is_gone);
fn what_a_guest_does_is_counted_for_it_and_can_be_read_when_it_is_gone<G: Guest>() {
    let refused = own_ip();
    let setup = Setup {
        sockets_max: 2,
        ..Setup::allow(move |addr, _| addr.ip() != std::net::IpAddr::from(refused))
    };
    let (counters, uring) = on::<G, _>(Backend::Uring, setup, async |guest| {
        let counters = guest.rig().counters();
        assert_eq!(counters.stats(), GuestStats::default());
        let (native, peer) = native::socket(own_ip());
        let (stranger, to_stranger) = native::socket(refused);
        let (socket, local) = guest.bound(LOOPBACK).await;
        guest.arm(socket).await;
        for bytes in [0, 1, 100] {
            guest.send(socket, &vec![7; bytes], Some(peer)).await.unwrap();
        }
        let denied = guest.send(socket, b"x", Some(to_stranger)).await;
        assert_eq!(denied, Err(ErrorCode::AccessDenied));
        stranger.send_to(b"not seen", local).unwrap();
        for bytes in [200, 3] {
            native.send_to(&vec![7; bytes], local).unwrap();
            guest.receive(socket).await.unwrap();
        }
        guest.create(IpAddressFamily::Ipv4).await.unwrap();
        let beyond = guest.create(IpAddressFamily::Ipv4).await;
        assert_eq!(beyond, Err(ErrorCode::NewSocketLimit));
        (counters, guest.rig().uring.clone())
    });
    let stats = counters.stats();
    assert_eq!((stats.datagrams_sent, stats.bytes_sent), (3, 101));
    assert_eq!((stats.datagrams_received, stats.bytes_received), (3, 211));
    assert_eq!((stats.sockets_created, stats.sockets_beyond_quota), (2, 1));
    assert_eq!((stats.dropped_by_policy, stats.dropped_at_close), (1, 0));
    let [denials] = &stats.denials[..] else { panic!("{stats:?}") };
    assert_eq!((&*denials.reason, denials.count), ("address check", 2));
    block_on(eventually("all are closed", || {
        let _ = uring.stats();
        counters.stats().sockets_open == 0
    }));
}

in_both!(guests_of_an_app_share_its_quota_and_give_all_back);
/// Kills: a level that keeps what it was given; one that is asked only at the guest's first socket.
fn guests_of_an_app_share_its_quota_and_give_all_back<G: Guest>() {
    let uring = uring_with(16);
    let host = Quota::new(3);
    let app = Quota::within(&host, 2);
    let setup = |quota: &Quota| {
        let quota = quota.clone();
        let configure =
            std::sync::Arc::new(move |udp: wasi_uring::UdpCtxBuilder| udp.quota(&quota));
        Setup { configure: Some(configure), ..Setup::of(&uring) }
    };
    block_on(async {
        let mut one = G::new(Backend::Uring, setup(&app)).await;
        let mut two = G::new(Backend::Uring, setup(&app)).await;
        let mut other = G::new(Backend::Uring, setup(&host)).await;
        let limit = Err(ErrorCode::NewSocketLimit);
        let family = IpAddressFamily::Ipv4;
        let (bound, _) = one.bound(LOOPBACK).await;
        two.create(family).await.unwrap();
        assert_eq!(one.create(family).await, limit);
        assert_eq!((app.refusals(), host.refusals()), (1, 0));
        other.bound(LOOPBACK).await;
        assert_eq!(other.create(family).await, limit);
        assert_eq!((app.refusals(), host.refusals()), (1, 1));
        assert_eq!(other.rig().counters().stats().sockets_beyond_quota, 1);
        // Its place is free for the other guest of the app, which is the first to ask.
        one.drop_socket(bound).await;
        two.bound(LOOPBACK).await;
        assert_eq!((app.in_use(), host.in_use()), (2, 3));
        drop((one, two));
        eventually("the app's are closed", || {
            let _ = uring.stats();
            app.in_use() == 0
        })
        .await;
        assert_eq!(host.in_use(), 1);
        drop(other);
        eventually("all are closed", || {
            let _ = uring.stats();
            host.in_use() == 0
        })
        .await;
    });
}
