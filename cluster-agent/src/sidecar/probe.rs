//! Whether the app answers: a TCP connection to each of its ports ten times a second; a machine's stand-in for the kubelet's
//! readiness.
//!
//! An app that accepts is ready at once. One that refuses has no listener and is unready at once; one that is silent is
//! unready after two failures in a row, so that one lost race is not an outage.
//! A process that is stopped still accepts (its kernel does): that is seen by those who wait for its answers, not here.

use std::{collections::BTreeMap, io::ErrorKind, net::SocketAddr, time::Duration};

use futures_util::future::join_all;
use isthmus_runtime::tasks::Shutdown;
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

const INTERVAL: Duration = Duration::from_millis(100);
/// On loopback an accept queue that is full for this long is a failure.
const DEADLINE: Duration = Duration::from_millis(200);
const FAILURES: u8 = 2;

/// Readiness by the sidecar's port. A port that was never probed is not ready.
pub(super) type Ready = BTreeMap<u16, bool>;

/// One port's history, as far as it matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Port {
    ready: bool,
    failures: u8,
}

impl Port {
    fn probed(&mut self, answer: Answer) {
        match answer {
            Answer::Accepted => *self = Self { ready: true, failures: 0 },
            Answer::Refused => *self = Self { ready: false, failures: FAILURES },
            Answer::Silent => {
                self.failures = self.failures.saturating_add(1);
                self.ready &= self.failures < FAILURES;
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Accepted,
    Refused,
    Silent,
}

/// Probes `apps` (by the sidecar's port) until shutdown, and puts every change into `ready`.
pub(super) async fn run(apps: BTreeMap<u16, SocketAddr>, ready: watch::Sender<Ready>, shutdown: Shutdown) {
    let mut ports: BTreeMap<u16, Port> = apps.keys().map(|port| (*port, Port::default())).collect();
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.requested() => return,
            _ = ticks.tick() => {}
        }
        let answers = join_all(apps.values().map(|app| probe(*app))).await;
        if shutdown.is_requested() {
            // A drain has set everything unready meanwhile; that must stand.
            return;
        }
        for (port, answer) in ports.values_mut().zip(answers) {
            port.probed(answer);
        }
        let now: Ready = ports.iter().map(|(port, state)| (*port, state.ready)).collect();
        ready.send_if_modified(|held| {
            let changed = *held != now;
            if changed {
                tracing::info!(ready = ?now, "the app's readiness changed");
                *held = now;
            }
            changed
        });
    }
}

async fn probe(app: SocketAddr) -> Answer {
    match timeout(DEADLINE, TcpStream::connect(app)).await {
        Ok(Ok(_)) => Answer::Accepted,
        Ok(Err(e)) if e.kind() == ErrorKind::ConnectionRefused => Answer::Refused,
        Ok(Err(_)) | Err(_) => Answer::Silent,
    }
}

#[cfg(test)]
mod tests {
    use isthmus_runtime::tasks::Tasks;
    use tokio::{net::TcpListener, time::timeout};

    use super::*;

    #[test]
    fn one_silence_is_forgiven_a_refusal_is_not_and_one_success_is_enough() {
        let mut port = Port::default();
        port.probed(Answer::Accepted);
        assert!(port.ready);
        port.probed(Answer::Silent);
        assert!(port.ready);
        port.probed(Answer::Silent);
        assert!(!port.ready);
        port.probed(Answer::Accepted);
        assert!(port.ready);
        port.probed(Answer::Refused);
        assert!(!port.ready);
    }

    #[tokio::test]
    async fn an_apps_death_and_return_are_noticed() {
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = app.local_addr().unwrap();
        let (sender, mut ready) = watch::channel(Ready::new());
        let tasks = Tasks::new();
        tasks.spawn("probe", run([(8443, address)].into(), sender, tasks.shutdown()));
        let mut expect = async |wanted: bool| {
            let seen = ready.wait_for(|ready| ready.get(&8443) == Some(&wanted));
            timeout(Duration::from_secs(5), seen).await.unwrap().unwrap();
        };
        expect(true).await;
        drop(app);
        expect(false).await;
        let _app = TcpListener::bind(address).await.unwrap();
        expect(true).await;
        tasks.run_until(async {}, Duration::from_secs(1)).await.unwrap();
    }
}
