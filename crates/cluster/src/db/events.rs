//! The cluster's event log: a bounded ring inside the database, written by `apply`, so that every node has the same.

use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Events kept.
pub const EVENTS_MAX: usize = 4096;
/// Bytes of a message; longer ones are cut.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// For the record.
    Info,
    /// Something works less well, or soon may.
    Warning,
    /// Something does not work.
    Error,
}

/// An entry of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Number in the log, from 1, without gaps, never given out twice.
    pub number: u64,
    /// Stable code of its kind; see [`EventKind`].
    pub id: u32,
    /// When (Unix ms, clock of the node that proposed the change).
    pub at_unix_ms: u64,
    /// The node that it is about.
    pub node: Option<NodeId>,
    /// What it is about: a node, volume, group, resource or setting by name.
    pub subject: String,
    /// How bad it is.
    pub level: Level,
    /// What happened, and why.
    pub message: String,
}

/// An event that a node saw and wants in the log (`Command::EventAdd`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewEvent {
    /// Stable code of its kind.
    pub id: u32,
    /// When (Unix ms).
    pub at_unix_ms: u64,
    /// The node that it is about.
    pub node: Option<NodeId>,
    /// What it is about.
    pub subject: String,
    /// How bad it is.
    pub level: Level,
    /// What happened, and why.
    pub message: String,
}

macro_rules! kinds {
    ($($kind:ident = $id:literal, $level:ident, $text:literal;)*) => {
        /// Every kind of event that the engine makes, with its stable code: 1000s nodes, 2000s quorum and cluster,
        /// 3000s volumes, 4000s fencing and self-defence, 5000s groups and resources, 6000s storage and paths.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum EventKind { $(#[doc = concat!("`", stringify!($id), "`: ", $text)] $kind,)* }

        impl EventKind {
            /// Every kind.
            pub const ALL: &'static [EventKind] = &[$(EventKind::$kind,)*];
            /// Stable code.
            #[must_use]
            pub fn id(self) -> u32 { match self { $(EventKind::$kind => $id,)* } }
            /// How bad it usually is.
            #[must_use]
            pub fn level(self) -> Level { match self { $(EventKind::$kind => Level::$level,)* } }
            /// What it means.
            #[must_use]
            pub fn text(self) -> &'static str { match self { $(EventKind::$kind => $text,)* } }
        }
    };
}

kinds! {
    NodeAdded = 1001, Info, "a node was added to the cluster";
    NodeUp = 1002, Info, "a node is up";
    NodeIsolated = 1003, Warning, "a node is not heard, but not given up yet";
    NodeDown = 1004, Error, "a node failed or is not heard";
    NodeStopped = 1005, Info, "a node stopped in good order";
    NodePaused = 1006, Info, "a node was paused: it gets no volumes";
    NodeDraining = 1007, Info, "a node is being drained";
    NodeDrained = 1008, Info, "a drained node owns no volume any more";
    NodeResumed = 1009, Info, "a node takes volumes again";
    NodeQuarantined = 1010, Error, "a node failed too often and is kept out";
    NodeQuarantineCleared = 1011, Info, "a node is no longer kept out";
    NodeEvicted = 1012, Warning, "a node was removed from the cluster";
    NodeAddressChanged = 1013, Info, "a node has another address";
    NodeLeaving = 1014, Info, "a node is about to stop";
    NodeVersionChanged = 1015, Info, "a node runs other software";
    NodeCertificateChanged = 1016, Info, "a node has a new certificate";
    ClusterCreated = 2001, Info, "the cluster was created";
    QuorumChanged = 2002, Info, "the quorum configuration was changed";
    NodeVoteChanged = 2003, Info, "a node's configured vote was changed";
    VotersChanged = 2004, Info, "dynamic quorum changed who votes";
    QuorumLost = 2005, Error, "a node lost quorum";
    QuorumForced = 2006, Error, "the cluster was started by force without quorum";
    WitnessTaken = 2007, Info, "a node took the disk witness";
    WitnessLost = 2008, Warning, "a node lost the disk witness";
    FeatureLevelRaised = 2009, Info, "the cluster's feature level was raised";
    SettingChanged = 2010, Info, "a setting was changed";
    TokenAdded = 2011, Info, "a join token was made";
    TokenRevoked = 2012, Info, "a join token was revoked";
    SecretsChanged = 2013, Info, "the cluster's secrets were replaced";
    Restored = 2014, Warning, "the database was restored from a backup";
    VolumeAdded = 3001, Info, "a volume was added";
    VolumeRemoved = 3002, Info, "a volume was removed";
    VolumeAssigned = 3003, Info, "a volume got an owner";
    VolumeOnline = 3004, Info, "a volume is online";
    VolumeReleasing = 3005, Info, "a volume is being moved in good order";
    VolumeReleased = 3006, Info, "a volume was released by its owner";
    VolumeReleaseCancelled = 3007, Warning, "a volume's move was given up; its owner keeps it";
    VolumeStartFailed = 3008, Error, "a volume could not be brought online on a node";
    VolumeUnowned = 3009, Error, "no node can own a volume";
    VolumeFailed = 3010, Error, "a volume could not be brought online anywhere";
    VolumeOffline = 3011, Info, "a volume was taken offline";
    VolumeBroughtOnline = 3012, Info, "a volume is to be brought online";
    VolumePreferredChanged = 3013, Info, "a volume's preferred owners were changed";
    VolumeModeChanged = 3014, Warning, "a node's way to a volume's data changed";
    MemberAdmitted = 4001, Info, "a node may write a volume's LUN";
    FenceOrdered = 4002, Warning, "a node must be fenced from a volume's LUN";
    Fenced = 4003, Warning, "a node was fenced from a volume's LUN";
    SelfFenced = 4004, Error, "a node stopped its direct I/O to defend the data";
    FenceFailed = 4005, Error, "a node could not be fenced";
    MemberWithdrawn = 4007, Info, "a node gave up its way to a volume's LUN itself";
    FrozenAwake = 4006, Warning, "a node was frozen and woke up";
    GroupChanged = 5001, Info, "a group was changed";
    GroupRemoved = 5002, Info, "a group was removed";
    ResourceChanged = 5003, Info, "a resource was changed";
    ResourceRemoved = 5004, Info, "a resource was removed";
    GroupAdded = 5005, Info, "a group was added";
    GroupWanted = 5006, Info, "a group is to be online";
    GroupNotWanted = 5007, Info, "a group is to be offline";
    GroupAssigned = 5008, Info, "a group got an owner";
    GroupOnline = 5009, Info, "a group is online";
    GroupPartial = 5010, Warning, "a group is partially online";
    GroupFailed = 5011, Error, "a group failed on its owner";
    GroupMoving = 5012, Info, "a group leaves its owner";
    GroupReleased = 5013, Info, "a group was released by its owner";
    GroupMoveCancelled = 5014, Warning, "a group's move was given up; its owner keeps it";
    GroupMigrated = 5015, Info, "a group moved while it ran";
    GroupUnplaced = 5016, Error, "no node can have a group";
    GroupGivenUp = 5017, Error, "a group failed too often and is not moved any more";
    GroupMaintenance = 5018, Info, "a group's maintenance began or ended";
    ResourceAdded = 5101, Info, "a resource was added";
    ResourceOnline = 5102, Info, "a resource is online";
    ResourceOffline = 5103, Info, "a resource is offline";
    ResourceFailed = 5104, Error, "a resource failed";
    ResourceWanted = 5105, Info, "a resource is to be online or offline";
    ResourceRestarted = 5106, Warning, "a resource that failed is started again on its node";
    ResourceHung = 5107, Error, "a resource hangs in an entry point";
    ResourceHostEnded = 5108, Error, "a resource host ended";
    ResourceNote = 5109, Info, "a resource says something";
    ResourceWarning = 5110, Warning, "something about a resource does not work as it should";
    TypeChanged = 5201, Info, "a resource type was added or changed";
    TypeRemoved = 5202, Info, "a resource type was removed";
    PathLost = 6001, Warning, "a node lost its path to a LUN";
    PathRestored = 6002, Info, "a node's path to a LUN is back";
    StorageProblem = 6003, Error, "a node's storage has a problem";
}

/// The ring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Number of the next event.
    pub next: u64,
    /// The newest [`EVENTS_MAX`], oldest first.
    pub ring: VecDeque<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Events { next: 1, ring: VecDeque::new() }
    }
}

impl Events {
    /// Appends an event; the oldest falls out of a full ring.
    pub fn push(&mut self, new: NewEvent) {
        let NewEvent { id, at_unix_ms, node, mut subject, level, mut message } = new;
        cut(&mut subject);
        cut(&mut message);
        self.ring.push_back(Event { number: self.next, id, at_unix_ms, node, subject, level, message });
        self.next += 1;
        while self.ring.len() > EVENTS_MAX {
            self.ring.pop_front();
        }
    }

    /// Events with a number greater than `after`, oldest first.
    pub fn after(&self, after: u64) -> impl Iterator<Item = &Event> {
        let first = self.ring.partition_point(|event| event.number <= after);
        self.ring.range(first..)
    }
}

fn cut(text: &mut String) {
    let mut end = text.len().min(MESSAGE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn event(message: &str) -> NewEvent {
        let (subject, level) = ("x".into(), Level::Info);
        NewEvent { id: 1, at_unix_ms: 0, node: None, subject, level, message: message.into() }
    }

    #[test]
    fn codes_are_unique() {
        let codes: BTreeSet<u32> = EventKind::ALL.iter().map(|kind| kind.id()).collect();
        assert_eq!(codes.len(), EventKind::ALL.len());
    }

    #[test]
    fn the_ring_keeps_the_newest_and_cuts_long_messages() {
        let mut events = Events::default();
        for _ in 0..EVENTS_MAX {
            events.push(event("a"));
        }
        events.push(event(&"ä".repeat(MESSAGE_BYTES_MAX)));
        assert_eq!(events.ring.len(), EVENTS_MAX);
        assert_eq!((events.ring[0].number, events.next), (2, EVENTS_MAX as u64 + 2));
        let newest: Vec<_> = events.after(EVENTS_MAX as u64).collect();
        assert_eq!(newest.len(), 1);
        assert_eq!(newest[0].message.len(), MESSAGE_BYTES_MAX);
        assert_eq!(events.after(u64::MAX).count(), 0);
    }
}
