//! One connection's story, a fault somewhere in it, and what must have come of it.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Builder,
    sync::Notify,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    net::{Net, Random, Weather},
    world::{self, Gateway, OTHERS},
};
use crate::{
    hello::{HelloReader, Progress},
    splice,
    tests::rig,
    tunnel::Close,
};

/// Steps at which a fault may come: each is reached by one end, once or never.
pub(super) const STEPS: u8 = 14;
/// In held time, for all of a case.
const DEADLINE: Duration = Duration::from_secs(30);
/// What each end says, in two halves.
const MESSAGE: usize = 40_000;
/// What the endpoint adds once the client has ended.
const POSTSCRIPT: usize = 5_000;
const GREETING: &[u8] = b"G";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Bad weather alone.
    None,
    /// The path to the gateway in use is gone for good.
    Blackhole,
    /// For less than it takes to notice.
    Blip,
    /// The far gateway ends the link.
    LinkLost,
    /// The far gateway drains.
    Drain,
    ClientResets,
    ServerResets,
}

impl Fault {
    pub(super) const ALL: [Self; 7] =
        [Self::None, Self::Blackhole, Self::Blip, Self::LinkLost, Self::Drain, Self::ClientResets, Self::ServerResets];
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) seed: u64,
    pub(super) fault: Fault,
    pub(super) at: u8,
}

/// How an end saw it end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Whole,
    Reset,
    /// Reset by itself.
    Own,
    /// An orderly end too early, so many bytes after the hello or the greeting.
    Cut(usize),
}

/// How a case went, when it went well.
#[derive(Debug)]
pub(super) struct Outcome {
    client: Seen,
    attempts: usize,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.client == Seen::Whole { "whole" } else { "reset" };
        write!(f, "{end}{}", if self.attempts > 1 { ", replayed" } else { "" })
    }
}

/// Where the story is, and the fault that waits for its step.
struct Stage {
    case: Case,
    gateways: Vec<Gateway>,
    net: Arc<Net>,
    /// Which of `gateways` is used first.
    primary: usize,
    fired: AtomicBool,
    /// The furthest step.
    step: AtomicU8,
    client_resets: Notify,
    server_resets: Notify,
    /// What each connection to an endpoint saw, by attempt.
    endpoints: Mutex<Vec<Option<Seen>>>,
    /// Something that must never be.
    wrong: Mutex<Vec<String>>,
    hello: Vec<u8>,
}

impl Case {
    pub(super) fn play(self) -> Result<Outcome, String> {
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async { timeout(DEADLINE, self.story()).await.unwrap_or(Err("it hangs".to_owned())) })
    }

    async fn story(self) -> Result<Outcome, String> {
        let mut random = Random(self.seed ^ (u64::from(self.at) << 32) ^ ((self.fault as u64) << 48));
        let weather = Weather {
            lost: random.below(60),
            doubled: random.below(60),
            delay: rig::ms(1 + random.below(20)),
            jitter: rig::ms(random.below(15)),
        };
        let net = Net::new(random.next(), weather);
        let listeners =
            [TcpListener::bind(rig::local(0)).await.unwrap(), TcpListener::bind(rig::local(0)).await.unwrap()];
        let addresses = [0, 1].map(|i| listeners[i].local_addr().unwrap());
        let gateways = world::gateways(&net, addresses).await;
        let first = loop {
            match gateways[0].first_choice() {
                Some(first) => break first,
                None => sleep(rig::ms(10)).await,
            }
        };
        let primary = gateways.iter().position(|g| g.core.cluster == first).unwrap();
        let stage = Arc::new(Stage {
            case: self,
            gateways,
            net,
            primary,
            fired: AtomicBool::new(false),
            step: AtomicU8::new(0),
            client_resets: Notify::new(),
            server_resets: Notify::new(),
            endpoints: Mutex::default(),
            wrong: Mutex::default(),
            hello: rig::hello(&rig::sni(None)),
        });
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(stage.clone().endpoint(listener));
        }
        let mut random = Random(random.next());
        let flapping = stage.clone();
        tasks.spawn(async move {
            loop {
                let other = usize::try_from(random.below(OTHERS as u64)).unwrap();
                let count = u16::try_from(random.below(4)).unwrap();
                flapping.gateways[flapping.primary].set_endpoints(other, count);
                sleep(rig::ms(random.below(150))).await;
                if flapping.step.load(Ordering::Relaxed) >= STEPS {
                    return;
                }
            }
        });
        let client = stage.clone().client().await;
        stage.step.store(STEPS, Ordering::Relaxed);
        stage.endpoints_end().await;
        stage.converges().await?;
        stage.judge(client)
    }
}

impl Stage {
    /// The story has come to `step`.
    async fn reach(self: &Arc<Self>, step: u8) {
        self.step.fetch_max(step, Ordering::Relaxed);
        if self.case.at == step && !self.fired.swap(true, Ordering::Relaxed) {
            self.strike();
        }
        // Faults come between two packets, not between two instructions.
        sleep(rig::ms(2)).await;
    }

    fn strike(self: &Arc<Self>) {
        let far = &self.gateways[self.primary];
        match self.case.fault {
            Fault::None => {}
            Fault::Blackhole => self.net.cut_off(far.address),
            Fault::Blip => {
                self.net.cut_off(far.address);
                let net = self.net.clone();
                tokio::spawn(async move {
                    sleep(rig::ms(300)).await;
                    net.heal();
                });
            }
            Fault::LinkLost => far.core.inbound.close_if(|_| true, Close::Protocol),
            Fault::Drain => {
                let core = far.core.clone();
                tokio::spawn(async move { crate::drain::drain(&core, &core.tasks.shutdown()).await });
            }
            Fault::ClientResets => self.client_resets.notify_one(),
            Fault::ServerResets => self.server_resets.notify_one(),
        }
    }

    async fn client(self: Arc<Self>) -> Seen {
        self.reach(0).await;
        let mut tcp = TcpStream::connect(self.gateways[0].auto).await.unwrap();
        let seen = tokio::select! {
            seen = self.client_speaks(&mut tcp) => seen,
            () = self.client_resets.notified() => Err(Seen::Own),
        };
        if seen == Err(Seen::Own) {
            splice::abort(&tcp);
        }
        seen.err().unwrap_or(Seen::Whole)
    }

    async fn client_speaks(self: &Arc<Self>, tcp: &mut TcpStream) -> Result<(), Seen> {
        let (begin, rest) = self.hello.split_at(self.hello.len() / 2);
        self.say(tcp, begin, 1).await?;
        self.say(tcp, rest, 2).await?;
        self.hear(tcp, GREETING, 0).await?;
        self.reach(5).await;
        let message = message(b'c');
        let (begin, rest) = message.split_at(MESSAGE / 2);
        self.say(tcp, begin, 6).await?;
        tcp.write_all(rest).await.map_err(|_| Seen::Reset)?;
        self.hear(tcp, &self::message(b's'), 1).await?;
        self.reach(9).await;
        tcp.shutdown().await.map_err(|_| Seen::Reset)?;
        self.reach(10).await;
        self.hear(tcp, &postscript(), 1 + MESSAGE).await?;
        self.hear_end(tcp).await?;
        self.reach(13).await;
        Ok(())
    }

    /// Each connection is one attempt.
    async fn endpoint(self: Arc<Self>, listener: TcpListener) {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let stage = self.clone();
            let attempt = {
                let mut all = stage.endpoints.lock().unwrap();
                all.push(None);
                all.len() - 1
            };
            tokio::spawn(async move {
                let seen = tokio::select! {
                    seen = stage.endpoint_speaks(&mut tcp) => seen,
                    () = stage.server_resets.notified() => Err(Seen::Own),
                };
                if seen == Err(Seen::Own) {
                    splice::abort(&tcp);
                }
                drop(tcp);
                stage.endpoints.lock().unwrap()[attempt] = Some(seen.err().unwrap_or(Seen::Whole));
            });
        }
    }

    async fn endpoint_speaks(self: &Arc<Self>, tcp: &mut TcpStream) -> Result<(), Seen> {
        self.hear_hello(tcp).await?;
        self.reach(3).await;
        self.say(tcp, GREETING, 4).await?;
        self.hear(tcp, &message(b'c'), 0).await?;
        self.reach(7).await;
        let message = message(b's');
        let (begin, rest) = message.split_at(MESSAGE / 2);
        self.say(tcp, begin, 8).await?;
        tcp.write_all(rest).await.map_err(|_| Seen::Reset)?;
        self.hear_end(tcp).await?;
        self.reach(11).await;
        tcp.write_all(&postscript()).await.map_err(|_| Seen::Reset)?;
        tcp.shutdown().await.map_err(|_| Seen::Reset)?;
        self.reach(12).await;
        Ok(())
    }

    async fn say(self: &Arc<Self>, tcp: &mut TcpStream, bytes: &[u8], step: u8) -> Result<(), Seen> {
        tcp.write_all(bytes).await.map_err(|_| Seen::Reset)?;
        self.reach(step).await;
        Ok(())
    }

    /// Exactly `expected`, after `before` bytes.
    async fn hear(&self, tcp: &mut TcpStream, expected: &[u8], before: usize) -> Result<(), Seen> {
        let mut heard = vec![0; expected.len()];
        let mut at = 0;
        while at < heard.len() {
            match tcp.read(&mut heard[at..]).await {
                Ok(0) => return Err(Seen::Cut(before + at)),
                Ok(n) => at += n,
                Err(_) => return Err(Seen::Reset),
            }
        }
        self.must(heard == expected, "bytes come as they were sent");
        Ok(())
    }

    async fn hear_end(&self, tcp: &mut TcpStream) -> Result<(), Seen> {
        match tcp.read(&mut [0; 64]).await {
            Ok(0) => Ok(()),
            Ok(_) => {
                self.must(false, "nothing comes after the end");
                Ok(())
            }
            Err(_) => Err(Seen::Reset),
        }
    }

    async fn hear_hello(&self, tcp: &mut TcpStream) -> Result<(), Seen> {
        let mut reader = HelloReader::new(16 * 1024);
        while reader.wanted() > 0 {
            let mut bytes = vec![0; reader.wanted()];
            match tcp.read(&mut bytes).await {
                Ok(n) if n > 0 => self.must(!matches!(reader.push(&bytes[..n]), Progress::Bad(_)), "a hello comes"),
                Ok(_) => return Err(Seen::Cut(0)),
                Err(_) => return Err(Seen::Reset),
            }
        }
        self.must(reader.into_raw() == self.hello, "the hello comes whole");
        Ok(())
    }

    fn must(&self, holds: bool, what: &str) {
        if !holds {
            self.wrong.lock().unwrap().push(format!("not so: {what}"));
        }
    }

    /// Waits until every attempt has ended at its endpoint.
    async fn endpoints_end(&self) {
        while self.endpoints.lock().unwrap().iter().any(Option::is_none) {
            sleep(rig::ms(10)).await;
        }
    }

    /// Waits until the near gateway knows just what the far one says; where that can be.
    async fn converges(&self) -> Result<(), String> {
        if matches!(self.case.fault, Fault::Blackhole | Fault::Drain) {
            return Ok(());
        }
        let far = &self.gateways[self.primary].core;
        let mut known = None;
        // Ten times what a lost link and a dozen lost datagrams take.
        for _ in 0..1_000 {
            let near = &self.gateways[0].core;
            known = near.evidence(&far.cluster, &near.current_view());
            if known.as_ref().is_some_and(|e| e.reachable && e.table == **far.pool.table().borrow()) {
                return Ok(());
            }
            sleep(rig::ms(10)).await;
        }
        Err(format!("the near gateway has {known:?}, the far one {:?}", far.pool.table().borrow()))
    }

    fn judge(&self, client: Seen) -> Result<Outcome, String> {
        let endpoints: Vec<Seen> = self.endpoints.lock().unwrap().iter().flatten().copied().collect();
        let mut wrong = std::mem::take(&mut *self.wrong.lock().unwrap());
        let mut check = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("not so: {what}"));
            }
        };
        let (fault, at) = (self.case.fault, self.case.at);
        check(self.fired.load(Ordering::Relaxed), "the story comes to the fault's step");
        check(!matches!(client, Seen::Cut(_)), "a client takes no cut for an end");
        // Before its first byte came back an attempt may end in order: nothing was carried yet.
        check(endpoints.iter().all(|e| !matches!(e, Seen::Cut(n) if *n > 0)), "an endpoint takes no cut for an end");
        let whole = endpoints.iter().filter(|e| **e == Seen::Whole).count();
        check(whole <= 1, "one attempt at most is carried");
        let said_all = fault == Fault::ServerResets && at >= 12;
        check(
            client != Seen::Whole || whole == 1 || said_all,
            "what is whole for the client is whole for the endpoint",
        );
        match fault {
            Fault::None | Fault::Blip | Fault::Drain => check(client == Seen::Whole, "nothing is lost"),
            Fault::Blackhole | Fault::LinkLost | Fault::ServerResets if at <= 3 => {
                check(client == Seen::Whole, "what had no first byte goes on elsewhere");
            }
            Fault::Blackhole | Fault::LinkLost if (5..=9).contains(&at) => {
                check(client == Seen::Reset && whole == 0, "both ends are reset");
            }
            Fault::ServerResets if (5..=10).contains(&at) => check(client == Seen::Reset, "the client is reset"),
            Fault::ClientResets => {
                check(client == Seen::Own || at >= 12, "it resets");
                check(whole == 0 || at >= 10, "the endpoint takes no reset for an end");
            }
            _ => {}
        }
        if wrong.is_empty() {
            return Ok(Outcome { client, attempts: endpoints.len() });
        }
        Err(format!("{}; client {client:?}, endpoints {endpoints:?}, {} first", wrong.join("; "), self.primary_name()))
    }

    fn primary_name(&self) -> String {
        self.gateways[self.primary].core.cluster.to_string()
    }
}

fn message(of: u8) -> Vec<u8> {
    let mut random = Random(of.into());
    (0..MESSAGE).map(|_| u8::try_from(random.next() & 0xff).unwrap()).collect()
}

fn postscript() -> Vec<u8> {
    vec![b'p'; POSTSCRIPT]
}
