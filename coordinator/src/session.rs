//! Sessions: one per node. A connection comes and goes, the session stays until its lease is over, it fails to answer
//! and is fenced, or its node starts anew. When it ends, everything it held is free again.

use crate::block::Pieces;
use crate::coordinator::Coordinator;
use crate::leases;
use crate::options::{Outbox, Refusal, SessionRef};
use crate::replies::ReplyCache;
use crate::state::{Core, Session};
use csv_layout::table::Input;
use csv_proto::{Hello, Revoked, ServerMessage, Welcome, server_message};
use csv_types::{FileId, NodeId};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

/// Length of the bytes that name a session.
const SESSION_BYTES: usize = 16;

impl Coordinator {
    /// A node's csvfs has connected. Sends Welcome through `outbox` before it returns. The same session bytes as
    /// before resume the session: the former outbox is closed, and what was not answered is asked again. May block
    /// on the disk when the node is new.
    ///
    /// # Errors
    /// A [`Refusal`] for the other end; EAGAIN ones are worth another try.
    pub fn connect(
        &self,
        node: NodeId,
        hello: &Hello,
        outbox: Arc<dyn Outbox>,
    ) -> Result<SessionRef, Refusal> {
        self.check_hello(node, hello)?;
        // Held until the session stands, so that the end of a former one does not take the node off the list.
        let mut roster = self.roster.lock();
        self.enlist(&mut roster, node)
            .map_err(|errno| refuse(errno, "the list of sessions cannot be written to the volume"))?;
        let core = &mut *self.core.lock();
        if core.stopping || core.stopped || core.moving {
            return Err(refuse(Errno::AGAIN, "the coordinator is stopping"));
        }
        let same = core.sessions.get(&node).map(|session| (session.bytes == hello.session, session.doomed));
        match same {
            Some((_, true)) => {
                return Err(refuse(Errno::AGAIN, "the node is being fenced; wait until its lease is over"));
            }
            Some((true, false)) => return Ok(self.resume(core, node, outbox)),
            Some((false, false)) => self.end_session(core, node, "the node's csvfs was started anew"),
            None => {}
        }
        let session = self.open_session(core, node, hello, Arc::clone(&outbox));
        let welcome = self.welcome(core, node, false);
        let grace = welcome.grace;
        core.send(node, server_message::Body::Welcome(welcome));
        if hello.last_epoch != 0 && !grace {
            // It had something at this coordinator or a former one, and all of it is gone.
            core.send(node, revoked("the session is over: its lease ran out or the grace period has passed"));
        }
        self.event(
            "session-open",
            format!("{} has connected to volume {}", self.name(node), self.options.volume_name),
        );
        Ok(session)
    }

    /// A connection is gone. The session stays until its lease is over.
    pub fn disconnected(&self, session: &SessionRef) {
        let core = &mut *self.core.lock();
        if let Some(found) = core.session(session.node, session.session)
            && found.connection == session.connection
        {
            found.outbox = None;
            self.event(
                "session-lost",
                format!("the connection of {} is lost; its lease runs", self.name(session.node)),
            );
        }
    }

    fn check_hello(&self, node: NodeId, hello: &Hello) -> Result<(), Refusal> {
        if hello.protocol_version != csv_proto::PROTOCOL_VERSION {
            let text = format!(
                "protocol version {} is not {}: install the same release on all nodes",
                hello.protocol_version,
                csv_proto::PROTOCOL_VERSION
            );
            return Err(Refusal { errno: Errno::PROTONOSUPPORT, reason: text });
        }
        if hello.volume != self.options.volume_name {
            let text = format!("this is volume {}, not {}", self.options.volume_name, hello.volume);
            return Err(Refusal { errno: Errno::NODEV, reason: text });
        }
        if hello.node != node.0 || !self.is_known(node) {
            return Err(refuse(
                Errno::ACCESS,
                "the node in Hello is not the one of the connection, or is not configured",
            ));
        }
        if hello.session.len() != SESSION_BYTES {
            return Err(refuse(Errno::INVAL, "session bytes must be 16"));
        }
        if hello.last_epoch > self.options.epoch.0 {
            return Err(refuse(Errno::STALE, "the node knows a later coordinator: this one must stop"));
        }
        Ok(())
    }

    fn open_session(
        &self,
        core: &mut Core,
        node: NodeId,
        hello: &Hello,
        outbox: Arc<dyn Outbox>,
    ) -> SessionRef {
        let (id, connection) = (core.number(), core.number());
        let session = Session {
            id,
            bytes: hello.session.clone(),
            connection,
            outbox: Some(outbox),
            heard: Instant::now(),
            doomed: false,
            token: token(),
            running: HashMap::new(),
            lock_waits: 0,
            replies: ReplyCache::new(self.options.limits.replies_per_session_max),
            opens: HashMap::new(),
            state_json: String::new(),
            pieces: Pieces::default(),
        };
        core.sessions.insert(node, session);
        SessionRef { node, session: id, connection }
    }

    fn resume(&self, core: &mut Core, node: NodeId, outbox: Arc<dyn Outbox>) -> SessionRef {
        let connection = core.number();
        let welcome = self.welcome(core, node, true);
        let mut session_ref = SessionRef { node, session: 0, connection };
        if let Some(session) = core.sessions.get_mut(&node) {
            session_ref.session = session.id;
            session.connection = connection;
            session.heard = Instant::now();
            if let Some(old) = session.outbox.replace(outbox) {
                old.close("the node has connected anew");
            }
        }
        core.send(node, server_message::Body::Welcome(welcome));
        for push in core.pushes.values().filter(|push| push.node == node) {
            core.send(node, push.body.clone());
        }
        self.event("session-resume", format!("{} has connected again", self.name(node)));
        session_ref
    }

    fn welcome(&self, core: &Core, node: NodeId, resumed: bool) -> Welcome {
        let token = core.sessions.get(&node).map(|session| session.token.clone()).unwrap_or_default();
        let grace = core.grace.as_ref().is_some_and(|grace| grace.members.contains(&node));
        Welcome {
            epoch: self.options.epoch.0,
            resumed,
            volume_id: self.options.volume_id.as_bytes().to_vec().into(),
            root: Some(self.fs.root().into()),
            lease_ms: self.options.lease_ms,
            fs_block_bytes: self.fs.block_bytes(),
            smb_token: token.into_bytes().into(),
            grace,
            order: Some(core.mode_order(node)),
            unsynced_lost: self.options.unsynced_lost,
        }
    }

    /// Ends sessions whose lease is over.
    pub(crate) fn expire(&self, core: &mut Core) {
        let limit = self.lease_over();
        let over: Vec<NodeId> =
            core.sessions.iter().filter(|(_, s)| s.heard.elapsed() > limit).map(|(node, _)| *node).collect();
        for node in over {
            self.end_session(core, node, "its lease ran out");
            self.event(
                "session-expired",
                format!(
                    "{} was not heard for its lease and a margin; everything it held is free",
                    self.name(node)
                ),
            );
        }
    }

    /// A node does not do what it must. It is told, it is renewed no more, and its session ends once it is fenced
    /// or its lease is over.
    pub(crate) fn give_up(&self, node: NodeId, why: &str) {
        let core = &mut *self.core.lock();
        self.give_up_locked(core, node, why);
    }

    pub(crate) fn give_up_locked(&self, core: &mut Core, node: NodeId, why: &str) {
        let Some(session) = core.sessions.get_mut(&node) else {
            // Without a session its lease is long over.
            self.step(core, Input::NodeGone { node });
            return;
        };
        if session.doomed {
            return;
        }
        session.doomed = true;
        let id = session.id;
        core.send(node, revoked(why));
        self.event("fence", format!("fencing {}: {why}", self.name(node)));
        let fence = Arc::clone(&self.options.fence);
        // This node is not to fence itself: its own client ends with its lease, which the coordinator sees.
        let other = node != self.options.own_node;
        self.spawn(move |co| async move {
            if other && fence(node) {
                let core = &mut *co.core.lock();
                if core.session(node, id).is_some() {
                    co.event("fenced", format!("{} can write the LUN no more", co.name(node)));
                    co.end_session(core, node, "it was fenced");
                }
            } else {
                let wait =
                    format!("{} cannot be fenced here; waiting until its lease is over", co.name(node));
                co.event("fence", wait);
            }
        });
    }

    /// Everything of a session goes. Only when the node cannot write the LUN any more.
    pub(crate) fn end_session(&self, core: &mut Core, node: NodeId, why: &str) {
        let Some(session) = core.sessions.remove(&node) else { return };
        if let Some(outbox) = session.outbox {
            outbox.send(ServerMessage { epoch: core.epoch.0, body: Some(revoked(why)) });
            outbox.close(why);
        }
        core.pushes.retain(|_, push| push.node != node);
        self.step(core, Input::NodeGone { node });
        self.drop_locks(core, session.id);
        leases::forget_node(core, node);
        let mut touched: Vec<FileId> = session.opens.values().copied().collect();
        for file in &touched {
            let state = core.file(*file);
            state.opens = state.opens.saturating_sub(1);
        }
        for (file, state) in &mut core.files {
            if state.eof.is_some_and(|eof| eof.node == node) {
                state.eof = None;
                state.settle = true;
                touched.push(*file);
            }
        }
        touched.extend(core.files.iter().filter(|(_, state)| state.unlinked).map(|(file, _)| *file));
        touched.sort_unstable();
        touched.dedup();
        for file in touched {
            self.look_after(core, file);
        }
        self.event("session-end", format!("the session of {} has ended: {why}", self.name(node)));
        self.spawn(|co| async move { co.delist(node) });
    }
}

pub(crate) fn revoked(reason: &str) -> server_message::Body {
    server_message::Body::Revoked(Revoked { reason: reason.to_owned() })
}

fn refuse(errno: Errno, reason: &str) -> Refusal {
    Refusal { errno, reason: reason.to_owned() }
}

/// Sixteen random bytes in lower-case hex.
fn token() -> String {
    let bytes: [u8; 16] = rand::random();
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _written = write!(text, "{byte:02x}");
        text
    })
}
