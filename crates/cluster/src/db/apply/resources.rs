//! Commands about resources and resource types.

use super::super::ClusterDb;
use super::super::checkpoint::{Followed, is_plain_path};
use super::super::command::{Answer, Command, NewResource, ResourceChange};
use super::super::events::EventKind;
use super::super::refused::Refused;
use super::super::resource::{
    CHECKPOINTS_PER_RESOURCE_MAX, LibraryType, Resource, ResourcePolicy, ResourceState, ResourceStatus,
};
use super::super::{PROPERTY_BYTES_MAX, RECORDS_MAX};
use super::records::{check_bytes, map_bytes, room};
use super::{At, check_name, done, unchanged};
use crate::groups::expr::{self, Expr};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a type's name.
const KIND_BYTES_MAX: usize = 128;
const DAY_MS: u64 = 86_400_000;

impl ClusterDb {
    /// The commands of this file; `None` for others.
    pub(super) fn apply_resource(&mut self, at: At, command: &Command) -> Option<Answer> {
        Some(if let Command::ResourceAdd { resource } = command {
            self.resource_add(at, resource)
        } else if let Command::ResourceSet { name, change } = command {
            self.resource_set(at, name, change)
        } else if let Command::ResourceRemove { name } = command {
            self.resource_remove(at, name)
        } else if let Command::ResourceOnline { name } = command {
            self.resource_want(at, name, true)
        } else if let Command::ResourceOffline { name } = command {
            self.resource_want(at, name, false)
        } else if let Command::TypePut { resource_type } = command {
            self.type_put(at, resource_type)
        } else if let Command::TypeRemove { name } = command {
            self.type_remove(at, name)
        } else {
            return None;
        })
    }

    fn need_resource(&self, name: &str) -> Result<&Resource, Refused> {
        self.resources
            .get(name)
            .ok_or_else(|| Refused::NotFound { what: "resource".into(), name: name.into() })
    }

    /// Everything that is asked of a resource as it would be.
    fn check_resource(&self, resource: &Resource) -> Result<(), Refused> {
        check_name("resource", &resource.name)?;
        let invalid = |text: String| Err(Refused::Invalid(text));
        let word = resource.name.eq_ignore_ascii_case("and") || resource.name.eq_ignore_ascii_case("or");
        if word || resource.name.contains(['[', ']', '(', ')']) {
            let why = "it must have no brackets or parentheses, and not be \"and\" or \"or\"".into();
            return Err(Refused::BadName { what: "resource".into(), name: resource.name.clone(), why });
        }
        if resource.kind.is_empty() || resource.kind.len() > KIND_BYTES_MAX {
            return invalid(format!("a resource type has 1 to {KIND_BYTES_MAX} bytes"));
        }
        self.need_group(&resource.group)?;
        check_bytes("a resource", resource_bytes(resource), PROPERTY_BYTES_MAX)?;
        self.check_nodes_once("possible owners", &resource.possible)?;
        check_resource_policy(&resource.policy)?;
        if resource.checkpoints.len() > CHECKPOINTS_PER_RESOURCE_MAX {
            let what = "checkpoints of a resource".into();
            return Err(Refused::TooMany { what, max: CHECKPOINTS_PER_RESOURCE_MAX as u64 });
        }
        if let Some(path) = resource.checkpoints.iter().find(|path| Followed::parse(path).is_none()) {
            return invalid(format!(
                "a checkpoint is a file by its absolute path, without \"..\", or a kernel setting such as \
                 sysctl:net.core.somaxconn; not \"{path}\""
            ));
        }
        self.check_dependencies(resource)
    }

    fn check_dependencies(&self, resource: &Resource) -> Result<(), Refused> {
        let invalid = |text: String| Err(Refused::Invalid(text));
        let own = match Expr::parse(&resource.depends) {
            Ok(own) => own,
            Err(error) => return invalid(error.to_string()),
        };
        for name in own.names() {
            if name == resource.name {
                return invalid(format!("resource {name} cannot depend on itself"));
            }
            let other = self.need_resource(name)?;
            if other.group != resource.group {
                return invalid(format!(
                    "{name} is in group {}, {} in group {}: only resources of one group can depend on each other",
                    other.group, resource.name, resource.group
                ));
            }
        }
        // Those of the database were checked when they came.
        let others = self.resources.values().filter(|other| other.name != resource.name);
        let parsed: BTreeMap<&str, Expr> = others
            .map(|other| (other.name.as_str(), Expr::parse(&other.depends).unwrap_or(Expr::Nothing)))
            .collect();
        let mut depends: BTreeMap<&str, BTreeSet<&str>> =
            parsed.iter().map(|(name, expr)| (*name, expr.names())).collect();
        depends.insert(&resource.name, own.names());
        match expr::cycle(&depends) {
            None => Ok(()),
            Some(way) => invalid(format!(
                "resources cannot depend on each other in a circle: {}",
                way.join(" depends on ")
            )),
        }
    }

    fn resource_add(&mut self, at: At, new: &NewResource) -> Answer {
        let new = new.clone();
        let resource = Resource {
            name: new.name,
            kind: new.kind,
            group: new.group,
            properties: new.properties,
            depends: new.depends,
            possible: new.possible,
            want_online: new.want_online,
            wanted_unix_ms: None,
            policy: new.policy,
            checkpoints: new.checkpoints,
            status: ResourceStatus { since_unix_ms: at, ..ResourceStatus::default() },
        };
        let name = resource.name.clone();
        if let Some(there) = self.resources.get(&name) {
            let hint = format!(" (in group {})", there.group);
            return Err(Refused::Duplicate { what: "resource".into(), name, hint });
        }
        self.check_resource(&resource)?;
        room(&self.resources, &name, "resources")?;
        self.room_for(0, resource_bytes(&resource), &name)?;
        let message = format!("resource {name} ({}) was added to group {}", resource.kind, resource.group);
        self.resources.insert(name.clone(), resource);
        self.emit(at, EventKind::ResourceAdded, None, &name, message);
        done()
    }

    fn resource_set(&mut self, at: At, name: &str, change: &ResourceChange) -> Answer {
        let old = self.need_resource(name)?;
        let mut new = old.clone();
        for (key, value) in &change.properties {
            match value {
                Some(value) => {
                    new.properties.insert(key.clone(), value.clone());
                }
                None => {
                    new.properties.remove(key);
                }
            }
        }
        let take = |place: &mut String, value: &Option<String>| {
            if let Some(value) = value {
                place.clone_from(value);
            }
        };
        take(&mut new.depends, &change.depends);
        take(&mut new.group, &change.group);
        if let Some(possible) = &change.possible {
            new.possible.clone_from(possible);
        }
        if let Some(policy) = &change.policy {
            new.policy = policy.clone();
        }
        if let Some(checkpoints) = &change.checkpoints {
            new.checkpoints.clone_from(checkpoints);
        }
        if new == *old {
            return unchanged();
        }
        if new.group != old.group {
            self.check_leaves_group(old)?;
        }
        self.check_resource(&new)?;
        self.room_for(resource_bytes(old), resource_bytes(&new), name)?;
        self.resources.insert(name.into(), new);
        self.emit(at, EventKind::ResourceChanged, None, name, format!("resource {name} was changed"));
        done()
    }

    /// May the resource go out of its group?
    fn check_leaves_group(&self, resource: &Resource) -> Result<(), Refused> {
        let name = &resource.name;
        let dependent = self.resources.values().find(|other| {
            Expr::parse(&other.depends).is_ok_and(|depends| depends.names().contains(name.as_str()))
        });
        if let Some(other) = dependent {
            return Err(Refused::Invalid(format!(
                "resource {} depends on {name}: change that first with `csvctl resource set {} --depends ...`",
                other.name, other.name
            )));
        }
        let owned = self.groups.get(&resource.group).is_some_and(|group| group.owner.is_some());
        let gone = match resource.status.state {
            ResourceState::Offline => true,
            ResourceState::Failed | ResourceState::Unknown => !owned,
            ResourceState::Online | ResourceState::OnlinePending | ResourceState::OfflinePending => false,
        };
        if gone && !(owned && resource.want_online) {
            return Ok(());
        }
        Err(Refused::Invalid(format!(
            "resource {name} is {}: take it offline first with `csvctl resource offline {name}`",
            resource.status.state
        )))
    }

    fn resource_remove(&mut self, at: At, name: &str) -> Answer {
        let resource = self.need_resource(name)?;
        self.check_leaves_group(resource)?;
        self.resources.remove(name);
        // As the owner names them: `resource:NAME:NUMBER`.
        let number = |key: &str| {
            let number = key.strip_prefix("resource:")?.strip_prefix(name)?.strip_prefix(':')?;
            number.bytes().all(|byte| byte.is_ascii_digit()).then_some(())
        };
        self.checkpoints.retain(|key, _| number(key).is_none());
        self.emit(at, EventKind::ResourceRemoved, None, name, format!("resource {name} was removed"));
        done()
    }

    fn resource_want(&mut self, at: At, name: &str, online: bool) -> Answer {
        let resource = self.need_resource(name)?;
        let failed = resource.status.state == ResourceState::Failed;
        self.need_group(&resource.group)?;
        if resource.want_online == online && !(online && failed) {
            return unchanged();
        }
        let group = resource.group.clone();
        if let Some(resource) = self.resources.get_mut(name) {
            resource.want_online = online;
            if online {
                resource.wanted_unix_ms = Some(at);
            }
        }
        if let Some(group) = self.groups.get_mut(&group).filter(|_| online) {
            group.given_up = None;
            group.failures.clear();
        }
        let message = format!("resource {name} is to be {}", if online { "online" } else { "offline" });
        self.emit(at, EventKind::ResourceWanted, None, name, message);
        done()
    }

    fn type_put(&mut self, at: At, resource_type: &LibraryType) -> Answer {
        let name = &resource_type.name;
        check_name("resource type", name)?;
        if name.contains(':') {
            let why = "it must have no colon: such names are those of OCF agents and systemd units".into();
            return Err(Refused::BadName { what: "resource type".into(), name: name.clone(), why });
        }
        if !is_plain_path(&resource_type.library) {
            return Err(Refused::Invalid("a type's library is a file by its absolute path".into()));
        }
        if self.types.get(name) == Some(resource_type) {
            return unchanged();
        }
        if !self.types.contains_key(name) && self.types.len() >= RECORDS_MAX / 16 {
            return Err(Refused::TooMany { what: "resource types".into(), max: RECORDS_MAX as u64 / 16 });
        }
        self.types.insert(name.clone(), resource_type.clone());
        let message = format!("resource type {name} is in {}", resource_type.library);
        self.emit(at, EventKind::TypeChanged, None, name, message);
        done()
    }

    fn type_remove(&mut self, at: At, name: &str) -> Answer {
        if !self.types.contains_key(name) {
            return Err(Refused::NotFound { what: "resource type".into(), name: name.into() });
        }
        if let Some(resource) = self.resources.values().find(|resource| resource.kind == name) {
            return Err(Refused::Invalid(format!(
                "resource {} is of type {name}: remove it first",
                resource.name
            )));
        }
        self.types.remove(name);
        self.emit(at, EventKind::TypeRemoved, None, name, format!("resource type {name} was removed"));
        done()
    }
}

fn check_resource_policy(policy: &ResourcePolicy) -> Result<(), Refused> {
    let within = |what: &str, value: u64, min: u64, max: u64| {
        if (min..=max).contains(&value) {
            return Ok(());
        }
        Err(Refused::Invalid(format!("{what} is {min} to {max} ms, not {value}")))
    };
    if policy.restart_threshold > 1000 {
        return Err(Refused::Invalid("the restart threshold is 0 to 1000".into()));
    }
    within("the restart period", policy.restart_period_ms, 1_000, 30 * DAY_MS)?;
    within("the restart delay", policy.restart_delay_ms, 0, DAY_MS)?;
    within("the wait before another try", policy.retry_after_ms, 0, 30 * DAY_MS)?;
    within("looks-alive", policy.looks_alive_ms.unwrap_or(5_000), 100, DAY_MS)?;
    within("is-alive", policy.is_alive_ms.unwrap_or(60_000), 100, DAY_MS)?;
    within("the pending time-out", policy.pending_timeout_ms, 100, DAY_MS)?;
    within("the deadlock time-out", policy.deadlock_timeout_ms, 100, DAY_MS)
}

/// Bytes that a resource takes in a record.
pub(super) fn resource_bytes(resource: &Resource) -> usize {
    let Resource { name, kind, group, properties, depends, possible, checkpoints, .. } = resource;
    let paths: usize = checkpoints.iter().map(String::len).sum();
    name.len() + kind.len() + group.len() + depends.len() + possible.len() * 4 + paths + map_bytes(properties)
}
