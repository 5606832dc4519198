//! Joining: what a new node says of itself, and what it is given.

use super::{PROTOCOL_VERSION, Refusal, node_id, versioned, wire};
use crate::Malformed;
use bytes::Bytes;
use csv_types::NodeId;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Length of a token's secret, in bytes.
pub const SECRET_BYTES: usize = 32;
/// Longest certificate request, in bytes.
const CSR_BYTES_MAX: usize = 16 << 10;
/// Longest name, in bytes; what a DNS label takes.
const NAME_BYTES_MAX: usize = 63;
/// Longest text for the software's version, in bytes.
const SOFTWARE_BYTES_MAX: usize = 64;

/// What a node that wants to join says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinRequest {
    /// Its name; becomes the DNS name in its certificate.
    pub name: String,
    /// Its address for the control protocol and SMB.
    pub addr: IpAddr,
    /// Certificate request for the key that it made itself.
    pub csr_pem: String,
    /// Newest feature level that its software knows.
    pub feature_level: u32,
    /// Its software's version, for people.
    pub software_version: String,
    /// Its clock, Unix milliseconds.
    pub now_unix_ms: u64,
    /// It takes the place of the node of its name, which is down and lost its database.
    pub rejoin: bool,
}

impl JoinRequest {
    /// From the wire, with the token's secret.
    ///
    /// # Errors
    /// The field that is missing, too long or no address.
    pub fn from_wire(call: wire::JoinCall) -> Result<(JoinRequest, [u8; SECRET_BYTES]), Malformed> {
        versioned(call.version)?;
        let secret = <[u8; SECRET_BYTES]>::try_from(&*call.secret).map_err(|_| Malformed("secret"))?;
        if call.name.is_empty() || call.name.len() > NAME_BYTES_MAX {
            return Err(Malformed("name"));
        }
        if call.csr_pem.len() > CSR_BYTES_MAX {
            return Err(Malformed("certificate request"));
        }
        if call.software_version.len() > SOFTWARE_BYTES_MAX {
            return Err(Malformed("software version"));
        }
        let request = JoinRequest {
            name: call.name,
            addr: call.addr.parse().map_err(|_| Malformed("address"))?,
            csr_pem: call.csr_pem,
            feature_level: call.feature_level,
            software_version: call.software_version,
            now_unix_ms: call.now_unix_ms,
            rejoin: call.rejoin,
        };
        Ok((request, secret))
    }

    /// To the wire.
    #[must_use]
    pub fn into_wire(self, secret: &[u8; SECRET_BYTES]) -> wire::JoinCall {
        wire::JoinCall {
            version: PROTOCOL_VERSION,
            secret: Bytes::copy_from_slice(secret),
            name: self.name,
            addr: self.addr.to_string(),
            csr_pem: self.csr_pem,
            feature_level: self.feature_level,
            software_version: self.software_version,
            now_unix_ms: self.now_unix_ms,
            rejoin: self.rejoin,
        }
    }
}

/// A node of the cluster, as a new one is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Where its cluster service listens.
    pub addr: SocketAddr,
}

/// What a node that joined is given.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinGrant {
    /// Its id, never used before.
    pub node: NodeId,
    /// The cluster's id.
    pub cluster_id: uuid::Uuid,
    /// The cluster's name.
    pub cluster_name: String,
    /// Its certificate.
    pub cert_pem: String,
    /// The cluster's authority.
    pub ca_pem: String,
    /// Password of the private SMB servers.
    pub smb_password: String,
    /// All nodes, the new one included.
    pub members: Vec<Member>,
}

impl fmt::Debug for JoinGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the password.
        f.debug_struct("JoinGrant")
            .field("node", &self.node)
            .field("cluster_id", &self.cluster_id)
            .field("cluster_name", &self.cluster_name)
            .field("members", &self.members)
            .finish_non_exhaustive()
    }
}

impl JoinGrant {
    fn from_wire(grant: wire::JoinGrant) -> Result<JoinGrant, Malformed> {
        let members = grant.members.into_iter().map(|member| {
            Ok(Member {
                node: node_id(member.node)?,
                name: member.name,
                addr: member.addr.parse().map_err(|_| Malformed("member's address"))?,
            })
        });
        Ok(JoinGrant {
            node: node_id(grant.node)?,
            cluster_id: uuid::Uuid::from_slice(&grant.cluster_id).map_err(|_| Malformed("cluster id"))?,
            cluster_name: grant.cluster_name,
            cert_pem: grant.cert_pem,
            ca_pem: grant.ca_pem,
            smb_password: grant.smb_password,
            members: members.collect::<Result<_, _>>()?,
        })
    }

    fn into_wire(self) -> wire::JoinGrant {
        let members = self.members.into_iter().map(|member| wire::Member {
            node: member.node.0,
            name: member.name,
            addr: member.addr.to_string(),
        });
        wire::JoinGrant {
            node: self.node.0,
            cluster_id: Bytes::copy_from_slice(self.cluster_id.as_bytes()),
            cluster_name: self.cluster_name,
            cert_pem: self.cert_pem,
            ca_pem: self.ca_pem,
            smb_password: self.smb_password,
            members: members.collect(),
        }
    }
}

/// An answer to [`wire::JoinCall`] from the wire.
///
/// # Errors
/// The field that is missing or wrong.
pub fn answer_from_wire(answer: wire::JoinAnswer) -> Result<Result<JoinGrant, Refusal>, Malformed> {
    use wire::join_answer::Outcome;
    versioned(answer.version)?;
    match answer.outcome {
        Some(Outcome::Grant(grant)) => JoinGrant::from_wire(grant).map(Ok),
        Some(Outcome::Refusal(refusal)) => Ok(Err(Refusal::from_wire(refusal))),
        None => Err(Malformed("answer to a join")),
    }
}

/// An answer to [`wire::JoinCall`] to the wire.
#[must_use]
pub fn answer_into_wire(answer: Result<JoinGrant, Refusal>) -> wire::JoinAnswer {
    use wire::join_answer::Outcome;
    let outcome = match answer {
        Ok(grant) => Outcome::Grant(grant.into_wire()),
        Err(refusal) => Outcome::Refusal(refusal.into_wire()),
    };
    wire::JoinAnswer { version: PROTOCOL_VERSION, outcome: Some(outcome) }
}
