//! Resources: what can be online or offline. A resource belongs to a group and is where its group is.

use super::group::Group;
use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Bytes of a resource's reason.
pub const WHY_BYTES_MAX: usize = 512;
/// Files that follow a resource.
pub const CHECKPOINTS_PER_RESOURCE_MAX: usize = 16;

/// How a resource is, by the word of its group's owner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResourceState {
    /// Not there.
    #[default]
    Offline,
    /// On its way.
    OnlinePending,
    /// There.
    Online,
    /// On its way out.
    OfflinePending,
    /// It does not work, and is not there.
    Failed,
    /// Its owner has not said anything yet, or was lost.
    Unknown,
}

impl fmt::Display for ResourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ResourceState::Offline => "offline",
            ResourceState::OnlinePending => "online pending",
            ResourceState::Online => "online",
            ResourceState::OfflinePending => "offline pending",
            ResourceState::Failed => "failed",
            ResourceState::Unknown => "unknown",
        })
    }
}

/// State with its reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourceStatus {
    /// How it is.
    pub state: ResourceState,
    /// Why, or what it is doing; may be empty. At most [`WHY_BYTES_MAX`] bytes.
    pub why: String,
    /// When the state began (Unix ms, by the owner's clock).
    pub since_unix_ms: u64,
}

/// What is done when a resource fails, and how it is watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResourcePolicy {
    /// Restarts on the same node within `restart_period_ms`; 0: none.
    pub restart_threshold: u32,
    /// In milliseconds.
    pub restart_period_ms: u64,
    /// Wait before a restart, in milliseconds.
    pub restart_delay_ms: u64,
    /// When all restarts have failed, and the group with it: it is tried again after so long, in milliseconds; 0: never.
    pub retry_after_ms: u64,
    /// When it fails for good, does its group fail (and move)? If not, the group is partially online.
    pub affects_group: bool,
    /// Between two looks; `None`: as its type says (5 s, mostly). In milliseconds.
    pub looks_alive_ms: Option<u64>,
    /// Between two thorough looks; `None`: as its type says (60 s, mostly). In milliseconds.
    pub is_alive_ms: Option<u64>,
    /// For going online or offline, without any progress, in milliseconds.
    pub pending_timeout_ms: u64,
    /// An entry point that does not return for so long hangs, in milliseconds.
    pub deadlock_timeout_ms: u64,
    /// A resource host of its own.
    pub separate_monitor: bool,
}

impl Default for ResourcePolicy {
    fn default() -> Self {
        ResourcePolicy {
            restart_threshold: 1,
            restart_period_ms: 900_000,
            restart_delay_ms: 500,
            retry_after_ms: 3_600_000,
            affects_group: true,
            looks_alive_ms: None,
            is_alive_ms: None,
            pending_timeout_ms: 180_000,
            deadlock_timeout_ms: 300_000,
            separate_monitor: false,
        }
    }
}

/// A resource.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resource {
    /// Name, unique in the cluster.
    pub name: String,
    /// Resource type: `VirtualMachine`, `ocf:heartbeat:nginx`, `systemd:foo.service`, ...
    #[serde(rename = "type")]
    pub kind: String,
    /// Its group.
    pub group: String,
    /// What its type needs to know.
    pub properties: BTreeMap<String, String>,
    /// What must be online before it, as an expression (see [`crate::groups::expr`]); empty: nothing.
    pub depends: String,
    /// Nodes that may have it; empty: all.
    pub possible: Vec<NodeId>,
    /// Should it be online when its group is?
    pub want_online: bool,
    /// When an administrator wanted it online last (Unix ms): whatever failed before then is forgotten.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wanted_unix_ms: Option<u64>,
    /// Failure and polls.
    pub policy: ResourcePolicy,
    /// Files (absolute paths) and kernel settings (`sysctl:NAME`) that follow it to the next node; see [`super::Followed`].
    pub checkpoints: Vec<String>,
    /// How it is.
    pub status: ResourceStatus,
}

/// A resource type in a shared library (see `include/csv_resource.h`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LibraryType {
    /// Name of the type.
    pub name: String,
    /// Absolute path of the library, the same on every node.
    pub library: String,
    /// Properties that it knows; those with `true` must be given.
    pub properties: BTreeMap<String, bool>,
}

/// What guards a resource's data against a former owner that is cut off but still works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// The storage refuses the former owner, or a lock or a check on the network does: the next owner can start at once.
    Own,
    /// Nothing does, unless something that it depends on is a disk: the next owner waits until the former has stopped.
    ByDisk,
}

impl Resource {
    /// See [`Guard`].
    #[must_use]
    pub fn guard(&self) -> Guard {
        match self.kind.as_str() {
            // Image locks and fenced volumes; reservations; duplicate address detection; a name is only a record.
            "VirtualMachine"
            | "PhysicalDisk"
            | "ClusterSharedVolume"
            | "IPAddress"
            | "NetworkName"
            | "FileShare" => Guard::Own,
            _ => Guard::ByDisk,
        }
    }

    /// Memory that it takes on its node, in MiB.
    #[must_use]
    pub fn memory_mib(&self) -> u64 {
        self.number("memory_mib")
    }

    /// Processors that it takes on its node.
    #[must_use]
    pub fn cpus(&self) -> u64 {
        self.number("cpus")
    }

    fn number(&self, key: &str) -> u64 {
        if self.kind != "VirtualMachine" {
            return 0;
        }
        self.properties.get(key).and_then(|text| text.parse().ok()).unwrap_or(match key {
            "memory_mib" => 1024,
            _ => 1,
        })
    }
}

/// Resources of a group, by name.
pub fn of_group<'a>(
    resources: &'a BTreeMap<String, Resource>,
    group: &'a Group,
) -> impl Iterator<Item = &'a Resource> {
    resources.values().filter(move |resource| resource.group == group.name)
}
