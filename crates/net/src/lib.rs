//! How the nodes of a cluster talk to each other and why they trust each other.
//!
//! * [`pki`]: the cluster's own certificate authority; a certificate names cluster, node id and node name.
//! * [`token`]: what an administrator carries from a member to a machine that shall join.
//! * [`secrets`]: a node's certificate, key and authority, loaded and made into TLS settings; can be reloaded.
//! * [`server`]: serves the protocol `csv.cluster.v1` ([`csv_proto::cluster`]) to the other nodes.
//! * [`peers`]: connections to the other nodes: calls, and heartbeats.
//! * [`mod@join`]: the joiner's side.
//!
//! Invariants: both ends of a connection have proved by a certificate of this cluster who they are, except that a
//! joiner has none yet, and it can call Join only. A node speaks for itself only. Every call has a time limit, every
//! queue and every number of connections a bound. What is not known to have failed is reported as unknown
//! ([`CallError::may_have_happened`]).

pub mod join;
pub mod peers;
pub mod pki;
pub mod secrets;
pub mod server;
pub mod token;

mod error;
mod files;
mod socket;

#[cfg(test)]
mod tests;

pub use error::{CallError, explain_tls};
pub use files::write_secrets;
pub use join::{JoinError, JoinOptions, join};
pub use peers::{BeatSource, PeerAddr, Peers, PeersOptions};
pub use pki::{ClusterCa, NodeIdentity, Peer, PkiError, peer_of, sha256_hex};
pub use secrets::{Secrets, SecretsError};
pub use server::{Handler, Joining, ServeError, ServerHandle, ServerOptions, serve};
pub use token::{Token, TokenError};
pub use tonic::async_trait;

/// What the nodes say to each other.
pub use csv_proto::cluster::{
    Beat, JoinGrant, JoinRequest, Member, ProposeRefusal, Proposed, RaftCall, RaftKind, Refusal, RefusalKind,
    VoterId,
};
