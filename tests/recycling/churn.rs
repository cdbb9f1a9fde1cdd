//! The host of the guest `guests/churn.wat`: runs its cycles (a socket from create to drop), and
//! reports what it has found wrong.

use std::sync::OnceLock;
use std::time::Duration;

use wasi_uring::Uring;
use wasmtime::component::{Component, TypedFunc};
use wasmtime::{Engine, Store};

use crate::common::{Backend, Host, Setup, host};

/// What a guest finds wrong, as its text numbers it.
const WRONG: [&str; 8] = [
    "a call failed (step, error code)",
    "a datagram of another cycle (its number, its port, our port)",
    "a datagram that no native sent (its length)",
    "answers are missing (so many, of so many)",
    "bound to all addresses, and disconnected, it is still at one (which)",
    "connected, it hears another than its peer (the port)",
    "refused, it received no error (whether it failed, error code or datagrams)",
    "more answers than it requested (so many, of so many)",
];

/// Longest that a guest waits for an answer, counted from the beginning of its chapter.
const PATIENCE: Duration = Duration::from_secs(40);

type Wrong = (u32, u32, u32, u32, u32, u32, u32, u32);
type Counts = (u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32);

/// A seed, the number of the first cycle, how many there are, and how long each may wait.
type Chapter = (u64, u32, u32, u64);
type Ran = (Wrong, Counts);

/// A guest.
pub(crate) struct Churn {
    store: Store<Host>,
    run: TypedFunc<Chapter, (Ran,)>,
}

/// What the guests have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub cycles: u64,
    /// Datagrams that they received.
    pub heard: u64,
    /// Those of them that were answers.
    pub answers: u64,
    /// Cycles that sent their address to a native.
    pub hellos: u64,
    /// Connected to a closed port and received the refusal.
    pub refused: u64,
    pub set_hops: u64,
    pub named_port: u64,
    /// Connected over IPv6, without a refusal.
    pub connected_v6: u64,
}

impl std::ops::Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            cycles: self.cycles + other.cycles,
            heard: self.heard + other.heard,
            answers: self.answers + other.answers,
            hellos: self.hellos + other.hellos,
            refused: self.refused + other.refused,
            set_hops: self.set_hops + other.set_hops,
            named_port: self.named_port + other.named_port,
            connected_v6: self.connected_v6 + other.connected_v6,
        }
    }
}

impl Churn {
    pub(crate) async fn on(uring: &Uring) -> Self {
        static ENGINE: OnceLock<Engine> = OnceLock::new();
        static COMPONENT: OnceLock<Component> = OnceLock::new();
        let engine = ENGINE.get_or_init(Engine::default);
        let text = include_str!("../guests/churn.wat");
        let component = COMPONENT.get_or_init(|| Component::new(engine, text).unwrap());
        let (_, linker, mut store) = host(engine, Backend::Uring, Setup::of(uring));
        let guest = linker.instantiate_async(&mut store, component).await.unwrap();
        let run = guest.get_typed_func(&mut store, "run").unwrap();
        Self { store, run }
    }

    /// Runs that many cycles, from a number on; else what was wrong.
    pub(crate) async fn run(
        &mut self,
        seed: u64,
        first: u32,
        cycles: u32,
    ) -> Result<Tally, String> {
        let patience = u64::try_from(PATIENCE.as_nanos()).unwrap();
        let params = (seed, first, cycles, patience);
        let ((wrong, counts),) = self.run.call_async(&mut self.store, params).await.unwrap();
        let (what, cycle, a, b, c, kind, v6, to_all) = wrong;
        if let Some(what) = (what as usize).checked_sub(1) {
            return Err(format!(
                "{}: {a}, {b}, {c}; cycle {cycle} of kind {kind}, IPv{}, bound to {}",
                WRONG[what],
                if v6 == 0 { 4 } else { 6 },
                if to_all == 0 { "its own address" } else { "all" },
            ));
        }
        let (heard, answers, .., connected_v6) = counts;
        let (.., refused, _, asked_connected, _, set_hops, named_port, _, _, _) = counts;
        Ok(Tally {
            cycles: cycles.into(),
            heard: heard.into(),
            answers: answers.into(),
            hellos: (cycles - refused - asked_connected).into(),
            refused: refused.into(),
            set_hops: set_hops.into(),
            named_port: named_port.into(),
            connected_v6: connected_v6.into(),
        })
    }
}
