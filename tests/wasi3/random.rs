//! Calls in any order: both backends answer them alike.

use std::net::SocketAddr;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use crate::common::target::{Target, target};
use crate::common::{Backend, LOOPBACK, LOOPBACK_6, Setup, native};
use crate::rig::{Rig3, Status, family, on};

/// One thing a guest may do with its socket.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Drops the socket and makes another.
    Renew,
    Bind(Target),
    Connect(Target),
    Disconnect,
    Send(Option<Target>),
    /// Two at once.
    Sends(Option<Target>),
    /// To itself, and back.
    Echo,
    /// One that waits is cancelled.
    ReceiveNothing,
    SetHopLimit(u8),
    SetReceiveBuffer(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Renew),
        3 => target().prop_map(Step::Bind),
        3 => target().prop_map(Step::Connect),
        2 => Just(Step::Disconnect),
        3 => proptest::option::of(target()).prop_map(Step::Send),
        1 => proptest::option::of(target()).prop_map(Step::Sends),
        2 => Just(Step::Echo),
        2 => Just(Step::ReceiveNothing),
        1 => any::<u8>().prop_map(Step::SetHopLimit),
        1 => prop_oneof![Just(0), 1..1_000_000_u64].prop_map(Step::SetReceiveBuffer),
    ]
}

struct Player<'rig> {
    rig: &'rig mut Rig3,
    /// Any address of the socket's family.
    any: SocketAddr,
    peers: [SocketAddr; 2],
    socket: u32,
}

impl Player<'_> {
    fn addr(&self, target: Target) -> SocketAddr {
        target.addr(self.any.is_ipv4(), self.peers)
    }

    /// Does it, and says what it was answered.
    async fn play(&mut self, step: Step) -> String {
        let Self { socket, any, .. } = *self;
        match step {
            Step::Renew => {
                self.rig.drop_socket(socket).await;
                self.socket = self.rig.create(family(any)).await.unwrap();
                String::new()
            }
            Step::Bind(target) => format!("{:?}", self.rig.bind(socket, self.addr(target)).await),
            Step::Connect(target) => {
                format!("{:?}", self.rig.connect(socket, self.addr(target)).await)
            }
            Step::Disconnect => format!("{:?}", self.rig.disconnect(socket).await),
            Step::Send(target) => {
                let to = target.map(|target| self.addr(target));
                format!("{:?}", self.rig.send(socket, b"x", to).await)
            }
            Step::Sends(target) => {
                let to = target.map(|target| self.addr(target));
                let (_, first) = self.rig.start_send(socket, b"1", to).await;
                let (_, second) = self.rig.start_send(socket, b"2", to).await;
                format!("{:?} {:?}", self.rig.sent(second).await, self.rig.sent(first).await)
            }
            Step::Echo => {
                let Ok(itself) = self.rig.local(socket).await else { return String::new() };
                let sent = self.rig.send(socket, b"echo", Some(itself)).await;
                if sent.is_ok() {
                    assert_eq!(self.rig.receive(socket).await, Ok((b"echo".to_vec(), itself)));
                }
                format!("{sent:?}")
            }
            Step::ReceiveNothing => match self.rig.start_receive(socket).await {
                (Status::Started, call) => format!("{:?}", self.rig.cancel(call).await),
                (_, call) => format!("{:?}", self.rig.received(call).await),
            },
            Step::SetHopLimit(value) => {
                format!("{:?}", self.rig.set_hop_limit(socket, value).await)
            }
            Step::SetReceiveBuffer(value) => {
                format!("{:?}", self.rig.set_receive_buffer(socket, value).await)
            }
        }
    }

    /// Everything a guest can see of its socket, ports left out where they are the kernel's choice.
    async fn view(&mut self) -> String {
        let local = self.rig.local(self.socket).await;
        let local = local.map(|addr| (addr.ip(), addr.port() == 0));
        let remote = self.rig.remote(self.socket).await;
        let hops = self.rig.hop_limit(self.socket).await;
        let buffer = self.rig.receive_buffer(self.socket).await;
        format!("{local:?} {remote:?} {hops:?} {buffer:?}")
    }
}

fn transcript(
    backend: Backend,
    any: SocketAddr,
    peers: [SocketAddr; 2],
    steps: &[Step],
) -> Vec<(Step, String, String)> {
    on(backend, Setup::default(), async |rig| {
        let socket = rig.create(family(any)).await.unwrap();
        let mut player = Player { rig, any, peers, socket };
        let mut answers = Vec::new();
        for step in steps {
            let answer = player.play(*step).await;
            answers.push((*step, answer, player.view().await));
        }
        answers
    })
}

/// From the package's directory.
const REGRESSIONS: &str = "tests/proptest-regressions/wasi3.txt";

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 100,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(REGRESSIONS))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_of_calls_is_answered_alike(
        is_v4: bool,
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let any = if is_v4 { LOOPBACK } else { LOOPBACK_6 };
        let natives = [native::socket(any.ip()), native::socket(any.ip())];
        let peers = [natives[0].1, natives[1].1];
        let stock = transcript(Backend::Stock, any, peers, &steps);
        let ring = transcript(Backend::Uring, any, peers, &steps);
        for (ring, stock) in ring.iter().zip(&stock) {
            prop_assert_eq!(format!("{:?}", ring), format!("{:?}", stock), "ring, then stock");
        }
    }
}
