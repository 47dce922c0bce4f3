//! Where everything runs: on one loopback, or at the two ends of a long path.
//!
//! Both are private network namespaces of one [`Link`] where that can be had (root), so that addresses, ports and congestion
//! control are our own; without it the loopback is the machine's, and there is no long path. Client and A-side are near, B-side
//! and server are far.

use std::{
    ffi::OsStr,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow};
use isthmus_e2e::federation::process::http_get;
use tokio::{process::Command, time::timeout};

use crate::wan::{Link, Side};

const PATIENCE: Duration = Duration::from_secs(5);

/// An end of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Near,
    Far,
}

/// A topology's place.
#[derive(Clone, Debug)]
pub(super) struct Place {
    link: Option<Arc<Link>>,
    apart: bool,
}

impl Place {
    /// All on one loopback.
    pub(super) fn together(link: Option<Arc<Link>>) -> Self {
        Self { link, apart: false }
    }

    /// At both ends of `link`.
    pub(super) fn apart(link: Arc<Link>) -> Self {
        Self { link: Some(link), apart: true }
    }

    /// A command whose process runs at `end`, and dies with this one.
    pub(super) fn command(&self, end: End, program: impl AsRef<OsStr>) -> Command {
        match &self.link {
            Some(link) => link.command(self.side(end), program),
            None => {
                let mut command = Command::new("setpriv");
                command.args(["--pdeathsig", "KILL", "--"]).arg(program);
                command
            }
        }
    }

    /// Where the sides of a tunnel find each other.
    pub(super) fn ip(&self, end: End) -> IpAddr {
        match (&self.link, self.apart) {
            (Some(link), true) => {
                let [near, far] = link.addresses();
                if end == End::Near { near } else { far }
            }
            _ => self.local(end),
        }
    }

    /// What only processes at the same end can reach.
    pub(super) fn local(&self, end: End) -> IpAddr {
        let host = if end == End::Near { 11 } else { 12 };
        Ipv4Addr::new(127, 0, 0, host).into()
    }

    /// `GET path` at `end`; the body, if the answer is 200.
    pub(super) async fn http_get(&self, end: End, address: SocketAddr, path: &str) -> anyhow::Result<String> {
        let path = path.to_owned();
        let ask = async move {
            let (code, body) = timeout(PATIENCE, http_get(address, &path)).await.context("no answer in time")??;
            if code == 200 { Ok(body) } else { Err(anyhow!("{path} on {address} says {code}: {body}")) }
        };
        let Some(link) = &self.link else { return ask.await };
        let inside = link.spawn(self.side(end), move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.context("start a runtime")?.block_on(ask)
        })?;
        let joined = tokio::task::spawn_blocking(move || inside.join()).await.context("wait for a thread")?;
        joined.map_err(|_| anyhow!("a thread died"))??
    }

    fn side(&self, end: End) -> Side {
        if self.apart && end == End::Far { Side::B } else { Side::A }
    }
}
