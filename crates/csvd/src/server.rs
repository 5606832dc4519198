//! Admin socket of csvd: answers csvctl and csvfs, passing what concerns a volume on to its csvfs.
//!
//! One thread per connection, a bounded number of them; a connection beyond the bound is closed at once. A csvfs
//! that does not answer makes that request fail, not the daemon.

use crate::daemon::Daemon;
use crate::engine::Engine;
use crate::engine::agent::Agent;
use crate::requests;
use crate::volume::{Order, Volume};
use anyhow::{Context, anyhow, bail};
use csv_cluster::db::{Command, Witness};
use csv_types::admin::{Answer, IoCounts, LINE_BYTES_MAX, PathFault, Request, VolumeState};
use csv_types::{Epoch, Mode, ModeKind, Reason};
use csvd::client::{ClientError, read_line};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Connections at one time.
const CONNECTIONS_MAX: usize = 32;
/// A connection idle for longer is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(300);
/// Time for csvfs to tell its state.
const STATE_LIMIT: Duration = Duration::from_secs(10);

/// Time for a volume request besides what csvfs may take for it.
const PASS_LIMIT: Duration = Duration::from_secs(65);
/// How long csvfs waits for a node to be fenced.
const FENCE_LIMIT: Duration = Duration::from_secs(9);

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Server {
    daemon: Arc<Daemon>,
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

impl Server {
    pub(crate) fn new(daemon: Arc<Daemon>) -> Server {
        Server { daemon, connections: AtomicUsize::new(0) }
    }

    /// Accepts connections until the process ends. `stopped` is told after a `Stop` has been carried out.
    pub(crate) fn serve(self: &Arc<Server>, listener: &UnixListener, stopped: &SyncSender<()>) {
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
        while let Some(line) = read_line(&mut stream, LINE_BYTES_MAX)? {
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
        match self.carry_out(request) {
            Ok(answer) => answer,
            Err(error) => Answer::Error { message: format!("{error:#}") },
        }
    }

    fn carry_out(&self, request: &Request) -> anyhow::Result<Answer> {
        match request {
            Request::State { volume } => self.state(volume.as_deref()),
            Request::Events { after } => {
                if let Ok(engine) = self.daemon.engine() {
                    for agent in engine.volumes.all() {
                        agent.volume.collect_events(&self.daemon.events);
                    }
                }
                let events = self.daemon.events.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(Answer::Events { events: events.after(*after) })
            }
            Request::Stop => {
                self.daemon.stop();
                Ok(Answer::Ok)
            }
            Request::Cluster { what } => {
                requests::answer(&self.daemon, what.clone()).map(|data| Answer::Cluster { data })
            }
            Request::Fence { volume, node, reason, .. } => {
                let engine = self.daemon.engine()?;
                self.daemon.block_on(engine.have_fenced(volume, *node, reason, FENCE_LIMIT))?;
                Ok(Answer::Ok)
            }
            Request::Crash { volume } => self.crash(volume, request),
            Request::Redirect { volume, on, node } => {
                let answer = self.pass_on(volume, request)?;
                self.remember_redirect(volume, *on, node.as_deref())?;
                Ok(answer)
            }
            Request::Maintenance { volume, on } => {
                let answer = self.pass_on(volume, request)?;
                self.remember(volume, "maintenance", on.then(|| "on".to_owned()))?;
                Ok(answer)
            }
            Request::Fault { volume, fault } if self.is_disk_witness(volume) => {
                let failed = match fault {
                    PathFault::Heal => false,
                    PathFault::Fail => true,
                    PathFault::DelayMs(_) | PathFault::ErrorAfter(_) => {
                        bail!("the path to a disk witness can be failed and healed only")
                    }
                };
                self.daemon.engine()?.disk_witness.set_failed(failed);
                Ok(Answer::Ok)
            }
            Request::Fault { volume, .. }
            | Request::Role { volume, .. }
            | Request::RoleStatus { volume }
            | Request::Map { volume, .. } => self.pass_on(volume, request),
        }
    }

    fn is_disk_witness(&self, name: &str) -> bool {
        self.daemon.engine().is_ok_and(|engine| {
            matches!(&engine.db.read().quorum.witness, Witness::Disk { name: witness, .. } if witness == name)
        })
    }

    /// Orders that stand are given to the next coordinator too.
    fn remember(&self, volume: &str, what: &str, value: Option<String>) -> anyhow::Result<()> {
        let engine = self.daemon.engine()?;
        let command = Command::Property { key: format!("volume.{volume}.{what}"), value };
        self.daemon.block_on(engine.propose(command, STATE_LIMIT))?;
        Ok(())
    }

    fn remember_redirect(&self, volume: &str, on: bool, node: Option<&str>) -> anyhow::Result<()> {
        let Some(name) = node else {
            self.remember(volume, "redirect-nodes", None)?;
            return self.remember(volume, "redirect", on.then(|| "on".to_owned()));
        };
        let nodes = {
            let engine = self.daemon.engine()?;
            let db = engine.db.read();
            let id = db.node_by_name(name).with_context(|| format!("there is no node \"{name}\""))?.id;
            let list =
                db.properties.get(&format!("volume.{volume}.redirect-nodes")).cloned().unwrap_or_default();
            let mut ids: BTreeSet<u32> = list.split(',').filter_map(|id| id.parse().ok()).collect();
            if on {
                ids.insert(id.0)
            } else {
                ids.remove(&id.0)
            };
            ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
        };
        self.remember(volume, "redirect-nodes", (!nodes.is_empty()).then_some(nodes))
    }

    fn find(&self, name: &str) -> anyhow::Result<Arc<Agent>> {
        let engine = self.daemon.engine()?;
        engine.volumes.find(name).with_context(|| {
            let names: Vec<String> =
                engine.volumes.all().iter().map(|agent| agent.volume.name.clone()).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            format!("there is no volume \"{name}\"; volumes here: {names}")
        })
    }

    fn pass_on(&self, name: &str, request: &Request) -> anyhow::Result<Answer> {
        let agent = self.find(name)?;
        agent.volume.ask(request, PASS_LIMIT).map_err(|e| anyhow!(self.explain(&agent.volume, &e)))
    }

    fn explain(&self, volume: &Volume, error: &ClientError) -> String {
        match error {
            ClientError::Refused(message) => message.clone(),
            ClientError::Connect { .. } => match volume.pid() {
                None => format!(
                    "csvfs of {} is not running on {}; csvd starts it again, see csvctl events for the reason",
                    volume.name, self.daemon.config.node
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
    fn crash(&self, name: &str, request: &Request) -> anyhow::Result<Answer> {
        let agent = self.find(name)?;
        agent.volume.order(Order::StayDead);
        match agent.volume.ask(request, STATE_LIMIT) {
            Ok(_) | Err(ClientError::Unknown { .. }) => Ok(Answer::Ok),
            Err(
                e @ (ClientError::Refused(_) | ClientError::Connect { .. } | ClientError::Protocol { .. }),
            ) => {
                agent.volume.order(Order::Run);
                bail!("{}", self.explain(&agent.volume, &e))
            }
        }
    }

    fn state(&self, name: Option<&str>) -> anyhow::Result<Answer> {
        let engine = self.daemon.engine()?;
        let agents = match name {
            Some(name) => vec![self.find(name)?],
            None => engine.volumes.all(),
        };
        let mut rows = Vec::new();
        for agent in agents {
            let volume = &agent.volume;
            let request = Request::State { volume: Some(volume.name.clone()) };
            match volume.ask(&request, STATE_LIMIT) {
                Ok(Answer::State { rows: more }) => rows.extend(more),
                Ok(other) => {
                    rows.push(self.unavailable(&engine, volume, format!("unexpected answer {other:?}")))
                }
                Err(e) => rows.push(self.unavailable(&engine, volume, self.explain(volume, &e))),
            }
        }
        Ok(Answer::State { rows })
    }

    /// The row of a volume whose csvfs cannot speak for itself.
    fn unavailable(&self, engine: &Engine, volume: &Volume, why: String) -> VolumeState {
        let owner = engine.db.read().volumes.get(&volume.name).and_then(|volume| volume.owner);
        let role = if owner == Some(engine.me()) { "coordinator" } else { "data-server" };
        VolumeState {
            node: self.daemon.config.node.clone(),
            volume: volume.name.clone(),
            role: role.to_owned(),
            mode: Mode { kind: ModeKind::Unavailable, reason: Reason::CoordinatorUnreachable(why) },
            since_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            epoch: Epoch(0),
            io: IoCounts::default(),
        }
    }
}
