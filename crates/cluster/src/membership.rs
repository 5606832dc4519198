//! Who is heard. Every node counts the heartbeats of the others by its own monotonic clock; the leader's view decides.
//!
//! ```text
//!             beat                     no beat for silence_ms
//! silent ───────────────> heard ──────────────────────────────> silent
//! ```
//!
//! * **One-way losses.** Only what arrives here counts. A node that hears the leader but is not heard by it is silent for
//!   the leader, hence `Down`, whatever it thinks itself.
//! * **Being asleep.** A gap between two inputs that is longer than two heartbeats means that *this* node did not run (frozen,
//!   suspended, starved): beats that came meanwhile lie unread. That time is not held against the others. A gap of
//!   `silence_ms` or more restarts every clock and is reported as `Slept`: the others may have given this node up. What it
//!   heard before counts for as long as it would have without the sleep, then its direct I/O stops until the majority
//!   has been asked anew.
//! * Beats of an older incarnation than the newest heard are late messages and count for nothing.
//!
//! The driver must feed `Tick` at least once per heartbeat, however idle it is. [`verdicts`] turns what is heard into commands,
//! level-triggered: it may be called at any time, its commands may be lost or doubled.

use crate::db::{ClusterDb, Command, Node, NodeState, Settings};
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};

#[cfg(test)]
mod tests;

/// What happened. Times are milliseconds of the local monotonic clock; one that goes back counts as standing still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A heartbeat arrived.
    Beat { from: NodeId, incarnation: u64, at_ms: u64 },
    /// Time passed.
    Tick { at_ms: u64 },
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// A node is heard that was silent, or is heard in a newer incarnation.
    Heard { node: NodeId, incarnation: u64 },
    /// A node was not heard for that long.
    Missed { node: NodeId, silent_ms: u64 },
    /// This node did not run for that long: nothing that lies there unread says that it is still in the cluster.
    Slept { ms: u64 },
}

/// What is known of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Is it heard?
    pub heard: bool,
    /// Its newest incarnation; 0 before its first beat.
    pub incarnation: u64,
    /// Last beat, or start of its clock.
    pub since_ms: u64,
}

/// The clocks of all peers.
#[derive(Debug, Clone)]
pub struct Heartbeats {
    heartbeat_ms: u64,
    silence_ms: u64,
    peers: BTreeMap<NodeId, Peer>,
    now_ms: u64,
}

impl Heartbeats {
    /// No peers yet.
    #[must_use]
    pub fn new(settings: &Settings, now_ms: u64) -> Self {
        let mut heartbeats = Heartbeats { heartbeat_ms: 0, silence_ms: 0, peers: BTreeMap::new(), now_ms };
        heartbeats.set_thresholds(settings);
        heartbeats
    }

    /// Takes changed settings over.
    pub fn set_thresholds(&mut self, settings: &Settings) {
        self.heartbeat_ms = settings.heartbeat_ms;
        self.silence_ms = settings.silence_ms();
    }

    /// Who is to be heard. A new peer has the whole time before it counts as missed; it counts as not heard until its
    /// first beat.
    pub fn set_peers(&mut self, peers: &BTreeSet<NodeId>) {
        self.peers.retain(|node, _| peers.contains(node));
        for &node in peers {
            let since_ms = self.now_ms;
            self.peers.entry(node).or_insert(Peer { heard: false, incarnation: 0, since_ms });
        }
    }

    /// Takes an input. Outputs are appended.
    pub fn step(&mut self, input: &Input, out: &mut Vec<Output>) {
        let at_ms = match input {
            Input::Beat { at_ms, .. } | Input::Tick { at_ms } => *at_ms,
        };
        self.advance(at_ms, out);
        match *input {
            Input::Beat { from, incarnation, .. } => self.beat(from, incarnation, out),
            Input::Tick { .. } => self.expire(out),
        }
    }

    /// Lets time pass; sleep is not held against the peers.
    fn advance(&mut self, at_ms: u64, out: &mut Vec<Output>) {
        let gap_ms = at_ms.saturating_sub(self.now_ms);
        self.now_ms += gap_ms;
        if gap_ms >= self.silence_ms {
            out.push(Output::Slept { ms: gap_ms });
            for peer in self.peers.values_mut() {
                peer.since_ms = self.now_ms;
            }
        } else if gap_ms > self.heartbeat_ms.saturating_mul(2) {
            let asleep_ms = gap_ms - self.heartbeat_ms;
            for peer in self.peers.values_mut() {
                peer.since_ms = (peer.since_ms + asleep_ms).min(self.now_ms);
            }
        }
    }

    fn beat(&mut self, from: NodeId, incarnation: u64, out: &mut Vec<Output>) {
        let Some(peer) = self.peers.get_mut(&from).filter(|peer| incarnation >= peer.incarnation) else {
            return;
        };
        let news = !peer.heard || incarnation > peer.incarnation;
        *peer = Peer { heard: true, incarnation, since_ms: self.now_ms };
        if news {
            out.push(Output::Heard { node: from, incarnation });
        }
    }

    fn expire(&mut self, out: &mut Vec<Output>) {
        for (&node, peer) in &mut self.peers {
            let silent_ms = self.now_ms - peer.since_ms;
            if peer.heard && silent_ms >= self.silence_ms {
                peer.heard = false;
                out.push(Output::Missed { node, silent_ms });
            }
        }
    }

    /// What is known of a peer.
    #[must_use]
    pub fn peer(&self, node: NodeId) -> Option<&Peer> {
        self.peers.get(&node)
    }

    /// For how long a peer was not heard, this node's own sleep left out.
    #[must_use]
    pub fn silent_ms(&self, node: NodeId) -> Option<u64> {
        self.peers.get(&node).map(|peer| self.now_ms - peer.since_ms)
    }

    /// The nodes that are heard.
    #[must_use]
    pub fn heard(&self) -> BTreeSet<NodeId> {
        self.peers.iter().filter(|(_, peer)| peer.heard).map(|(&node, _)| node).collect()
    }
}

/// This node and the wall clock, for [`verdicts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observer {
    /// This node, the leader.
    pub me: NodeId,
    /// Its incarnation.
    pub incarnation: u64,
    /// Wall clock (Unix ms), as it will stand in the commands.
    pub now_unix_ms: u64,
}

/// The leader's verdicts on all nodes, itself included. Late or doubled ones are refused by the database (incarnations).
#[must_use]
pub fn verdicts(db: &ClusterDb, heartbeats: &Heartbeats, observer: Observer) -> Vec<Command> {
    let verdict = |node: &Node| {
        if node.id == observer.me {
            return heard_verdict(node, observer.incarnation, observer.now_unix_ms);
        }
        let peer = heartbeats.peer(node.id)?;
        if peer.heard {
            return heard_verdict(node, peer.incarnation, observer.now_unix_ms);
        }
        let silent_ms = heartbeats.silent_ms(node.id)?;
        let silent = silent_ms >= db.settings.silence_ms();
        silent.then(|| silent_verdict(db, node, silent_ms, observer.now_unix_ms)).flatten()
    };
    db.nodes.values().filter_map(verdict).collect()
}

fn heard_verdict(node: &Node, incarnation: u64, now_unix_ms: u64) -> Option<Command> {
    let newer = incarnation > node.incarnation;
    let up = match node.state {
        NodeState::Up => newer,
        NodeState::Isolated => incarnation >= node.incarnation,
        NodeState::Joining | NodeState::Down => newer && !node.quarantined(now_unix_ms),
    };
    up.then_some(Command::NodeUp { node: node.id, incarnation })
}

fn silent_verdict(db: &ClusterDb, node: &Node, silent_ms: u64, now_unix_ms: u64) -> Option<Command> {
    let (id, incarnation) = (node.id, node.incarnation);
    let isolation_ms = db.settings.isolation_ms;
    let reason = format!("no heartbeat for {silent_ms} ms");
    let over = match node.state {
        NodeState::Joining | NodeState::Down => return None,
        NodeState::Up => isolation_ms == 0 || node.leaving,
        NodeState::Isolated => now_unix_ms.abs_diff(node.since_unix_ms) >= isolation_ms,
    };
    match node.state {
        _ if over => Some(Command::NodeDown { node: id, incarnation, reason, planned: node.leaving }),
        NodeState::Up => Some(Command::NodeIsolated { node: id, incarnation, reason }),
        NodeState::Isolated | NodeState::Joining | NodeState::Down => None,
    }
}
