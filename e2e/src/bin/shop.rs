//! `isthmus-shop`: the sample app, one subcommand per service.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Context;
use clap::{Parser, Subcommand};
use isthmus_e2e::shop::{
    Instance, http,
    load::{self, LoadArgs},
    orders,
    web::{self, Shop},
};
use tokio::net::TcpListener;

/// The sample app of the demo: says who it is, in which cluster, and who called.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example:\n  isthmus-shop cart --cluster us-east --instance cart-1 --listen 127.0.0.1:18080"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The cart, HTTP/1.1.
    Cart {
        #[command(flatten)]
        me: Instance,
        /// Where to listen.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// The catalog, HTTP/1.1 and gRPC.
    Catalog {
        #[command(flatten)]
        me: Instance,
        /// Where to listen for HTTP/1.1.
        #[arg(long)]
        listen: SocketAddr,
        /// Where to listen for gRPC.
        #[arg(long)]
        listen_grpc: SocketAddr,
    },
    /// The orders desk, a TCP protocol in which the server speaks first.
    Orders {
        #[command(flatten)]
        me: Instance,
        /// Where to listen.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// The front page: calls the others by their global names.
    Web {
        /// Where to listen.
        #[arg(long)]
        listen: SocketAddr,
        /// The cluster's DNS server.
        #[arg(long)]
        dns: SocketAddr,
    },
    /// Steady load, as web would make it.
    Load {
        /// The cluster's DNS server.
        #[arg(long)]
        dns: SocketAddr,
        #[command(flatten)]
        load: LoadArgs,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Cart { me, listen } => http::serve(bind(listen).await?, "cart".into(), me).await,
        Command::Catalog { me, listen, listen_grpc } => {
            let (plain, grpc) = (bind(listen).await?, bind(listen_grpc).await?);
            tokio::try_join!(http::serve(plain, "catalog".into(), me.clone()), http::serve_grpc(grpc, me)).map(|_| ())
        }
        Command::Orders { me, listen } => orders::serve(bind(listen).await?, me).await,
        Command::Web { listen, dns } => web::serve(bind(listen).await?, Arc::new(Shop::new(dns)?)).await,
        Command::Load { dns, load } => load::run(Arc::new(Shop::new(dns)?), load).await,
    }
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))
}
