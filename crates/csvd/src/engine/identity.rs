//! Who this machine is in which cluster: `<state_dir>/cluster/identity.json`, written when it creates or joins a cluster
//! and removed when it leaves. Without it csvd waits for either. Beside it lies the Raft storage.

use anyhow::{Context, Result};
use csv_types::NodeId;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) cluster_id: Uuid,
    pub(crate) cluster_name: String,
    pub(crate) node: NodeId,
    pub(crate) name: String,
    /// Where the others were when this was written: until this node has the database itself.
    pub(crate) members: Vec<Member>,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) node: NodeId,
    pub(crate) name: String,
    pub(crate) addr: SocketAddr,
}

/// Directory of everything about the cluster.
pub(crate) fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("cluster")
}

/// Directory of the Raft storage.
pub(crate) fn raft_dir(state_dir: &Path) -> PathBuf {
    dir(state_dir).join("raft")
}

fn path(state_dir: &Path) -> PathBuf {
    dir(state_dir).join("identity.json")
}

impl Identity {
    /// As a cluster has granted it.
    pub(crate) fn granted(grant: &csv_net::JoinGrant, name: &str) -> Identity {
        let members = grant.members.iter();
        Identity {
            cluster_id: grant.cluster_id,
            cluster_name: grant.cluster_name.clone(),
            node: grant.node,
            name: name.to_owned(),
            members: members.map(|m| Member { node: m.node, name: m.name.clone(), addr: m.addr }).collect(),
        }
    }

    /// What is written, if anything.
    pub(crate) fn load(state_dir: &Path) -> Result<Option<Identity>> {
        let path = path(state_dir);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let identity = serde_json::from_str(&text).with_context(|| {
            format!("{} is damaged; run `csvctl cluster rejoin` with a token of the cluster", path.display())
        })?;
        Ok(Some(identity))
    }

    /// Writes it, durable when this returns.
    pub(crate) fn save(&self, state_dir: &Path) -> Result<()> {
        let dir = dir(state_dir);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        let (path, new) = (path(state_dir), dir.join("identity.json.new"));
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&dir)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Forgets the cluster: identity and database go aside, under a name that tells when, and are never used again by
/// themselves.
pub(crate) fn set_aside(state_dir: &Path, unix_ms: u64) -> Result<Option<PathBuf>> {
    let dir = dir(state_dir);
    if !dir.exists() {
        return Ok(None);
    }
    let aside = state_dir.join(format!("cluster.old-{unix_ms}"));
    fs::rename(&dir, &aside)
        .with_context(|| format!("cannot rename {} to {}", dir.display(), aside.display()))?;
    Ok(Some(aside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_and_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), None);
        let identity = Identity {
            cluster_id: Uuid::from_u128(1),
            cluster_name: "c".into(),
            node: NodeId(3),
            name: "n3".into(),
            members: vec![Member { node: NodeId(1), name: "n1".into(), addr: ([10, 0, 0, 1], 7440).into() }],
        };
        identity.save(dir.path()).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), Some(identity));
        assert!(set_aside(dir.path(), 5).unwrap().unwrap().ends_with("cluster.old-5"));
        assert_eq!(Identity::load(dir.path()).unwrap(), None);
        fs::create_dir(super::dir(dir.path())).unwrap();
        fs::write(path(dir.path()), "{").unwrap();
        assert!(format!("{:#}", Identity::load(dir.path()).unwrap_err()).contains("rejoin"));
    }
}
