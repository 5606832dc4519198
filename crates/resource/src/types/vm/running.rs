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

/// Why a guest was not let go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{failure}")]
pub(crate) struct Halted {
    pub(crate) failure: Failure,
    /// QEMU refused, so that the guest has not run; else it may have.
    pub(crate) surely: bool,
}

impl From<Halted> for Failure {
    fn from(halted: Halted) -> Failure {
        halted.failure
    }
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
        self.monitor.call(command, arguments, limit).map_err(|error| self.in_words(command, &error))
    }

    fn in_words(&self, command: &str, error: &QmpError) -> Failure {
        match error {
            QmpError::Refused(_) => Failure::new(format!("QEMU refused \"{command}\": {error}")),
            QmpError::Closed => Failure::Failed(self.ending().unwrap_or_else(|| error.to_string())),
            QmpError::Late { .. } => Failure::new(error),
        }
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
    pub(crate) fn resume(&self) -> Result<(), Halted> {
        self.monitor.call("cont", json!({}), SLOW).map(drop).map_err(|error| Halted {
            // Any other error leaves open what QEMU did.
            surely: matches!(error, QmpError::Refused(_)),
            failure: self.in_words("cont", &error),
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::Bed;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    /// A double of QEMU that does this with `cont`: refuses it, or ends.
    fn double(bed: &Bed, refuses: bool) -> Running {
        let process = Process::spawn("sleep", &["1000".into()], &bed.dir().join("log")).unwrap();
        let process = Arc::new(process);
        let listener = UnixListener::bind(bed.dir().join("qmp")).unwrap();
        let dies = Arc::clone(&process);
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let message: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let mut answer = json!({ "id": message["id"], "return": {} });
                if message["execute"] == "cont" {
                    if !refuses {
                        dies.kill().unwrap();
                        return;
                    }
                    answer = json!({ "id": message["id"], "error": { "desc": "no" } });
                }
                stream.write_all(format!("{answer}\n").as_bytes()).unwrap();
            }
        });
        let watch = Arc::new(Watch::new(bed.context(), bed.dir().join("log"), false));
        let hears = Arc::clone(&watch);
        let tell = move |happening| hears.tell(happening);
        let monitor = Monitor::connect(&bed.dir().join("qmp"), &process, QUICK, tell).unwrap();
        let hardware = Hardware { machine: "q35".into(), accelerator: "tcg".into(), cpu: "max".into() };
        let phase = Phase::Starting;
        Running { monitor, process, watch, hardware, phase, phase_since: Instant::now() }
    }

    #[test]
    fn only_a_refusal_says_that_the_guest_has_not_run() {
        for refuses in [true, false] {
            let bed = Bed::new();
            let running = double(&bed, refuses);
            let halted = running.resume().unwrap_err();
            assert_eq!(halted.surely, refuses, "{halted}");
            running.kill().unwrap();
        }
    }
}
