//! Records that the engine only keeps: properties, checkpoints, tokens, secrets, events.

use super::super::command::{Answer, Command, EVENTS_PER_COMMAND_MAX};
use super::super::events::EventKind;
use super::super::refused::Refused;
use super::super::{
    CHECKPOINT_BYTES_MAX, ClusterDb, Group, GroupPolicy, PROPERTY_BYTES_MAX, RECORDS_BYTES_MAX, RECORDS_MAX,
    TOKENS_MAX, Token,
};
use super::resources::resource_bytes;
use super::{At, check_name, done, is_sha256, unchanged};
use std::collections::BTreeMap;

impl ClusterDb {
    /// The commands of this file; `None` for others.
    pub(super) fn apply_record(&mut self, at: At, command: &Command) -> Option<Answer> {
        Some(if let Command::Property { key, value } = command {
            self.property(key, value.as_deref())
        } else if let Command::CheckpointPut { name, value, owner } = command {
            let owns = owner.as_ref().map(|of| self.need_group_owner(&of.group, of.generation, of.node));
            match owns {
                Some(Err(refused)) => Err(refused),
                Some(Ok(_)) | None => self.checkpoint_put(name, value),
            }
        } else if let Command::CheckpointDelete { name } = command {
            if self.checkpoints.remove(name).is_some() { done() } else { unchanged() }
        } else if let Command::TokenAdd { sha256, expires_unix_ms, uses } = command {
            self.token_add(at, sha256, *expires_unix_ms, *uses)
        } else if let Command::TokenRevoke { sha256 } = command {
            self.token_revoke(at, sha256)
        } else if let Command::SecretsSet { secrets } = command {
            if self.secrets == *secrets {
                return Some(unchanged());
            }
            self.secrets = secrets.clone();
            let name = self.name.clone();
            self.emit(
                at,
                EventKind::SecretsChanged,
                None,
                &name,
                "the cluster's secrets were replaced".into(),
            );
            done()
        } else if let Command::EventAdd { events } = command {
            if events.len() > EVENTS_PER_COMMAND_MAX {
                let (what, max) = ("events at a time".into(), EVENTS_PER_COMMAND_MAX as u64);
                return Some(Err(Refused::TooMany { what, max }));
            }
            events.iter().for_each(|event| self.events.push(event.clone()));
            done()
        } else {
            return None;
        })
    }

    fn property(&mut self, key: &str, value: Option<&str>) -> Answer {
        check_name("property", key)?;
        let Some(value) = value else {
            return if self.properties.remove(key).is_some() { done() } else { unchanged() };
        };
        check_bytes("a property", value.len(), PROPERTY_BYTES_MAX)?;
        room(&self.properties, key, "properties")?;
        self.room_for(self.properties.get(key).map_or(0, String::len), value.len(), key)?;
        self.properties.insert(key.into(), value.into());
        done()
    }

    fn checkpoint_put(&mut self, name: &str, value: &[u8]) -> Answer {
        check_name("checkpoint", name)?;
        check_bytes("a checkpoint", value.len(), CHECKPOINT_BYTES_MAX)?;
        room(&self.checkpoints, name, "checkpoints")?;
        self.room_for(self.checkpoints.get(name).map_or(0, |old| old.len() * 2), value.len() * 2, name)?;
        self.checkpoints.insert(name.into(), value.into());
        done()
    }

    fn token_add(&mut self, at: At, sha256: &str, expires_unix_ms: u64, uses: u32) -> Answer {
        if !is_sha256(sha256) {
            return Err(Refused::Invalid("a token's SHA-256 must be 64 lower-case hex digits".into()));
        }
        if uses == 0 || expires_unix_ms <= at {
            return Err(Refused::Invalid("a token must be good for at least one node and some time".into()));
        }
        let good = |token: &Token| token.uses_left > 0 && token.expires_unix_ms > at;
        let others = self.tokens.iter().filter(|(key, token)| *key != sha256 && good(token)).count();
        if others >= TOKENS_MAX {
            return Err(Refused::TooMany { what: "join tokens".into(), max: TOKENS_MAX as u64 });
        }
        // Useless ones stay until then, so that their user is told why they are.
        self.tokens.retain(|_, token| good(token));
        self.tokens.insert(sha256.into(), Token { expires_unix_ms, uses_left: uses });
        let name = self.name.clone();
        self.emit(at, EventKind::TokenAdded, None, &name, format!("a join token for {uses} nodes was made"));
        done()
    }

    fn token_revoke(&mut self, at: At, sha256: &str) -> Answer {
        if self.tokens.remove(sha256).is_none() {
            return unchanged();
        }
        let name = self.name.clone();
        self.emit(at, EventKind::TokenRevoked, None, &name, "a join token was revoked".into());
        done()
    }
}

impl ClusterDb {
    /// May there be a group of that name with that policy?
    pub(super) fn room_for_group(&self, name: &str, policy: &GroupPolicy) -> Result<(), Refused> {
        room(&self.groups, name, "groups")?;
        self.room_for(self.groups.get(name).map_or(0, group_bytes), name.len() + policy_bytes(policy), name)
    }

    /// May a record of that name have so many bytes, where it had `old`?
    pub(super) fn room_for(&self, old: usize, new: usize, name: &str) -> Result<(), Refused> {
        let hex = |value: &Vec<u8>| value.len() * 2;
        let records = self.groups.values().map(group_bytes).sum::<usize>()
            + self.resources.values().map(resource_bytes).sum::<usize>()
            + map_bytes(&self.properties)
            + self.checkpoints.iter().map(|(name, value)| name.len() + hex(value)).sum::<usize>();
        // One that shrinks is always taken.
        if new <= old || records - old + new + name.len() <= RECORDS_BYTES_MAX {
            return Ok(());
        }
        let what = "bytes of groups, resources, properties and checkpoints together".into();
        Err(Refused::TooMany { what, max: RECORDS_BYTES_MAX as u64 })
    }
}

fn group_bytes(group: &Group) -> usize {
    group.name.len() + policy_bytes(&group.policy)
}

fn policy_bytes(policy: &GroupPolicy) -> usize {
    let after: usize = policy.start_after.iter().map(String::len).sum();
    let classes: usize = policy.anti_affinity.iter().map(|class| class.class.len()).sum();
    policy.preferred.len() * 4 + after + classes
}

pub(super) fn map_bytes(map: &BTreeMap<String, String>) -> usize {
    map.iter().map(|(key, value)| key.len() + value.len()).sum()
}

pub(super) fn check_bytes(what: &str, bytes: usize, max: usize) -> Result<(), Refused> {
    if bytes <= max {
        return Ok(());
    }
    Err(Refused::Invalid(format!("{what} can have {max} bytes, this one has {bytes}")))
}

/// Is there room for one more, or is it there already?
pub(super) fn room<T>(map: &BTreeMap<String, T>, key: &str, what: &str) -> Result<(), Refused> {
    if map.len() < RECORDS_MAX || map.contains_key(key) {
        return Ok(());
    }
    Err(Refused::TooMany { what: what.into(), max: RECORDS_MAX as u64 })
}
