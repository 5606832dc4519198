//! The local admin socket `<run_dir>/<volume>.sock`: one JSON request per line, one JSON answer per line
//! ([`csv_types::admin`]). Only root can connect (mode 0600). One thread per connection, a bounded number of them.

use crate::app::App;
use anyhow::{Context, Result};
use csv_proto as proto;
use csv_types::admin::{Answer, LINE_BYTES_MAX, MapExtent, Request, VolumeState};
use csv_types::config::NodeConfig;
use proto::call::Op;
use proto::reply::Body;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const CONNECTIONS_MAX: usize = 64;
/// How long `state` waits for the coordinator before it shows this node alone.
const STATES_TIMEOUT: Duration = Duration::from_secs(3);

/// Starts serving.
///
/// # Errors
/// When the socket cannot be made, or another csvfs serves this volume on this node.
pub(crate) fn serve(app: &Arc<App>, path: &Path) -> Result<()> {
    if UnixStream::connect(path).is_ok() {
        anyhow::bail!(
            "another csvfs already serves this volume here (its socket {} answers)",
            path.display()
        );
    }
    let _ = std::fs::remove_file(path);
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", path.display()))?;
    let app = app.clone();
    let open = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new()
        .name("admin".into())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
                    open.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                let (app, open) = (app.clone(), open.clone());
                std::thread::spawn(move || {
                    if let Err(error) = talk(&app, stream) {
                        tracing::debug!(%error, "admin connection");
                    }
                    open.fetch_sub(1, Ordering::AcqRel);
                });
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn talk(app: &Arc<App>, stream: UnixStream) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut line = Vec::new();
        let limit = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
        if reader.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => answer(app, request),
            Err(error) => Answer::Error { message: format!("not a request: {error}") },
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        writer.write_all(&text)?;
    }
}

fn answer(app: &Arc<App>, request: Request) -> Answer {
    match handle(app, request) {
        Ok(answer) => answer,
        Err(error) => Answer::Error { message: format!("{error:#}") },
    }
}

fn handle(app: &Arc<App>, request: Request) -> Result<Answer> {
    match request {
        Request::State { .. } => Ok(Answer::State { rows: states(app) }),
        Request::Redirect { on, node, .. } => {
            let node = node.map(|name| node_number(app, &name)).transpose()?;
            order(app, proto::AdminOrder { redirect: Some(on), maintenance: None, node })
        }
        Request::Maintenance { on, .. } => {
            order(app, proto::AdminOrder { redirect: None, maintenance: Some(on), node: None })
        }
        Request::Fault { fault, .. } => {
            let lun = app
                .client
                .modes
                .lun()
                .context("this node has no path to the LUN at all, so there is none to fail or heal")?;
            lun.set_fault(fault);
            Ok(Answer::Ok)
        }
        Request::Crash { .. } => app.crash(),
        Request::Map { path, .. } => map(app, &path),
        Request::Events { after } => Ok(Answer::Events { events: app.client.events.after(after) }),
        Request::Role { order, .. } => app.role_order(order).map(|()| Answer::Ok),
        Request::RoleStatus { .. } => Ok(Answer::Role { status: app.role_status() }),
        Request::Cluster { .. } => anyhow::bail!("csvfs knows nothing of the cluster; ask csvd"),
        Request::Fence { .. } => anyhow::bail!("csvfs fences nobody; ask csvd"),
        Request::Stop => {
            app.stop_soon();
            Ok(Answer::Ok)
        }
    }
}

fn node_number(app: &App, name: &str) -> Result<u32> {
    let nodes = app.nodes.read();
    nodes.all.iter().find(|node| node.name == name).map(|node| node.id.0).with_context(|| {
        let known: Vec<_> = nodes.all.iter().map(|node| node.name.as_str()).collect();
        format!("there is no node \"{name}\"; nodes are {}", known.join(", "))
    })
}

fn order(app: &Arc<App>, order: proto::AdminOrder) -> Result<Answer> {
    app.client
        .chan
        .call(Default::default(), Op::AdminOrder(order))
        .map_err(|error| anyhow::anyhow!("the coordinator did not take the order: {error}"))?;
    Ok(Answer::Ok)
}

fn states(app: &Arc<App>) -> Vec<VolumeState> {
    let own = app.client.state();
    let op = Op::ListStates(proto::ListStates {});
    let mut rows: Vec<VolumeState> =
        match app.client.chan.call_with(Default::default(), op, None, STATES_TIMEOUT).map(|reply| reply.body)
        {
            Ok(Some(Body::States(list))) => {
                list.state_json.iter().filter_map(|json| serde_json::from_str(json).ok()).collect()
            }
            Ok(_) | Err(_) => Vec::new(),
        };
    rows.retain(|row| row.node != own.node);
    rows.push(own);
    let nodes = app.nodes.read().clone();
    for node in &nodes.all {
        if !rows.iter().any(|row| row.node == node.name) {
            rows.push(unknown_row(app, node, nodes.owner == Some(node.id)));
        }
    }
    rows.sort_by(|a, b| a.node.cmp(&b.node));
    rows
}

fn unknown_row(app: &App, node: &NodeConfig, coordinator: bool) -> VolumeState {
    VolumeState {
        node: node.name.clone(),
        volume: app.volume.name.clone(),
        role: if coordinator { "coordinator" } else { "data-server" }.to_owned(),
        mode: csv_types::Mode {
            kind: csv_types::ModeKind::Unavailable,
            reason: csv_types::Reason::CoordinatorUnreachable("the node does not report".into()),
        },
        since_unix_s: 0,
        epoch: csv_types::Epoch(0),
        io: Default::default(),
    }
}

fn map(app: &Arc<App>, path: &str) -> Result<Answer> {
    let op = Op::MapFile(proto::MapFile { path: bytes::Bytes::copy_from_slice(path.as_bytes()) });
    let reply = app
        .client
        .chan
        .call(Default::default(), op)
        .map_err(|error| anyhow::anyhow!("{path} cannot be mapped: {error}"))?;
    let Some(Body::Map(map)) = reply.body else { anyhow::bail!("the coordinator answered something else") };
    let extents = map
        .extents
        .iter()
        .filter(|extent| !extent.zeros)
        .map(|extent| MapExtent {
            file_offset: extent.file_offset,
            lun_offset: extent.lun_offset,
            len: extent.len,
        })
        .collect();
    Ok(Answer::Map { extents })
}
