//! Handing the volume over to another node, as planned: nobody loses anything, and nothing is recalled.
//!
//! Layouts stay where they are and direct I/O goes on, as after a crash: the list of sessions stays on the volume, so the
//! next coordinator begins with a grace period in which everybody reclaims. What a crash leaves in doubt is settled
//! here instead:
//!
//! 1. What is dirty is written while calls are still served, so that little is left for the end.
//! 2. No call is begun any more. One that arrives, and one that waits (for a lock, a layout, the end of maintenance), is
//!    answered with [`csv_proto::MOVED`]: it was not carried out, and its node sends it to the next coordinator as a new
//!    one. Calls that are being carried out are finished and answered; so is block I/O of other nodes.
//! 3. Everything is written and every session's connection is closed.
//!
//! When something cannot be written, the file system is shut down as in a power cut: a clean unmount would hide from the
//! next coordinator that data was lost which nobody has been told of.
//!
//! A call that is not finished in time is not answered: its node asks the next coordinator what became of it, as after a
//! crash.

use crate::coordinator::Coordinator;
use crate::state::{CallRef, Core, Waits};
use csv_layout::table::Input;
use csv_types::NodeId;
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// How a hand-over went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandedOver {
    /// Calls and block I/O that were not finished in time.
    pub unfinished: usize,
    /// Everything is on the LUN; else what the last sync said, and the file system was shut down as in a power cut.
    pub synced: Result<(), Errno>,
}

impl Coordinator {
    /// See the module. Blocks for up to `limit` and the time that the LUN needs for what is dirty. The file system is
    /// unmounted when the last reference to this coordinator is gone.
    pub fn hand_over(&self, limit: Duration) -> HandedOver {
        let early = self.fs.syncfs();
        if let Err(errno) = early {
            self.event("hand-over", format!("the sync before the hand-over failed: {errno}"));
        }
        let deadline = Instant::now() + limit;
        let unfinished = {
            let mut core = self.core.lock();
            core.moving = true;
            self.moved.send_replace(true);
            self.end_waits(&mut core);
            loop {
                let left = under_way(&core);
                if left == 0 || self.quiet.wait_until(&mut core, deadline).timed_out() {
                    break left;
                }
            }
        };
        let synced = early.and_then(|()| if self.options.read_only { Ok(()) } else { self.fs.syncfs() });
        self.end("the volume moves to another node");
        if synced.is_err() {
            self.shut_down();
        }
        HandedOver { unfinished, synced }
    }

    /// These nodes can write the LUN no more: their sessions end at once, and nobody waits for them.
    pub fn nodes_gone(&self, nodes: &[NodeId]) {
        let core = &mut *self.core.lock();
        for node in nodes {
            if core.sessions.contains_key(node) {
                self.event("fenced", format!("{} can write the LUN no more", self.name(*node)));
                self.end_session(core, *node, "it was fenced");
            } else if core.grace.as_ref().is_none_or(|grace| !grace.members.contains(node)) {
                continue;
            }
            self.not_waited_for(core, *node);
        }
    }

    fn end_waits(&self, core: &mut Core) {
        let waiting: Vec<(CallRef, Waits)> = core
            .sessions
            .iter()
            .flat_map(|(node, session)| {
                let at = move |id: &u64| CallRef { node: *node, session: session.id, id: *id };
                session.running.iter().map(move |(id, waits)| (at(id), *waits))
            })
            .collect();
        for (at, waits) in waiting {
            match waits {
                Waits::Lock(request) => self.cancel_lock(core, request),
                Waits::Nothing | Waits::Get(_) => {
                    if let Some(session) = core.session(at.node, at.session)
                        && let Some(waits) = session.running.get_mut(&at.id)
                    {
                        *waits = Waits::Cancelled;
                    }
                    if let Waits::Get(request) = waits {
                        self.step(core, Input::CancelGet { request });
                    }
                }
                Waits::Cancelled => {}
            }
        }
    }
}

/// What a hand-over waits for.
fn under_way(core: &Core) -> usize {
    let calls: usize = core.sessions.values().map(|session| session.running.len()).sum();
    let block_io: usize = core.files.values().map(|file| file.block_io.len()).sum();
    calls + block_io
}
