//! The types that come with csvfs, and where a type is looked up.

mod application;
pub mod csv;
pub mod disk;
mod fault;
pub mod ip;
mod launch;
mod library;
mod log;
mod mounts;
pub mod name;
mod ocf;
mod run;
mod script;
mod service;
mod settings;
pub mod share;
#[cfg(test)]
mod testbed;
pub mod vm;

use crate::api::{Context, Failure, ResourceType, Spec};
use std::path::Path;
use std::time::Duration;

pub use launch::{LAUNCH, launch};

/// Types that are always there.
#[must_use]
pub fn builtin() -> Vec<Box<dyn ResourceType>> {
    let mut types: Vec<Box<dyn ResourceType>> = vec![
        Box::new(csv::ClusterSharedVolume),
        Box::new(disk::PhysicalDisk),
        Box::new(ip::IpAddress),
        Box::new(name::NetworkName),
        Box::new(share::FileShare),
        Box::new(vm::VirtualMachine),
        Box::new(application::GenericApplication),
        Box::new(script::GenericScript),
        Box::new(service::GenericService::default()),
    ];
    if fault::enabled() {
        types.push(Box::new(fault::FaultType));
    }
    types
}

/// The type of that name: from its shared library, if it has one; `systemd:UNIT`; `ocf:PROVIDER:AGENT`; or one that
/// comes with csvfs.
///
/// # Errors
/// There is no such type on this node, in words that say which there are.
pub fn find(kind: &str, library: Option<&Path>) -> Result<Box<dyn ResourceType>, String> {
    if let Some(path) = library {
        return library::load(kind, path);
    }
    if let Some(unit) = kind.strip_prefix("systemd:") {
        return Ok(Box::new(service::GenericService::of_unit(unit)?));
    }
    if let Some(agent) = kind.strip_prefix("ocf:") {
        return Ok(Box::new(ocf::OcfAgent::find(agent)?));
    }
    let mut names = Vec::new();
    for known in builtin() {
        let name = known.info().name;
        if name == kind {
            return Ok(known);
        }
        names.push(name);
    }
    Err(format!(
        "there is no resource type \"{kind}\"; there are {}, systemd:UNIT (such as systemd:nginx), \
         ocf:PROVIDER:AGENT (such as ocf:heartbeat:Filesystem), and types with a shared library of their own",
        names.join(", ")
    ))
}

/// Keeps what a next host needs.
///
/// # Errors
/// See [`Services::save`](crate::api::Services::save).
fn keep(context: &Context, state: &impl serde::Serialize) -> Result<(), Failure> {
    context.save(Some(serde_json::to_value(state).map_err(Failure::new)?))
}

/// A property's value.
fn property<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.properties.get(name).map(String::as_str)
}

/// A property that is a number of milliseconds.
fn property_ms(spec: &Spec, name: &str, default_ms: u64) -> Duration {
    let given = property(spec, name).and_then(|value| value.parse().ok());
    Duration::from_millis(given.unwrap_or(default_ms))
}

#[cfg(test)]
mod tests {
    use super::testbed::{Bed, spec};
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A program that leaves a file when it is called.
    fn program(bed: &Bed, name: &str) -> (String, std::path::PathBuf) {
        let (path, mark) = (bed.dir().join(name), bed.dir().join(format!("{name}.called")));
        std::fs::write(&path, format!("#!/bin/sh\necho \"$1\" >>{}\n", mark.display())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (path.to_str().unwrap().to_owned(), mark)
    }

    #[test]
    fn nothing_is_started_that_cannot_be_kept() {
        let bed = Bed::new();
        bed.set_full(true);
        let (path, called) = program(&bed, "program");
        let image = bed.dir().join("disk.img");
        std::fs::write(&image, "image").unwrap();
        let image = image.to_str().unwrap();
        type Case<'a> = (&'a dyn ResourceType, &'a str, &'a [(&'a str, &'a str)]);
        let kinds: [Case; 3] = [
            (&script::GenericScript, "GenericScript", &[("script", &path)]),
            (&application::GenericApplication, "GenericApplication", &[("command", &path)]),
            (
                &vm::VirtualMachine,
                "VirtualMachine",
                &[("disk", image), ("qemu", &path), ("memory_mib", "16")],
            ),
        ];
        for (kind, name, properties) in kinds {
            let mut resource = bed.open(kind, spec(name, properties));
            let error = resource.online().unwrap_err();
            assert!(error.to_string().contains("could not be kept"), "{name}: {error}");
            assert!(!called.exists(), "{name}");
            // A script is told that it is closed.
            drop(resource);
            let _ = std::fs::remove_file(&called);
        }
        // What ends a resource goes on.
        let mut script = bed.open(&script::GenericScript, spec("GenericScript", &[("script", &path)]));
        script.offline().unwrap();
        script.terminate().unwrap();
        let calls = std::fs::read_to_string(&called).unwrap();
        assert!(calls.contains("offline\nterminate\n"), "{calls}");
        assert!(bed.events().iter().any(|event| event.contains("could not be kept")), "{:?}", bed.events());
    }
}
