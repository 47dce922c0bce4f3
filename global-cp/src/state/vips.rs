//! Which number a global service has. A number stays with a service for the service's life, and waits for it afterwards:
//! a withdrawn service that returns gets its old number back, so its VIP does not move. Numbers of services that are
//! gone are given to others only when no fresh one is left, the longest-gone first, and only after a quarantine: a name
//! that somebody resolved must not lead to another service.

use std::collections::{BTreeSet, VecDeque};

use isthmus_model::{
    ids::{ServiceName, VipIndex},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

/// The highest number: what fits a VIP range of 16 host bits without network and broadcast address.
pub(super) const MAX_VIP_INDEX: u32 = 65_534;

/// How long a number waits for its service alone: longer than what resolves names once a day.
const QUARANTINE_MS: u64 = 24 * 3600 * 1000;

/// The numbers that are not in use by a service, and how to get one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct VipIndexes {
    /// The highest number ever given away.
    last: u32,
    /// In order of their release.
    quarantine: VecDeque<Released>,
}

/// A number that waits for its service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Released {
    service: ServiceName,
    index: VipIndex,
    at: Timestamp,
}

impl Released {
    fn free_at(&self) -> Timestamp {
        Timestamp(self.at.0.saturating_add(QUARANTINE_MS))
    }
}

impl VipIndexes {
    /// With so many fresh numbers left.
    #[cfg(test)]
    pub(super) fn with_left(left: u32) -> Self {
        Self { last: MAX_VIP_INDEX - left, quarantine: VecDeque::new() }
    }

    /// How many services could get a number now.
    pub(super) fn available(&self, now: Timestamp) -> usize {
        let fresh = MAX_VIP_INDEX.saturating_sub(self.last);
        let over = self.quarantine.iter().take_while(|released| released.free_at() <= now).count();
        over.saturating_add(usize::try_from(fresh).unwrap_or(usize::MAX))
    }

    /// When the next number's quarantine is over.
    pub(super) fn next_free(&self) -> Option<Timestamp> {
        self.quarantine.front().map(Released::free_at)
    }

    /// Numbers for services that have none. Returning services come first, lest another of the same batch takes their
    /// number. Services are left out only when more are asked for than [`Self::available`].
    pub(super) fn assign(&mut self, services: &BTreeSet<ServiceName>, now: Timestamp) -> Vec<(ServiceName, VipIndex)> {
        if services.is_empty() {
            return Vec::new();
        }
        let mut given = Vec::with_capacity(services.len());
        self.quarantine.retain(|released| {
            let returning = services.contains(&released.service);
            if returning {
                given.push((released.service.clone(), released.index));
            }
            !returning
        });
        let returned: BTreeSet<ServiceName> = given.iter().map(|(service, _)| service.clone()).collect();
        for service in services.difference(&returned) {
            let index = if self.last < MAX_VIP_INDEX {
                self.last += 1;
                VipIndex(self.last)
            } else if let Some(released) = self.quarantine.pop_front_if(|released| released.free_at() <= now) {
                released.index
            } else {
                break;
            };
            given.push((service.clone(), index));
        }
        given
    }

    /// The service is gone; its number waits for it.
    pub(super) fn release(&mut self, service: ServiceName, index: VipIndex, now: Timestamp) {
        self.quarantine.push_back(Released { service, index, at: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<ServiceName> {
        names.iter().map(|name| ServiceName::new("shop", name).unwrap()).collect()
    }

    const DAY: u64 = QUARANTINE_MS;

    #[test]
    fn a_returning_service_gets_its_old_number_back() {
        let mut vips = VipIndexes::default();
        let given = vips.assign(&names(&["a", "b"]), Timestamp(0));
        assert_eq!(given.iter().map(|(_, i)| i.0).collect::<Vec<_>>(), [1, 2]);
        let (a, index) = given[0].clone();
        vips.release(a.clone(), index, Timestamp(0));
        assert_eq!(
            vips.assign(&names(&["0-earlier-in-order", "a"]), Timestamp(9 * DAY)),
            [(a, VipIndex(1)), (ServiceName::new("shop", "0-earlier-in-order").unwrap(), VipIndex(3))]
        );
    }

    #[test]
    fn only_exhaustion_reuses_a_number_after_its_quarantine_and_the_longest_gone_goes_first() {
        let mut vips = VipIndexes { last: MAX_VIP_INDEX, quarantine: VecDeque::new() };
        assert_eq!(vips.available(Timestamp(9 * DAY)), 0);
        assert!(vips.assign(&names(&["late"]), Timestamp(0)).is_empty());
        vips.release(ServiceName::new("shop", "x").unwrap(), VipIndex(9), Timestamp(1));
        vips.release(ServiceName::new("shop", "y").unwrap(), VipIndex(4), Timestamp(2));
        assert_eq!((vips.available(Timestamp(DAY)), vips.next_free()), (0, Some(Timestamp(DAY + 1))));
        assert!(vips.assign(&names(&["late"]), Timestamp(DAY)).is_empty(), "still in quarantine");
        assert_eq!(vips.available(Timestamp(DAY + 1)), 1);
        let late = ServiceName::new("shop", "late").unwrap();
        assert_eq!(vips.assign(&names(&["late"]), Timestamp(DAY + 1)), [(late, VipIndex(9))]);
    }
}
