//! Verbs of a virtual machine.

use super::config::OfflineAction;
use super::machine::Machine;
use super::running::Phase;
use crate::api::{EventLevel, Failure};
use serde_json::{Value, json};
use std::time::Duration;

/// Longest that a raw command may take.
const QMP_LIMIT: Duration = Duration::from_secs(60);

/// Verbs, with what they do.
pub(crate) const VERBS: [(&str, &str); 20] = [
    ("status", "what the machine does, and what its hardware is: {}"),
    ("pause", "stops the guest's processors; the resource stays online: {}"),
    ("resume", "lets a paused guest go on: {}"),
    ("reset", "the reset button: {}"),
    ("powerdown", "the power button, pressed once: {}"),
    ("start", "starts a guest again that shut itself down (on_guest_shutdown=stay): {}"),
    ("shutdown", "the next offline shuts the guest down, whatever offline_action says: {}"),
    ("save", "the next offline saves the guest: {}"),
    ("kill", "the next offline ends the guest at once: {}"),
    ("discard-saved", "throws the saved state away, so that the next start is a cold one: {}"),
    ("screendump", "writes a picture of the screen (PPM; needs vnc): {path}"),
    ("qmp", "a command of QEMU's monitor, as given: {execute, arguments}"),
    ("incoming", "target of a live migration: waits for the guest: {listen, hardware, tls, channels}"),
    (
        "migrate",
        "source: sends the guest: {uri, tls, tls_hostname, bandwidth_mib, downtime_ms, channels, timeout_s}",
    ),
    ("arrived", "target: waits until the guest is there, and lets it go on: {wait_ms, paused}"),
    ("hold", "source: the guest that was sent away is not lost, its move goes on: {}"),
    ("take-back", "source: lets a guest go on here that was sent away and goes on nowhere: {}"),
    ("migrated", "source: ends what is left of a guest that goes on elsewhere: {}"),
    ("cancel-incoming", "target: no longer waits: {}"),
    ("paths", "sockets and files of the running machine: {}"),
];

impl Machine {
    pub(crate) fn verb(&mut self, verb: &str, arguments: &Value) -> Result<Value, Failure> {
        match verb {
            "status" => self.tell_status(),
            "paths" => Ok(self.tell_paths()),
            "pause" => self.button("stop", "paused by an administrator"),
            "resume" => {
                self.online_running()?;
                self.unsave()?;
                let resumed = self.button("cont", "resumed by an administrator")?;
                self.kept_stopped = false;
                Ok(resumed)
            }
            "reset" => self.button("system_reset", "reset by an administrator"),
            "powerdown" => self.button("system_powerdown", "power button pressed by an administrator"),
            "start" => {
                // It may have shut itself down since the last look.
                let _ = crate::api::Resource::looks_alive(self);
                // Any other machine that does not run is offline, and perhaps online elsewhere.
                if !self.off {
                    return Err(Failure::new("the guest has not shut itself down; use csvctl vm start"));
                }
                crate::api::Resource::online(self)?;
                Ok(json!({}))
            }
            "shutdown" => Ok(self.offline_by(OfflineAction::Shutdown)),
            "save" => {
                if self.state_path().is_none() {
                    return Err(Failure::Config(
                        "the machine has no disk to save beside: give save_dir".into(),
                    ));
                }
                Ok(self.offline_by(OfflineAction::Save))
            }
            "kill" => Ok(self.offline_by(OfflineAction::Kill)),
            "discard-saved" => Ok(json!({ "discarded": self.discard_saved()? })),
            "screendump" => {
                let path = arguments["path"].as_str().filter(|path| path.starts_with('/'));
                let path = path.ok_or_else(|| Failure::Config("screendump needs an absolute path".into()))?;
                self.online_running()?.ask("screendump", json!({ "filename": path }))?;
                Ok(json!({ "path": path }))
            }
            "qmp" => self.raw(arguments),
            "incoming" => self.incoming(arguments),
            "migrate" => self.migrate(arguments),
            "arrived" => self.arrived(arguments),
            "hold" => self.hold(),
            "take-back" => self.take_back().map(|()| json!({})),
            "migrated" => self.migrated(),
            "cancel-incoming" => self.cancel_incoming(),
            other => {
                let known: Vec<&str> = VERBS.iter().map(|(verb, _)| *verb).collect();
                Err(Failure::Unsupported(format!(
                    "a virtual machine cannot \"{other}\"; it can {}",
                    known.join(", ")
                )))
            }
        }
    }

    fn offline_by(&mut self, action: OfflineAction) -> Value {
        self.next_offline = Some(action);
        json!({})
    }

    /// A QEMU whose guest is here, not one that waits for a guest or has sent it away.
    fn online_running(&self) -> Result<&super::running::Running, Failure> {
        let running = self.running()?;
        match running.phase {
            Phase::Running => Ok(running),
            Phase::Starting | Phase::Incoming | Phase::Migrated | Phase::Off => {
                Err(Failure::new("the guest is not on this node now: it is being moved"))
            }
        }
    }

    fn button(&self, command: &str, event: &str) -> Result<Value, Failure> {
        self.online_running()?.ask_within(command, json!({}), super::running::SLOW)?;
        self.context.event(EventLevel::Info, event);
        Ok(json!({}))
    }

    fn raw(&self, arguments: &Value) -> Result<Value, Failure> {
        let command = arguments["execute"].as_str();
        let command = command.ok_or_else(|| Failure::Config("qmp needs \"execute\"".into()))?;
        let given = arguments.get("arguments").cloned().unwrap_or_else(|| json!({}));
        self.running()?.ask_within(command, given, QMP_LIMIT)
    }

    fn tell_status(&self) -> Result<Value, Failure> {
        let saved = self.state_path().is_some_and(|path| path.exists());
        let Some(running) = &self.running else {
            return Ok(json!({ "status": "off", "saved_state": saved }));
        };
        if let Some(why) = running.watch.end() {
            return Ok(json!({ "status": "ended", "why": why, "saved_state": saved }));
        }
        Ok(json!({
            "status": running.status()?,
            "phase": running.phase,
            "pid": running.process.pid(),
            "hardware": running.hardware,
            "saved_state": saved,
        }))
    }

    fn tell_paths(&self) -> Value {
        let place = &self.place;
        json!({
            "serial": place.serial(), "monitor": place.admin(), "agent": place.agent(), "log": place.log(),
            "saved_state": self.state_path(),
        })
    }
}
