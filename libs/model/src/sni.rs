//! The server name that a sidecar puts into its ClientHello and a gateway routes by (docs/tunnel.md):
//! `<port>.<service>.<namespace>[.<selector>].svc.<cluster or "any">.<federation>`.
//!
//! [`encode`] and [`parse`] are inverse. Names that do not fit into 253 bytes are not shortened: there is no SNI for them.

use crate::ids::{ANY_CLUSTER, ClusterName, ServiceName, TrustDomain, check_label};

/// What an SNI names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The service.
    pub service: ServiceName,
    /// The port's number as the global service names it.
    pub port: u16,
    /// Pinned to this cluster; `None`: the gateway chooses.
    pub cluster: Option<ClusterName>,
    /// One hostname of a headless service.
    pub selector: Option<String>,
}

/// Why an SNI was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SniError {
    /// Not under this federation.
    #[error("the name is not under this federation's domain")]
    ForeignDomain,
    /// Not of the form above.
    #[error("the name is not <port>.<service>.<namespace>[.<selector>].svc.<cluster|any>.<federation>")]
    Malformed,
}

/// The longest name that DNS, and so SNI, can carry.
const MAX_NAME: usize = 253;

/// Writes the SNI for `route`.
///
/// `None` if there is none: it would exceed 253 bytes, the port is 0, the selector is not a label, or the federation's
/// trust domain is not a DNS name of labels with 1 to 63 bytes.
pub fn encode(route: &Route, federation: &TrustDomain) -> Option<String> {
    let Route { service, port, cluster, selector } = route;
    if *port == 0 || !federation.as_str().split('.').all(|label| matches!(label.len(), 1..=63)) {
        return None;
    }
    let selector = match selector {
        Some(s) => format!("{}.", valid_selector(s)?),
        None => String::new(),
    };
    let cluster = cluster.as_ref().map_or(ANY_CLUSTER, ClusterName::as_str);
    let name = format!("{port}.{}.{}.{selector}svc.{cluster}.{federation}", service.name(), service.namespace);
    (name.len() <= MAX_NAME).then_some(name)
}

/// Reads an SNI, in upper or lower case; the inverse of [`encode`]. Allocates nothing for a name that is too long.
pub fn parse(name: &str, federation: &TrustDomain) -> Result<Route, SniError> {
    if name.len() > MAX_NAME {
        return Err(SniError::Malformed);
    }
    let name = name.to_ascii_lowercase();
    let rest = name.strip_suffix(federation.as_str()).and_then(|rest| rest.strip_suffix('.'));
    let labels: Vec<&str> = rest.ok_or(SniError::ForeignDomain)?.split('.').collect();
    let (port, service, namespace, selector, cluster) = match labels.as_slice() {
        [port, service, namespace, "svc", cluster] => (port, service, namespace, None, *cluster),
        [port, service, namespace, selector, "svc", cluster] => (port, service, namespace, Some(*selector), *cluster),
        _ => return Err(SniError::Malformed),
    };
    let read = || {
        Some(Route {
            service: ServiceName::new(namespace, service).ok()?,
            port: canonical_port(port)?,
            cluster: if cluster == ANY_CLUSTER { None } else { Some(cluster.parse().ok()?) },
            selector: match selector {
                Some(s) => Some(valid_selector(s)?.to_owned()),
                None => None,
            },
        })
    };
    read().ok_or(SniError::Malformed)
}

fn valid_selector(selector: &str) -> Option<&str> {
    check_label("selector", selector).is_ok().then_some(selector)
}

/// Digits without a leading zero or sign, so that each port has one spelling.
fn canonical_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if digits { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn federation() -> TrustDomain {
        "isthmus.example".parse().unwrap()
    }

    #[test]
    fn the_form_is_as_documented() {
        let mut route =
            Route { service: ServiceName::new("shop", "cart").unwrap(), port: 80, cluster: None, selector: None };
        let name = |route: &Route| encode(route, &federation()).unwrap();
        assert_eq!(name(&route), "80.cart.shop.svc.any.isthmus.example");
        route.cluster = Some("us-west".parse().unwrap());
        assert_eq!(name(&route), "80.cart.shop.svc.us-west.isthmus.example");
        route.selector = Some("db-0".into());
        assert_eq!(name(&route), "80.cart.shop.db-0.svc.us-west.isthmus.example");
        assert_eq!(parse("80.CART.shop.db-0.Svc.us-west.ISTHMUS.example", &federation()), Ok(route));
    }

    #[test]
    fn what_is_not_of_the_form_is_refused() {
        for foreign in ["", "example.com", "isthmus.example", "80.cart.shop.svc.any.notisthmus.example.org"] {
            assert_eq!(parse(foreign, &federation()), Err(SniError::ForeignDomain), "{foreign}");
        }
        for malformed in [
            "0.cart.shop.svc.any",
            "080.cart.shop.svc.any",
            "+80.cart.shop.svc.any",
            "65536.cart.shop.svc.any",
            ".cart.shop.svc.any",
            "80.cart.shop.sv.any",
            "80.cart.shop.svc",
            "80.cart.shop.-.svc.any",
            "80.cart.shop.a.b.svc.any",
            "80.c_t.shop.svc.any",
            "",
        ] {
            let name = format!("{malformed}.isthmus.example");
            assert_eq!(parse(&name, &federation()), Err(SniError::Malformed), "{name}");
        }
        assert_eq!(parse(&"a".repeat(254), &federation()), Err(SniError::Malformed));
        assert_eq!(parse("80.cart.shop.svc.any.isthmus.example.", &federation()), Err(SniError::ForeignDomain));
    }

    proptest! {
        #[test]
        fn encode_and_parse_are_inverse(
            (service, namespace) in ("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"),
            port in 1..=u16::MAX,
            cluster in proptest::option::of("[a-z]([a-z0-9-]{0,61}[a-z0-9])?"),
            selector in proptest::option::of("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?|svc"),
        ) {
            let cluster = match cluster.map(|c| c.parse()) {
                Some(Err(_)) => return Ok(()), // the reserved word
                Some(Ok(c)) => Some(c),
                None => None,
            };
            let route = Route { service: ServiceName::new(&namespace, &service).unwrap(), port, cluster, selector };
            if let Some(name) = encode(&route, &federation()) {
                prop_assert!(name.len() <= MAX_NAME && name.split('.').all(|l| l.len() <= 63));
                prop_assert_eq!(parse(&name, &federation()), Ok(route.clone()));
                prop_assert_eq!(parse(&name.to_ascii_uppercase(), &federation()), Ok(route));
            }
        }

        #[test]
        fn what_parses_encodes_to_the_same_text(name in "([0-9]{1,5}|[a-z.-]{1,9})(\\.[a-z0-9-]{0,4}){2,3}\\.svc\\.[a-z]{1,3}\\.isthmus\\.example") {
            if let Ok(route) = parse(&name, &federation()) {
                prop_assert_eq!(encode(&route, &federation()), Some(name));
            }
        }

        #[test]
        fn garbage_never_panics(name in ".*") {
            let _ = parse(&name, &federation());
        }
    }
}
