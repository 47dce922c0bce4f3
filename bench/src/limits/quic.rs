//! quinn alone: TLS 1.3, and its default settings but for windows and the size of packets.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use quinn::{ClientConfig, Endpoint, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{DATAGRAM, Moved, cpu};

const CHUNK: usize = 256 * 1024;
/// Enough for loopback.
const WINDOW: u32 = 4 << 20;

fn transport() -> Arc<TransportConfig> {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(DATAGRAM as u16);
    let mut transport = TransportConfig::default();
    transport
        .mtu_discovery_config(Some(discovery))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(WINDOW.into());
    Arc::new(transport)
}

fn configs() -> anyhow::Result<(ServerConfig, ClientConfig)> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let certificate: CertificateDer<'static> = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut server = ServerConfig::with_single_cert(vec![certificate.clone()], key)?;
    server.transport_config(transport());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let mut client = ClientConfig::with_root_certificates(Arc::new(roots))?;
    client.transport_config(transport());
    Ok((server, client))
}

pub(super) fn measure(time: Duration) -> anyhow::Result<Moved> {
    let (server, client) = configs()?;
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (near, far) = (runtime()?, runtime()?);
    let local = "127.0.0.1:0".parse()?;
    let listening = {
        let _entered = far.enter();
        Endpoint::server(server, local)?
    };
    let address = listening.local_addr()?;
    let reader = std::thread::spawn(move || {
        far.block_on(async move {
            let connection = listening.accept().await.context("nobody came")?.await?;
            let mut stream = connection.accept_uni().await?;
            let mut bytes = 0;
            while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
                bytes += chunk.bytes.len() as u64;
            }
            connection.close(0_u32.into(), b"done");
            listening.wait_idle().await;
            anyhow::Ok(bytes)
        })
    });
    let (began, before) = near.block_on(async {
        let mut endpoint = Endpoint::client(local)?;
        endpoint.set_default_client_config(client);
        let connection = endpoint.connect(address, "localhost")?.await?;
        let mut stream = connection.open_uni().await?;
        let chunk = Bytes::from(vec![7; CHUNK]);
        let (began, before) = (Instant::now(), cpu());
        while began.elapsed() < time {
            stream.write_chunk(chunk.clone()).await?;
        }
        stream.finish()?;
        drop(connection.closed().await);
        anyhow::Ok((began, before))
    })?;
    let bytes = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    Ok(Moved::since(began, before, bytes))
}
