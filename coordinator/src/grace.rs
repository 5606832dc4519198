//! Which nodes had sessions when the coordinator ended, and the grace period in which they reclaim.
//!
//! `/.csvfs/sessions` lists the nodes, one number a line. It is written, and durable, before a node is welcomed. A
//! crash between leaves a node too many in it, which costs the next coordinator the rest of a grace period.
//! During grace nothing is changed, lent or freed except by reclaims.
//!
//! Grace ends when every node has reclaimed, or when the lease of those who have not come back is over. A node that has
//! come back and is still reclaiming then is waited for, as long as it goes on and a few leases at most; else it is
//! given up, and grace ends after its session has ended: what it has not reclaimed may have blocks in flight.

use crate::coordinator::Coordinator;
use crate::state::{Core, Grace};
use csv_types::{FileId, NodeId};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::sync::watch;

const NAME: &[u8] = b"sessions";
const NEW_NAME: &[u8] = b"sessions.new";
/// More than all node numbers of a cluster need.
const LIST_BYTES_MAX: u32 = 64 << 10;
/// Nodes that go on reclaiming put the end of grace off by no more than this many leases.
const MORE_LEASES_MAX: u32 = 4;

/// The list as it is on the volume.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    nodes: BTreeSet<NodeId>,
}

impl Coordinator {
    /// Reads the list; somebody in it means grace.
    pub(crate) fn begin_grace(&self) -> Result<(), Errno> {
        let mut nodes = self.read_roster()?;
        self.roster.lock().nodes.clone_from(&nodes);
        let unknown = |node: &NodeId| !self.is_known(*node);
        let gone: Vec<NodeId> =
            nodes.iter().filter(|node| self.options.gone.contains(node) || unknown(node)).copied().collect();
        for gone in gone {
            if nodes.remove(&gone) {
                self.event("grace-gone", format!("{} is not waited for", self.name(gone)));
                self.spawn(|co| async move { co.delist(gone) });
            }
        }
        let orphans = self.fs.orphans();
        let core = &mut *self.core.lock();
        for file in &orphans {
            core.file(*file).unlinked = true;
        }
        if nodes.is_empty() {
            for file in orphans {
                self.look_after(core, file);
            }
            return Ok(());
        }
        let names: Vec<String> = nodes.iter().map(|node| self.name(*node)).collect();
        self.event("grace-begin", format!("waiting for {} to reclaim what they hold", names.join(", ")));
        let until = Instant::now() + self.lease_over();
        core.grace = Some(Grace {
            until,
            until_max: until + MORE_LEASES_MAX * self.lease_over(),
            members: nodes.clone(),
            waiting: nodes,
            ending: BTreeMap::new(),
            progress: BTreeMap::new(),
        });
        self.grace.send_replace(true);
        Ok(())
    }

    /// A node has reclaimed everything. Of one that is being fenced nobody knows: its session has to end.
    pub(crate) fn reclaim_done(&self, core: &mut Core, node: NodeId) {
        let doomed = core.sessions.get(&node).is_none_or(|session| session.doomed);
        if let Some(grace) = core.grace.as_mut().filter(|_| !doomed) {
            grace.waiting.remove(&node);
            if grace.waiting.is_empty() && grace.ending.is_empty() {
                self.end_grace(core, "every node has reclaimed what it held");
            }
        }
    }

    /// A node is fenced: grace does not wait for it.
    pub(crate) fn not_waited_for(&self, core: &mut Core, node: NodeId) {
        let Some(grace) = core.grace.as_mut() else { return };
        grace.members.remove(&node);
        grace.waiting.remove(&node);
        grace.ending.remove(&node);
        self.spawn(|co| async move { co.delist(node) });
        if grace.waiting.is_empty() && grace.ending.is_empty() {
            self.end_grace(core, "every node that is left has reclaimed what it held");
        }
    }

    /// A node sent a reclaim, or one of its reclaims is done.
    pub(crate) fn reclaims(&self, core: &mut Core, node: NodeId) {
        if let Some(grace) = core.grace.as_mut()
            && let Some(session) = core.sessions.get(&node)
        {
            grace.progress.insert(node, (session.connection, Instant::now()));
        }
    }

    pub(crate) fn grace_tick(&self, core: &mut Core) {
        let now = Instant::now();
        for node in self.given_up(core, now) {
            if let Some(session) = core.sessions.get(&node).map(|session| session.id)
                && let Some(grace) = core.grace.as_mut()
            {
                grace.waiting.remove(&node);
                grace.members.remove(&node);
                grace.ending.insert(node, session);
            }
            self.give_up_locked(core, node, "it did not finish to reclaim what it held before");
        }
        let Some(grace) = core.grace.as_mut() else { return };
        let sessions = &core.sessions;
        grace.ending.retain(|node, id| sessions.get(node).is_some_and(|session| session.id == *id));
        let back = grace.waiting.iter().any(|node| sessions.contains_key(node));
        if grace.ending.is_empty() && (grace.waiting.is_empty() || now >= grace.until && !back) {
            self.end_grace(core, "its time is over");
        }
    }

    /// Nodes that have come back and are not waited for any longer: those that are being fenced, and, when time is over,
    /// those that have stopped to reclaim.
    fn given_up(&self, core: &mut Core, now: Instant) -> Vec<NodeId> {
        let silence = Duration::from_millis(self.options.lease_ms / 4);
        let Some(grace) = core.grace.as_mut() else { return Vec::new() };
        let mut given_up = Vec::new();
        for node in &grace.waiting {
            let Some(session) = core.sessions.get(node) else { continue };
            let progress = grace.progress.entry(*node).or_insert((session.connection, now));
            if progress.0 != session.connection {
                // It begins again.
                *progress = (session.connection, now);
            }
            let stopped = now.duration_since(progress.1) >= silence || now >= grace.until_max;
            if session.doomed || (now >= grace.until && stopped) {
                given_up.push(*node);
            }
        }
        given_up
    }

    fn end_grace(&self, core: &mut Core, why: &str) {
        let Some(grace) = core.grace.take() else { return };
        self.event("grace-end", format!("the grace period has ended: {why}"));
        self.grace.send_replace(false);
        let silent: Vec<NodeId> =
            grace.waiting.into_iter().filter(|node| !core.sessions.contains_key(node)).collect();
        for node in silent {
            self.event(
                "grace-missed",
                format!("{} did not come back; what it held is free", self.name(node)),
            );
            self.spawn(|co| async move { co.delist(node) });
        }
        let files: Vec<FileId> = core
            .files
            .iter()
            .filter(|(_, state)| state.unlinked || state.settle)
            .map(|(file, _)| *file)
            .collect();
        for file in files {
            self.look_after(core, file);
        }
    }

    /// Waits until grace is over; it is bounded by a few leases.
    pub(crate) async fn grace_over(&self) {
        self.until_false(&self.grace).await;
    }

    /// Waits until maintenance is over.
    pub(crate) async fn maintenance_over(&self) {
        self.until_false(&self.maintenance).await;
    }

    /// A hand-over ends the wait too.
    async fn until_false(&self, what: &watch::Sender<bool>) {
        let (mut what, mut moved) = (what.subscribe(), self.moved.subscribe());
        // Errors would mean that the coordinator is gone, and this with it.
        tokio::select! {
            _over = what.wait_for(|on| !*on) => {}
            _moved = moved.wait_for(|moved| *moved) => {}
        }
    }

    /// Puts a node on the list before it gets a session.
    pub(crate) fn enlist(&self, roster: &mut Roster, node: NodeId) -> Result<(), Errno> {
        if self.options.read_only || roster.nodes.contains(&node) {
            return Ok(());
        }
        let mut nodes = roster.nodes.clone();
        nodes.insert(node);
        self.write_roster(&nodes)?;
        roster.nodes = nodes;
        Ok(())
    }

    /// Takes a node without a session off the list.
    pub(crate) fn delist(&self, node: NodeId) {
        let mut roster = self.roster.lock();
        let needed = {
            let core = self.core.lock();
            core.sessions.contains_key(&node) || core.stopped
        };
        if needed || self.options.read_only || !roster.nodes.remove(&node) {
            return;
        }
        if let Err(errno) = self.write_roster(&roster.nodes) {
            self.event(
                "sessions",
                format!("cannot write the list of sessions: {errno}; the next start waits for {node}"),
            );
        }
    }

    fn read_roster(&self) -> Result<BTreeSet<NodeId>, Errno> {
        let attr = match self.fs.lookup(self.fs.csvfs_dir(), NAME) {
            Ok(attr) => attr,
            Err(Errno::NOENT | Errno::STALE) => return Ok(BTreeSet::new()),
            Err(errno) => return Err(errno),
        };
        let file = csv_proto::file_id(attr.file).map_err(|_| Errno::IO)?;
        let text = String::from_utf8(self.fs.read(file, 0, LIST_BYTES_MAX)?).map_err(|_| Errno::IO)?;
        let parse = |line: &str| line.parse().map(NodeId).map_err(|_| Errno::IO);
        text.lines().map(parse).collect()
    }

    /// The new list beside the old one, then in place of it: a crash leaves one of the two, whole.
    fn write_roster(&self, nodes: &BTreeSet<NodeId>) -> Result<(), Errno> {
        let dir = self.fs.csvfs_dir();
        match self.fs.unlink(dir, NEW_NAME) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        let (attr, _) = self.fs.create(dir, NEW_NAME, 0o600, 0)?;
        let file = csv_proto::file_id(attr.file).map_err(|_| Errno::IO)?;
        let text: String = nodes.iter().map(|node| format!("{}\n", node.0)).collect();
        self.fs.write(file, 0, text.as_bytes())?;
        self.fs.fsync(file, false)?;
        self.fs.rename(dir, NEW_NAME, dir, NAME, 0)?;
        self.fs.fsync_dir(dir)?;
        self.fs.forget(file);
        Ok(())
    }
}
