//! `isthmus-demo`: plays the scenario on this machine, see `make demo`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use isthmus_e2e::scenario::{self, Options, report::Report, stage::Stage};
use tokio::signal::unix::{SignalKind, signal};

/// Starts three clusters on loopback, plays the failover story, and checks every step.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  make demo           play the scenario\n  make demo STAY=1    play it, then leave everything running until Ctrl-C"
)]
struct Args {
    /// Folder for state, configurations and logs; emptied first.
    #[arg(long, default_value = "target/demo")]
    dir: PathBuf,
    /// Leave the federation running and say how to look around.
    #[arg(long)]
    stay: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    isthmus_identity::install_crypto();
    let args = Args::parse();
    let dir = std::path::absolute(&args.dir).unwrap_or(args.dir);
    let options = Options { dir, stay: args.stay };
    let mut report = Report::new();
    println!("Isthmus: three clusters, real Envoy sidecars, gateways linked over QUIC, one machine.");
    let played = tokio::select! {
        played = scenario::play(&options, &mut report) => Some(played),
        () = interrupted() => None,
    };
    // Dropping an unfinished play kills its processes: each has kill-on-drop and dies with this one.
    let Some((stage, outcome)) = played else {
        println!("\nInterrupted; everything is stopped.");
        return ExitCode::from(130);
    };
    if let Err(e) = &outcome {
        report.bad(&format!("{e:#}"));
    }
    report.close();
    if stage.is_none() {
        println!("Logs, as far as there are any, are in {}", options.dir.join("logs").display());
    }
    if let Some(mut stage) = stage {
        finish(&mut stage, &options, &report).await;
    }
    if report.held() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn finish(stage: &mut Stage, options: &Options, report: &Report) {
    if let Err(e) = stage.write_env() {
        eprintln!("{e:#}");
    }
    if let Err(e) = std::fs::write(options.dir.join("table.txt"), report.table()) {
        eprintln!("write table.txt: {e}");
    }
    if options.stay {
        look_around(stage);
        interrupted().await;
        println!("\nStopping.");
    } else if !report.held() {
        if let Ok(status) = stage.federation.ctl.run(&["status"]).await {
            println!("\n{status}\n");
        }
        println!("Logs are in {}", options.dir.join("logs").display());
    }
    if let Err(e) = stage.federation.stop(Duration::from_secs(10)).await {
        eprintln!("{e:#}");
    }
}

fn look_around(stage: &Stage) {
    let env = stage.env_file();
    let bin = stage.federation.binaries.isthmusctl.parent().unwrap_or(std::path::Path::new("")).display().to_string();
    println!(
        "\nEverything runs until Ctrl-C. In another terminal:\n\n  \
         . {env}; export ISTHMUS_CONTEXT; PATH={bin}:$PATH\n  \
         isthmusctl status\n  \
         isthmusctl get services\n  \
         isthmusctl explain shop/cart --from us-east\n  \
         dig @${{US_EAST_DNS%:*}} -p ${{US_EAST_DNS#*:}} cart.shop.svc.clusterset.local\n  \
         dig @${{US_EAST_DNS%:*}} -p ${{US_EAST_DNS#*:}} TXT _failover.cart.shop.svc.clusterset.local\n  \
         curl -s http://$US_EAST_WEB_HTTP_APP/ | python3 -m json.tool     # web asks everyone\n  \
         curl -s http://$US_EAST_GATEWAY_1_HEALTH/debug/tunnels\n  \
         kill -9 $US_EAST_CART_PID                # then look again\n",
        env = env.display(),
    );
}

async fn interrupted() {
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = int.recv() => {}
        _ = term.recv() => {}
    }
}
