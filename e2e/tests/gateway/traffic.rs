//! Mixed load by one way, for as long as wanted: places that each carry one connection after the other, short ones with
//! all kinds of ends and long-lived trickles. What is wrong with any of them is collected, and told at the end.
//!
//! Whoever kills a gateway says so ([`Traffic::disturb`]): connections that were there then may be reset, and nothing else.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::sleep};

use crate::{
    carry::judge,
    load::{Fault, Load},
    plan::{Plan, Random, Sender},
};

/// By what way the connections go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    /// Where they enter.
    pub(crate) entry: SocketAddr,
    /// The end beside the gateway that may be killed.
    pub(crate) mortal: Sender,
    /// How many gateways a hello is tried at.
    pub(crate) attempts: Attempts,
}

/// Whether a hello outlives the gateway that dies with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempts {
    /// On the auto port, as long as it is not the near one.
    Many,
    /// On a pinned port, unless both attempts meet the dying one.
    Two,
}

/// How many connections at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    pub(crate) short: u64,
    pub(crate) long: u64,
    /// For how many milliseconds long ones last, from and to.
    pub(crate) lasting: (u64, u64),
}

/// Load that goes on until it is stopped.
pub(crate) struct Traffic {
    driver: Arc<Driver>,
    places: JoinSet<Vec<String>>,
}

struct Driver {
    load: Arc<Load>,
    route: Route,
    seed: u64,
    stop: AtomicBool,
    ids: AtomicU64,
    done: AtomicU64,
    /// Moves with every disturbance.
    events: AtomicU64,
}

impl Traffic {
    pub(crate) fn start(load: Arc<Load>, route: Route, seed: u64, places: Places) -> Self {
        let (stop, ids, done, events) = Default::default();
        let driver = Arc::new(Driver { load, route, seed, stop, ids, done, events });
        let mut running = JoinSet::new();
        (0..places.short).for_each(|_| drop(running.spawn(driver.clone().short())));
        (0..places.long).for_each(|place| drop(running.spawn(driver.clone().long(place, places.lasting))));
        Self { driver, places: running }
    }

    /// Connections that have come to their end.
    pub(crate) fn done(&self) -> u64 {
        self.driver.done.load(Ordering::Relaxed)
    }

    /// A gateway is being killed. To be called before and after: a connection may come to it between the first word and its
    /// death.
    pub(crate) fn disturb(&self) {
        self.driver.events.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets what runs come to its end. Returns how many there were, and what went wrong.
    pub(crate) async fn stop(mut self) -> (u64, Vec<String>) {
        self.driver.stop.store(true, Ordering::Relaxed);
        let mut wrong = Vec::new();
        while let Some(place) = self.places.join_next().await {
            wrong.extend(place.unwrap());
        }
        (self.done(), wrong)
    }
}

impl Driver {
    /// One short connection after the other.
    async fn short(self: Arc<Self>) -> Vec<String> {
        let mut wrong = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let id = self.ids.fetch_add(1, Ordering::Relaxed);
            wrong.extend(self.one(Plan::draw(self.seed, id)).await);
            // Load, not a race for the processor.
            sleep(Duration::from_millis(Random::new(id).between(20, 120))).await;
        }
        wrong
    }

    /// One long connection after the other.
    async fn long(self: Arc<Self>, place: u64, (least, most): (u64, u64)) -> Vec<String> {
        let mut wrong = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let id = self.ids.fetch_add(1, Ordering::Relaxed);
            let lasting = Duration::from_millis(Random::new(id ^ place << 32).between(least, most));
            wrong.extend(self.one(Plan::trickle(self.seed, id, lasting)).await);
        }
        wrong
    }

    async fn one(&self, plan: Plan) -> Option<String> {
        let before = self.events.load(Ordering::SeqCst);
        let plan = Arc::new(plan);
        let outcome = self.load.connection(self.route.entry, &plan).await;
        self.done.fetch_add(1, Ordering::Relaxed);
        // A kill is noticed a while later, and what ran through it may have begun long before.
        let killed = (self.events.load(Ordering::SeqCst) != before).then_some(self.route.mortal);
        match outcome {
            Ok((client, server)) => {
                let faults = judge(&plan, &client, &server, killed.is_some());
                (!faults.is_empty()).then(|| format!("{}: {plan:?}, {client:?}, {server:?}", faults.join("; ")))
            }
            Err(Fault::Nobody(client))
                if self.may_lose_hello(killed) && client.as_ref().is_none_or(|c| c.received == 0) =>
            {
                None
            }
            Err(fault) => Some(format!("{fault}: {plan:?}")),
        }
    }

    fn may_lose_hello(&self, killed: Option<Sender>) -> bool {
        killed == Some(Sender::Client) || (killed.is_some() && self.route.attempts == Attempts::Two)
    }
}
