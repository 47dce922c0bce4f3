//! The control plane's admin REST (`docs` call it the admin API): JSON over TLS, with a certificate, a token, or both, one
//! method per kind of call.
//!
//! Errors are for people: where it was tried, what it means, what to check. Every call has a deadline and a bounded
//! answer.

use std::{error::Error, time::Duration};

use anyhow::{Context as _, bail};
use isthmus_model::ids::ClusterName;
use reqwest::{Client as Http, Method, RequestBuilder, StatusCode};
use serde::{Serialize, de::DeserializeOwned};

use crate::{context::Context, shapes::Failure};

const CONNECT: Duration = Duration::from_secs(5);
const CALL: Duration = Duration::from_secs(20);
/// Of a whole state.
const TRANSFER: Duration = Duration::from_secs(600);
/// A federation's whole state as JSON.
const MAX_ANSWER: usize = 512 * 1024 * 1024;

/// Talks to one control plane.
pub(crate) struct Client {
    http: Http,
    context: Context,
}

impl Client {
    pub(crate) fn new(context: Context) -> anyhow::Result<Self> {
        let builder = Http::builder()
            .tls_backend_preconfigured(context.tls.clone())
            .connect_timeout(CONNECT)
            .timeout(CALL)
            .redirect(reqwest::redirect::Policy::none())
            // The control plane is dialled directly; a proxy would break mutual TLS.
            .no_proxy();
        Ok(Self { http: builder.build().context("set up HTTPS")?, context })
    }

    /// For messages.
    pub(crate) fn server(&self) -> &str {
        &self.context.server
    }

    /// `path` starts after `/v1/`.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(self.request(Method::GET, path), path).await
    }

    /// The same with a query, whose values may be anything.
    pub(crate) async fn query<T: DeserializeOwned>(&self, path: &str, query: &[(&str, String)]) -> anyhow::Result<T> {
        self.call(self.request(Method::GET, path).query(query), path).await
    }

    /// Replaces what is there, if its version is `expected`; 0: if there is nothing.
    pub(crate) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        expected: Option<u64>,
    ) -> anyhow::Result<T> {
        let request = self.request(Method::PUT, path).json(body);
        let request = match expected {
            None => request,
            Some(0) => request.header("if-none-match", "*"),
            Some(version) => request.header("if-match", format!("\"{version}\"")),
        };
        self.call(request, path).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call(self.request(Method::POST, path).json(body), path).await
    }

    /// A file, as it is.
    pub(crate) async fn download(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        self.bytes(self.request(Method::GET, path).timeout(TRANSFER), path).await
    }

    /// Sends a file, as it is.
    pub(crate) async fn upload<T: DeserializeOwned>(&self, path: &str, file: Vec<u8>) -> anyhow::Result<T> {
        self.call(self.request(Method::POST, path).timeout(TRANSFER).body(file), path).await
    }

    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(self.request(Method::DELETE, path), path).await
    }

    /// `clusters/<name>/<verb>`; a cluster's name needs no escaping.
    pub(crate) fn cluster_path(name: &ClusterName, verb: &str) -> String {
        format!("clusters/{name}/{verb}")
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("https://{}/v1/{path}", self.context.server));
        match &self.context.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    async fn call<T: DeserializeOwned>(&self, request: RequestBuilder, path: &str) -> anyhow::Result<T> {
        let body = self.bytes(request, path).await?;
        serde_json::from_slice(&body).with_context(|| {
            format!(
                "the answer of {} to /v1/{path} is not as expected; use programs of the same release",
                self.server()
            )
        })
    }

    async fn bytes(&self, request: RequestBuilder, path: &str) -> anyhow::Result<Vec<u8>> {
        let mut response = request.send().await.map_err(|e| self.explain(e))?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.explain(e))? {
            if body.len() + chunk.len() > MAX_ANSWER {
                bail!("the control plane's answer to /v1/{path} is over {MAX_ANSWER} bytes");
            }
            body.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            bail!(self.refusal(status, &body));
        }
        Ok(body)
    }

    /// What a status other than success means.
    fn refusal(&self, status: StatusCode, body: &[u8]) -> String {
        let failure = serde_json::from_slice::<Failure>(body).map(|f| f.error);
        let said = match failure {
            Ok(error) => {
                let field = error.field.map(|f| format!("{f}: ")).unwrap_or_default();
                let problems: String = error.problems.iter().map(|problem| format!("\n  {problem}")).collect();
                format!("{field}{} ({}){problems}", error.message, error.code)
            }
            Err(_) => format!("HTTP {status}"),
        };
        match status {
            StatusCode::UNAUTHORIZED => {
                format!("{} does not know who is calling: {said}\n{}", self.server(), self.check_credentials())
            }
            // It says which role is missing, and who can give it.
            StatusCode::FORBIDDEN => {
                format!("not allowed: {said}\n`isthmusctl whoami` shows as whom you came, and your roles")
            }
            StatusCode::TOO_MANY_REQUESTS => {
                format!("{} asks for patience: {said}\nsomething else may be using the same credentials", self.server())
            }
            _ => said,
        }
    }

    /// What a failure below HTTP means.
    fn explain(&self, error: reqwest::Error) -> anyhow::Error {
        let server = self.server();
        let reason = innermost(&error);
        if reason.contains("received fatal alert") {
            let check = self.check_certificate();
            return anyhow::anyhow!("{server} refused this program's certificate: {reason}\n{check}");
        }
        if reason.contains("invalid peer certificate") || reason.contains("certificate") {
            return anyhow::anyhow!(
                "what answers at {server} is not the control plane of this context's federation: {reason}\n\
                 check `server`, `ca` and `federation` in {}",
                self.context.path.display()
            );
        }
        if error.is_connect() || error.is_timeout() {
            return anyhow::anyhow!(
                "the control plane at {server} does not answer: {reason}\n\
                 check that isthmus-global-cp is running, that its listen.admin is this address, and that no firewall \
                 is between; {} names the address",
                self.context.path.display()
            );
        }
        anyhow::anyhow!("the call to {server} failed: {reason}")
    }

    fn check_credentials(&self) -> String {
        match (&self.context.token, self.context.certificate) {
            (Some(_), true) => format!(
                "{} has a certificate and a token, and then the token decides: check `token` or `tokenFile`, or take it away",
                self.context.path.display()
            ),
            (Some(_), false) => format!(
                "check `token` or `tokenFile` in {}: it must be whole, not expired, and of this federation",
                self.context.path.display()
            ),
            (None, _) => self.check_certificate(),
        }
    }

    fn check_certificate(&self) -> String {
        format!(
            "check `cert` and `key` in {}: an admin certificate of this federation is needed, and it must not have \
             expired; the control plane writes a new one when it starts without one",
            self.context.path.display()
        )
    }
}

/// The last error of the chain: the others only say that something below failed.
fn innermost(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
