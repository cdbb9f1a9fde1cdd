//! The churning guest's host: runs it, and says what it has found.

use std::sync::OnceLock;
use std::time::Duration;

use wasi_uring::Uring;
use wasmtime::component::{Component, TypedFunc};
use wasmtime::{Engine, Store};

use crate::common::{Backend, Host, Setup, host};

/// What a guest finds wrong, as its text numbers it.
const WRONG: [&str; 8] = [
    "a call failed (step, error code)",
    "a datagram for another life (its number, its port, our port)",
    "a datagram that nobody sent (its length)",
    "answers are missing (so many, of so many)",
    "bound to all addresses, and disconnected, it is still at one (which)",
    "connected, it hears somebody else (his port)",
    "it was refused and not told (whether it failed, error code or datagrams)",
    "more answers than were asked for (so many, of so many)",
];

/// Longest that a guest waits for an answer, counted from the beginning of its chapter.
const PATIENCE: Duration = Duration::from_secs(40);

type Wrong = (u32, u32, u32, u32, u32, u32, u32, u32);
type Counts = (u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32, u32);

/// A seed, the number of the first life and how many there are, and how long a life may wait.
type Chapter = (u64, u32, u32, u64);
type Lived = (Wrong, Counts);

/// A guest that can live.
pub(crate) struct Churn {
    store: Store<Host>,
    live: TypedFunc<Chapter, (Lived,)>,
}

/// What lives have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub lives: u64,
    /// Datagrams that the host gave them.
    pub heard: u64,
    /// Those of them that were answers.
    pub answers: u64,
    /// Told natives where they are.
    pub hellos: u64,
    /// Connected to a closed port and received the refusal.
    pub told: u64,
    pub set_hops: u64,
    pub named_port: u64,
    /// Connected over IPv6, and not told of a refusal.
    pub connected_v6: u64,
}

impl std::ops::Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            lives: self.lives + other.lives,
            heard: self.heard + other.heard,
            answers: self.answers + other.answers,
            hellos: self.hellos + other.hellos,
            told: self.told + other.told,
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
        let live = guest.get_typed_func(&mut store, "live").unwrap();
        Self { store, live }
    }

    /// Leads that many lives, from a number on; else what was wrong.
    pub(crate) async fn live(
        &mut self,
        seed: u64,
        first: u32,
        lives: u32,
    ) -> Result<Tally, String> {
        let patience = u64::try_from(PATIENCE.as_nanos()).unwrap();
        let params = (seed, first, lives, patience);
        let ((wrong, counts),) = self.live.call_async(&mut self.store, params).await.unwrap();
        let (what, life, a, b, c, kind, v6, to_all) = wrong;
        if let Some(what) = (what as usize).checked_sub(1) {
            return Err(format!(
                "{}: {a}, {b}, {c}; life {life} of kind {kind}, IPv{}, bound to {}",
                WRONG[what],
                if v6 == 0 { 4 } else { 6 },
                if to_all == 0 { "its own address" } else { "all" },
            ));
        }
        let (heard, answers, .., connected_v6) = counts;
        let (.., told, _, asked_connected, _, set_hops, named_port, _, _, _) = counts;
        Ok(Tally {
            lives: lives.into(),
            heard: heard.into(),
            answers: answers.into(),
            hellos: (lives - told - asked_connected).into(),
            told: told.into(),
            set_hops: set_hops.into(),
            named_port: named_port.into(),
            connected_v6: connected_v6.into(),
        })
    }
}
