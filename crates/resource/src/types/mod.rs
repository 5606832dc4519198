//! The types that come with csvfs, and where a type is looked up.

mod application;
pub mod csv;
pub mod disk;
mod fault;
pub mod ip;
mod launch;
mod library;
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

use crate::api::{ResourceType, Spec};
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

/// A property's value.
fn property<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.properties.get(name).map(String::as_str)
}

/// A property that is a number of milliseconds.
fn property_ms(spec: &Spec, name: &str, default_ms: u64) -> Duration {
    let given = property(spec, name).and_then(|value| value.parse().ok());
    Duration::from_millis(given.unwrap_or(default_ms))
}
