//! Backups of the cluster's database, and the restore of one on a machine that is in no cluster.
//!
//! A backup is one line of JSON (format, length and CRC-32 of the rest) and the database as it stands in a snapshot. A
//! restore makes a cluster of this node alone (see `ClusterDb::restore_on`). It must not happen beside the former cluster:
//! so the administrator says that the others are down, and each of them is asked once more here, by the certificate that
//! only this cluster's authority gives. Old nodes that come back later have no say: their certificates are refused, their
//! keys are fenced, and the LUNs' labels are in a later epoch.
//!
//! Failure: until the identity is written, the last step, this machine is in no cluster and the restore can be repeated.

use super::check::to_bytes;
use super::identity::{self, Identity};
use super::lifecycle::{Log, VERSION, aside_remains, own_addr};
use super::{Engine, unix_ms};
use anyhow::{Context, Result, bail};
use csv_cluster::db::{ClusterDb, FEATURE_LEVEL, NewNode};
use csv_net::{
    CallError, ClusterCa, NodeIdentity, PeerAddr, Peers, PeersOptions, Secrets, sha256_hex, write_secrets,
};
use csv_raft::{RaftNode, Role};
use csv_types::NodeId;
use csv_types::config::LocalConfig;
use csvd::check::NodeRequest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const FORMAT: u32 = 1;
/// Longest backup that is read, in bytes.
const BYTES_MAX: u64 = 1 << 30;
/// For a node of the former cluster to answer.
const ASK_LIMIT: Duration = Duration::from_secs(3);
/// For the only voter to elect itself.
const LEAD_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    csvfs_backup: u32,
    bytes: usize,
    crc32: u32,
}

/// The file's bytes.
fn encode(db: &ClusterDb) -> Result<Vec<u8>> {
    let body = db.encode_snapshot();
    let head = Head { csvfs_backup: FORMAT, bytes: body.len(), crc32: crc32fast::hash(&body) };
    let mut file = serde_json::to_vec(&head)?;
    file.push(b'\n');
    file.extend(body);
    Ok(file)
}

/// What `encode` made; the error says what is wrong with the file.
fn decode(file: &[u8]) -> Result<ClusterDb> {
    let end = file.iter().take(1024).position(|byte| *byte == b'\n').context("it is no backup of csvfs")?;
    let head: Head = serde_json::from_slice(&file[..end]).ok().context("it is no backup of csvfs")?;
    if head.csvfs_backup > FORMAT {
        bail!(
            "it has format {}, this csvd reads up to {FORMAT}: install a csvd that is as new as the backup",
            head.csvfs_backup
        );
    }
    let body = &file[end + 1..];
    if body.len() < head.bytes {
        bail!("it is cut off: {} bytes of {} are there; take another backup", body.len(), head.bytes);
    }
    if body.len() > head.bytes || crc32fast::hash(body) != head.crc32 {
        bail!("it is damaged: its checksum is wrong; take another backup");
    }
    Ok(ClusterDb::decode_snapshot(body)?)
}

/// Writes a backup, durable and for root's eyes only: the authority's key is in it.
pub(crate) fn write(engine: &Engine, path: &Path) -> Result<()> {
    let bytes = encode(&engine.db.read())?;
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).with_context(|| {
            format!("cannot create {}; an existing file is not written over", path.display())
        })?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a backup is none.
        let _gone = std::fs::remove_file(path);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a backup.
pub(crate) fn read(path: &Path) -> Result<ClusterDb> {
    let bytes = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if bytes > BYTES_MAX {
        bail!("{} is too long for a backup ({bytes} bytes)", path.display());
    }
    let file = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    decode(&file).with_context(|| format!("{} cannot be restored", path.display()))
}

/// Makes a cluster of this machine alone from a backup.
pub(crate) async fn restore(
    config: &LocalConfig,
    events: Log,
    mut db: ClusterDb,
    others_are_down: bool,
) -> Result<Arc<Engine>> {
    let addr = own_addr(config)?;
    let ca = ClusterCa::load(&db.secrets.ca_cert_pem, &db.secrets.ca_key_pem)
        .context("the cluster's authority in the backup cannot be used")?;
    let others: BTreeMap<NodeId, PeerAddr> = db
        .nodes
        .values()
        .filter(|node| node.name != config.node)
        .map(|node| {
            let addr = SocketAddr::new(node.addr, config.cluster_port);
            (node.id, PeerAddr { name: node.name.clone(), addr })
        })
        .collect();
    if !others.is_empty() && !others_are_down {
        let names: Vec<&str> = others.values().map(|other| other.name.as_str()).collect();
        bail!(
            "cluster {} has other nodes: {}. If one of them is alive, join it again with `csvctl cluster rejoin`; two \
             clusters on the same LUNs destroy the volumes. If all of them are down and stay so, say it with \
             --others-are-down",
            db.name,
            names.join(", ")
        );
    }
    let keys = NodeIdentity::create()?;
    let me = db.node_by_name(&config.node).map_or(NodeId(0), |node| node.id);
    let mut node = NewNode {
        name: config.node.clone(),
        addr,
        feature_level: FEATURE_LEVEL,
        version: VERSION.to_owned(),
        cert_sha256: String::new(),
    };
    // Refuses what it must before there is a certificate.
    db.clone().restore_on(unix_ms(), &node)?;
    let cert = ca.issue(&config.node, me, addr, &keys.csr_pem)?;
    let secrets = Secrets::from_pem(&ca.cert_pem, &cert, &keys.key_pem)?;
    nobody_lives(secrets, &others).await?;
    node.cert_sha256 = sha256_hex(&cert)?;
    let me = db.restore_on(unix_ms(), &node)?;
    let identity = Identity {
        cluster_id: db.id,
        cluster_name: db.name.clone(),
        node: me,
        name: config.node.clone(),
        members: Vec::new(),
    };
    write_secrets(&config.secrets_dir, &ca.cert_pem, &cert, &keys.key_pem, &db.secrets.smb_password)?;
    aside_remains(config)?;
    let dir = identity::raft_dir(&config.state_dir);
    std::fs::create_dir_all(identity::dir(&config.state_dir))
        .with_context(|| format!("cannot create {}", dir.display()))?;
    let voter = csv_raft::Identity { cluster: identity.cluster_id, voter: me.0.into() };
    let at =
        RaftNode { name: config.node.clone(), addr: SocketAddr::new(addr, config.cluster_port).to_string() };
    csv_raft::storage::directory::create_with(&dir, voter, at, db.encode_snapshot())?;
    identity.save(&config.state_dir)?;
    let engine = Engine::start(config.clone(), identity, events).await?;
    if engine.raft().wait_for(LEAD_LIMIT, |metrics| metrics.role == Role::Leader).await.is_err() {
        tracing::warn!("the restored cluster has no leader yet");
    }
    Ok(engine)
}

/// Does any node of the former cluster answer? Whoever shows a certificate of its authority is one, whatever it says.
async fn nobody_lives(secrets: Secrets, others: &BTreeMap<NodeId, PeerAddr>) -> Result<()> {
    let peers =
        Peers::new(Arc::new(secrets), PeersOptions { connect_timeout: ASK_LIMIT, ..PeersOptions::default() });
    peers.set(others);
    let ping = to_bytes(&NodeRequest::Ping).map_err(anyhow::Error::msg)?;
    let mut asked = tokio::task::JoinSet::new();
    for (node, other) in others {
        let (peers, node, name, ping) = (peers.clone(), *node, other.name.clone(), ping.clone());
        asked.spawn(async move { (name, peers.admin(node, ping, ASK_LIMIT * 2).await) });
    }
    let mut alive: Vec<String> = asked
        .join_all()
        .await
        .into_iter()
        .filter(|(_, answer)| !matches!(answer, Err(CallError::Unreachable(_))))
        .map(|(name, _)| name)
        .collect();
    alive.sort();
    if alive.is_empty() {
        return Ok(());
    }
    bail!(
        "{} of that cluster answers, so nothing was lost: join it again with `csvctl cluster rejoin` and a token from there",
        alive.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_comes_back_and_a_damaged_one_is_refused() {
        let db = ClusterDb::default();
        let file = encode(&db).unwrap();
        assert_eq!(decode(&file).unwrap(), db);
        let error = |file: &[u8]| format!("{:#}", decode(file).unwrap_err());
        for end in [0, 1, 20] {
            assert!(error(&file[..end]).contains("no backup"), "{end}");
        }
        assert!(error(&file[..file.len() - 1]).contains("cut off"));
        let last = file.len() - 1;
        for at in [last, last / 2] {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(error(&bad).contains("damaged"), "{at}");
        }
        let long = [file.as_slice(), b"x"].concat();
        assert!(error(&long).contains("damaged"));
        let newer = String::from_utf8(file).unwrap().replacen("\"csvfs_backup\":1", "\"csvfs_backup\":2", 1);
        assert!(error(newer.as_bytes()).contains("format 2"));
    }
}
