//! Calls in any order: both backends answer them alike.

use std::net::SocketAddr;

use proptest::prelude::*;

use crate::common::target::{Target, target};
use crate::common::{
    Backend, ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, Setup, native, on,
    yield_to_others,
};

/// One thing a guest may do with its socket.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Drops the socket with all that hangs on it, and makes another.
    Renew,
    StartBind(Target),
    FinishBind,
    /// Start and finish: the backends differ in which of the two has the kernel's error.
    BindTaken,
    Stream(Option<Target>),
    DropStreams,
    Send(Option<Target>),
    /// To itself, and back.
    Echo,
    ReceiveNothing,
    SetHopLimit(u8),
    SetReceiveBuffer(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => Just(Step::Renew),
        3 => prop_oneof![Just(Target::Loopback), Just(Target::Wildcard)].prop_map(Step::StartBind),
        1 => target().prop_map(Step::StartBind),
        4 => Just(Step::FinishBind),
        1 => Just(Step::BindTaken),
        5 => proptest::option::of(target()).prop_map(Step::Stream),
        4 => Just(Step::DropStreams),
        3 => proptest::option::of(target()).prop_map(Step::Send),
        2 => Just(Step::Echo),
        2 => Just(Step::ReceiveNothing),
        1 => any::<u8>().prop_map(Step::SetHopLimit),
        1 => prop_oneof![Just(0), 1..1_000_000_u64].prop_map(Step::SetReceiveBuffer),
    ]
}

/// Everything a guest can see of its socket, ports left out where they are the kernel's choice.
type View = (
    Result<(SocketAddr, bool), ErrorCode>,
    Result<SocketAddr, ErrorCode>,
    (Result<u8, ErrorCode>, Result<u64, ErrorCode>),
);

struct Player<'rig> {
    rig: &'rig mut Rig,
    family: IpAddressFamily,
    peers: [SocketAddr; 2],
    taken: SocketAddr,
    socket: u32,
    streams: Option<(u32, u32)>,
}

impl Player<'_> {
    fn addr(&self, target: Target) -> SocketAddr {
        target.addr(self.family == IpAddressFamily::Ipv4, self.peers)
    }

    async fn drop_streams(&mut self) {
        if let Some(streams) = self.streams.take() {
            self.rig.drop_streams(streams).await;
            // wasmtime-wasi would trap otherwise: see `Rig::reconnect`.
            yield_to_others().await;
        }
    }

    /// Does it, and says what it was answered.
    async fn play(&mut self, step: Step) -> String {
        match step {
            Step::Renew => {
                self.drop_streams().await;
                self.rig.drop_socket(self.socket).await;
                self.socket = self.rig.create(self.family).await.unwrap();
                String::new()
            }
            Step::StartBind(target) => {
                // A peer's port is taken: whose error that is differs.
                let ip = SocketAddr::new(self.addr(target).ip(), 0);
                format!("{:?}", self.rig.start_bind(self.socket, ip).await)
            }
            Step::FinishBind => format!("{:?}", self.rig.finish_bind(self.socket).await),
            Step::BindTaken => format!("{:?}", self.rig.bind(self.socket, self.taken).await),
            Step::Stream(_) if self.streams.is_some() => String::from("would trap"),
            Step::Stream(target) => {
                let remote = target.map(|target| self.addr(target));
                let answer = self.rig.stream(self.socket, remote).await;
                self.streams = answer.as_ref().ok().copied();
                format!("{:?}", answer.map(drop))
            }
            Step::DropStreams => {
                self.drop_streams().await;
                String::new()
            }
            Step::Send(target) => {
                let Some((_, outgoing)) = self.streams else { return String::new() };
                let to = target.map(|target| self.addr(target));
                format!("{:?}", self.rig.send_one(outgoing, b"x", to).await)
            }
            Step::Echo => {
                let Some((incoming, outgoing)) = self.streams else { return String::new() };
                let itself = self.rig.local(self.socket).await.unwrap();
                let sent = self.rig.send_one(outgoing, b"echo", Some(itself)).await;
                if sent == Ok(1) {
                    self.rig.receive_exactly(incoming, 1).await;
                }
                format!("{sent:?}")
            }
            Step::ReceiveNothing => {
                let Some((incoming, _)) = self.streams else { return String::new() };
                format!("{:?}", self.rig.receive(incoming, 16).await)
            }
            Step::SetHopLimit(value) => {
                format!("{:?}", self.rig.set_hop_limit(self.socket, value).await)
            }
            Step::SetReceiveBuffer(value) => {
                format!("{:?}", self.rig.set_receive_buffer(self.socket, value).await)
            }
        }
    }

    async fn view(&mut self) -> View {
        let local = self.rig.local(self.socket).await;
        let options =
            (self.rig.hop_limit(self.socket).await, self.rig.receive_buffer(self.socket).await);
        (
            local.map(|addr| (SocketAddr::new(addr.ip(), 0), addr.port() == 0)),
            self.rig.remote(self.socket).await,
            options,
        )
    }
}

fn transcript(
    backend: Backend,
    family: IpAddressFamily,
    peers: [SocketAddr; 2],
    steps: &[Step],
) -> Vec<(Step, String, View)> {
    on(backend, Setup::default(), async |rig| {
        let socket = rig.create(family).await.unwrap();
        let mut player = Player { rig, family, peers, taken: peers[0], socket, streams: None };
        let mut answers = Vec::new();
        for step in steps {
            let answer = player.play(*step).await;
            answers.push((*step, answer, player.view().await));
        }
        answers
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_calls_is_answered_alike(
        is_v4: bool,
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let (family, any) = if is_v4 {
            (IpAddressFamily::Ipv4, LOOPBACK)
        } else {
            (IpAddressFamily::Ipv6, LOOPBACK_6)
        };
        let natives = [native::socket(any.ip()), native::socket(any.ip())];
        let peers = [natives[0].1, natives[1].1];
        let stock = transcript(Backend::Stock, family, peers, &steps);
        let ring = transcript(Backend::Uring, family, peers, &steps);
        for (ring, stock) in ring.iter().zip(&stock) {
            prop_assert_eq!(format!("{:?}", ring), format!("{:?}", stock), "ring, then stock");
        }
    }
}
