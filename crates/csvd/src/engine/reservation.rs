//! This node's part in the reservations of a volume's LUN. A LUN without reservations has none of it: fencing then means
//! to wait until the lease of whoever is to be fenced is over.

use anyhow::{Context, Result, bail};
use csv_cluster::db::{ClusterDb, Volume, parse_own_key, reservation_key};
use csv_lun::reservation::{Reservations, VictimOutcome};
use csv_types::NodeId;
use std::path::Path;
use std::time::Duration;

/// A storage that cannot abort lets writes that it had accepted reach the medium; they are given this time.
pub(crate) const NO_ABORT_WAIT: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(crate) enum Fencing {
    /// With this handle.
    Reservations(Reservations),
    /// The LUN cannot.
    Leases,
}

/// How a fence went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fenced {
    /// They are out; something to tell, perhaps.
    Out(Option<String>),
    /// Nothing can be done but to wait for their leases.
    ByLease,
}

impl Fencing {
    /// Looks what the LUN can do, by the paths that it has now.
    pub(crate) fn open(device: &Path) -> Result<Fencing> {
        match Reservations::open(device) {
            Ok(reservations) => Ok(Fencing::Reservations(reservations)),
            Err(error) if error.is_unsupported() => {
                tracing::warn!(device = %device.display(), %error, "no reservations");
                Ok(Fencing::Leases)
            }
            // It may have them: to go on without would be to write without a key.
            Err(error) => Err(error).context("the reservations of the LUN cannot be looked at"),
        }
    }

    /// Registers this node's key, and sees to it that nodes without one cannot write. `older`: is it an earlier one of this
    /// node?
    pub(crate) fn register(&mut self, key: u64, older: impl Fn(u64) -> bool) -> Result<Option<String>> {
        let Fencing::Reservations(reservations) = self else { return Ok(None) };
        unregister_older(reservations, older)?;
        let registered = match reservations.ensure_registered(key) {
            Err(error) if error.is_unsupported() => {
                *self = Fencing::Leases;
                return Ok(Some(format!(
                    "the LUN has no reservations, nodes are fenced by waiting: {error}"
                )));
            }
            other => other.context("the node's key cannot be registered on the LUN")?,
        };
        reservations.ensure_reserved(key).context("the LUN cannot be reserved")?;
        let note = "the storage forgets reservations when it loses power (no APTPL)";
        Ok((!registered.aptpl).then(|| note.to_owned()))
    }

    /// Takes this node's key back, if it is there.
    pub(crate) fn unregister(&self, key: u64) -> Result<()> {
        match self {
            Fencing::Reservations(reservations) if self.has_key(key) != Some(false) => {
                reservations.unregister(key).context("the node's key stays on the LUN")
            }
            Fencing::Reservations(_) | Fencing::Leases => Ok(()),
        }
    }

    /// Is this key registered? `None` when that cannot be seen.
    pub(crate) fn has_key(&self, key: u64) -> Option<bool> {
        match self {
            Fencing::Reservations(reservations) => reservations.verify(key).ok(),
            Fencing::Leases => None,
        }
    }

    /// Takes the keys of these members, and of older lives of any, off the LUN.
    pub(crate) fn fence(
        &self,
        db: &ClusterDb,
        volume: &Volume,
        me: NodeId,
        members: &[(NodeId, u32)],
    ) -> Result<Fenced> {
        let Fencing::Reservations(reservations) = self else {
            return Ok(if members.is_empty() { Fenced::Out(None) } else { Fenced::ByLease });
        };
        let own = db.key_of(volume, me).context("this node has no key for the LUN")?;
        let mut victims: Vec<u64> =
            members.iter().map(|(node, generation)| reservation_key(db.id, *node, *generation)).collect();
        match reservations.read_keys() {
            Ok(keys) => victims.extend(db.stale_keys(volume, &keys.keys)),
            Err(error) if error.is_unsupported() => {}
            Err(error) => return Err(error).context("the keys on the LUN cannot be read"),
        }
        // This node's own from earlier lives last: a storage may not tell them from the present one (see `unregister_older`).
        let mine = |key| parse_own_key(db.id, key).is_some_and(|(node, _)| node == me);
        victims.sort_unstable_by_key(|key| (mine(*key), *key));
        victims.dedup();
        if victims.contains(&own) {
            bail!("this node is to be fenced itself");
        }
        let report = reservations.fence(own, &victims)?;
        if report.victims.iter().any(|victim| victim.outcome == VictimOutcome::Preempted) {
            std::thread::sleep(NO_ABORT_WAIT);
            let text = format!(
                "the storage cannot abort writes under way; {} s were waited for them",
                NO_ABORT_WAIT.as_secs()
            );
            return Ok(Fenced::Out(Some(text)));
        }
        Ok(Fenced::Out(None))
    }
}

/// Linux's own target notes once per node and LUN that somebody is registered, and forgets it when any registration of that
/// node is taken away, be it that of a session from before a restart. Then a new key in place of the present one changes
/// nothing; a registration that is made anew does. Not where the key holds the reservation, which would go with it.
fn unregister_older(reservations: &Reservations, older: impl Fn(u64) -> bool) -> Result<()> {
    let keys = match reservations.read_keys() {
        Ok(keys) => keys.keys,
        Err(error) if error.is_unsupported() => return Ok(()),
        Err(error) => return Err(error).context("the keys on the LUN cannot be read"),
    };
    let mut mine: Vec<u64> = keys.into_iter().filter(|key| older(*key)).collect();
    mine.dedup();
    if mine.is_empty() {
        return Ok(());
    }
    let held = reservations.read_reservation().context("the LUN's reservation cannot be read")?;
    for key in mine.into_iter().filter(|key| held.is_none_or(|held| held.key != *key)) {
        match reservations.unregister(key) {
            // That of another session.
            Err(error) if error.is_conflict() => {}
            other => other.context("an older key of this node stays on the LUN")?,
        }
    }
    Ok(())
}
