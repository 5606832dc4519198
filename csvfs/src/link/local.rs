//! The coordinator in this same process. Its messages go through a queue and a thread, because it sends while it
//! holds its own locks and the client answers by calling it.

use crate::client::VolumeClient;
use crate::client::channel::Link;
use crate::client::now_ms;
use anyhow::{Context, Result, anyhow};
use csv_coordinator::{Coordinator, Outbox, SessionRef};
use csv_proto as proto;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};

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
}

struct Queue(Sender<proto::ServerMessage>);

impl Outbox for Queue {
    fn send(&self, message: proto::ServerMessage) {
        // The receiver ends with the process.
        let _ = self.0.send(message);
    }
    fn close(&self, why: &str) {
        tracing::warn!(why, "the coordinator closed the local session");
    }
}

/// Connects the client to the coordinator of this process, for as long as the process lives.
///
/// # Errors
/// When the coordinator refuses the session.
pub(crate) fn connect(
    client: &Arc<VolumeClient>,
    coordinator: &Arc<Coordinator>,
    hello: &proto::Hello,
) -> Result<()> {
    let (sender, receiver) = channel();
    let link = Arc::new(LocalLink { coordinator: coordinator.clone(), session: OnceLock::new() });
    let hello_ms = now_ms();
    let session = coordinator
        .connect(client.node, hello, Arc::new(Queue(sender)))
        .map_err(|refusal| anyhow!("the coordinator refused the local session: {refusal}"))?;
    let _ = link.session.set(session);
    let client = client.clone();
    std::thread::Builder::new()
        .name("local-link".into())
        .spawn(move || {
            for message in receiver {
                match message.body {
                    Some(proto::server_message::Body::Welcome(welcome)) => {
                        if let Err(error) = client.welcomed(link.clone(), &welcome, hello_ms) {
                            tracing::error!(%error, "bad Welcome");
                        }
                    }
                    Some(_) | None => client.received(message),
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}
