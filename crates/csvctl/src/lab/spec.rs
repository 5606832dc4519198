//! What a lab is: its state file `<dir>/lab.json` and the registry of labs of this machine.
//!
//! The registry `/run/csv-lab/` has a symbolic link per lab, from its name to its directory, and the list of mount
//! points that labs have made on the host. The link is made first and removed last, so `lab down` finds a lab
//! that was left half made. `RegistryLock` keeps two commands from making or removing labs at one time.

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Where labs are registered.
const REGISTRY: &str = "/run/csv-lab";
/// Where labs lie unless `--dir` says otherwise.
const DEFAULT_PARENT: &str = "/var/tmp/csv-lab";
/// Name of the lab's disk witness.
pub(crate) const WITNESS: &str = "witness";
/// Directories of the node that are private to it. The host must have them as mount points.
pub(crate) const NODE_DIRS: [&str; 4] = ["/ClusterStorage", "/run/csv", "/var/lib/csv", "/etc/csv"];

/// A lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Lab {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    /// First three bytes of the addresses of the lab.
    pub(crate) subnet: [u8; 3],
    pub(crate) volume: String,
    pub(crate) coordinator: String,
    pub(crate) cluster_id: uuid::Uuid,
    pub(crate) lease_ms: Option<u64>,
    pub(crate) op_timeout_ms: Option<u64>,
    pub(crate) smb_encrypt: bool,
    /// Has it a disk witness?
    #[serde(default)]
    pub(crate) witness: bool,
    /// Names of the shared disks besides.
    #[serde(default)]
    pub(crate) disks: Vec<String>,
    /// Settings of the cluster that differ from their defaults.
    #[serde(default)]
    pub(crate) settings: Vec<(String, String)>,
    pub(crate) nodes: Vec<LabNode>,
}

/// A node of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LabNode {
    pub(crate) name: String,
    pub(crate) id: u32,
    /// Has it a path to the LUN?
    pub(crate) path: bool,
    /// The loop device that is its path, while it has one.
    pub(crate) lun: Option<PathBuf>,
    /// The loop device that is its path to the witness LUN, while it has one.
    #[serde(default)]
    pub(crate) witness_lun: Option<PathBuf>,
    /// The loop devices that are its paths to the lab's disks, by the disk's name, while it has them.
    #[serde(default)]
    pub(crate) disk_luns: BTreeMap<String, PathBuf>,
    /// First process of the node, as the host numbers it.
    pub(crate) holder_pid: Option<i32>,
}

/// Held while labs are made or removed.
#[derive(Debug)]
pub(crate) struct RegistryLock {
    _file: File,
}

impl RegistryLock {
    /// Waits for other commands.
    pub(crate) fn take() -> anyhow::Result<RegistryLock> {
        // The directory above: it stays, so nobody can wait for a lock on a file that is being removed.
        let parent = Path::new(REGISTRY).parent().context("the registry has a parent")?;
        let file = File::open(parent).with_context(|| format!("cannot open {}", parent.display()))?;
        flock(&file, FlockOperation::LockExclusive)?;
        fs::create_dir_all(REGISTRY).with_context(|| format!("cannot create {REGISTRY}"))?;
        Ok(RegistryLock { _file: file })
    }

    /// Writes the lab into the registry, where it must not be yet.
    pub(crate) fn register(&self, name: &str, dir: &Path) -> anyhow::Result<()> {
        match std::os::unix::fs::symlink(dir, link(name)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                bail!(
                    "lab {name} exists; `csvctl lab down --name {name}` removes it, or choose another --name"
                )
            }
            other => other.with_context(|| format!("cannot register lab {name} in {REGISTRY}")),
        }
    }

    /// Takes the lab out; with the last one go the host's mount points that labs made.
    pub(crate) fn unregister(&self, name: &str) -> anyhow::Result<()> {
        match fs::remove_file(link(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).context("cannot unregister the lab");
            }
            Err(_) | Ok(()) => {}
        }
        if names()?.is_empty() {
            for dir in self.made_dirs().iter().rev() {
                // Not empty: somebody uses it, so it stays.
                let _ = fs::remove_dir(dir);
            }
            let _ = fs::remove_dir(DEFAULT_PARENT);
            fs::remove_dir_all(REGISTRY).with_context(|| format!("cannot remove {REGISTRY}"))?;
        }
        Ok(())
    }

    fn made_dirs(&self) -> Vec<String> {
        let text = fs::read_to_string(Path::new(REGISTRY).join(".made")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Makes the mount points that the host lacks, and writes down which.
    pub(crate) fn make_mount_points(&self) -> anyhow::Result<()> {
        let mut made = self.made_dirs();
        for dir in NODE_DIRS {
            if Path::new(dir).is_dir() {
                continue;
            }
            made.push(dir.to_owned());
            fs::write(Path::new(REGISTRY).join(".made"), made.join("\n"))?;
            fs::create_dir_all(dir).with_context(|| format!("cannot create the mount point {dir}"))?;
        }
        Ok(())
    }
}

/// Held while nodes of one lab are stopped and started.
#[derive(Debug)]
pub(crate) struct LabLock {
    _file: File,
}

fn link(name: &str) -> PathBuf {
    Path::new(REGISTRY).join(name)
}

/// Names of the registered labs, sorted.
pub(crate) fn names() -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    match fs::read_dir(REGISTRY) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("cannot read {REGISTRY}")),
        Ok(entries) => {
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_symlink() {
                    names.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
    }
    names.sort();
    Ok(names)
}

/// Directory of a registered lab.
pub(crate) fn dir_of(name: &str) -> anyhow::Result<PathBuf> {
    fs::read_link(link(name)).map_err(|_| {
        let names = names().unwrap_or_default();
        let known = if names.is_empty() { "none runs".to_owned() } else { names.join(", ") };
        anyhow::anyhow!("there is no lab \"{name}\" (labs: {known}); `csvctl lab up --name {name}` makes one")
    })
}

/// Where a lab lies unless told otherwise.
pub(crate) fn default_dir(name: &str) -> PathBuf {
    Path::new(DEFAULT_PARENT).join(name)
}

/// The lab meant by an optional name: that one, or the only one.
pub(crate) fn choose(name: Option<&str>) -> anyhow::Result<String> {
    if let Some(name) = name {
        return Ok(name.to_owned());
    }
    let names = names()?;
    match names.as_slice() {
        [only] => Ok(only.clone()),
        [] => bail!("no lab runs; `csvctl lab up` makes one"),
        several => bail!("several labs run ({}); say which with --name", several.join(", ")),
    }
}

/// Names stand in interface, namespace and directory names; `-n1` at the end would look like a node's.
pub(crate) fn check_name(name: &str) -> anyhow::Result<()> {
    let fine = !name.is_empty()
        && name.len() <= 15
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-');
    let like_a_node = name
        .rsplit_once("-n")
        .is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()));
    if fine && !like_a_node {
        return Ok(());
    }
    bail!(
        "\"{name}\" cannot be a lab's name: 1 to 15 of a-z, 0-9 and -, not starting with -, not ending in -n1"
    )
}

impl Lab {
    pub(crate) fn load(name: &str) -> anyhow::Result<Lab> {
        let path = dir_of(name)?.join("lab.json");
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read {}; lab {name} was not finished, remove it with `csvctl lab down --name {name}`",
                path.display()
            )
        })?;
        serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))
    }

    /// As `load`, keeping other commands that change the lab waiting for as long as the lock lives.
    pub(crate) fn load_to_change(name: &str) -> anyhow::Result<(Lab, LabLock)> {
        let path = dir_of(name)?.join("lab.lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok((Lab::load(name)?, LabLock { _file: file }))
    }

    pub(crate) fn save(&self) -> anyhow::Result<()> {
        let (path, new) = (self.dir.join("lab.json"), self.dir.join("lab.json.new"));
        fs::write(&new, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    pub(crate) fn node(&self, name: &str) -> anyhow::Result<&LabNode> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| self.no_node(name))
    }

    pub(crate) fn node_mut(&mut self, name: &str) -> anyhow::Result<&mut LabNode> {
        let error = self.no_node(name);
        self.nodes.iter_mut().find(|node| node.name == name).ok_or(error)
    }

    fn no_node(&self, name: &str) -> anyhow::Error {
        let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
        anyhow::anyhow!("lab {} has no node \"{name}\"; its nodes: {}", self.name, names.join(", "))
    }

    pub(crate) fn addr(&self, node: &LabNode) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, u8::try_from(node.id).unwrap_or(u8::MAX))
    }

    pub(crate) fn lun_image(&self) -> PathBuf {
        self.dir.join("lun.img")
    }

    pub(crate) fn witness_image(&self) -> PathBuf {
        self.dir.join("witness.img")
    }

    pub(crate) fn disk_image(&self, disk: &str) -> PathBuf {
        self.dir.join(format!("disk-{disk}.img"))
    }

    pub(crate) fn node_dir(&self, node: &str) -> PathBuf {
        self.dir.join(node)
    }

    /// Network namespace of the bridge.
    pub(crate) fn netns(&self) -> String {
        format!("csv-{}", self.name)
    }

    /// Network namespace of a node.
    pub(crate) fn node_netns(&self, node: &str) -> String {
        format!("csv-{}-{node}", self.name)
    }
}

/// Subnet of a lab, from its name, away from those that other labs have.
pub(crate) fn pick_subnet(name: &str, taken: &[[u8; 3]]) -> [u8; 3] {
    // FNV-1a; any spread would do.
    let hash = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let subnet = |h: u32| {
        let [_, _, b, c] = h.to_be_bytes();
        [10, b, c]
    };
    let free = (0..=u32::from(u16::MAX)).map(|i| subnet(hash.wrapping_add(i))).find(|s| !taken.contains(s));
    free.unwrap_or_else(|| subnet(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_look_like_nodes_are_refused() {
        for good in ["lab", "a", "t-posix-12", "lab-net"] {
            check_name(good).unwrap();
        }
        for bad in ["", "Lab", "a/b", "lab-n1", "-x", "sixteen-letters-", "a b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn subnets_avoid_each_other() {
        let first = pick_subnet("lab", &[]);
        assert_eq!(first, pick_subnet("lab", &[]));
        assert_ne!(first, pick_subnet("lab", &[first]));
        assert_eq!(first[0], 10);
    }
}
