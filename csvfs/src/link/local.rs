//! The coordinator in this same process. Its messages go through a queue and a thread, because it sends while it
//! holds its own locks and the client answers by calling it.
//!
//! The coordinator may end this session like any other (a recall that was missed, a process that stood still for too
//! long); the thread then begins a new one.

use crate::client::VolumeClient;
use crate::client::channel::Link;
use crate::client::now_ms;
use anyhow::{Context, Result, anyhow};
use csv_coordinator::{Coordinator, Outbox, SessionRef};
use csv_proto as proto;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// Pause before a session that was refused is asked for again.
const RETRY: Duration = Duration::from_millis(20);

struct LocalLink {
    coordinator: Arc<Coordinator>,
    session: OnceLock<SessionRef>,
}

impl std::fmt::Debug for LocalLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalLink").finish_non_exhaustive()
    }
}

impl Link for LocalLink {
    fn send(&self, message: proto::ClientMessage) {
        if let Some(session) = self.session.get() {
            self.coordinator.message(session, message);
        }
    }

    fn is_local(&self) -> bool {
        true
    }
}

/// `None` ends the session.
struct Queue(Sender<Option<proto::ServerMessage>>);

impl Outbox for Queue {
    fn send(&self, message: proto::ServerMessage) {
        // The receiver ends only after a `close`.
        let _ = self.0.send(Some(message));
    }
    fn close(&self, why: &str) {
        tracing::warn!(why, "the coordinator closed the local session");
        let _ = self.0.send(None);
    }
}

struct Session {
    link: Arc<LocalLink>,
    messages: Receiver<Option<proto::ServerMessage>>,
    hello_ms: u64,
}

fn begin(client: &VolumeClient, coordinator: &Arc<Coordinator>, hello: &proto::Hello) -> Result<Session> {
    let (sender, messages) = channel();
    let link = Arc::new(LocalLink { coordinator: coordinator.clone(), session: OnceLock::new() });
    let hello_ms = now_ms();
    let session = coordinator
        .connect(client.node, hello, Arc::new(Queue(sender)))
        .map_err(|refusal| anyhow!("the coordinator refused the local session: {refusal}"))?;
    let _ = link.session.set(session);
    Ok(Session { link, messages, hello_ms })
}

fn talk(client: &Arc<VolumeClient>, session: &Session) {
    while let Ok(Some(message)) = session.messages.recv() {
        match message.body {
            Some(proto::server_message::Body::Welcome(welcome)) => {
                if let Err(error) = client.welcomed(session.link.clone(), &welcome, session.hello_ms) {
                    tracing::error!(%error, "bad Welcome");
                }
            }
            Some(_) | None => client.received(message),
        }
    }
}

/// The session for as long as this node coordinates the volume.
#[derive(Debug)]
pub(crate) struct Local {
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Local {
    /// Waits until nothing of the session is left. The coordinator has ended, and with it the session.
    pub(crate) fn end(self) {
        self.over.store(true, Ordering::Release);
        // A panic there has been reported.
        let _ = self.thread.join();
    }
}

/// Connects the client to the coordinator of this process, until [`Local::end`].
///
/// # Errors
/// When the coordinator refuses the session.
pub(crate) fn connect(
    client: &Arc<VolumeClient>,
    coordinator: &Arc<Coordinator>,
    hello: proto::Hello,
) -> Result<Local> {
    let mut session = begin(client, coordinator, &hello)?;
    let (client, coordinator) = (client.clone(), coordinator.clone());
    let over = Arc::new(AtomicBool::new(false));
    let ends = over.clone();
    let thread = std::thread::Builder::new()
        .name("local-link".into())
        .spawn(move || {
            loop {
                talk(&client, &session);
                client.chan.unlinked();
                // A coordinator that has stopped refuses until it is left.
                session = loop {
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    match begin(&client, &coordinator, &hello) {
                        Ok(session) => break session,
                        Err(error) => tracing::debug!(%error, "local session"),
                    }
                    std::thread::sleep(RETRY);
                };
            }
        })
        .context("cannot start a thread")?;
    Ok(Local { over: ends, thread })
}
