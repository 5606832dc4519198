//! A QEMU that is there, and what is asked of it.

use super::command::{Hardware, Place};
use super::monitor::{Monitor, QmpError};
use super::process::Process;
use super::watch::Watch;
use crate::api::Failure;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For an answer to a command that is answered at once. Storage that hangs can hold up QEMU's main loop for a while.
pub(crate) const QUICK: Duration = Duration::from_secs(20);
/// For `stop` and `cont`, which wait for requests that are under way or open images.
pub(crate) const SLOW: Duration = Duration::from_secs(120);
/// For QEMU to end after `quit`.
const QUIT_LIMIT: Duration = Duration::from_secs(10);

/// What a QEMU is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Being started; its guest has not run yet.
    Starting,
    /// The guest is here.
    Running,
    /// Waits for a guest to arrive, or for word that it may go on here.
    Incoming,
    /// The guest has been sent away; it could be taken back until it runs at the other end.
    Migrated,
    /// The guest shut itself down and stays off; there is no QEMU.
    Off,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) monitor: Monitor,
    pub(crate) process: Arc<Process>,
    pub(crate) watch: Arc<Watch>,
    pub(crate) hardware: Hardware,
    pub(crate) phase: Phase,
    /// Since when `phase` is what it is, as far as this host knows.
    pub(crate) phase_since: Instant,
}

impl Running {
    /// Runs a command that is answered at once.
    pub(crate) fn ask(&self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.ask_within(command, arguments, QUICK)
    }

    pub(crate) fn ask_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, Failure> {
        self.monitor.call(command, arguments, limit).map_err(|error| match error {
            QmpError::Refused(_) => Failure::new(format!("QEMU refused \"{command}\": {error}")),
            QmpError::Closed => Failure::Failed(self.ending().unwrap_or_else(|| error.to_string())),
            QmpError::Late { .. } => Failure::new(error),
        })
    }

    /// How QEMU ended, after it has closed its monitor, which it does just before.
    fn ending(&self) -> Option<String> {
        let deadline = Instant::now() + QUIT_LIMIT;
        while self.watch.end().is_none() && Instant::now() < deadline {
            self.watch.wait(QUIT_LIMIT);
        }
        self.watch.end()
    }

    /// The state of the guest, as QEMU names it.
    pub(crate) fn status(&self) -> Result<String, Failure> {
        let status = self.ask("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or("unknown").to_owned())
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) -> Result<(), Failure> {
        self.ask_within("cont", json!({}), SLOW).map(drop)
    }

    /// Stops the guest.
    pub(crate) fn stop(&self) -> Result<(), Failure> {
        self.ask_within("stop", json!({}), SLOW).map(drop)
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        (self.phase, self.phase_since) = (phase, Instant::now());
    }

    /// Ends QEMU in good order, or else at once: its guest has stopped already or is elsewhere.
    pub(crate) fn quit(&self) -> Result<(), Failure> {
        self.watch.quiet(true);
        let asked = self.monitor.call("quit", json!({}), QUIT_LIMIT);
        if !matches!(asked, Err(QmpError::Late { .. })) && self.process.wait(QUIT_LIMIT) {
            let _ = self.process.outcome();
            return Ok(());
        }
        self.process.kill()
    }

    /// Ends QEMU at once, as a power cut would.
    pub(crate) fn kill(&self) -> Result<(), Failure> {
        self.watch.quiet(true);
        self.process.kill()
    }
}

/// What is left in the run directory of a QEMU that has ended.
pub(crate) fn tidy(place: &Place) {
    for path in [place.qmp(), place.admin(), place.serial(), place.agent()] {
        let _ = std::fs::remove_file(path);
    }
    let _ = std::fs::remove_dir_all(place.tls());
}
