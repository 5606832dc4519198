//! What nodes may cache of a file's attributes and of a directory's names, and taking it back.
//!
//! A lease is noted *before* the attributes are read, with a number; it is confirmed when the reply leaves, if the
//! number is still the same. So a change between the two turns into a reply without a lease, never into a stale one that
//! is cached. A change is first made, then the others' leases are taken (and their nodes waited for), then it is
//! answered.

use crate::block::NOBODY;
use crate::coordinator::Coordinator;
use crate::state::{Core, FileState, Lease};
use csv_proto::{Invalidate, server_message};
use csv_types::{FileId, NodeId};

/// When there is no room for leases, this part of them is taken back at once.
const ROOM_SHARE: usize = 16;

/// What of a file a lease is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    Attr,
    Names,
}

/// A lease that was noted for a reply under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Note {
    file: FileId,
    node: NodeId,
    subject: Subject,
    number: u64,
}

/// What a call changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) file: FileId,
    pub(crate) attr: bool,
    pub(crate) names: bool,
    /// The caller learns the new attributes from the reply, so its own lease on them may stay.
    pub(crate) told: bool,
}

impl Change {
    /// Attributes changed; the reply carries the new ones.
    pub(crate) fn attr(file: FileId) -> Change {
        Change { file, attr: true, names: false, told: true }
    }

    /// Attributes changed and the reply does not say how.
    pub(crate) fn attr_untold(file: FileId) -> Change {
        Change { file, attr: true, names: false, told: false }
    }

    /// A directory's names changed, and its times with them.
    pub(crate) fn directory(dir: FileId) -> Change {
        Change { file: dir, attr: true, names: true, told: false }
    }

    /// The same, and the reply carries the directory's new attributes.
    pub(crate) fn directory_told(dir: FileId) -> Change {
        Change { told: true, ..Change::directory(dir) }
    }
}

fn list(core: &mut Core, file: FileId, subject: Subject) -> &mut Vec<Lease> {
    let state = core.file(file);
    match subject {
        Subject::Attr => &mut state.attr_leases,
        Subject::Names => &mut state.names_leases,
    }
}

impl Coordinator {
    /// Notes that `node` may cache what a reply is going to tell; `None` when it may not.
    pub(crate) fn lease(&self, node: NodeId, file: FileId, subject: Subject) -> Option<Note> {
        self.lease_locked(&mut self.core.lock(), node, file, subject)
    }

    pub(crate) fn lease_locked(
        &self,
        core: &mut Core,
        node: NodeId,
        file: FileId,
        subject: Subject,
    ) -> Option<Note> {
        if subject == Subject::Attr && core.written_by_others(file, node) {
            return None;
        }
        if !core.files.contains_key(&file) && core.files.len() >= self.options.limits.leased_files_max {
            self.make_room(core);
            return None;
        }
        if let Some((_, number)) = list(core, file, subject).iter().find(|(holder, _)| *holder == node) {
            return Some(Note { file, node, subject, number: *number });
        }
        let number = core.number();
        list(core, file, subject).push((node, number));
        Some(Note { file, node, subject, number })
    }

    /// Takes leases of some files back, so that others can be leased.
    fn make_room(&self, core: &mut Core) {
        if std::mem::replace(&mut core.making_room, true) {
            return;
        }
        let share = (self.options.limits.leased_files_max / ROOM_SHARE).max(1);
        let leased = |state: &FileState| !state.attr_leases.is_empty() || !state.names_leases.is_empty();
        let some = core.files.iter().filter(|(_, state)| leased(state)).map(|(file, _)| *file);
        let changes: Vec<Change> = some.take(share).map(Change::directory).collect();
        self.spawn(|co| async move {
            // In the name of nobody: everybody's leases go.
            co.changed(NOBODY, &changes).await;
            co.core.lock().making_room = false;
        });
    }

    /// Tells those who may cache what changed, and waits until they have dropped it. To be called after the change
    /// and before its reply.
    pub(crate) async fn changed(&self, by: NodeId, changes: &[Change]) {
        let waits = {
            let core = &mut *self.core.lock();
            core.changes += 1;
            let mut waits = Vec::new();
            for change in changes {
                for (node, body) in taken(core, by, *change) {
                    let wait = self.push(core, node, |id| invalidate(id, change.file, body));
                    // Its own cache is behind the reply on the same stream.
                    waits.extend(wait.filter(|_| node != by));
                }
                core.tidy(change.file);
            }
            waits
        };
        self.answered(waits, "did not drop cached attributes").await;
    }

    /// Takes the attribute leases of everybody but `node`, which is about to write.
    pub(crate) async fn take_attr_leases(&self, file: FileId, node: NodeId) {
        let waits: Vec<_> = {
            let core = &mut *self.core.lock();
            core.changes += 1;
            let others = without(&mut core.file(file).attr_leases, |holder| holder != node);
            others
                .into_iter()
                .filter_map(|holder| self.push(core, holder, |id| invalidate(id, file, (true, false))))
                .collect()
        };
        self.answered(waits, "did not drop cached attributes").await;
    }
}

/// Is every one of these leases still what it was when it was noted?
pub(crate) fn confirmed(core: &Core, notes: &[Note]) -> bool {
    !notes.is_empty()
        && notes.iter().all(|note| {
            let Some(state) = core.files.get(&note.file) else { return false };
            let leases = match note.subject {
                Subject::Attr => &state.attr_leases,
                Subject::Names => &state.names_leases,
            };
            leases.contains(&(note.node, note.number))
        })
}

/// Drops every lease of a node whose session is over.
pub(crate) fn forget_node(core: &mut Core, node: NodeId) {
    let files: Vec<FileId> = core.files.keys().copied().collect();
    for file in files {
        if let Some(state) = core.files.get_mut(&file) {
            state.attr_leases.retain(|(holder, _)| *holder != node);
            state.names_leases.retain(|(holder, _)| *holder != node);
        }
        core.tidy(file);
    }
}

fn invalidate(id: u64, file: FileId, (attr, names): (bool, bool)) -> server_message::Body {
    server_message::Body::Invalidate(Invalidate { id, file: Some(file.into()), attr, names, data: false })
}

/// Takes out of `leases` and returns the nodes for which `take` says so.
fn without(leases: &mut Vec<Lease>, take: impl Fn(NodeId) -> bool) -> Vec<NodeId> {
    let taken = leases.iter().map(|(node, _)| *node).filter(|node| take(*node)).collect();
    leases.retain(|(node, _)| !take(*node));
    taken
}

/// Takes the leases that a change breaks: which node has to drop (attributes, names). The caller's own leases get
/// new numbers, so that a reply of it that was read before the change confirms nothing.
fn taken(core: &mut Core, by: NodeId, change: Change) -> Vec<(NodeId, (bool, bool))> {
    if !core.files.contains_key(&change.file) {
        return Vec::new();
    }
    let (attr_number, names_number) = (core.number(), core.number());
    let Some(state) = core.files.get_mut(&change.file) else { return Vec::new() };
    let mut nodes: Vec<(NodeId, (bool, bool))> = Vec::new();
    if change.attr {
        let attr = without(&mut state.attr_leases, |node| node != by || !change.told);
        nodes.extend(attr.into_iter().map(|node| (node, (true, false))));
        state.attr_leases.iter_mut().for_each(|lease| lease.1 = attr_number);
    }
    if change.names {
        for node in without(&mut state.names_leases, |node| node != by) {
            match nodes.iter_mut().find(|(known, _)| *known == node) {
                Some((_, (_, names))) => *names = true,
                None => nodes.push((node, (false, true))),
            }
        }
        state.names_leases.iter_mut().for_each(|lease| lease.1 = names_number);
    }
    nodes
}
