//! The operations of the arbitration on the witness LUN, as blocking calls. They run on threads that may block, several
//! at the same time; each says what came of it in the words of `csv_cluster::witness`.
//!
//! Writes go by one open LUN, which is opened anew with each take-over and cut off by a flag when the voter stops: from then
//! on nothing of the stopped voter begins a write. Those under way are waited for before the next take-over.

use anyhow::{Context, Result, bail};
use csv_cluster::db::{parse_own_key, reservation_key};
use csv_cluster::quorum::VoterId;
use csv_cluster::witness::{Outcome, Slot};
use csv_lun::reservation::{PreemptOutcome, ReservationError, Reservations};
use csv_lun::witness as records;
use csv_lun::{AlignedBuf, Lun, LunOptions};
use csv_ondisk::witness::REGION_OFFSET;
use csv_ondisk::{Beat, WitnessHeader};
use csv_raft::OpenStorage;
use csv_raft::storage::blocks::{self, BlockStore};
use csv_types::{LunOffset, NodeId};
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// Every life of a node has the same key: one that is found is challenged like any other.
const GENERATION: u32 = 1;
/// A storage that cannot abort lets writes that it had accepted reach the medium; they are given this time.
const NO_ABORT_WAIT: Duration = Duration::from_secs(2);

/// The reservation key of a node on its cluster's witness LUN.
pub(crate) fn key_of(cluster: Uuid, node: NodeId) -> u64 {
    reservation_key(cluster, node, GENERATION)
}

/// The witness LUN as one node sees it.
#[derive(Debug)]
pub(crate) struct WitnessLun {
    device: PathBuf,
    header: WitnessHeader,
    node: NodeId,
    key: u64,
    /// The path is failed, by order of a test.
    failed: Arc<AtomicBool>,
    reservations: Mutex<Option<Arc<Reservations>>>,
    writer: Mutex<Option<Writer>>,
}

/// The way of the writes of one tenure.
#[derive(Debug, Clone)]
struct Writer {
    lun: Arc<Lun>,
    revoked: Arc<AtomicBool>,
}

/// Is this device the witness with that identity?
pub(crate) fn is_witness(device: &Path, id: Uuid) -> Result<WitnessHeader> {
    let lun = records::open_for_reading(device)?;
    let header = records::read_header(&lun)?;
    if header.witness_id != id {
        bail!("{} is another disk witness ({}, {})", device.display(), header.name, header.witness_id);
    }
    Ok(header)
}

fn conflict_or_failed(error: &ReservationError) -> Outcome {
    if error.is_conflict() { Outcome::Conflict } else { Outcome::Failed(error.to_string()) }
}

fn outcome(result: Result<Outcome>) -> Outcome {
    result.unwrap_or_else(|error| {
        let reservation = error.downcast_ref::<ReservationError>();
        let conflict = reservation.is_some_and(ReservationError::is_conflict)
            || error.downcast_ref::<records::WitnessIoError>().is_some_and(|e| e.is_conflict());
        if conflict { Outcome::Conflict } else { Outcome::Failed(format!("{error:#}")) }
    })
}

impl WitnessLun {
    pub(crate) fn new(device: PathBuf, header: WitnessHeader, node: NodeId, failed: Arc<AtomicBool>) -> Self {
        let key = key_of(header.cluster_id, node);
        let (reservations, writer) = (Mutex::default(), Mutex::default());
        WitnessLun { device, header, node, key, failed, reservations, writer }
    }

    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    pub(crate) fn id(&self) -> Uuid {
        self.header.witness_id
    }

    fn check_path(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            bail!("the path to {} has failed", self.device.display());
        }
        Ok(())
    }

    /// The reservations; opened anew after each error, since the device may be another one then.
    fn with_reservations<T>(
        &self,
        work: impl FnOnce(&Reservations) -> Result<T, ReservationError>,
    ) -> Result<T> {
        self.check_path()?;
        let opened = self.reservations.lock().clone();
        let reservations = match opened {
            Some(reservations) => reservations,
            None => {
                let opened = Arc::new(Reservations::open(&self.device)?);
                *self.reservations.lock() = Some(opened.clone());
                opened
            }
        };
        work(&reservations).map_err(|error| {
            *self.reservations.lock() = None;
            error.into()
        })
    }

    /// Who holds it, by its key.
    pub(crate) fn holder(&self) -> Result<Option<u64>> {
        let holder = self.with_reservations(Reservations::read_reservation)?;
        match holder {
            Some(holder) if holder.key == 0 => {
                bail!("{} has a reservation of a type that no node holds alone", self.device.display())
            }
            other => Ok(other.map(|holder| holder.key)),
        }
    }

    /// The node that holds it.
    pub(crate) fn holder_node(&self) -> Result<Option<NodeId>> {
        Ok(self.holder()?.and_then(|key| parse_own_key(self.header.cluster_id, key)).map(|(node, _)| node))
    }

    /// `ReadSlot` and `ReadKeys`.
    pub(crate) fn read_slot(&self) -> Outcome {
        let read = || {
            let holder = self.holder()?;
            let lun = records::open_for_reading(&self.device)?;
            if records::read_header(&lun)? != self.header {
                bail!("{} holds another witness now", self.device.display());
            }
            let beat = records::read_beat(&lun, &self.header)?;
            Ok(Outcome::Slot(Slot { counter: beat.counter, holder }))
        };
        outcome(read())
    }

    /// `TakeOver`. Nothing of an earlier tenure may be under way.
    pub(crate) fn take_over(&self, victim: Option<u64>) -> Outcome {
        let key = self.key;
        let taken = self.with_reservations(|reservations| {
            let kind = reservations.exclusive_type();
            reservations.register_ignore(key)?;
            let taken = match victim {
                None => reservations.reserve(key, kind).map(|()| PreemptOutcome { aborted: true }),
                Some(victim) if victim == key => {
                    let holder = reservations.read_reservation()?;
                    if holder.is_none_or(|holder| holder.key != key) {
                        // Somebody was faster.
                        return reservations.unregister(key).map(|()| None);
                    }
                    Ok(PreemptOutcome { aborted: true })
                }
                Some(victim) => reservations.preempt(key, victim, kind, true),
            };
            if taken.is_err() {
                // A key that holds nothing is of no use to anybody; what came of this is told by the next look.
                let _gone = reservations.unregister(key);
            }
            taken.map(Some)
        });
        match taken {
            Ok(Some(PreemptOutcome { aborted })) => {
                if !aborted {
                    std::thread::sleep(NO_ABORT_WAIT);
                }
                outcome(self.open_writer().map(|()| Outcome::Ok))
            }
            Ok(None) => Outcome::Conflict,
            Err(error) => match error.downcast_ref::<ReservationError>() {
                Some(error) => conflict_or_failed(error),
                None => Outcome::Failed(format!("{error:#}")),
            },
        }
    }

    fn open_writer(&self) -> Result<()> {
        let lun = Lun::open(&self.device, LunOptions::default())?;
        lun.set_reservation_key(Some(self.key));
        let revoked = Arc::new(AtomicBool::new(false));
        *self.writer.lock() = Some(Writer { lun: Arc::new(lun), revoked });
        Ok(())
    }

    /// No write begins any more.
    pub(crate) fn revoke(&self) {
        if let Some(writer) = self.writer.lock().take() {
            writer.revoked.store(true, Ordering::Release);
        }
    }

    fn writer(&self) -> Result<Writer> {
        self.check_path()?;
        self.writer.lock().clone().context("the witness LUN is not this node's")
    }

    /// `Verify`: is it still ours?
    pub(crate) fn verify(&self) -> Outcome {
        let key = self.key;
        outcome(self.holder().map(|holder| if holder == Some(key) { Outcome::Ok } else { Outcome::Conflict }))
    }

    /// `Renew`.
    pub(crate) fn renew(&self, counter: u64) -> Outcome {
        let write = || {
            match self.verify() {
                Outcome::Ok => {}
                other @ (Outcome::Slot(_) | Outcome::Conflict | Outcome::Failed(_)) => return Ok(other),
            }
            let beat = Beat { counter, node: self.node, key: self.key, witness_id: self.header.witness_id };
            records::write_beat(&self.writer()?.lun, &beat)?;
            Ok(Outcome::Ok)
        };
        outcome(write())
    }

    /// `ReadState`.
    pub(crate) fn read_state(&self) -> Result<OpenStorage> {
        let Writer { lun, revoked } = self.writer()?;
        let region = Region { lun, revoked: Some(revoked), failed: self.failed.clone() };
        Ok(blocks::open(Box::new(region), voter(self.header.cluster_id))?)
    }

    /// `Release`: gives the reservation back, and the key with it.
    pub(crate) fn release(&self) -> Result<()> {
        let key = self.key;
        self.with_reservations(|reservations| {
            // Already gone is as good.
            match reservations.unregister(key) {
                Err(error) if error.is_conflict() => Ok(()),
                other => other,
            }
        })
    }
}

/// The witness as a voter of this cluster.
pub(crate) fn voter(cluster: Uuid) -> csv_raft::Identity {
    csv_raft::Identity { cluster, voter: VoterId::WITNESS.0 }
}

/// The part of the LUN on which the voter's database lies.
pub(crate) struct Region {
    pub(crate) lun: Arc<Lun>,
    pub(crate) revoked: Option<Arc<AtomicBool>>,
    pub(crate) failed: Arc<AtomicBool>,
}

impl Region {
    fn check(&self) -> io::Result<()> {
        if self.revoked.as_ref().is_some_and(|revoked| revoked.load(Ordering::Acquire)) {
            return Err(io::Error::other("the witness LUN is not this node's any more"));
        }
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("the path to the witness LUN has failed"));
        }
        Ok(())
    }
}

impl BlockStore for Region {
    fn place(&self) -> String {
        format!("disk witness {}", self.lun.path().display())
    }

    fn len(&self) -> u64 {
        records::region_bytes(&self.lun)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check()?;
        let mut aligned = AlignedBuf::new(buf.len());
        self.lun
            .read_at(&mut aligned, buf.len(), LunOffset(REGION_OFFSET + offset))
            .map_err(io::Error::other)?;
        buf.copy_from_slice(&aligned);
        Ok(())
    }

    fn write_synced(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        let aligned = AlignedBuf::copy_padded(data, data.len());
        self.lun
            .write_at(&aligned, data.len(), LunOffset(REGION_OFFSET + offset))
            .and_then(|()| self.lun.flush())
            .map_err(io::Error::other)
    }
}
