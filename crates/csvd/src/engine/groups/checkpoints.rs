//! Files and kernel settings that follow a resource: each is kept in the database under `resource:NAME:N` (N: its place in the
//! list), with the node that saved it.
//!
//! Before a resource goes online, files that another node saved last are put in place, and those that are missing; and settings
//! that are not as they were kept (no matter by whom: they do not outlive a start of the node). While it is online all are
//! looked at every few seconds, and saved when they have changed; and once more when it has gone offline in good order, before
//! the next owner may have it. So a crash loses what changed in the last few seconds.
//!
//! A file is replaced as a whole, with owner and permissions. One that was removed is not removed elsewhere. One that is too
//! long is told once, and stays as it is in the database. A setting stays as it is on a node that the resource has left.

use super::{Local, News};
use crate::engine::Engine;
use crate::engine::propose::Failed;
use csv_cluster::db::{Command, FileHead, Followed, Ownership, ResourceState};
use csv_cluster::groups::local::Input;
use csv_types::NodeId;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Between two looks at files of resources that are online.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// For one file to be in the database.
const PROPOSE_LIMIT: Duration = Duration::from_secs(5);
/// For the last words of a resource that has gone offline to be in the database, while the cluster changes its leader for example.
const SAVE_LIMIT: Duration = Duration::from_secs(30);
/// Between two tries of that.
const SAVE_AGAIN: Duration = Duration::from_millis(500);
/// Bytes of a file, so that it and its head fit into a checkpoint.
const FILE_BYTES_MAX: u64 = 500_000;

/// Bytes of a setting: what the kernel gives of one in a read.
const SETTING_BYTES_MAX: usize = 4096;

/// What tells whether something has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    /// It cannot be saved, and that was told.
    Told,
    /// Device, inode, size, and when it was changed.
    File(u64, u64, u64, i64, i64),
    /// The setting.
    Setting(Vec<u8>),
}

/// Puts files in place, in a thread; the driver hears how it went.
pub(super) fn restore(engine: &Arc<Engine>, local: &Local, resource: &str, files: Vec<String>) {
    let (engine, resource) = (engine.clone(), resource.to_owned());
    let Local { group, generation, call } = local.clone();
    engine.runtime.clone().spawn_blocking(move || {
        let result = files.iter().enumerate().try_for_each(|(index, path)| {
            let kept = engine.db.read().checkpoints.get(&FileHead::key(&resource, index)).cloned();
            kept.map_or(Ok(()), |kept| restore_one(path, &kept, engine.me()))
        });
        // With a full queue the resource's own time-out tells.
        let _full = engine.groups.news.try_send(News::Restored { group, generation, call, result });
    });
}

fn restore_one(name: &str, kept: &[u8], me: NodeId) -> Result<(), String> {
    let (head, bytes) = FileHead::decode(kept)
        .ok_or_else(|| format!("what the cluster keeps of {name} is not understood"))?;
    if head.path != name {
        return Ok(());
    }
    match Followed::parse(name) {
        Some(Followed::File(path)) => restore_file(path, &head, bytes, me),
        Some(Followed::Setting(path)) => restore_setting(&path, bytes)
            .map_err(|error| format!("{name} cannot be set on this node ({}): {error}", path.display())),
        None => Err(format!("{name} is neither a file nor a setting")),
    }
}

fn restore_setting(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if read_setting(path)? == bytes {
        return Ok(());
    }
    // In one write(2): the kernel takes each for the whole.
    fs::File::options().write(true).open(path)?.write_all(bytes)
}

fn read_setting(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; SETTING_BYTES_MAX];
    let length = fs::File::open(path)?.read(&mut bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}

fn restore_file(path: &Path, head: &FileHead, bytes: &[u8], me: NodeId) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("{} cannot be put in place: {error}", path.display());
    // This node's own file is as new as what it saved, or newer.
    if head.node == me && path.exists() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(cannot)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".csv-new");
    let new = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        fchown(&file, Some(head.uid), Some(head.gid))?;
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(head.mode & 0o7777))?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(cannot)
}

/// What a file or a setting is, if it is another one than was seen. One that is not there is as it was seen.
fn look(name: &str, seen: Option<&Seen>, me: NodeId) -> Result<Option<(Seen, Vec<u8>)>, String> {
    match Followed::parse(name) {
        Some(Followed::File(path)) => look_file(path, seen, me),
        Some(Followed::Setting(path)) => {
            let bytes = match read_setting(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(format!("{name} cannot be read: {error}")),
            };
            let now = Seen::Setting(bytes.clone());
            if seen == Some(&now) {
                return Ok(None);
            }
            let (path, length) = (name.to_owned(), bytes.len() as u64);
            let head =
                FileHead { path, node: me, mode: 0, uid: 0, gid: 0, bytes: length, modified_unix_ns: 0 };
            Ok(Some((now, head.encode(&bytes))))
        }
        None => Err(format!("{name} is neither a file nor a setting")),
    }
}

fn look_file(path: &Path, seen: Option<&Seen>, me: NodeId) -> Result<Option<(Seen, Vec<u8>)>, String> {
    let Ok(meta) = fs::metadata(path) else { return Ok(None) };
    let now = Seen::File(meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec());
    if seen == Some(&now) || !meta.is_file() {
        return Ok(None);
    }
    if meta.len() > FILE_BYTES_MAX {
        return Err(format!(
            "{} has {} bytes, and only files of up to {FILE_BYTES_MAX} bytes can follow a resource",
            path.display(),
            meta.len()
        ));
    }
    let bytes = fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    let head = FileHead {
        path: path.display().to_string(),
        node: me,
        mode: meta.mode(),
        uid: meta.uid(),
        gid: meta.gid(),
        bytes: bytes.len() as u64,
        modified_unix_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
    };
    Ok(Some((now, head.encode(&bytes))))
}

/// Saves files that have changed since they were saved, then hands the input in.
pub(super) fn save_before(
    engine: &Arc<Engine>,
    local: &Local,
    resource: &str,
    files: Vec<String>,
    input: Input,
) {
    let (engine, resource) = (engine.clone(), resource.to_owned());
    let Local { group, generation, .. } = local.clone();
    engine.runtime.clone().spawn(async move {
        let owner = Ownership { group: group.clone(), generation, node: engine.me() };
        let (mut seen, until) = (BTreeMap::new(), tokio::time::Instant::now() + SAVE_LIMIT);
        while let Err(why) = engine.save_files(&resource, &files, &owner, &mut seen).await {
            if engine.is_stopping() || tokio::time::Instant::now() >= until {
                let text = format!(
                    "the files of resource {resource} could not be saved before it leaves this node, and the next one may get \
                     older ones: {why}"
                );
                engine.event(&resource, "resource-warning", text);
                break;
            }
            tokio::time::sleep(SAVE_AGAIN).await;
        }
        // With a full queue the resource's own time-out tells.
        let _full = engine.groups.news.try_send(News::Saved { group, generation, input: Box::new(input) });
    });
}

impl Engine {
    /// The loop that looks at files of resources that are online here.
    pub(super) async fn keep_checkpoints(self: Arc<Self>) {
        let mut seen: BTreeMap<String, Seen> = BTreeMap::new();
        while !self.is_stopping() {
            let online = self.with_files();
            let known =
                |key: &String| online.iter().any(|(name, ..)| key.starts_with(&format!("resource:{name}:")));
            seen.retain(|key, _| known(key));
            for (resource, files, owner) in online {
                // What could not be told is told next time.
                let _later = self.save_files(&resource, &files, &owner, &mut seen).await;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Resources that are online here and have files that follow them.
    fn with_files(&self) -> Vec<(String, Vec<String>, Ownership)> {
        if self.cut_off().is_some() {
            return Vec::new();
        }
        let db = self.db.read();
        let here = |resource: &csv_cluster::db::Resource| {
            let group = db.groups.get(&resource.group).filter(|group| {
                group.owner == Some(self.me()) && group.incarnation == self.incarnation.get()
            })?;
            if resource.status.state != ResourceState::Online || resource.checkpoints.is_empty() {
                return None;
            }
            let owner =
                Ownership { group: group.name.clone(), generation: group.generation, node: self.me() };
            Some((resource.name.clone(), resource.checkpoints.clone(), owner))
        };
        db.resources.values().filter_map(here).collect()
    }

    /// Saves what has changed. The error is one that may pass; what is wrong with a file, or refused, is told and done with.
    async fn save_files(
        &self,
        resource: &str,
        files: &[String],
        owner: &Ownership,
        seen: &mut BTreeMap<String, Seen>,
    ) -> Result<(), String> {
        let mut left = Ok(());
        for (index, path) in files.iter().enumerate() {
            let name = FileHead::key(resource, index);
            let (file, before, me) = (path.clone(), seen.get(&name).cloned(), self.me());
            let looked = tokio::task::spawn_blocking(move || look(&file, before.as_ref(), me)).await;
            match looked {
                Ok(Ok(None)) | Err(_) => {}
                Ok(Ok(Some((now, value)))) => match self.save_file(&name, value, owner).await {
                    Ok(()) => drop(seen.insert(name, now)),
                    Err(Failed::Refused(refused)) => {
                        seen.insert(name, now);
                        if self.owns_still(owner) {
                            let text = format!("resource {resource}: {path} cannot follow it: {refused}");
                            self.event(resource, "resource-warning", text);
                        }
                    }
                    Err(Failed::Unknown(why) | Failed::NoLeader(why)) => left = Err(why),
                },
                Ok(Err(why)) => {
                    if seen.insert(name, Seen::Told) != Some(Seen::Told) {
                        self.event(resource, "resource-warning", format!("resource {resource}: {why}"));
                    }
                }
            }
        }
        left
    }

    async fn save_file(&self, name: &str, value: Vec<u8>, owner: &Ownership) -> Result<(), Failed> {
        if self.db.read().checkpoints.get(name) == Some(&value) {
            return Ok(());
        }
        let put = Command::CheckpointPut { name: name.to_owned(), value, owner: Some(owner.clone()) };
        self.propose(put, PROPOSE_LIMIT).await.map(drop)
    }

    fn owns_still(&self, owner: &Ownership) -> bool {
        let db = self.db.read();
        db.groups
            .get(&owner.group)
            .is_some_and(|group| group.owner == Some(owner.node) && group.generation == owner.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_follows_with_its_permissions_and_only_from_another_node() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/app.conf");
        let name = path.to_str().unwrap();
        let (one, two) = (NodeId(1), NodeId(2));
        assert!(look(name, None, one).unwrap().is_none(), "it is not there yet");
        fs::create_dir(dir.path().join("deep")).unwrap();
        fs::write(&path, b"first\nsecond").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let (seen, kept) = look(name, None, one).unwrap().unwrap();
        assert!(look(name, Some(&seen), one).unwrap().is_none(), "nothing has changed");

        // The node that saved it keeps its own, which may be newer.
        fs::write(&path, b"newer").unwrap();
        restore_one(name, &kept, one).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newer");
        restore_one(name, &kept, two).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first\nsecond");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        // Another file, that stood in its place in the list.
        restore_one(dir.path().join("deep/other").to_str().unwrap(), &kept, two).unwrap();
        assert!(!dir.path().join("deep/other").exists());
        // What is missing is put in place anywhere.
        fs::remove_dir_all(dir.path().join("deep")).unwrap();
        restore_one(name, &kept, one).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first\nsecond");
        assert_eq!(fs::read_dir(dir.path().join("deep")).unwrap().count(), 1);
    }

    #[test]
    fn what_is_too_long_or_not_understood_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        let name = path.to_str().unwrap();
        let file = fs::File::create(&path).unwrap();
        file.set_len(FILE_BYTES_MAX + 1).unwrap();
        assert!(look(name, None, NodeId(1)).unwrap_err().contains("500001 bytes"));
        assert!(restore_one(name, b"no line", NodeId(1)).unwrap_err().contains("not understood"));
        file.set_len(FILE_BYTES_MAX).unwrap();
        let (_, value) = look(name, None, NodeId(64)).unwrap().unwrap();
        assert!(value.len() <= csv_cluster::db::CHECKPOINT_BYTES_MAX);
    }

    #[test]
    fn a_setting_follows_as_its_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("somaxconn");
        fs::write(&path, "4096\t8\n").unwrap();
        restore_setting(&path, b"4096\t8\n").unwrap();
        restore_setting(&path, b"5000\t9\n").unwrap();
        assert_eq!(read_setting(&path).unwrap(), b"5000\t9\n");
        assert!(restore_setting(&dir.path().join("none"), b"1\n").is_err());
        assert!(!dir.path().join("none").exists(), "the kernel has what it has");

        let (name, me) = ("sysctl:kernel.ostype", NodeId(1));
        let (seen, kept) = look(name, None, me).unwrap().unwrap();
        assert_eq!(seen, Seen::Setting(b"Linux\n".to_vec()));
        assert!(look(name, Some(&seen), me).unwrap().is_none());
        // As it is already; the kernel would not take it.
        restore_one(name, &kept, NodeId(2)).unwrap();
        let other =
            FileHead { path: name.into(), node: me, mode: 0, uid: 0, gid: 0, bytes: 4, modified_unix_ns: 0 };
        let refused = restore_one(name, &other.encode(b"BSD\n"), me).unwrap_err();
        assert!(refused.contains("sysctl:kernel.ostype cannot be set"), "{refused}");
        assert!(look("sysctl:kernel.nothing_of_that_name", None, me).unwrap().is_none());
    }
}
