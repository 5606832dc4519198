//! The small LUN of the disk witness: an exclusive reservation, a counter, and the voter's whole durable state. Keys are
//! node numbers.

use crate::raft_model::{Disk, DiskOp};
use csv_cluster::witness::{Effect, Outcome, Slot};

/// See the module.
#[derive(Debug, Default)]
pub struct WitnessLun {
    /// Who holds the reservation.
    pub holder: Option<u64>,
    /// Counter of the heartbeat slot.
    pub counter: u64,
    /// State of the voter.
    pub disk: Disk,
    /// Nobody can reach it.
    pub broken: bool,
}

impl WitnessLun {
    /// An operation of that node reaches the LUN.
    pub fn act(&mut self, key: u64, effect: &Effect) -> Outcome {
        if self.broken {
            return Outcome::Failed("no path".into());
        }
        let mine = if self.holder == Some(key) { Outcome::Ok } else { Outcome::Conflict };
        match effect {
            Effect::ReadSlot { .. } | Effect::ReadKeys { .. } => {
                Outcome::Slot(Slot { counter: self.counter, holder: self.holder })
            }
            Effect::TakeOver { victim, .. } => {
                if self.holder == *victim || self.holder == Some(key) {
                    self.holder = Some(key);
                    Outcome::Ok
                } else {
                    Outcome::Conflict
                }
            }
            Effect::Renew { counter, .. } => {
                if mine == Outcome::Ok {
                    self.counter = *counter;
                }
                mine
            }
            Effect::Verify { .. } => mine,
            Effect::ReadState { .. } => Outcome::Ok,
            Effect::Release => {
                if mine == Outcome::Ok {
                    self.holder = None;
                }
                mine
            }
            Effect::StartVoter
            | Effect::StopVoter { .. }
            | Effect::Answer { .. }
            | Effect::Deny { .. }
            | Effect::Lost { .. } => Outcome::Failed("no operation".into()),
        }
    }

    /// A write of the voter's state; false: refused.
    pub fn write(&mut self, key: u64, ops: Vec<DiskOp>) -> bool {
        let ok = !self.broken && self.holder == Some(key);
        if ok {
            ops.into_iter().for_each(|op| self.disk.apply(op));
        }
        ok
    }
}
