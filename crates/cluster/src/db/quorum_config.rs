//! How the cluster decides whether it may go on.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use uuid::Uuid;

/// Witness and dynamic quorum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QuorumConfig {
    /// The vote beside the nodes'.
    pub witness: Witness,
    /// Do votes follow who is up?
    pub dynamic: bool,
}

impl Default for QuorumConfig {
    fn default() -> Self {
        QuorumConfig { witness: Witness::None, dynamic: true }
    }
}

/// The vote beside the nodes'.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Witness {
    /// Only nodes vote.
    #[default]
    None,
    /// A small LUN whose holder runs a voter on it.
    Disk {
        /// For people.
        name: String,
        /// Identity in the witness header on the LUN.
        lun_id: Uuid,
        /// How nodes find the device, for example `/dev/disk/by-id/...`; the header is compared all the same.
        device: String,
    },
    /// A bare voter on another machine.
    Node {
        /// Name in its certificate.
        name: String,
        /// Address of its control protocol.
        addr: IpAddr,
    },
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Witness::None => f.write_str("none"),
            Witness::Disk { name, .. } => write!(f, "disk witness {name}"),
            Witness::Node { name, addr } => write!(f, "witness node {name} ({addr})"),
        }
    }
}
