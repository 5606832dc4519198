//! `PhysicalDisk`: a disk that one node at a time has mounted.
//!
//! Safety is the reservation's (`reserve`): online takes the disk by PREEMPT AND ABORT before anything is read to be
//! changed, so whatever a former owner still has mounted cannot write any more. A thread keeps looking at the reservation and tells
//! at once when it is lost. After `terminate` nothing of this node writes: the file system is shut down where it cannot be
//! unmounted, or where another mount of it is left (a bind mount, another namespace), and the registration is given up, which
//! the next owner's reservation turns into a wall. `offline` keeps the disk while there is such a mount.
//!
//! What outlives a host: mount and reservation. Both are noted before they are made. A host that finds them both takes them
//! over; one that finds less reports it, and `terminate` clears away what is left.

mod device;
mod holders;
mod key;
mod reserve;
#[cfg(test)]
mod tests;

use super::keep;
use super::run::Bounded;
use super::settings::{flag, optional, required, text, words};
use crate::api::{Context, EventLevel, Failure, Form, Resource, ResourceType, Spec, TypeInfo};
use device::Down;
use reserve::{Claim, Keeper};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The type.
#[derive(Debug, Clone, Copy, Default)]
pub struct PhysicalDisk;

impl ResourceType for PhysicalDisk {
    fn info(&self) -> TypeInfo {
        TypeInfo {
            name: "PhysicalDisk".into(),
            help: "A shared disk that one node at a time has mounted".into(),
            properties: vec![
                required(
                    "device",
                    Form::Text,
                    "name of a device in the node's file, or a path such as /dev/disk/by-id/...",
                ),
                required("fs", words(&["ext4", "xfs"]), "the file system on it"),
                required("mount", Form::Path, "where it is mounted"),
                optional("options", Form::Text, None, "mount options, with commas"),
                optional(
                    "check",
                    words(&["auto", "always", "never"]),
                    Some("auto"),
                    "check before mounting: auto corrects what is needed after an unclean end, always reads all of it",
                ),
                optional(
                    "reservations",
                    words(&["required", "off"]),
                    Some("required"),
                    "off only for a disk that no other node can reach: nothing keeps two nodes from mounting it then",
                ),
                optional(
                    "break_foreign",
                    Form::Bool,
                    Some("false"),
                    "take the disk also from another cluster, or from a later owner: for disaster recovery",
                ),
            ],
            verbs: vec![("holders".into(), "who has files open on it".into())],
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        let device = text(properties, "device").unwrap_or_default();
        if device.is_empty() || (device.contains('/') && !device.starts_with('/')) {
            return Err(format!("device \"{device}\" is neither a name nor an absolute path"));
        }
        let mount = Path::new(text(properties, "mount").unwrap_or_default());
        let plain = mount.components().all(|part| !matches!(part, std::path::Component::ParentDir));
        if mount.parent().is_none() || !plain {
            return Err(format!(
                "mount \"{}\" cannot be a mount point; give a directory of its own",
                mount.display()
            ));
        }
        let options = text(properties, "options").unwrap_or_default();
        for option in options.split(',').map(str::trim) {
            if matches!(option, "bind" | "rbind" | "remount" | "move" | "loop")
                || option.contains(char::is_whitespace)
            {
                return Err(format!("options: \"{option}\" is no option for a disk of the cluster"));
            }
        }
        Ok(())
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        self.check(&spec.properties).map_err(Failure::Config)?;
        let owned = |name: &str| text(&spec.properties, name).unwrap_or_default().to_owned();
        let mount = owned("mount");
        Ok(Box::new(Disk {
            device: owned("device"),
            fs: owned("fs"),
            mount: Path::new(&mount).components().collect(),
            options: owned("options"),
            check: text(&spec.properties, "check").unwrap_or("auto").to_owned(),
            reserved: text(&spec.properties, "reservations") != Some("off"),
            break_foreign: flag(&spec.properties, "break_foreign", false),
            generation: spec.generation,
            keeper: None,
            calls: Bounded::default(),
            context,
        }))
    }
}

/// What a new host must know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    device: PathBuf,
    /// `major:minor`.
    number: String,
    /// As mountinfo has it: without symbolic links.
    mount: PathBuf,
    /// `None` without reservations.
    key: Option<u64>,
}

#[derive(Debug)]
struct Disk {
    context: Context,
    device: String,
    fs: String,
    mount: PathBuf,
    options: String,
    check: String,
    reserved: bool,
    break_foreign: bool,
    generation: u64,
    keeper: Option<Keeper>,
    calls: Bounded,
}

impl Disk {
    fn saved(&self) -> Option<Saved> {
        serde_json::from_value(self.context.saved()?).ok()
    }

    fn claim(&self, device: PathBuf, key: u64) -> Claim {
        Claim { device, key, generation: self.generation, break_foreign: self.break_foreign }
    }

    /// Mounted, writable, and ours by the last look.
    fn state(&self) -> Result<Saved, Failure> {
        let not_online = || Failure::new(format!("the disk {} is not online", self.device));
        let saved = self.saved().ok_or_else(not_online)?;
        if let Some(keeper) = &self.keeper {
            keeper.state()?;
        } else if saved.key.is_some() {
            return Err(not_online());
        }
        let shown = saved.mount.display();
        let Some(mount) = device::mounted(&saved.number, &saved.mount)? else {
            return Err(Failure::new(format!("{shown} is not mounted any more; somebody has unmounted it")));
        };
        if mount.read_only && !self.options.split(',').any(|option| option.trim() == "ro") {
            return Err(Failure::new(format!(
                "the file system at {shown} has become read-only after an error; see the kernel's log of this node"
            )));
        }
        Ok(saved)
    }

    fn bring_up(&mut self, saved: &Saved) -> Result<(), Failure> {
        let device = &saved.device;
        if let Some(key) = saved.key {
            self.context.progress(&format!("reserving {}", device.display()));
            let claim = self.claim(device.to_owned(), key);
            claim.take(&self.context)?;
            self.keeper = Some(Keeper::start(claim, self.context.clone())?);
        }
        device::forget_cache(device)?;
        device::check(&self.context, device, &self.fs, &self.check)?;
        device::mount(&self.context, device, &self.fs, &saved.number, &saved.mount, &self.options)
    }

    /// May this node still write to it?
    fn is_ours(&mut self, saved: &Saved) -> bool {
        match (&self.keeper, saved.key) {
            (Some(keeper), _) => keeper.state().is_ok(),
            (None, None) => true,
            (None, Some(key)) => {
                let claim = self.claim(saved.device.clone(), key);
                let look = move || claim.is_held().map_err(|error| error.to_string());
                self.calls.call(device::LOOK_LIMIT, "looking at the reservation", look) == Ok(true)
            }
        }
    }

    /// Nothing of this node writes to the disk any more, through whichever mount.
    fn end_use(&mut self, saved: &Saved, is_mounted: bool, is_ours: bool) -> Result<(), Failure> {
        let (device, mount) = (&saved.device, &saved.mount);
        if is_mounted && device::take_down(&mut self.calls, device, mount, is_ours)? == Down::ShutDown {
            return Ok(());
        }
        // By calls of their own: an earlier one may hang.
        let Some(user) = device::used_by(&mut Bounded::default(), device, &saved.number)? else {
            return Ok(());
        };
        let shown = device.display();
        device::shut_down(device, &self.fs, is_ours)
            .map_err(|error| Failure::new(format!("the disk {shown} is still in use: {user}; {error}")))?;
        let text = format!(
            "the disk {shown} was still in use: {user}; its file system was shut down, and whatever uses it there gets errors"
        );
        self.context.event(EventLevel::Warning, &text);
        Ok(())
    }

    fn give_back(&self, saved: &Saved) -> Result<(), Failure> {
        let Some(key) = saved.key else { return Ok(()) };
        let claim = self.claim(saved.device.clone(), key);
        // By a call of its own: an earlier one may hang.
        Bounded::default().call(reserve::COMMAND_LIMIT, "giving the reservation back", move || {
            claim.give_back().map_err(|error| error.to_string())
        })
    }
}

impl Resource for Disk {
    fn adopt(&mut self) -> Result<(), Failure> {
        let Some(saved) = self.saved() else {
            return Err(Failure::new(format!("the disk {} was not online here", self.device)));
        };
        if let Some(key) = saved.key {
            let claim = self.claim(saved.device, key);
            self.keeper = Some(Keeper::start(claim, self.context.clone())?);
        }
        self.state().map(drop)
    }

    fn online(&mut self) -> Result<(), Failure> {
        if self.saved().is_some() {
            // What an earlier host had begun.
            self.terminate()?;
        }
        let device = device::resolve(&self.context, &self.device)?;
        device::examine(&device, &self.fs)?;
        let number = device::number(&device)
            .map_err(|error| Failure::new(format!("{}: {error}", device.display())))?;
        let key = self.reserved.then(|| key::own(self.context.node(), self.generation));
        let mount = device::make_point(&self.mount)?;
        let saved = Saved { device, number, mount, key };
        keep(&self.context, &saved)?;
        self.bring_up(&saved)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        let Some(saved) = self.saved() else { return Ok(()) };
        if device::mounted(&saved.number, &saved.mount)?.is_some() {
            device::unmount(&self.context, &mut self.calls, &saved.mount)?;
        }
        // Whatever else has the file system mounted would write on after the disk was given back.
        if let Some(user) = device::used_by(&mut self.calls, &saved.device, &saved.number)? {
            let shown = saved.device.display();
            return Err(Failure::new(format!(
                "the disk {shown} is still in use on this node and is not given back: {user}; end that (umount, or end \
                 the programs) and take this resource offline again"
            )));
        }
        self.keeper = None;
        self.give_back(&saved)?;
        self.context.forget();
        Ok(())
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        let Some(saved) = self.saved() else { return Ok(()) };
        let is_ours = self.is_ours(&saved);
        self.keeper = None;
        let is_mounted = device::mounted(&saved.number, &saved.mount)?.is_some();
        let mut left = Vec::new();
        if let Err(error) = self.end_use(&saved, is_mounted, is_ours) {
            if saved.key.is_none() {
                return Err(error);
            }
            left.push(error);
        }
        left.extend(self.give_back(&saved).err());
        for error in left {
            // The next owner takes the disk by force: from then on nothing of this node reaches it, whatever hangs here.
            let text = format!("{} was not let go in order: {error}", saved.device.display());
            self.context.event(EventLevel::Warning, &text);
        }
        self.context.forget();
        Ok(())
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.state().map(drop)
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        let saved = self.state()?;
        device::look(&mut self.calls, &saved.device, &saved.mount)
    }

    fn control(&mut self, verb: &str, _arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        if verb != "holders" {
            return Err(Failure::Unsupported(format!(
                "a PhysicalDisk cannot \"{verb}\"; it can \"holders\""
            )));
        }
        let saved = self.state()?;
        Ok(serde_json::json!({ "mount": saved.mount, "holders": holders::describe(&saved.mount) }))
    }
}
