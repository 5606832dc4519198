//! Saving a guest to a file, and going on from there.
//!
//! ```text
//! <disk>.vmstate.json       the hardware, written first
//! <disk>.vmstate.part       being written      --synced, renamed-->  <disk>.vmstate
//! <disk>.vmstate            the next start goes on from it
//!   renamed, synced before the guest runs -->  <disk>.vmstate.resumed   removed once it runs
//!   cannot be loaded                      -->  <disk>.vmstate.bad       for somebody to look at; cold start
//! ```
//!
//! A state is used once: memory that is older than the disks would destroy the guest's file systems. So it loses its name
//! before the guest runs, and gets it back only when QEMU refused to let the guest run; a guest whose state could not be
//! saved goes on only when no start can find that state. A crash between that and the guest running loses the state, as a power cut of the guest would;
//! a crash while saving leaves the guest as a power cut would, and a `.part` that the next save overwrites.

use super::command::{Hardware, Start};
use super::machine::Machine;
use super::transfer::{self, Transfer};
use crate::api::{EventLevel, Failure};
use crate::types::vm::{running::Phase, stable};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For a state to be written or read; a stalled disk ends it earlier.
const LIMIT: Duration = Duration::from_secs(3600);
/// Name of the open file in QEMU.
const FD: &str = "vmstate";

/// What stands beside a state.
#[derive(Debug, Serialize, Deserialize)]
struct Beside {
    vm: String,
    hardware: Hardware,
}

fn with(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

fn sync_dir(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::rename(from, to)?;
    sync_dir(to)
}

impl Machine {
    /// Where the state is saved.
    pub(crate) fn state_path(&self) -> Option<PathBuf> {
        match &self.config.save_dir {
            Some(dir) => Some(dir.join(format!("{}.vmstate", stable::directory(&self.name)))),
            None => self.config.disks.first().map(|disk| with(&disk.path, ".vmstate")),
        }
    }

    /// Saves the guest and ends its QEMU. On failure the guest goes on, unless its state may have been saved nevertheless.
    pub(crate) fn save(&mut self) -> Result<(), Failure> {
        let path = self.state_path().ok_or_else(|| {
            Failure::Config("there is no place to save the machine: it has no disk; give save_dir".into())
        })?;
        let running = self.running()?;
        running.watch.quiet(true);
        let was = running.status()?;
        let result = running.stop().and_then(|()| self.write_state(&path));
        let running = self.running()?;
        if let Err(failure) = result {
            let _ = fs::remove_file(with(&path, ".part"));
            running.watch.quiet(false);
            if let Err(error) = self.unsave() {
                self.kept_stopped = true;
                return Err(Failure::new(format!("{failure}; {error}")));
            }
            if was == "running"
                && !running.process.has_ended()
                && let Err(error) = running.resume()
            {
                return Err(Failure::new(format!("{failure}; and the guest does not go on: {error}")));
            }
            return Err(failure);
        }
        running.quit()?;
        self.forget();
        Ok(())
    }

    /// Sees to it that no start goes on from a saved state, which a guest that runs on makes too old for its disks.
    pub(crate) fn unsave(&self) -> Result<(), Failure> {
        let Some(path) = self.state_path() else { return Ok(()) };
        let removed = match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            // A removal that a crash undoes is none.
            removed => removed.and_then(|()| sync_dir(&path)),
        };
        removed.map_err(|error| {
            Failure::new(format!(
                "the guest is kept paused, since a next start would go on from the saved state {}, which cannot be removed: \
                 {error}; remove it, then let the guest go on (verb resume), or end it (verb kill, then offline)",
                path.display()
            ))
        })?;
        let _ = fs::remove_file(with(&path, ".json"));
        Ok(())
    }

    fn write_state(&self, path: &Path) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(format!("the machine could not be saved to {}: {error}", path.display()))
        };
        let running = self.running()?;
        let part = with(path, ".part");
        let file = File::create(&part).map_err(failed)?;
        running.monitor.give(FD, &file, super::running::QUICK).map_err(Failure::new)?;
        let transfer = Transfer {
            doing: "saving",
            uri: format!("fd:{FD}"),
            bandwidth_mib: 0,
            downtime_ms: self.config.downtime_ms,
            tls: None,
            answered: false,
            channels: 0,
            limit: LIMIT,
        };
        transfer::send(running, &self.context, &transfer)?;
        self.context.progress("the saved state is being written out");
        let finish = || -> std::io::Result<()> {
            file.sync_all()?;
            let beside = Beside { vm: self.name.clone(), hardware: running.hardware.clone() };
            let mut text = File::create(with(path, ".json"))?;
            text.write_all(&serde_json::to_vec(&beside)?)?;
            text.sync_all()?;
            rename(&part, path)
        };
        finish().map_err(failed)
    }

    /// Goes on from a saved state, if there is one that can be used; is the guest online now?
    pub(crate) fn resume_saved(&mut self) -> Result<bool, Failure> {
        let Some(path) = self.state_path() else { return Ok(false) };
        let resumed = with(&path, ".resumed");
        if fs::remove_file(&resumed).is_ok() {
            let text =
                "a start from the saved state was cut off after its use; the machine starts from its disks";
            self.context.event(EventLevel::Warning, text);
        }
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => {
                return Err(Failure::new(format!(
                    "the saved state {} cannot be opened: {error}",
                    path.display()
                )));
            }
        };
        let beside = fs::read(with(&path, ".json")).ok();
        let beside: Option<Beside> = beside.and_then(|text| serde_json::from_slice(&text).ok());
        let Some(beside) = beside else {
            return self.put_aside(&path, "what belongs beside it (.json) is missing");
        };
        if beside.vm != self.name {
            return self.put_aside(&path, &format!("it is of the machine \"{}\"", beside.vm));
        }
        // What fails here is not the state's fault: it is kept for another try, or another node.
        self.launch(Some(beside.hardware), Start::Incoming)?;
        if let Err(failure) = self.load(&file) {
            let ended = self.running.as_ref().is_none_or(|running| running.process.has_ended());
            self.end()?;
            if failure == Failure::Cancelled || !ended {
                return Err(failure);
            }
            return self.put_aside(&path, &failure.to_string());
        }
        let used = rename(&path, &resumed);
        if let Err(error) = used {
            self.end()?;
            return Err(Failure::new(format!(
                "the saved state {} cannot be marked as used: {error}",
                path.display()
            )));
        }
        if let Err(halted) = self.go() {
            self.end()?;
            if halted.surely {
                let _ = rename(&resumed, &path);
            }
            // Else the guest may have run, and written to its disks: the next start is a cold one.
            return Err(halted.into());
        }
        let _ = fs::remove_file(&resumed);
        let _ = fs::remove_file(with(&path, ".json"));
        Ok(true)
    }

    fn load(&self, file: &File) -> Result<(), Failure> {
        let running = self.running()?;
        transfer::capabilities(running, &[("events", true), ("late-block-activate", true)])?;
        running.monitor.give(FD, file, super::running::QUICK).map_err(Failure::new)?;
        running.ask("migrate-incoming", json!({ "uri": format!("fd:{FD}") }))?;
        transfer::arrive(running, &self.context, LIMIT)
    }

    fn put_aside(&self, path: &Path, why: &str) -> Result<bool, Failure> {
        let bad = with(path, ".bad");
        rename(path, &bad).map_err(|error| {
            Failure::new(format!("the saved state {} cannot be put aside: {error}", path.display()))
        })?;
        let text = format!(
            "the saved state cannot be used ({why}) and is put aside as {}; the machine starts from its disks",
            bad.display()
        );
        self.context.event(EventLevel::Error, &text);
        Ok(false)
    }

    /// Throws a saved state away.
    pub(crate) fn discard_saved(&self) -> Result<bool, Failure> {
        if self.running.as_ref().is_some_and(|running| running.phase == Phase::Starting) {
            return Err(Failure::new("the machine is being started"));
        }
        let Some(path) = self.state_path() else { return Ok(false) };
        match fs::remove_file(&path) {
            Ok(()) => {
                let _ = fs::remove_file(with(&path, ".json"));
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Failure::new(format!("{} cannot be removed: {error}", path.display()))),
        }
    }
}
