//! Having a disk for this node alone, by persistent reservations (csv_lun): taking it, keeping it, giving it back.
//!
//! The type is Write Exclusive - Registrants Only, and this node is the only registrant. Taking registers this node's key,
//! then takes every other key of this cluster out with PREEMPT AND ABORT and reads the keys back: when it has returned, no
//! write of a former holder can reach the disk. The keeper looks every 3 s, and reserves again where a reservation went
//! away while the registration stayed. It never registers again: a registration that has gone was taken by another node, and
//! registering would undo that node's fence.

use super::key;
use crate::api::{Context, EventLevel, Failure};
use crate::types::run::pause;
use csv_lun::reservation::{Reservations, VictimOutcome};
use parking_lot::{Condvar, Mutex};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(3);
/// A look older than this says nothing.
pub(super) const STALE: Duration = Duration::from_secs(9);
/// Longest time of a command on storage that can preempt but not abort.
pub(super) const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// A disk and this node's key on it.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub(super) device: PathBuf,
    pub(super) key: u64,
    pub(super) generation: u64,
    /// Take it from another cluster, or from a later owner, too.
    pub(super) break_foreign: bool,
}

fn open(device: &Path) -> Result<Reservations, Failure> {
    Reservations::open(device).map_err(|error| {
        if error.is_unsupported() {
            Failure::NotHere(format!(
                "{error}; a disk that only this node can reach may be used with the property reservations set to off"
            ))
        } else {
            Failure::new(error)
        }
    })
}

impl Claim {
    /// Whose a key is, in words.
    fn whose(context: &Context, key: u64) -> String {
        match key::owner(context.node(), key) {
            Some(owner) => format!("node {} (ownership {})", owner.node, owner.generation),
            None => format!("somebody outside this cluster (key {key:#018x})"),
        }
    }

    /// Takes the disk. Afterwards this node alone can write it.
    ///
    /// # Errors
    /// Somebody has it who must not be pushed out, or the device does not do it.
    pub(super) fn take(&self, context: &Context) -> Result<(), Failure> {
        let reservations = open(&self.device)?;
        let victims = self.victims(context, &reservations)?;
        reservations.ensure_registered(self.key).map_err(Failure::new)?;
        let report = reservations.fence(self.key, &victims).map_err(Failure::new)?;
        let preempted = report.victims.iter().find(|victim| victim.outcome == VictimOutcome::Preempted);
        if let Some(victim) = preempted {
            // Nobody knows when the last of its commands ends, but it is no later than that.
            let who = Self::whose(context, victim.key);
            context.progress(&format!(
                "the storage cannot abort writes of {who}; waiting until they have ended"
            ));
            pause(context, COMMAND_LIMIT)?;
        }
        if let Some(victim) = report.victims.first() {
            let device = self.device.display();
            let text = format!("the disk {device} was taken from {}", Self::whose(context, victim.key));
            context.event(EventLevel::Info, &text);
        }
        self.check(context, &reservations)
    }

    fn victims(&self, context: &Context, reservations: &Reservations) -> Result<Vec<u64>, Failure> {
        let mut victims: Vec<u64> = match reservations.read_keys() {
            Ok(keys) => keys.keys,
            Err(error) if error.is_unsupported() => return Ok(Vec::new()),
            Err(error) => return Err(Failure::new(error)),
        };
        victims.retain(|key| *key != self.key);
        victims.sort_unstable();
        victims.dedup();
        if self.break_foreign {
            return Ok(victims);
        }
        let device = self.device.display();
        for key in &victims {
            let who = Self::whose(context, *key);
            match key::owner(context.node(), *key) {
                None => {
                    return Err(Failure::new(format!(
                        "the disk {device} is registered by {who}; end its use there, or set break_foreign to take it by force"
                    )));
                }
                Some(owner) if key::is_later(owner, self.generation) => {
                    return Err(Failure::new(format!(
                        "the disk {device} is held by {who}, which is later than this node's ownership {}; it is not taken back",
                        self.generation
                    )));
                }
                Some(_) => {}
            }
        }
        Ok(victims)
    }

    /// Is it still ours? Reserves again if only the reservation went away.
    fn check(&self, context: &Context, reservations: &Reservations) -> Result<(), Failure> {
        match reservations.verify(self.key) {
            Ok(true) => {}
            Ok(false) => return Err(Failure::Failed(self.lost(context, reservations))),
            // What cannot be read cannot be checked; the device refuses writes in any case.
            Err(error) if error.is_unsupported() => return Ok(()),
            Err(error) => return Err(Failure::new(error)),
        }
        reservations.ensure_reserved(self.key).map(drop).map_err(Failure::new)
    }

    fn lost(&self, context: &Context, reservations: &Reservations) -> String {
        let keys = reservations.read_keys().map(|keys| keys.keys).unwrap_or_default();
        let who: Vec<String> = keys.iter().map(|key| Self::whose(context, *key)).collect();
        let who = if who.is_empty() { "nobody; they were cleared".to_owned() } else { who.join(", ") };
        format!(
            "this node's reservation of {} is gone: the disk was taken; registered now: {who}",
            self.device.display()
        )
    }

    /// Is this node still registered?
    ///
    /// # Errors
    /// That cannot be found out.
    pub(super) fn is_held(&self) -> Result<bool, Failure> {
        open(&self.device)?.verify(self.key).map_err(Failure::new)
    }

    /// Gives the disk back; nothing happens when it is not ours any more.
    ///
    /// # Errors
    /// The device does not do it.
    pub(super) fn give_back(&self) -> Result<(), Failure> {
        let reservations = open(&self.device)?;
        if matches!(reservations.verify(self.key), Ok(false)) {
            return Ok(());
        }
        // The reservation ends with its holder's registration (SPC-4 5.13.11.2.1).
        match reservations.unregister(self.key) {
            Err(error) if error.is_conflict() => Ok(()),
            other => other.map_err(Failure::new),
        }
    }
}

#[derive(Debug)]
struct Look {
    stop: bool,
    /// When it was good last.
    good: Instant,
    /// The last look's result.
    result: Result<(), String>,
}

/// A thread that looks every 3 s; ends when dropped.
#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<(Mutex<Look>, Condvar)>,
}

impl Keeper {
    /// Looks once, then goes on in a thread.
    ///
    /// # Errors
    /// The disk is not ours.
    pub(super) fn start(claim: Claim, context: Context) -> Result<Keeper, Failure> {
        let reservations = open(&claim.device)?;
        claim.check(&context, &reservations)?;
        let look = Look { stop: false, good: Instant::now(), result: Ok(()) };
        let shared = Arc::new((Mutex::new(look), Condvar::new()));
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("disk-keeper".into())
            .spawn(move || keep(&claim, &context, &reservations, &of_thread))
            .map_err(|error| Failure::new(format!("no thread to keep the reservation: {error}")))?;
        Ok(Keeper { shared })
    }

    /// What the last look said; one that is too old counts as none.
    ///
    /// # Errors
    /// The reservation is lost, or nothing has been heard of the disk for 9 s.
    pub(super) fn state(&self) -> Result<(), Failure> {
        let look = self.shared.0.lock();
        if let Err(why) = &look.result {
            return Err(Failure::Failed(why.clone()));
        }
        let age = look.good.elapsed();
        if age > STALE {
            return Err(Failure::new(format!("the disk has not answered for {} s", age.as_secs())));
        }
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Not joined: a look at a disk that hangs returns late or never, and changes nothing then.
        self.shared.0.lock().stop = true;
        self.shared.1.notify_all();
    }
}

fn keep(claim: &Claim, context: &Context, reservations: &Reservations, shared: &(Mutex<Look>, Condvar)) {
    let (look, changed) = shared;
    loop {
        let mut guard = look.lock();
        changed.wait_while_for(&mut guard, |look| !look.stop, LOOK);
        if guard.stop {
            return;
        }
        let good = guard.good;
        drop(guard);
        let result = claim.check(context, reservations).map_err(|error| error.to_string());
        // A registration that has gone is the end; an error of the path may pass.
        let is_lost = matches!(reservations.verify(claim.key), Ok(false));
        if result.is_err() && !is_lost && good.elapsed() <= STALE {
            continue;
        }
        let mut guard = look.lock();
        if guard.stop {
            return;
        }
        let changed = guard.result.is_ok() != result.is_ok();
        if result.is_ok() {
            guard.good = Instant::now();
        }
        guard.result.clone_from(&result);
        drop(guard);
        if changed {
            context.report(result);
        }
    }
}
