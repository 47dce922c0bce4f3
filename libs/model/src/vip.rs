//! A service's virtual address in a cluster: the cluster's VIP range plus the service's stable index.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::ids::VipIndex;

/// `range.network() + index`, or `None` if the index lies outside the range (0 and the broadcast address excluded).
pub fn vip(range: Ipv4Net, index: VipIndex) -> Option<Ipv4Addr> {
    let base = u32::from(range.network());
    let last = u32::from(range.broadcast());
    let address = base.checked_add(index.0)?;
    (index.0 > 0 && address < last).then(|| Ipv4Addr::from(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vip_is_base_plus_index_and_stays_inside_the_range() {
        let of = |range: &str, index| vip(range.parse().unwrap(), VipIndex(index)).map(|ip| ip.to_string());
        assert_eq!(of("127.64.0.0/16", 1).as_deref(), Some("127.64.0.1"));
        assert_eq!(of("127.64.0.0/16", 256).as_deref(), Some("127.64.1.0"));
        assert_eq!(of("127.64.7.9/16", 1).as_deref(), Some("127.64.0.1"));
        assert_eq!(of("10.0.0.0/30", 2).as_deref(), Some("10.0.0.2"));
        for (range, index) in [("127.64.0.0/16", 0), ("10.0.0.0/30", 3), ("10.0.0.0/30", u32::MAX), ("10.0.0.1/32", 1)]
        {
            assert_eq!(of(range, index), None, "{range} {index}");
        }
    }
}
