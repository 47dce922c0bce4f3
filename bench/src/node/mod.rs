//! One real gateway in a process of its own, told by files what the agent would tell it.
//!
//! In: a [`Spec`] as JSON. The gateway is the library as it is deployed, with the runtime that its own program uses; only the
//! feed is given instead of followed, so that no control plane and no agent take part in what is measured.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use isthmus_gateway::{Config, Feed, Given, View, build};
use isthmus_identity::{bundle::TrustStore, svid::Svid, tls::IdentitySource};
use isthmus_model::{
    global::{ClusterInfo, ClusterState, Exporter, GlobalPort, GlobalService, GlobalSnapshot, Locality, Settings},
    ids::{ClusterIndex, ClusterName, Epoch, Revision, ServiceName, Stamp, TrustDomain, VipIndex},
    local::{Endpoint, LocalEndpoints},
    service::{AppProtocol, GatewayAddress, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Name of the only service's only port.
const PORT: &str = "tcp";

/// Options of the hidden subcommand.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A file with a specification.
    #[arg(long)]
    spec: PathBuf,
}

/// What one gateway is and is told.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Spec {
    /// The gateway's configuration, as its file would have it.
    pub(crate) config: serde_json::Value,
    pub(crate) cluster: ClusterName,
    pub(crate) federation: TrustDomain,
    /// The folder with the certificates: `ca.pem`, and `<identity>.pem` and `.key`.
    pub(crate) certificates: PathBuf,
    pub(crate) identity: String,
    /// All clusters, in the order of their indexes, with their gateways.
    pub(crate) members: Vec<(ClusterName, Vec<SocketAddr>)>,
    pub(crate) service: ServiceName,
    pub(crate) port: u16,
    pub(crate) exporters: Vec<ClusterName>,
    /// This cluster's endpoints of the service.
    pub(crate) endpoints: Vec<SocketAddr>,
}

/// Serves until SIGTERM.
pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let text = std::fs::read(&args.spec).with_context(|| format!("read {}", args.spec.display()))?;
    let spec: Spec = serde_json::from_slice(&text).with_context(|| format!("understand {}", args.spec.display()))?;
    let config: Config =
        serde_json::from_value(spec.config.clone()).context("understand the gateway's configuration")?;
    let telemetry = isthmus_runtime::telemetry::init("isthmus-gateway", &config.name, &config.telemetry)?;
    // The sender is kept: a feed that ends is a gateway that stops.
    let (_tell, view) = watch::channel(Arc::new(spec.view()?));
    let feed = Feed::Given(spec.given(view)?);
    let outcome = build(config, feed).await.context("start the gateway")?.run_until_signal().await;
    telemetry.shutdown();
    Ok(outcome?)
}

impl Spec {
    /// Writes it where a node will read it.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(self).context("write a specification")?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    fn given(&self, view: watch::Receiver<Arc<View>>) -> anyhow::Result<Given> {
        let dir = &self.certificates;
        let svid =
            Svid::load(dir, &self.identity).context("read the certificate")?.context("there is no certificate")?;
        let root = CertificateDer::from_pem_file(dir.join("ca.pem")).context("read the federation's root")?;
        let trust = TrustStore::new();
        trust.set(BTreeMap::from([(self.federation.clone(), vec![root])]));
        let identity = IdentitySource::new(svid);
        Ok(Given { cluster: self.cluster.clone(), federation: self.federation.clone(), identity, trust, view })
    }

    fn view(&self) -> anyhow::Result<View> {
        let endpoints = self.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?;
        let endpoints = LocalEndpoints { services: BTreeMap::from([(self.service.clone(), endpoints)]) };
        Ok(View { global: Some(Arc::new(self.global()?)), endpoints: Arc::new(endpoints) })
    }

    fn global(&self) -> anyhow::Result<GlobalSnapshot> {
        let clusters = (1..).zip(&self.members).map(|(index, (name, tunnels))| {
            let gateways = (1..).zip(tunnels);
            let gateways =
                gateways.map(|(n, tunnel)| GatewayAddress { name: format!("gateway-{n}"), tunnel: Some(*tunnel) });
            let info = ClusterInfo {
                name: name.clone(),
                index: ClusterIndex(index),
                locality: Locality { region: "us".parse()?, zone: name.as_str().parse()? },
                state: ClusterState::Active,
                bundle: no_bundle(format!("{name}.example").parse()?),
                gateways: gateways.collect(),
                grant: Default::default(),
            };
            Ok((name.clone(), info))
        });
        let exporter = Exporter { created_at: Timestamp(1), identities: [].into() };
        let port = ServicePort { name: PORT.parse()?, number: self.port, protocol: AppProtocol::Tcp };
        let service = GlobalService {
            name: self.service.clone(),
            index: VipIndex(1),
            kind: ServiceKind::ClusterSetIp,
            ports: vec![GlobalPort { port, clusters: self.exporters.iter().cloned().collect() }],
            exporters: self.exporters.iter().map(|name| (name.clone(), exporter.clone())).collect(),
            conflicts: Vec::new(),
        };
        Ok(GlobalSnapshot {
            stamp: Stamp { epoch: Epoch(1), revision: Revision(1) },
            federation: self.federation.clone(),
            federation_bundle: no_bundle(self.federation.clone()),
            settings: Settings::default(),
            clusters: clusters.collect::<anyhow::Result<_>>()?,
            services: [(self.service.clone(), service.into())].into(),
        })
    }
}

fn endpoint(address: &SocketAddr) -> anyhow::Result<Endpoint> {
    Ok(Endpoint {
        ip: address.ip(),
        ports: BTreeMap::from([(PORT.parse()?, address.port())]),
        ready: true,
        has_sidecar: true,
        zone: "".parse()?,
    })
}

/// Workloads' roots play no part: gateways do not look at what they carry.
fn no_bundle(trust_domain: TrustDomain) -> TrustBundle {
    TrustBundle { trust_domain, document: r#"{"keys":[]}"#.to_owned(), predecessor_signature: Vec::new() }
}
