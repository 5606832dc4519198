//! Two files of a node. `/etc/csv/csv.toml` ([`NodeFile`]) is the administrator's: what this machine is called, where it
//! keeps its things, and where its LUNs are if they are not to be found by their labels. `<run_dir>/csv.toml` ([`Config`])
//! is written by csvd from the cluster's database, for csvfs: who is in the cluster, and which volumes there are.

use crate::ids::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// `/etc/csv/csv.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeFile {
    /// This node.
    pub local: LocalConfig,
}

impl NodeFile {
    /// Parses a file's text.
    ///
    /// # Errors
    /// What is wrong, in words that name the key.
    pub fn parse(text: &str) -> Result<NodeFile, ConfigError> {
        Ok(toml::from_str(text)?)
    }
}

/// `<run_dir>/csv.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Cluster-wide settings.
    pub cluster: ClusterConfig,
    /// This node.
    pub local: LocalConfig,
    /// All nodes, this one included.
    #[serde(rename = "node")]
    pub nodes: Vec<NodeConfig>,
    /// All volumes.
    #[serde(rename = "volume", default)]
    pub volumes: Vec<VolumeConfig>,
}

/// Cluster-wide settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// Name for people, 1 to 15 characters.
    pub name: String,
    /// Identity written into every label.
    pub id: uuid::Uuid,
    /// TCP port of the control protocol on every node.
    #[serde(default = "default_control_port")]
    pub control_port: u16,
    /// TCP port of the private smbd on the coordinator.
    #[serde(default = "default_smb_port")]
    pub smb_port: u16,
    /// A layout may be used for this long after the coordinator was last heard, in milliseconds.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u64,
    /// A client must return a recalled layout within this time or is fenced, in milliseconds. Less than the lease.
    #[serde(default = "default_recall_ms")]
    pub recall_ms: u64,
    /// How long an operation waits for an unreachable coordinator before it fails with EIO, in milliseconds.
    #[serde(default = "default_op_timeout_ms")]
    pub op_timeout_ms: u64,
    /// Encrypt SMB traffic besides signing it.
    #[serde(default)]
    pub smb_encrypt: bool,
    /// csv-smbc worker processes per volume and node, 1 to 64.
    #[serde(default = "default_smb_workers")]
    pub smb_workers: usize,
}

/// This node's own paths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalConfig {
    /// Name of this node.
    pub node: String,
    /// Address of this node for everything between nodes; needed to create or join a cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<IpAddr>,
    /// TCP port of the cluster service (csvd), the same on every node.
    #[serde(default = "default_cluster_port")]
    pub cluster_port: u16,
    /// Look for volumes that `luns` does not name on all disks, by their labels.
    #[serde(default = "default_true")]
    pub scan_luns: bool,
    /// Sockets and pids; lost at boot.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Events, Samba's databases; kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Where volumes are mounted, one directory each.
    #[serde(default = "default_mount_dir")]
    pub mount_dir: PathBuf,
    /// PEM files `ca.pem`, `node.pem`, `node.key` and the file `smb.password`.
    #[serde(default = "default_secrets_dir")]
    pub secrets_dir: PathBuf,
    /// A kernel watchdog that resets this machine when csvd has no control over it any more, such as `/dev/watchdog`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<PathBuf>,
    /// Memory that virtual machines may have on this machine altogether, in MiB; without, nine tenths of all, and at least
    /// 512 MiB less than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Devices of volumes and disks, by name.
    #[serde(default)]
    pub luns: BTreeMap<String, PathBuf>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Unique name; also the DNS name in the node's certificate.
    pub name: String,
    /// Unique number, 1 to 64.
    pub id: NodeId,
    /// Address of the control protocol and of SMB.
    pub addr: IpAddr,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// Name of the directory under `/ClusterStorage`.
    pub name: String,
    /// Tells its ports from those of other volumes: [`PORTS_PER_VOLUME`] further for each.
    #[serde(default)]
    pub index: u16,
    /// The LUN's device on this node; absent where the node has no path to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lun: Option<PathBuf>,
}

/// Distance between the ports of two volumes.
pub const PORTS_PER_VOLUME: u16 = 10;

impl VolumeConfig {
    fn port_offset(&self) -> u16 {
        self.index.saturating_mul(PORTS_PER_VOLUME)
    }
}

fn default_true() -> bool {
    true
}
fn default_cluster_port() -> u16 {
    7440
}
fn default_control_port() -> u16 {
    7450
}
fn default_smb_port() -> u16 {
    7445
}
fn default_lease_ms() -> u64 {
    20_000
}
fn default_recall_ms() -> u64 {
    10_000
}
fn default_op_timeout_ms() -> u64 {
    60_000
}
fn default_smb_workers() -> usize {
    8
}
fn default_run_dir() -> PathBuf {
    "/run/csv".into()
}
fn default_state_dir() -> PathBuf {
    "/var/lib/csv".into()
}
fn default_mount_dir() -> PathBuf {
    "/ClusterStorage".into()
}
fn default_secrets_dir() -> PathBuf {
    "/etc/csv/secrets".into()
}

/// What is wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, or an unknown or missing key.
    #[error("{0}")]
    Syntax(#[from] toml::de::Error),
    /// Well-formed but contradictory; the text says what to change.
    #[error("{0}")]
    Invalid(String),
}

impl Config {
    /// Parses and checks a file's text.
    ///
    /// # Errors
    /// The first contradiction found, in words that name the key.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |text: String| Err(ConfigError::Invalid(text));
        for (i, node) in self.nodes.iter().enumerate() {
            if !(1..=64).contains(&node.id.0) {
                return invalid(format!("node {}: id {} is outside 1 to 64", node.name, node.id.0));
            }
            if self.nodes[..i].iter().any(|n| n.name == node.name || n.id == node.id) {
                return invalid(format!("node {} (id {}) stands twice", node.name, node.id.0));
            }
        }
        if self.node(&self.local.node).is_none() {
            return invalid(format!(
                "local.node is \"{}\", which no [[node]] section names",
                self.local.node
            ));
        }
        for (i, volume) in self.volumes.iter().enumerate() {
            if volume.name.is_empty() || volume.name.len() > 64 || volume.name.contains(['/', '\0']) {
                return invalid(format!("volume name \"{}\" cannot be a directory name", volume.name));
            }
            if self.volumes[..i].iter().any(|v| v.name == volume.name) {
                return invalid(format!("volume {} stands twice", volume.name));
            }
        }
        if self.cluster.recall_ms >= self.cluster.lease_ms {
            return invalid("cluster.recall_ms must be less than cluster.lease_ms".into());
        }
        if !(1..=64).contains(&self.cluster.smb_workers) {
            return invalid("cluster.smb_workers must be 1 to 64".into());
        }
        Ok(())
    }

    /// The node of that name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&NodeConfig> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The node of that id.
    #[must_use]
    pub fn node_by_id(&self, id: NodeId) -> Option<&NodeConfig> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// This node. `check` has made sure that it is there.
    ///
    /// # Panics
    /// Never on a `Config` made by [`Config::parse`].
    #[must_use]
    pub fn me(&self) -> &NodeConfig {
        self.node(&self.local.node).expect("checked by Config::parse")
    }

    /// The volume of that name.
    #[must_use]
    pub fn volume(&self, name: &str) -> Option<&VolumeConfig> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// Where to reach a node's control protocol for a volume.
    #[must_use]
    pub fn control_addr(&self, node: &NodeConfig, volume: &VolumeConfig) -> SocketAddr {
        SocketAddr::new(node.addr, self.cluster.control_port.saturating_add(volume.port_offset()))
    }

    /// Where to reach a node's smbd for a volume.
    #[must_use]
    pub fn smb_addr(&self, node: &NodeConfig, volume: &VolumeConfig) -> SocketAddr {
        SocketAddr::new(node.addr, self.cluster.smb_port.saturating_add(volume.port_offset()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[cluster]
name = "lab"
id = "6f1d6c38-6f0e-4b8a-9f0e-2f7b3c1d2e3f"
[local]
node = "n1"
[[node]]
name = "n1"
id = 1
addr = "10.77.0.1"
[[node]]
name = "n2"
id = 2
addr = "10.77.0.2"
[[volume]]
name = "Volume1"
lun = "/dev/loop0"
"#;

    #[test]
    fn good_file_parses_and_round_trips() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.me().id, NodeId(1));
        assert_eq!(config.cluster.lease_ms, 20_000);
        let again = Config::parse(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn contradictions_are_named() {
        for (from, to, word) in [
            ("node = \"n1\"", "node = \"n9\"", "n9"),
            ("id = 2", "id = 1", "twice"),
            ("id = 2", "id = 65", "65"),
            ("name = \"Volume1\"", "name = \"a/b\"", "a/b"),
            ("name = \"lab\"", "name = \"lab\"\nrecall_ms = 30000", "recall_ms"),
            ("name = \"lab\"", "nam = \"lab\"", "nam"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            let error = Config::parse(&text).unwrap_err().to_string();
            assert!(error.contains(word), "{from} -> {to}: {error}");
        }
    }
}
