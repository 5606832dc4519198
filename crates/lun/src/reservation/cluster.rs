//! What the cluster engine does with reservations: take part, keep the reservation up, fence, look.
//!
//! Fencing is decided by the majority before any of this is called. Two nodes that fence each other at the same time
//! is still possible (a decision that was superseded): the device carries out one of the two first, and the other
//! meets a conflict, finds its own key gone and gets `Fatal`.

use super::error::{ErrorKind, PrOp, ReservationError};
use super::types::{Holder, RegisterOutcome, ReservationType};
use super::{Keys, Reservations};
use std::time::Duration;

/// Tries of a step whose outcome another node may have changed meanwhile.
const ROUNDS_MAX: u32 = 5;
/// How often a key that was preempted is looked for.
const READ_BACK_MAX: u32 = 20;
const READ_BACK_PAUSE: Duration = Duration::from_millis(100);

/// How one victim fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VictimOutcome {
    /// It had no registration any more. If another node took it this moment, that node's abort may still be under way.
    NotRegistered,
    /// Its registration is gone and its writes under way are aborted: nothing of it can reach the medium.
    Aborted,
    /// Its registration is gone, but writes that the storage had accepted may still reach the medium. Wait for the
    /// storage's longest command time before using what it may have written.
    Preempted,
}

/// One victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VictimReport {
    /// Its key.
    pub key: u64,
    /// What was done.
    pub outcome: VictimOutcome,
}

/// What a fence did. It is only returned when every victim is out and a reservation keeps it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FenceReport {
    /// The reservation's holder first, else in the order asked for; each once.
    pub victims: Vec<VictimReport>,
    /// The reservation afterwards. `None` where it cannot be read.
    pub holder: Option<Holder>,
    /// The keys afterwards. `None` where they cannot be read: then nothing but the device's word says that the victims
    /// are out.
    pub keys: Option<Keys>,
}

/// Is a node kept out?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FencedState {
    /// Not registered, and a reservation keeps it out.
    Fenced,
    /// Registered: it can write.
    Registered,
    /// Not registered, but nothing keeps it out.
    NoReservation,
}

impl Reservations {
    /// Registers this node, whether it is registered already or not. To be called when a node joins, and again after the
    /// storage has lost registrations; never to undo a fence while anything of the node's earlier life may still write.
    ///
    /// # Errors
    /// As [`Reservations::register_ignore`]; `Unknown` when the key cannot be seen afterwards.
    pub fn ensure_registered(&self, key: u64) -> Result<RegisterOutcome, ReservationError> {
        let outcome = self.register_ignore(key)?;
        match self.verify(key) {
            Ok(true) => Ok(outcome),
            Ok(false) => {
                let why = "the key is not there; another node may have preempted it";
                Err(self.errors.unknown(PrOp::RegisterIgnore, why))
            }
            Err(error) if error.is_unsupported() => Ok(outcome),
            Err(error) => Err(error),
        }
    }

    /// Makes sure that a reservation keeps unregistered nodes from writing: any registrant may hold it. The reservation
    /// found or made.
    ///
    /// # Errors
    /// `Conflict` when this node is not registered; `Rejected` when another node holds one of another type.
    pub fn ensure_reserved(&self, key: u64) -> Result<Holder, ReservationError> {
        let wanted = ReservationType::WriteExclusiveRegistrantsOnly;
        let ours = Holder { key, kind: wanted };
        let mut last = None;
        for _ in 0..ROUNDS_MAX {
            match self.read_reservation() {
                Ok(Some(holder)) if serves(holder.kind) => return Ok(holder),
                Ok(Some(holder)) if holder.key == key => self.release(key, holder.kind)?,
                Ok(Some(holder)) => {
                    let why = format!(
                        "key {:#x} holds a reservation of type {}; release it there, or clear it",
                        holder.key, holder.kind
                    );
                    return Err(self.errors.rejected(PrOp::Reserve, why));
                }
                Ok(None) => match self.reserve(key, wanted) {
                    // Read again rather than believe: the reservation may have gone already.
                    Ok(()) => {}
                    Err(error) if error.is_conflict() && self.verify(key)? => last = Some(error),
                    Err(error) => return Err(error),
                },
                Err(error) if error.is_unsupported() => {
                    return self.reserve(key, wanted).map(|()| ours);
                }
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| self.errors.unknown(PrOp::Reserve, "the reservation keeps going away")))
    }

    /// Makes sure that the victims can write no more: takes the registration of each, reads the keys back until they are
    /// gone, and makes sure that a reservation of a node that is not a victim keeps them out.
    ///
    /// # Errors
    /// `Fatal` when this node itself is not registered: it has been fenced, or has become another initiator. `Rejected`: no victim was touched, or the
    /// device cannot. `Unknown`: some may be out and some not; fence again.
    pub fn fence(&self, own_key: u64, victim_keys: &[u64]) -> Result<FenceReport, ReservationError> {
        let op = PrOp::Fence;
        if victim_keys.iter().any(|victim| *victim == own_key || *victim == 0) {
            return Err(self.errors.rejected(op, "a node cannot fence itself, nor a node without a key"));
        }
        match self.verify(own_key) {
            Ok(true) => {}
            Ok(false) => return Err(self.self_fenced()),
            Err(error) if error.is_unsupported() => return self.fence_blindly(own_key, victim_keys),
            Err(error) => return Err(error),
        }
        // A reservation of another type that a victim holds is taken over with its registration.
        let taken_over = |held: Holder| !serves(held.kind) && victim_keys.contains(&held.key);
        let held = self.read_reservation()?;
        if !held.is_some_and(taken_over) {
            self.keep_reserved(own_key)?;
        }
        // Who preempts the holder has the reservation, and is served whatever the storage thinks of its registration.
        let mut order = victim_keys.to_vec();
        order.sort_by_key(|key| held.is_none_or(|held| held.key != *key));
        let mut victims: Vec<VictimReport> = Vec::new();
        for key in order {
            if victims.iter().all(|known| known.key != key) {
                victims.push(VictimReport { key, outcome: self.fence_one(own_key, key)? });
            }
        }
        self.backend.settle()?;
        let keys = self.read_until_gone(&victims)?;
        if !keys.keys.contains(&own_key) {
            return Err(self.self_fenced());
        }
        let holder = self.keep_reserved(own_key)?;
        Ok(FenceReport { victims, holder: Some(holder), keys: Some(keys) })
    }

    /// As `ensure_reserved`, when a conflict can only mean that this node is out.
    fn keep_reserved(&self, own_key: u64) -> Result<Holder, ReservationError> {
        match self.ensure_reserved(own_key) {
            Err(error) if error.is_conflict() && !self.verify(own_key)? => Err(self.self_fenced()),
            other => other,
        }
    }

    fn self_fenced(&self) -> ReservationError {
        self.errors.fatal(PrOp::Fence, "this node's own key is not registered: another node has fenced it")
    }

    fn fence_one(&self, own_key: u64, victim: u64) -> Result<VictimOutcome, ReservationError> {
        let mut last = None;
        for _ in 0..ROUNDS_MAX {
            let keys = self.read_keys()?;
            if !keys.keys.contains(&own_key) {
                return Err(self.self_fenced());
            }
            if !keys.keys.contains(&victim) {
                // After a try of ours with an unknown outcome it was ours that took effect, and perhaps not its abort.
                let unsure = last.as_ref().is_some_and(|e: &ReservationError| e.kind() == ErrorKind::Unknown);
                return Ok(if unsure { VictimOutcome::Preempted } else { VictimOutcome::NotRegistered });
            }
            match self.preempt(own_key, victim, ReservationType::WriteExclusiveRegistrantsOnly, true) {
                Ok(done) if done.aborted => return Ok(VictimOutcome::Aborted),
                Ok(_) => return Ok(VictimOutcome::Preempted),
                // One of the two keys has just gone, or the outcome has to be read.
                Err(error) if error.is_conflict() || error.kind() == ErrorKind::Unknown => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        if last.as_ref().is_some_and(ReservationError::is_conflict) {
            let why = "this node's key is there, but the storage does not take this node for the initiator that registered \
                       it, as after a restart when an initiator comes back with another session id; register anew";
            return Err(self.errors.fatal(PrOp::Fence, why));
        }
        let why = last.map_or_else(String::new, |error| error.to_string());
        Err(self.errors.unknown(PrOp::Fence, format!("key {victim:#x} could not be preempted: {why}")))
    }

    fn read_until_gone(&self, victims: &[VictimReport]) -> Result<Keys, ReservationError> {
        for _ in 0..READ_BACK_MAX {
            let keys = self.read_keys()?;
            if victims.iter().all(|victim| !keys.keys.contains(&victim.key)) {
                return Ok(keys);
            }
            std::thread::sleep(READ_BACK_PAUSE);
        }
        let why = "a victim's key is still registered, or registered again; fence again";
        Err(self.errors.unknown(PrOp::Fence, why))
    }

    /// Where nothing can be read back: the device's own answers are all there is.
    fn fence_blindly(&self, own_key: u64, victim_keys: &[u64]) -> Result<FenceReport, ReservationError> {
        let kind = ReservationType::WriteExclusiveRegistrantsOnly;
        let mut holder = None;
        match self.reserve(own_key, kind) {
            Ok(()) => holder = Some(Holder { key: own_key, kind }),
            // Another node has the reservation, or this one is out; preempting tells which.
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error),
        }
        let mut victims = Vec::new();
        for key in victim_keys {
            let outcome = match self.preempt(own_key, *key, kind, true) {
                Ok(done) if done.aborted => VictimOutcome::Aborted,
                Ok(_) => VictimOutcome::Preempted,
                Err(error) if error.is_conflict() => {
                    let why = format!(
                        "key {key:#x} or this node's own is not registered, and keys cannot be read on this device"
                    );
                    return Err(self.errors.unknown(PrOp::Fence, why));
                }
                Err(error) => return Err(error),
            };
            victims.push(VictimReport { key: *key, outcome });
        }
        Ok(FenceReport { victims, holder, keys: None })
    }

    /// Is this node still registered with `key`, by this path where the device can tell?
    ///
    /// # Errors
    /// As [`Reservations::read_keys`].
    pub fn verify(&self, key: u64) -> Result<bool, ReservationError> {
        self.backend.is_registered_here(key)
    }

    /// Is the node with `key` kept out? Waits for a fence that is being carried out.
    ///
    /// # Errors
    /// As [`Reservations::read_keys`].
    pub fn check_fenced(&self, key: u64) -> Result<FencedState, ReservationError> {
        self.backend.settle()?;
        // The reservation first: a key that registers in between counts as registered.
        let holder = self.read_reservation()?;
        if self.read_keys()?.keys.contains(&key) {
            return Ok(FencedState::Registered);
        }
        Ok(if holder.is_some() { FencedState::Fenced } else { FencedState::NoReservation })
    }
}

/// Does a reservation of this type do what csvfs needs: registered nodes write, everybody else does not, all may read?
fn serves(kind: ReservationType) -> bool {
    matches!(
        kind,
        ReservationType::WriteExclusiveRegistrantsOnly | ReservationType::WriteExclusiveAllRegistrants
    )
}
