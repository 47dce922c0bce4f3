//! Envoy's refusals in words for the person who must mend them; Envoy's own words stay in.

use std::{collections::BTreeMap, net::SocketAddrV4};

use super::{
    delta::Rejection,
    names::{ListenerName, ResourceType},
    resources::Resources,
};

/// The refusal has its cause on Envoy's machine: the address is taken. It may be gone the next time.
pub(crate) fn is_bind_failure(rejection: &Rejection) -> bool {
    rejection.kind == ResourceType::Listener && rejection.detail.contains("cannot bind")
}

/// One sentence for `rejection`. `services` says whose a virtual address is.
pub(crate) fn explain(rejection: &Rejection, services: &BTreeMap<SocketAddrV4, String>) -> String {
    let words = &rejection.detail;
    if !is_bind_failure(rejection) {
        return format!("Envoy refuses {:?} {}: {words}", rejection.kind, rejection.name);
    }
    match ListenerName::parse(&rejection.name) {
        Some(ListenerName::Outbound(at)) => {
            let service = services.get(&at).map(String::as_str).unwrap_or("an upstream");
            format!(
                "{service} is not reachable at its virtual address: port {} of {} is taken on the sidecar's machine. \
                 An app there probably listens on 0.0.0.0:{} or [::]:{}; make it listen on its own address, or stop it. \
                 Envoy: {words}",
                at.port(),
                at.ip(),
                at.port(),
                at.port()
            )
        }
        Some(ListenerName::Inbound(port)) => format!(
            "the sidecar cannot accept traffic on port {port}: it is taken on its address. Stop what listens there \
             (ss -ltnp 'sport = :{port}'), or give the sidecar another port in `inbound`. Envoy: {words}"
        ),
        None => format!("Envoy cannot listen for {}: {words}", rejection.name),
    }
}

/// Everything to tell about a sidecar: what could not be built and what was refused.
pub(crate) fn all(
    resources: &Resources,
    rejections: &[Rejection],
    services: &BTreeMap<SocketAddrV4, String>,
) -> Vec<String> {
    resources.problems.iter().cloned().chain(rejections.iter().map(|r| explain(r, services))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: ResourceType, name: &str, detail: &str) -> Rejection {
        Rejection { kind, name: name.to_owned(), detail: detail.to_owned() }
    }

    #[test]
    fn a_taken_virtual_address_is_explained_with_service_port_and_remedy() {
        let services = [("127.64.0.1:80".parse().unwrap(), "shop/cart".to_owned())].into();
        let detail = "Error adding/updating listener(s) outbound|127.64.0.1:80: cannot bind '127.64.0.1:80': Address already in use";
        let text = explain(&refused(ResourceType::Listener, "outbound|127.64.0.1:80", detail), &services);
        for part in ["shop/cart", "127.64.0.1", "0.0.0.0:80", "make it listen on its own address", detail] {
            assert!(text.contains(part), "{part:?} missing in {text}");
        }
    }

    #[test]
    fn other_refusals_keep_envoys_words() {
        let text = explain(&refused(ResourceType::Cluster, "outbound|80|a/b", "no such extension"), &BTreeMap::new());
        assert!(text.contains("no such extension") && text.contains("outbound|80|a/b"));
    }
}
