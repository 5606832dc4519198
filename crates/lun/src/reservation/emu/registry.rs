//! The rules of persistent reservations over one file LUN, as a value. Pure. Source: SPC-4 5.13.
//!
//! Invariants: a holder is registered; no two registrations come from one nexus; the generation counts what SPC-4 counts
//! (register, preempt, clear). A nexus is *known* from its first registration until its loop device is gone, so that
//! it can be kept from writing once it is not registered any more.

use crate::reservation::types::{FullStatus, Holder, Keys, ReservationType};
use std::fmt;

/// Most registrations; a further one is refused.
pub(crate) const REGISTRATIONS_MAX: usize = 256;

/// The way by which a registration came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Nexus {
    /// A loop device. `sequence` (diskseq) is new with each attachment, so a device that was attached again is
    /// another nexus, as a machine that was started again is.
    Loop { index: u32, sequence: u64 },
    /// Whoever has this key, on a plain file.
    File { key: u64 },
}

impl fmt::Display for Nexus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Nexus::Loop { index, sequence } => write!(f, "loop{index} (attachment {sequence})"),
            Nexus::File { key } => write!(f, "file with key {key:#x}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) nexus: Nexus,
    pub(crate) key: u64,
}

/// What a loop device shows of the file while it may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) nexus: Nexus,
    pub(crate) offset: u64,
    pub(crate) size_limit: u64,
}

/// Why nothing was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Conflict,
    /// "Invalid release of persistent reservation".
    WrongType,
    /// A zero victim's key.
    InvalidKey,
    Full,
}

/// All state of one LUN.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Registry {
    pub(crate) generation: u32,
    pub(crate) registrations: Vec<Registration>,
    /// Holder and type. With an all-registrants type the nexus is whoever reserved.
    pub(crate) reservation: Option<(Nexus, ReservationType)>,
    pub(crate) known: Vec<Window>,
    /// Size of the file; 0 when it has not been noted yet.
    pub(crate) bytes: u64,
    /// Do the loop devices obey this state already? False while a change is being carried out, or after whoever
    /// carried it out died.
    pub(crate) settled: bool,
}

impl Registry {
    fn key_of(&self, nexus: Nexus) -> Option<u64> {
        self.registrations.iter().find(|one| one.nexus == nexus).map(|one| one.key)
    }

    /// Is this nexus registered with this key?
    pub(crate) fn is_registered(&self, nexus: Nexus, key: u64) -> bool {
        self.key_of(nexus) == Some(key)
    }

    /// Does any nexus have this key?
    pub(crate) fn has_key(&self, key: u64) -> bool {
        self.registrations.iter().any(|one| one.key == key)
    }

    /// May this nexus write?
    pub(crate) fn may_write(&self, nexus: Nexus) -> bool {
        match self.reservation {
            None => true,
            Some((_, kind)) if kind.is_for_registrants() => self.key_of(nexus).is_some(),
            Some((holder, _)) => holder == nexus,
        }
    }

    fn checked(&self, nexus: Nexus, key: u64) -> Result<(), Refusal> {
        if self.is_registered(nexus, key) { Ok(()) } else { Err(Refusal::Conflict) }
    }

    fn count_up(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// REGISTER (`old` given) or REGISTER AND IGNORE EXISTING KEY; `new` 0 unregisters.
    pub(crate) fn register(&mut self, nexus: Nexus, old: Option<u64>, new: u64) -> Result<(), Refusal> {
        let present = self.key_of(nexus);
        if old.is_some_and(|old| old != present.unwrap_or(0)) {
            return Err(Refusal::Conflict);
        }
        match (present, new) {
            (None, 0) => return Ok(()),
            (Some(_), 0) => self.remove(|one| one.nexus == nexus),
            (None, _) => {
                if self.registrations.len() >= REGISTRATIONS_MAX {
                    return Err(Refusal::Full);
                }
                self.registrations.push(Registration { nexus, key: new });
            }
            (Some(_), _) => self.replace_key(nexus, new),
        }
        self.count_up();
        Ok(())
    }

    fn replace_key(&mut self, nexus: Nexus, new: u64) {
        // On a plain file the key is the nexus.
        let renamed = match nexus {
            Nexus::File { .. } => Nexus::File { key: new },
            Nexus::Loop { .. } => nexus,
        };
        // Two plain-file nexuses that take one key become one.
        if renamed != nexus {
            self.registrations.retain(|one| one.nexus != renamed);
        }
        for one in self.registrations.iter_mut().filter(|one| one.nexus == nexus) {
            *one = Registration { nexus: renamed, key: new };
        }
        if let Some((holder, _)) = &mut self.reservation
            && *holder == nexus
        {
            *holder = renamed;
        }
    }

    /// Removes registrations; a reservation ends with its last holder.
    fn remove(&mut self, which: impl Fn(&Registration) -> bool) {
        self.registrations.retain(|one| !which(one));
        if let Some((holder, kind)) = self.reservation {
            let held = if kind.is_all_registrants() {
                !self.registrations.is_empty()
            } else {
                self.key_of(holder).is_some()
            };
            if !held {
                self.reservation = None;
            }
        }
    }

    fn is_holder(&self, nexus: Nexus) -> bool {
        self.reservation.is_some_and(|(holder, kind)| {
            holder == nexus || (kind.is_all_registrants() && self.key_of(nexus).is_some())
        })
    }

    pub(crate) fn reserve(&mut self, nexus: Nexus, key: u64, kind: ReservationType) -> Result<(), Refusal> {
        self.checked(nexus, key)?;
        match self.reservation {
            None => self.reservation = Some((nexus, kind)),
            Some((_, present)) if present == kind && self.is_holder(nexus) => {}
            Some(_) => return Err(Refusal::Conflict),
        }
        Ok(())
    }

    pub(crate) fn release(&mut self, nexus: Nexus, key: u64, kind: ReservationType) -> Result<(), Refusal> {
        self.checked(nexus, key)?;
        match self.reservation {
            Some((_, present)) if self.is_holder(nexus) => {
                if present != kind {
                    return Err(Refusal::WrongType);
                }
                self.reservation = None;
            }
            // Nothing of ours to release is no error.
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn preempt(
        &mut self,
        nexus: Nexus,
        key: u64,
        victim: u64,
        kind: ReservationType,
    ) -> Result<(), Refusal> {
        self.checked(nexus, key)?;
        let holder = self.reservation;
        let takes_over = match holder {
            Some((_, present)) if present.is_all_registrants() => victim == 0,
            Some((holder, _)) => self.key_of(holder) == Some(victim),
            None => false,
        };
        if victim == 0 && !takes_over {
            return Err(Refusal::InvalidKey);
        }
        if victim != 0 && !self.has_key(victim) {
            return Err(Refusal::Conflict);
        }
        self.remove(|one| (one.key == victim || victim == 0) && one.nexus != nexus);
        if takes_over {
            self.reservation = Some((nexus, kind));
        } else if victim == key {
            // Preempting one's own key without taking over removes oneself as well.
            self.remove(|one| one.nexus == nexus);
        }
        self.count_up();
        Ok(())
    }

    pub(crate) fn clear(&mut self, nexus: Nexus, key: u64) -> Result<(), Refusal> {
        self.checked(nexus, key)?;
        self.registrations.clear();
        self.reservation = None;
        self.count_up();
        Ok(())
    }

    /// A nexus came back as another one: its old registration under the same key is its own and goes over to it,
    /// with the reservation. `is_gone`: does the nexus exist no more?
    pub(crate) fn adopt(&mut self, nexus: Nexus, key: u64, is_gone: impl Fn(Nexus) -> bool) {
        let mut gone = Vec::new();
        self.registrations.retain(|one| {
            let old = one.key == key && one.nexus != nexus && is_gone(one.nexus);
            if old {
                gone.push(one.nexus);
            }
            !old
        });
        if let Some((holder, _)) = &mut self.reservation
            && gone.contains(holder)
        {
            *holder = nexus;
        }
    }

    pub(crate) fn keys(&self) -> Keys {
        let keys = self.registrations.iter().map(|one| one.key).collect();
        Keys { generation: self.generation, keys }
    }

    pub(crate) fn holder(&self) -> Option<Holder> {
        let (nexus, kind) = self.reservation?;
        let key = if kind.is_all_registrants() { 0 } else { self.key_of(nexus)? };
        Some(Holder { key, kind })
    }

    pub(crate) fn full_status(&self) -> Vec<FullStatus> {
        let status = |one: &Registration| {
            let holder = self.is_holder(one.nexus);
            FullStatus {
                key: one.key,
                holder,
                kind: self.reservation.map(|(_, kind)| kind).filter(|_| holder),
                initiator: one.nexus.to_string(),
            }
        };
        self.registrations.iter().map(status).collect()
    }
}

#[cfg(test)]
mod tests;
