//! The guest's end of the channel: shell scripts in, what they printed out, one JSON object a line. Scripts run at the
//! same time; answers come in the order in which they end.

use crate::wait;
use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// While the host is not connected, the port reads as at its end.
const NOT_CONNECTED_PAUSE: Duration = Duration::from_millis(100);

/// A script to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Number of the question; the answer has the same.
    pub id: u64,
    /// For `sh -ec`.
    pub script: String,
    /// It is killed after this time, in milliseconds.
    pub limit_ms: u64,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The question's number; 0: the guest is ready.
    pub id: u64,
    /// Raw wait status, if the script ended in time.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error, or why the script did not end.
    pub stderr: String,
}

/// Serves the port for ever.
///
/// # Errors
/// The port cannot be opened, read or written.
pub fn serve(port: &Path) -> anyhow::Result<()> {
    let open = || OpenOptions::new().read(true).write(true).open(port);
    let file = open().with_context(|| format!("opening {}", port.display()))?;
    let out = Arc::new(Mutex::new(file.try_clone()?));
    answer(&out, &Told { id: 0, status: Some(0), stdout: String::new(), stderr: String::new() })?;
    let mut lines = BufReader::new(file);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).context("reading the port")? == 0 {
            std::thread::sleep(NOT_CONNECTED_PAUSE);
            continue;
        }
        let ask: Ask = serde_json::from_str(&line).with_context(|| format!("not a question: {line}"))?;
        let out = out.clone();
        std::thread::spawn(move || {
            if let Err(error) = answer(&out, &run(&ask)) {
                eprintln!("answering {}: {error:#}", ask.id);
            }
        });
    }
}

fn run(ask: &Ask) -> Told {
    let mut command = Command::new("sh");
    command.args(["-ec", &ask.script]);
    match wait::run(&mut command, Duration::from_millis(ask.limit_ms)) {
        Ok(ended) => Told {
            id: ask.id,
            status: Some(ended.status.into_raw()),
            stdout: ended.stdout,
            stderr: ended.stderr,
        },
        Err(error) => Told { id: ask.id, status: None, stdout: String::new(), stderr: format!("{error:#}") },
    }
}

fn answer(out: &Mutex<File>, told: &Told) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(told)?;
    line.push('\n');
    let Ok(mut out) = out.lock() else { bail!("another answer broke off") };
    out.write_all(line.as_bytes()).context("writing the port")
}
