//! `isthmusctl`, run as a user would run it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{process::Command, time::timeout};

/// The program with a context file.
#[derive(Clone, Debug)]
pub struct Isthmusctl {
    program: PathBuf,
    context: PathBuf,
}

/// What a run printed and how it ended.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each field is what its name says")]
pub struct Output {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Isthmusctl {
    /// With the administrator's credentials in `context`.
    pub fn new(program: &Path, context: &Path) -> Self {
        Self { program: program.to_owned(), context: context.to_owned() }
    }

    /// The context file.
    pub fn context(&self) -> &Path {
        &self.context
    }

    /// Runs it and returns trimmed standard output; a failure is an error with standard error.
    pub async fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.try_run(args).await?;
        if !output.success {
            bail!("isthmusctl {} failed: {}", args.join(" "), output.stderr.trim());
        }
        Ok(output.stdout.trim().to_owned())
    }

    /// Runs it, whatever the outcome.
    pub async fn try_run(&self, args: &[&str]) -> anyhow::Result<Output> {
        let run = Command::new(&self.program)
            .arg("--context")
            .arg(&self.context)
            .args(args)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = timeout(Duration::from_secs(120), run).await.context("isthmusctl does not end")?;
        let output = output.with_context(|| format!("run {}", self.program.display()))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Output { success: output.status.success(), stdout: text(&output.stdout), stderr: text(&output.stderr) })
    }

    /// Runs it with `-o json` and parses the answer.
    pub async fn json(&self, args: &[&str]) -> anyhow::Result<serde_json::Value> {
        let text = self.run(&[args, &["-o", "json"]].concat()).await?;
        serde_json::from_str(&text).with_context(|| format!("isthmusctl {} printed no JSON", args.join(" ")))
    }
}
