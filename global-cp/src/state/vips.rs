//! Which number a global service has. A number stays with a service for the service's life, and waits for it afterwards:
//! a withdrawn service that returns gets its old number back, so its VIP does not move. Numbers of services that are
//! gone are given to others only when no fresh one is left, the longest-gone first.

use std::collections::{BTreeSet, VecDeque};

use isthmus_model::ids::{ServiceName, VipIndex};
use serde::{Deserialize, Serialize};

/// The highest number: what fits a VIP range of 16 host bits without network and broadcast address.
pub(super) const MAX_VIP_INDEX: u32 = 65_534;

/// The numbers that are not in use by a service, and how to get one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct VipIndexes {
    /// The highest number ever given away.
    last: u32,
    /// In order of their release.
    quarantine: VecDeque<(ServiceName, VipIndex)>,
}

impl VipIndexes {
    /// How many services could still get a number.
    pub(super) fn available(&self) -> usize {
        let fresh = MAX_VIP_INDEX.saturating_sub(self.last);
        self.quarantine.len().saturating_add(usize::try_from(fresh).unwrap_or(usize::MAX))
    }

    /// Numbers for services that have none. Returning services come first, lest another of the same batch takes their
    /// number. Services are left out only when more are asked for than [`Self::available`].
    pub(super) fn assign(&mut self, services: &BTreeSet<ServiceName>) -> Vec<(ServiceName, VipIndex)> {
        let mut given = Vec::with_capacity(services.len());
        self.quarantine.retain(|(service, index)| {
            let returning = services.contains(service);
            if returning {
                given.push((service.clone(), *index));
            }
            !returning
        });
        let returned: BTreeSet<ServiceName> = given.iter().map(|(service, _)| service.clone()).collect();
        for service in services.difference(&returned) {
            let index = if self.last < MAX_VIP_INDEX {
                self.last += 1;
                VipIndex(self.last)
            } else if let Some((_, index)) = self.quarantine.pop_front() {
                index
            } else {
                break;
            };
            given.push((service.clone(), index));
        }
        given
    }

    /// The service is gone; its number waits for it.
    pub(super) fn release(&mut self, service: ServiceName, index: VipIndex) {
        self.quarantine.push_back((service, index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<ServiceName> {
        names.iter().map(|name| ServiceName::new("shop", name).unwrap()).collect()
    }

    #[test]
    fn a_returning_service_gets_its_old_number_back() {
        let mut vips = VipIndexes::default();
        let given = vips.assign(&names(&["a", "b"]));
        assert_eq!(given.iter().map(|(_, i)| i.0).collect::<Vec<_>>(), [1, 2]);
        let (a, index) = given[0].clone();
        vips.release(a.clone(), index);
        assert_eq!(
            vips.assign(&names(&["0-earlier-in-order", "a"])),
            [(a, VipIndex(1)), (ServiceName::new("shop", "0-earlier-in-order").unwrap(), VipIndex(3))]
        );
    }

    #[test]
    fn only_exhaustion_reuses_a_number_and_the_longest_gone_goes_first() {
        let mut vips = VipIndexes { last: MAX_VIP_INDEX, quarantine: VecDeque::new() };
        assert_eq!(vips.available(), 0);
        assert!(vips.assign(&names(&["late"])).is_empty());
        vips.release(ServiceName::new("shop", "x").unwrap(), VipIndex(9));
        vips.release(ServiceName::new("shop", "y").unwrap(), VipIndex(4));
        assert_eq!(vips.available(), 2);
        assert_eq!(vips.assign(&names(&["late"])), [(ServiceName::new("shop", "late").unwrap(), VipIndex(9))]);
    }
}
