//! Admin socket of csvd: answers csvctl, passing what concerns a volume on to its csvfs.
//!
//! One thread per connection, a bounded number of them; a connection beyond the bound is closed at once. A csvfs
//! that does not answer makes that request fail, not the daemon.

use crate::events::EventLog;
use crate::volume::{Order, Volume};
use anyhow::Context;
use csv_types::admin::{Answer, IoCounts, Request, VolumeState};
use csv_types::config::Config;
use csv_types::{Epoch, Mode, ModeKind, Reason};
use csvd::client::{ClientError, read_line};
use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Connections at one time.
const CONNECTIONS_MAX: usize = 32;
/// A connection idle for longer is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(300);
/// Time for csvfs to tell its state.
const STATE_LIMIT: Duration = Duration::from_secs(10);

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) volumes: Vec<Arc<Volume>>,
    pub(crate) events: Mutex<EventLog>,
    connections: AtomicUsize,
}

/// Puts the socket there, for root only. A stale one is replaced; the caller holds the daemon's lock.
pub(crate) fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let _ = fs::remove_file(path);
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot restrict {}", path.display()))?;
    Ok(listener)
}

impl Node {
    pub(crate) fn new(config: Config, volumes: Vec<Arc<Volume>>, events: EventLog) -> Node {
        Node { config, volumes, events: Mutex::new(events), connections: AtomicUsize::new(0) }
    }

    /// Accepts connections until the process ends. `stopped` is told after a `Stop` has been carried out.
    pub(crate) fn serve(self: &Arc<Node>, listener: &UnixListener, stopped: &SyncSender<()>) {
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(e) => {
                    // Out of file descriptors, most likely; do not spin on it.
                    tracing::warn!(error = %e, "cannot accept on the admin socket");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if self.connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                self.connections.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (node, stopped) = (Arc::clone(self), stopped.clone());
            std::thread::spawn(move || {
                if let Err(e) = node.converse(stream, &stopped) {
                    tracing::debug!(error = %e, "admin connection ended");
                }
                node.connections.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    fn converse(&self, stream: UnixStream, stopped: &SyncSender<()>) -> std::io::Result<()> {
        stream.set_read_timeout(Some(IDLE_LIMIT))?;
        stream.set_write_timeout(Some(STATE_LIMIT))?;
        let mut stream = BufReader::new(stream);
        while let Some(line) = read_line(&mut stream)? {
            let request = serde_json::from_str(&line);
            let stop = matches!(request, Ok(Request::Stop));
            let answer = match request {
                Ok(request) => self.answer(&request),
                Err(e) => Answer::Error { message: format!("request not understood: {e}") },
            };
            let mut line = serde_json::to_vec(&answer)?;
            line.push(b'\n');
            let sent = stream.get_mut().write_all(&line);
            if stop {
                let _ = stopped.try_send(());
            }
            sent?;
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> Answer {
        match request {
            Request::State { volume } => self.state(volume.as_deref()),
            Request::Events { after } => {
                for volume in &self.volumes {
                    volume.collect_events(&self.events);
                }
                let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
                Answer::Events { events: events.after(*after) }
            }
            Request::Stop => {
                self.stop();
                Answer::Ok
            }
            Request::Crash { volume } => self.crash(volume, request),
            Request::Fence { node, .. } => Answer::Error {
                message: format!("{node} cannot be fenced: this cluster's membership is fixed by csv.toml"),
            },
            Request::Redirect { volume, .. }
            | Request::Maintenance { volume, .. }
            | Request::Fault { volume, .. }
            | Request::Role { volume, .. }
            | Request::RoleStatus { volume }
            | Request::Map { volume, .. } => self.pass_on(volume, request),
        }
    }

    fn find(&self, name: &str) -> Result<&Arc<Volume>, Answer> {
        self.volumes.iter().find(|volume| volume.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.volumes.iter().map(|volume| volume.name.as_str()).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            Answer::Error { message: format!("there is no volume \"{name}\"; volumes here: {names}") }
        })
    }

    fn pass_on(&self, name: &str, request: &Request) -> Answer {
        let limit = Duration::from_millis(self.config.cluster.op_timeout_ms) + Duration::from_secs(5);
        let volume = match self.find(name) {
            Ok(volume) => volume,
            Err(answer) => return answer,
        };
        match volume.ask(request, limit) {
            Ok(answer) => answer,
            Err(e) => Answer::Error { message: self.explain(volume, &e) },
        }
    }

    fn explain(&self, volume: &Volume, error: &ClientError) -> String {
        match error {
            ClientError::Refused(message) => message.clone(),
            ClientError::Connect { .. } => match volume.pid() {
                None => format!(
                    "csvfs of {} is not running on {}; csvd starts it again, see csvctl events for the reason",
                    volume.name, self.config.local.node
                ),
                Some(pid) => format!(
                    "csvfs of {} (process {pid}) does not listen yet; try again in a moment",
                    volume.name
                ),
            },
            ClientError::Unknown { .. } | ClientError::Protocol { .. } => {
                format!("{error}; it may have been carried out, look at csvctl volume state")
            }
        }
    }

    /// After a power cut csvd must not bring the volume back by itself. That csvfs dies instead of answering is
    /// what is wanted.
    fn crash(&self, name: &str, request: &Request) -> Answer {
        let volume = match self.find(name) {
            Ok(volume) => volume,
            Err(answer) => return answer,
        };
        volume.order(Order::StayDead);
        match volume.ask(request, STATE_LIMIT) {
            Ok(_) | Err(ClientError::Unknown { .. }) => Answer::Ok,
            Err(
                e @ (ClientError::Refused(_) | ClientError::Connect { .. } | ClientError::Protocol { .. }),
            ) => {
                volume.order(Order::Run);
                Answer::Error { message: self.explain(volume, &e) }
            }
        }
    }

    fn state(&self, name: Option<&str>) -> Answer {
        let volumes: Vec<&Arc<Volume>> = match name.map(|name| self.find(name)).transpose() {
            Ok(Some(volume)) => vec![volume],
            Ok(None) => self.volumes.iter().collect(),
            Err(answer) => return answer,
        };
        let mut rows = Vec::new();
        for volume in volumes {
            let request = Request::State { volume: Some(volume.name.clone()) };
            match volume.ask(&request, STATE_LIMIT) {
                Ok(Answer::State { rows: more }) => rows.extend(more),
                Ok(other) => rows.push(self.unavailable(volume, format!("unexpected answer {other:?}"))),
                Err(e) => rows.push(self.unavailable(volume, self.explain(volume, &e))),
            }
        }
        Answer::State { rows }
    }

    /// The row of a volume whose csvfs cannot speak for itself.
    fn unavailable(&self, volume: &Volume, why: String) -> VolumeState {
        let coordinator = self.config.volume(&volume.name).and_then(|v| v.coordinator.as_ref());
        let role = if coordinator == Some(&self.config.local.node) { "coordinator" } else { "data-server" };
        VolumeState {
            node: self.config.local.node.clone(),
            volume: volume.name.clone(),
            role: role.to_owned(),
            mode: Mode { kind: ModeKind::Unavailable, reason: Reason::CoordinatorUnreachable(why) },
            since_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            epoch: Epoch(0),
            io: IoCounts::default(),
        }
    }

    /// Ends every csvfs, all at the same time.
    fn stop(&self) {
        for volume in &self.volumes {
            volume.collect_events(&self.events);
            volume.order(Order::Stop);
        }
        for volume in &self.volumes {
            volume.wait_ended();
        }
    }
}
