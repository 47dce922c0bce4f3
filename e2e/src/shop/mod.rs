//! The sample app: `web` calls `cart` and `catalog` (HTTP, gRPC) and `orders` (a TCP protocol in which the server speaks
//! first). Each says who it is, in which cluster, and who called.
//!
//! Apps listen on 127.0.0.1 only; the mesh reaches them through their sidecar.

pub mod http;
pub mod load;
pub mod orders;
pub mod web;

use serde::{Deserialize, Serialize};

/// Generated from `proto/shop.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod proto {
    tonic::include_proto!("isthmus.shop.v1");
}

/// Who an instance is.
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
pub struct Instance {
    /// The cluster it runs in.
    #[arg(long)]
    pub cluster: String,
    /// Its own name, for example cart-1.
    #[arg(long)]
    pub instance: String,
}

/// What an HTTP instance answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The service that answered.
    pub service: String,
    /// Where it runs.
    pub cluster: String,
    /// Which instance.
    pub instance: String,
    /// SPIFFE ID of the caller, from Envoy's x-forwarded-client-cert; empty if there was none.
    pub caller: String,
    /// The request's method and path.
    pub request: String,
}

/// The URI field of the last element of an `x-forwarded-client-cert` header: the immediate caller's SPIFFE ID.
///
/// Format: Envoy's documentation of the header; elements are separated by commas, fields by semicolons.
pub fn caller_of(xfcc: &str) -> String {
    let last = xfcc.rsplit(',').next().unwrap_or_default();
    last.split(';').find_map(|field| field.strip_prefix("URI=")).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::caller_of;

    #[test]
    fn the_caller_is_the_uri_of_the_last_element() {
        let xfcc = "By=spiffe://a/x;URI=spiffe://a/ns/n/sa/first,By=spiffe://b/y;Hash=00;URI=spiffe://b/ns/n/sa/second";
        assert_eq!(caller_of(xfcc), "spiffe://b/ns/n/sa/second");
        assert_eq!(caller_of(""), "");
    }
}
