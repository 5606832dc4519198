//! What is on this node and belongs to nobody here: resources that are open in a host, or of which a host has left a note,
//! and whose group is not driven here and is not about to arrive. They are ended, for as long as it takes.
//!
//! How they come about: csvd or a host died, and the group went to another node meanwhile; a group that went to another node
//! while it ran; a move to this node that was given up.

use super::Asker;
use super::driver::Driver;
use super::spec::{resources_of, spec_of};
use csv_cluster::db::EventKind;
use csv_resource::protocol::{Entry, Outcome};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Before one that could not be ended is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Open,
    Terminate,
    Close,
}

/// How far one is.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Under,
    /// It failed; it is tried again then.
    Again(Instant),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    ending: BTreeMap<String, Ending>,
    /// Resources of which a host has left a note, until they are ended or driven. `None` before it was looked.
    noted: Option<BTreeSet<String>>,
}

impl Leftovers {
    /// A group looks after it from now on.
    pub(super) fn spare(&mut self, resource: &str) {
        self.ending.remove(resource);
        if let Some(noted) = &mut self.noted {
            noted.remove(resource);
        }
    }

    /// Its host is gone.
    pub(super) fn lost(&mut self, resource: &str) {
        if let Some(ending) = self.ending.get_mut(resource) {
            *ending = Ending::Again(Instant::now());
        }
        // It is open nowhere now; a group that looks after it opens it again.
        if let Some(noted) = &mut self.noted {
            noted.insert(resource.to_owned());
        }
    }

    pub(super) fn all_found(&self) -> bool {
        self.noted.is_some()
    }

    fn due(&self, resource: &str) -> bool {
        match self.ending.get(resource) {
            None => true,
            Some(Ending::Under) => false,
            Some(Ending::Again(at)) => *at <= Instant::now(),
        }
    }
}

impl Driver {
    pub(super) fn anything_left(&self) -> bool {
        self.hosts.open_resources().next().is_some()
            || !self.leftovers.ending.is_empty()
            || self.leftovers.noted.as_ref().is_some_and(|noted| !noted.is_empty())
    }

    /// Begins to end what nobody looks after.
    pub(super) fn end_leftovers(&mut self) {
        if !self.knows_what_is_driven() {
            return;
        }
        if self.leftovers.noted.is_none() {
            self.leftovers.noted = Some(self.find_notes());
        }
        let driven: BTreeSet<&String> = self
            .driven
            .values()
            .filter_map(|driven| driven.config.as_ref())
            .flat_map(|config| config.resources.keys())
            .chain(self.incoming.values().flat_map(|incoming| incoming.resources.iter()))
            .collect();
        let open = self.hosts.open_resources();
        let left: BTreeSet<String> = open
            .chain(self.leftovers.noted.iter().flatten())
            .filter(|resource| !driven.contains(resource) && self.leftovers.due(resource))
            .cloned()
            .collect();
        for resource in left {
            self.leftovers.ending.insert(resource.clone(), Ending::Under);
            if self.hosts.is_open(&resource) {
                tracing::info!(resource, "ending what no group here looks after");
                self.hosts.call(&resource, Entry::Terminate, Asker::Leftover(Step::Terminate));
            } else {
                self.open_leftover(&resource);
            }
        }
    }

    /// Resources of the database of which a host has left a note.
    fn find_notes(&self) -> BTreeSet<String> {
        let db = self.engine.db.read();
        let run_dir = &self.engine.config.run_dir;
        let noted = |name: &&String| csv_resource::host::state_file(run_dir, name).exists();
        db.resources.keys().filter(noted).cloned().collect()
    }

    fn open_leftover(&mut self, resource: &str) {
        let spec = {
            let db = self.engine.db.read();
            db.resources.get(resource).and_then(|of| {
                let group = db.groups.get(&of.group)?;
                let resources = resources_of(&db, &of.group);
                Some(spec_of(group, group.generation, &resources, &db.types, of))
            })
        };
        match spec {
            Some(spec) => {
                let lease_ms = self.lease_ms();
                self.hosts.open(spec, false, false, lease_ms, &self.node, Asker::Leftover(Step::Open));
            }
            // It was removed, which it only is when it is offline.
            None => self.leftovers.spare(resource),
        }
    }

    pub(super) fn leftover_answered(&mut self, resource: &str, step: Step, outcome: &Outcome) {
        if !self.leftovers.ending.contains_key(resource) {
            return;
        }
        match (step, outcome) {
            (Step::Open, Outcome::Done(_)) => {
                self.hosts.call(resource, Entry::Terminate, Asker::Leftover(Step::Terminate));
            }
            (Step::Terminate, Outcome::Done(_)) => {
                self.hosts.close(resource, Asker::Leftover(Step::Close));
            }
            (Step::Close, _) => {
                self.hosts.left(resource);
                self.leftovers.spare(resource);
            }
            (Step::Open | Step::Terminate, Outcome::Failed { why, .. }) => {
                let text = format!(
                    "what is left of resource {resource} on this node cannot be ended: {why}; it is tried again"
                );
                self.event(resource, EventKind::ResourceWarning, text);
                self.leftovers.ending.insert(resource.to_owned(), Ending::Again(Instant::now() + AGAIN));
            }
        }
    }
}
