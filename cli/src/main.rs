//! `isthmusctl`: the operators' command line.
//!
//! In: arguments, a context file, the control plane's admin REST over mutual TLS. Out: tables, JSON or YAML on stdout,
//! everything else on stderr. Exit code 0: done and true; 1: failed, or the answer is no; 2: wrong usage. It decides
//! nothing itself: `explain` calls the choice function that the data path calls.

mod args;
mod client;
mod commands;
mod context;
mod output;
mod shapes;
mod suggest;
mod table;

use std::process::ExitCode;

use clap::Parser as _;

/// How a command that worked ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Exit code 0.
    Yes,
    /// The question was answered, with no: exit code 1.
    No,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    isthmus_identity::install_crypto();
    let cli = args::Cli::parse();
    match commands::run(cli, &mut std::io::stdout()).await {
        Ok(Verdict::Yes) => ExitCode::SUCCESS,
        Ok(Verdict::No) => ExitCode::FAILURE,
        // `isthmusctl status | head` ends early; that is no error.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
