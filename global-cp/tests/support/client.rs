//! A client of the admin API that is nobody in particular: with or without a certificate, with whatever headers.

use std::{path::Path, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use isthmus_identity::{ca::CertificateAuthority, keys::KeyPair, svid::Svid, tls::IdentitySource, tls::client_config};
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::{Admin, ControlPlane, DEADLINE, anyone, federation, trust};

#[derive(Clone)]
pub(crate) struct Client {
    address: std::net::SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    bearer: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Client {
    /// Without a certificate.
    pub(crate) fn stranger(cp: &ControlPlane) -> Self {
        Self::with(&cp.admin, None)
    }

    /// With the control plane's own administrator's certificate.
    pub(crate) fn root(cp: &ControlPlane) -> Self {
        Self { address: cp.admin.address, tls: cp.admin.tls.clone(), bearer: None }
    }

    /// With a certificate `spiffe://<federation>/admin/<name>`, which whoever has the CA's key can make.
    pub(crate) fn admin(cp: &ControlPlane, state_dir: &Path, name: &str) -> Self {
        let ca = CertificateAuthority::load_or_create(&state_dir.join("ca"), &federation()).unwrap();
        let key = KeyPair::generate().unwrap();
        let id = format!("spiffe://{}/admin/{name}", federation()).parse().unwrap();
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(3600)).unwrap();
        Self::with(&cp.admin, Some(&Svid::new(chain, &key).unwrap()))
    }

    fn with(admin: &Admin, svid: Option<&Svid>) -> Self {
        let source = svid.map(|svid| IdentitySource::new(svid.clone()));
        let tls = client_config(source.as_ref(), &trust(&admin.root), anyone(), &[b"http/1.1"]).unwrap();
        Self { address: admin.address, tls: Arc::new(tls), bearer: None }
    }

    /// The same with a token.
    pub(crate) fn bearing(&self, token: &str) -> Self {
        Self { bearer: Some(token.to_owned()), ..self.clone() }
    }

    pub(crate) fn token(&self) -> Option<&str> {
        self.bearer.as_deref()
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Reply {
        self.send("POST", path, &[], body).await
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> Reply {
        self.send("PUT", path, &[], &body.to_string()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        self.send("DELETE", path, &[], "").await
    }

    pub(crate) async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        timeout(DEADLINE, self.try_send(method, path, headers, body)).await.expect("an answer in time").unwrap()
    }

    pub(crate) async fn try_send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> anyhow::Result<Reply> {
        let tcp = TcpStream::connect(self.address).await?;
        let tls = TlsConnector::from(self.tls.clone()).connect(ServerName::try_from("127.0.0.1")?, tcp).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(tls)).await?;
        let driver = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "cp");
        if let Some(token) = &self.bearer {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = sender.send_request(request.body(Full::new(Bytes::from(body.to_owned())))?).await?;
        let (head, body) = answer.into_parts();
        let bytes = body.collect().await?.to_bytes();
        driver.abort();
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Ok(Reply { status: head.status, headers: head.headers, body })
    }
}

impl Reply {
    pub(crate) fn ok(self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.body);
        self.body
    }

    pub(crate) fn code(&self) -> (u16, &str) {
        (self.status.as_u16(), self.body["error"]["code"].as_str().unwrap_or_default())
    }

    pub(crate) fn message(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_default()
    }
}
