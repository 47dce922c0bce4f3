//! Wire contracts of Isthmus: the protobuf messages of every stream, the Kubernetes-shaped manifests, and the
//! conversions that turn them into domain types, validating once, at the edge.
//!
//! `proto` is generated; `convert` is the only way from it to `isthmus_model`; `manifest` parses YAML objects.

pub mod convert;
pub mod manifest;

#[allow(missing_docs, unreachable_pub, rustdoc::all, clippy::all, clippy::unwrap_used, clippy::indexing_slicing)]
pub mod proto {
    //! Generated from `proto/*.proto`.
    pub mod common {
        pub mod v1 {
            tonic::include_proto!("isthmus.common.v1");
        }
    }
    pub mod federation {
        pub mod v1 {
            tonic::include_proto!("isthmus.federation.v1");
        }
    }
    pub mod local {
        pub mod v1 {
            tonic::include_proto!("isthmus.local.v1");
        }
    }
    pub mod peers {
        pub mod v1 {
            tonic::include_proto!("isthmus.peers.v1");
        }
    }
    pub mod tunnel {
        pub mod v1 {
            tonic::include_proto!("isthmus.tunnel.v1");
        }
    }
}
