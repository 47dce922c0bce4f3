//! What a peer has been told of this cluster's availability, and what it must be told next. Sans-IO.
//!
//! Level-triggered: in goes the whole current table, out comes the difference from what was sent, a snapshot first. One
//! service is mentioned at most once per interval; changes in between are merged, and the last state always goes out.
//! Updates are cut into parts that fit a frame.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use isthmus_api::proto::{common::v1 as common, tunnel::v1::AvailabilityUpdate};
use isthmus_model::{availability::Availability, ids::ServiceName};

/// This cluster's own services, as peers are told.
pub(crate) type Table = BTreeMap<ServiceName, Availability>;

/// Between two mentions of one service.
pub(crate) const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Entries per update: 250 × (two names of 63, counts, tags) stays under 65,535 bytes.
pub(crate) const PART: usize = 250;

/// The memory of one control stream.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    began: bool,
    told: BTreeMap<ServiceName, Told>,
}

#[derive(Debug)]
struct Told {
    /// `None`: that it is gone.
    state: Option<Availability>,
    at: Instant,
}

impl Outbox {
    /// The updates to send now, and when to ask again if some had to wait.
    pub(crate) fn poll(&mut self, current: &Table, now: Instant) -> (Vec<AvailabilityUpdate>, Option<Instant>) {
        let mut wait: Option<Instant> = None;
        let mut due = |told: Option<&Told>| match told.map(|t| t.at + MIN_INTERVAL) {
            Some(at) if at > now => {
                wait = Some(wait.map_or(at, |w: Instant| w.min(at)));
                false
            }
            _ => true,
        };
        let mut changed = Vec::new();
        for (service, state) in current {
            let told = self.told.get(service);
            if told.and_then(|t| t.state) != Some(*state) && due(told) {
                changed.push((service.clone(), *state));
            }
        }
        let mut removed = Vec::new();
        for (service, told) in &self.told {
            if told.state.is_some() && !current.contains_key(service) && due(Some(told)) {
                removed.push(service.clone());
            }
        }
        // What has been gone for an interval needs no memory.
        self.told.retain(|_, t| t.state.is_some() || t.at + MIN_INTERVAL > now);
        for (service, state) in &changed {
            self.told.insert(service.clone(), Told { state: Some(*state), at: now });
        }
        for service in &removed {
            self.told.insert(service.clone(), Told { state: None, at: now });
        }
        (self.updates(&changed, &removed), wait)
    }

    fn updates(&mut self, changed: &[(ServiceName, Availability)], removed: &[ServiceName]) -> Vec<AvailabilityUpdate> {
        let mut updates: Vec<AvailabilityUpdate> = Vec::new();
        // What is gone first: a peer at its limit must have room for what comes.
        for part in removed.chunks(PART) {
            updates.push(AvailabilityUpdate { removed: part.iter().map(Into::into).collect(), ..Default::default() });
        }
        for part in changed.chunks(PART) {
            updates.push(AvailabilityUpdate { services: part.iter().map(entry).collect(), ..Default::default() });
        }
        if !self.began {
            self.began = true;
            match updates.first_mut() {
                Some(first) => first.snapshot = true,
                None => updates.push(AvailabilityUpdate { snapshot: true, ..Default::default() }),
            }
            // The peer goes by what it knew before until it has all parts.
            updates.iter_mut().rev().skip(1).for_each(|part| part.more = true);
        }
        updates
    }
}

/// `cluster` stays empty: the certificate says it. `reachable` and the recovery are the receiver's to judge.
fn entry((service, state): &(ServiceName, Availability)) -> common::Availability {
    common::Availability {
        service: Some(service.into()),
        cluster: String::new(),
        ready: state.ready.into(),
        total: state.total.into(),
        reachable: true,
        recovered_at_unix_ms: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(&str, u8)]) -> Table {
        let of = |(name, ready): &(&str, u8)| {
            let availability = Availability { ready: *ready, total: 3, reachable: true };
            (ServiceName::new("shop", name).unwrap(), availability)
        };
        entries.iter().map(of).collect()
    }

    #[test]
    fn a_snapshot_comes_first_even_if_empty() {
        let (updates, wait) = Outbox::default().poll(&Table::new(), Instant::now());
        assert_eq!(updates.len(), 1);
        assert!(updates[0].snapshot && updates[0].services.is_empty());
        assert_eq!(wait, None);
    }

    #[test]
    fn only_what_changed_follows() {
        let now = Instant::now();
        let mut outbox = Outbox::default();
        outbox.poll(&table(&[("cart", 1), ("web", 2)]), now);
        let (updates, _) = outbox.poll(&table(&[("cart", 0), ("web", 2)]), now + MIN_INTERVAL);
        assert_eq!(updates.len(), 1);
        assert!(!updates[0].snapshot);
        assert_eq!(updates[0].services.len(), 1);
        assert_eq!(updates[0].services[0].ready, 0);
        assert!(outbox.poll(&table(&[("cart", 0), ("web", 2)]), now + MIN_INTERVAL * 2).0.is_empty());
    }

    #[test]
    fn a_flapping_service_is_mentioned_once_per_interval_and_ends_right() {
        let start = Instant::now();
        let mut outbox = Outbox::default();
        let mut mentions = 0;
        let mut last = None;
        for ms in 0..1_000 {
            let current = table(&[("cart", u8::from(ms % 2 == 0 && ms < 950))]);
            let (updates, _) = outbox.poll(&current, start + Duration::from_millis(ms));
            for service in updates.iter().flat_map(|u| &u.services) {
                mentions += 1;
                last = Some(service.ready);
            }
        }
        let (updates, wait) = outbox.poll(&table(&[("cart", 0)]), start + Duration::from_millis(1_100));
        assert_eq!(wait, None);
        last = updates.iter().flat_map(|u| &u.services).next_back().map(|s| s.ready).or(last);
        assert!(mentions <= 11, "{mentions}");
        assert_eq!(last, Some(0));
    }

    #[test]
    fn a_change_that_must_wait_says_until_when() {
        let now = Instant::now();
        let mut outbox = Outbox::default();
        outbox.poll(&table(&[("cart", 1)]), now);
        let (updates, wait) = outbox.poll(&table(&[("cart", 2)]), now + Duration::from_millis(30));
        assert!(updates.is_empty());
        assert_eq!(wait, Some(now + MIN_INTERVAL));
    }

    #[test]
    fn a_withdrawn_service_is_removed_once() {
        let now = Instant::now();
        let mut outbox = Outbox::default();
        outbox.poll(&table(&[("cart", 1)]), now);
        let (updates, _) = outbox.poll(&Table::new(), now + MIN_INTERVAL);
        assert_eq!(updates[0].removed.len(), 1);
        assert!(outbox.poll(&Table::new(), now + MIN_INTERVAL * 3).0.is_empty());
    }

    #[test]
    fn every_part_of_a_large_table_fits_a_frame() {
        let long = "x".repeat(60);
        let name = |i: usize| ServiceName::new(&"n".repeat(63), &format!("{long}{i:03}")).unwrap();
        let current: Table =
            (0..1000).map(|i| (name(i), Availability { ready: 255, total: 255, reachable: true })).collect();
        let (updates, _) = Outbox::default().poll(&current, Instant::now());
        assert_eq!(updates.iter().map(|u| u.services.len()).sum::<usize>(), 1000);
        assert!(updates.iter().all(|u| crate::frame::encode(u).is_ok()));
        assert_eq!(updates.iter().filter(|u| u.snapshot).count(), 1);
        assert!(updates.split_last().is_some_and(|(last, rest)| !last.more && rest.iter().all(|u| u.more)));
    }
}
