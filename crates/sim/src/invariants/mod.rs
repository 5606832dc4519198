//! What must hold after every event.

pub mod data;

use crate::event::Observation;
use crate::node::Node;
use crate::raft_model::{Entry, Payload, Proposal, Voter};
use crate::world::lun::{Landed, Lun, Request};
use csv_cluster::db::{self, ClusterDb, parse_own_key};
use csv_types::{Epoch, NodeId};
use data::Data;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use uuid::Uuid;

/// Between two comparisons of whole databases, in entries.
const COMPARE_EVERY: usize = 8;

/// An entry that was committed.
#[derive(Debug)]
struct Committed {
    entry: Rc<Entry>,
    answer: Option<db::Answer>,
    /// Committed in this term or an earlier one: that of the node that applied it first.
    term: u64,
}

/// What the checks know.
#[derive(Debug)]
pub struct Oracle {
    leaders: BTreeMap<u64, Voter>,
    /// What was committed.
    committed: Vec<Committed>,
    /// The database after that.
    pub db: ClusterDb,
    /// Keys that were fenced, by volume.
    fenced: BTreeSet<(usize, u64)>,
    /// Highest epoch that wrote metadata, by volume.
    epochs: Vec<Epoch>,
    /// Who owned which epoch, by volume.
    owners: BTreeMap<(String, Epoch), NodeId>,
    /// File data.
    pub data: Data,
    /// Things that clients got done, by volume and node.
    pub progress: BTreeMap<(usize, NodeId), u64>,
    /// Reads that the LUN gave to nodes without registration.
    pub reads_while_fenced: u64,
    acknowledged: BTreeMap<usize, Proposal>,
}

impl Oracle {
    /// Nothing has happened.
    #[must_use]
    pub fn new(loses_cache: &[bool]) -> Oracle {
        Oracle {
            leaders: BTreeMap::new(),
            committed: Vec::new(),
            db: ClusterDb::default(),
            fenced: BTreeSet::new(),
            epochs: vec![Epoch(0); loses_cache.len()],
            owners: BTreeMap::new(),
            data: Data::new(loses_cache),
            progress: BTreeMap::new(),
            reads_while_fenced: 0,
            acknowledged: BTreeMap::new(),
        }
    }

    /// Takes an observation of a node.
    ///
    /// # Errors
    /// What does not hold.
    pub fn observe(&mut self, now_ms: u64, node: &Node, seen: Observation) -> Result<(), String> {
        match seen {
            Observation::Leads(voter, term) => self.leads(node, voter, term),
            Observation::Applied { index, entry, answer } => self.applied(node, index, entry, answer),
            Observation::Acknowledged(index, proposal) => {
                self.acknowledged.insert(index, proposal);
                let entry = self.committed.get(index - 1).map(|known| &known.entry.payload);
                match entry {
                    Some(Payload::Command(_, Some(found))) if *found == proposal => Ok(()),
                    other => Err(format!("{} acknowledges {proposal:?} at {index}: {other:?}", node.id)),
                }
            }
            Observation::Fenced(volume, keys) => {
                self.fenced.extend(keys.into_iter().map(|key| (volume, key)));
                Ok(())
            }
            Observation::Read { volume, file, fblock, contents, began_ms } => {
                *self.progress.entry((volume, node.id)).or_insert(0) += 1;
                self.data
                    .read(volume, (file, fblock), &contents, began_ms)
                    .map_err(|broken| format!("{} read volume {volume} file {file}: {broken}", node.id))
            }
            Observation::ReadWhileFenced => {
                self.reads_while_fenced += 1;
                Ok(())
            }
            Observation::WriteBegun { volume, file, fblock, write } => {
                self.data.begun(now_ms, volume, (file, fblock), write);
                Ok(())
            }
            Observation::WriteEnded { volume, file, fblock, write } => {
                self.data.ended(now_ms, volume, (file, fblock), write);
                Ok(())
            }
            Observation::Synced { volume, writes } => {
                for (file, fblock, write) in writes {
                    self.data.synced(now_ms, volume, (file, fblock), write);
                }
                Ok(())
            }
            Observation::Progress(volume) => {
                *self.progress.entry((volume, node.id)).or_insert(0) += 1;
                Ok(())
            }
            Observation::WitnessAnswers { arrived_ms, verified_ms } => match verified_ms {
                Some(verified_ms) if verified_ms >= arrived_ms => Ok(()),
                other => Err(format!(
                    "the witness on {} answers what arrived at {arrived_ms}, verified {other:?}",
                    node.id
                )),
            },
        }
    }

    fn leads(&mut self, node: &Node, voter: Voter, term: u64) -> Result<(), String> {
        if let Some(&known) = self.leaders.get(&term) {
            return if known == voter {
                Ok(())
            } else {
                Err(format!("{known} and {voter} both lead in term {term}"))
            };
        }
        self.leaders.insert(term, voter);
        let Some(csvd) = node.csvd.as_ref().filter(|csvd| csvd.raft.id == voter) else { return Ok(()) };
        // Who was elected long ago and hears of it only now leads in an old term, without what later ones have committed.
        let before = self.committed.iter().enumerate().filter(|(_, known)| known.term < term);
        for (at, Committed { entry, .. }) in before {
            if csvd.raft.log.get(at).is_none_or(|mine| mine.term != entry.term) {
                return Err(format!("{voter} leads in term {term} without committed entry {}", at + 1));
            }
        }
        Ok(())
    }

    fn applied(
        &mut self,
        node: &Node,
        index: usize,
        entry: Rc<Entry>,
        answer: Option<db::Answer>,
    ) -> Result<(), String> {
        if let Some(Committed { entry: known, answer: known_answer, .. }) = self.committed.get(index - 1) {
            if **known != *entry || *known_answer != answer {
                return Err(format!("{} applies {entry:?} at {index}, others applied {known:?}", node.id));
            }
        } else {
            if let Payload::Command(envelope, _) = &entry.payload {
                let again = self.db.apply(envelope);
                if Some(&again) != answer.as_ref() {
                    return Err(format!("{} answered {answer:?} at {index}, not {again:?}", node.id));
                }
                self.db.check().map_err(|broken| format!("after {:?}: {broken}", envelope.command))?;
                self.check_owners()?;
            }
            let term = node.csvd.as_ref().map_or(u64::MAX, |csvd| csvd.raft.term);
            self.committed.push(Committed { entry, answer, term });
        }
        Ok(())
    }

    /// At most one owner per epoch.
    fn check_owners(&mut self) -> Result<(), String> {
        for volume in self.db.volumes.values() {
            let Some(owner) = volume.owner else { continue };
            let known = *self.owners.entry((volume.name.clone(), volume.epoch)).or_insert(owner);
            if known != owner {
                return Err(format!("{known} and {owner} own {} in epoch {}", volume.name, volume.epoch));
            }
        }
        Ok(())
    }

    /// Every so often, and where a node is up to date: its whole database.
    ///
    /// # Errors
    /// It is another.
    pub fn compare(&self, node: &Node) -> Result<(), String> {
        let Some(csvd) = &node.csvd else { return Ok(()) };
        let due = csvd.applied.is_multiple_of(COMPARE_EVERY) && csvd.applied == self.committed.len();
        if due && csvd.db != self.db {
            return Err(format!("{} has another database after entry {}", node.id, csvd.applied));
        }
        Ok(())
    }

    /// Was it reported that this key can write no more?
    #[must_use]
    pub fn is_fenced(&self, volume: usize, key: u64) -> bool {
        self.fenced.contains(&(volume, key))
    }

    /// A write took effect on a LUN, in place of these metadata before.
    ///
    /// # Errors
    /// It must not have.
    pub fn landed(&mut self, volume: usize, lun: &Lun, cluster: Uuid, landed: &Landed) -> Result<(), String> {
        let Landed { node, key, request } = landed;
        if self.is_fenced(volume, *key) {
            return Err(format!(
                "a write of {node} lands under key {:?}, which was fenced: {request:?}",
                parse_own_key(cluster, *key)
            ));
        }
        match request {
            Request::Commit(meta) => {
                let highest = &mut self.epochs[volume];
                if meta.epoch < *highest {
                    return Err(format!("{node} commits in epoch {}, after one of {highest}", meta.epoch));
                }
                *highest = meta.epoch;
            }
            Request::BeginEpoch { epoch, .. } => {
                let highest = &mut self.epochs[volume];
                if *epoch < *highest {
                    return Err(format!("{node} begins epoch {epoch} after {highest}"));
                }
                *highest = *epoch;
            }
            Request::Write { blocks, zeroing } => {
                let used = if *zeroing { lun.meta.used() } else { BTreeSet::new() };
                for (block, content) in blocks {
                    let good = if *zeroing {
                        !used.contains(block)
                    } else {
                        lun.meta.place(content.file, content.fblock) == Some(*block)
                    };
                    if !good {
                        return Err(format!(
                            "{node} writes block {block}, which is not {content:?} any more"
                        ));
                    }
                }
            }
            Request::Read(_)
            | Request::Flush
            | Request::ReadHead
            | Request::Register { .. }
            | Request::Unregister { .. }
            | Request::ReadKeys
            | Request::Preempt { .. } => {}
        }
        Ok(())
    }

    /// Metadata are about to change: what is freed must not be lent, nor under way.
    ///
    /// # Errors
    /// Who could still use it.
    pub fn frees(
        &self,
        volume: usize,
        lun: &Lun,
        next: &crate::world::lun::Meta,
        nodes: &BTreeMap<NodeId, Node>,
        now_ms: u64,
    ) -> Result<(), String> {
        for (file, blocks) in lun.meta.files.iter().enumerate() {
            for (at, block) in blocks.iter().enumerate() {
                if block.is_none() || next.files[file][at] == *block {
                    continue;
                }
                let byte = csv_types::ByteRange::at(at as u64 * crate::BLOCK_BYTES, 1);
                for node in nodes.values().filter(|node| lun.can_write(node.id)) {
                    let Some(csvfs) = node.csvfs.get(volume).and_then(Option::as_ref) else { continue };
                    let client = &csvfs.client;
                    if !csvfs.dead
                        && client.may_begin(node.clock.mono_ms(now_ms))
                        && client.caches[file].covers(byte, csv_layout::Access::Read)
                    {
                        return Err(format!(
                            "block {at} of file {file} of volume {volume} is freed under a layout of {}",
                            node.id
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// One coordinator that can write.
    ///
    /// # Errors
    /// Two.
    pub fn one_coordinator(
        &self,
        volume: usize,
        lun: &Lun,
        nodes: &BTreeMap<NodeId, Node>,
    ) -> Result<(), String> {
        let mounted = nodes
            .values()
            .filter(|node| lun.can_write(node.id))
            .filter_map(|node| Some((node.id, node.csvfs.get(volume)?.as_ref()?.mounted()?)));
        let mut found: Option<(NodeId, Epoch)> = None;
        for one in mounted {
            if let Some(other) = found.replace(one) {
                return Err(format!("{one:?} and {other:?} both have volume {volume} mounted and can write"));
            }
        }
        Ok(())
    }

    /// Commands that were acknowledged, and entries committed.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.acknowledged.len(), self.committed.len())
    }
}
