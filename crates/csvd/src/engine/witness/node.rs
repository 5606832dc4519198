//! The witness node: `csvd --witness` on a third machine, for clusters without a spare LUN. A bare voter: it serves Raft and
//! nothing else, holds no volume and is no node of the cluster. Its certificate carries the voter number of the witness.
//!
//! How it comes in: `csvctl quorum set --node` names it and makes a token that is good for it only; with that it joins
//! ([`Engine::admit_witness`]), and the leader adds it as a learner, then as a voter when votes are to be odd. One that has lost
//! its database comes in as a new one, after `csvctl quorum set --no-witness`.
//!
//! Failure: when its database fails it says nothing any more; the cluster takes its vote away.

use super::voter::WitnessVoter;
use crate::engine::identity::{self, Identity};
use crate::engine::lifecycle::{LIMIT, ask_to_join, own_addr};
use crate::engine::transport::{LocalVoter, LocalWitness, Net};
use crate::engine::{Engine, unix_ms};
use anyhow::{Result, bail};
use bytes::Bytes;
use csv_cluster::db::{ClusterDb, Command, Witness};
use csv_cluster::quorum::VoterId as Voter;
use csv_net::{
    ClusterCa, Handler, JoinGrant, Joining, Peer, PeerAddr, Peers, PeersOptions, RaftCall, RaftKind, Refusal,
    RefusalKind, Secrets, ServerHandle, ServerOptions, Token, async_trait, sha256_hex,
};
use csv_raft::Rpc;
use csv_types::NodeId;
use csv_types::config::LocalConfig;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Property: SHA-256 of the certificate of the witness node that has joined.
const CERTIFICATE: &str = "witness.certificate";
/// Property: SHA-256 of the token that is for the witness node.
const TOKEN: &str = "witness.token";
const TICK: Duration = Duration::from_millis(200);

/// The number that the witness has among nodes.
pub(crate) const WITNESS_NODE: NodeId = NodeId(1000);

/// Is this connection the witness node's?
pub(crate) fn is_witness_node(db: &ClusterDb, peer: &Peer) -> bool {
    matches!(db.quorum.witness, Witness::Node { .. })
        && db.properties.get(CERTIFICATE).is_some_and(|cert| *cert == peer.cert_sha256)
}

/// Where the witness node is, if there is one.
pub(crate) fn address(db: &ClusterDb, port: u16) -> Option<(NodeId, PeerAddr)> {
    let Witness::Node { name, addr } = &db.quorum.witness else { return None };
    Some((WITNESS_NODE, PeerAddr { name: name.clone(), addr: SocketAddr::new(*addr, port) }))
}

impl Engine {
    /// The certificate of the witness node that has joined.
    pub(crate) fn witness_certificate(&self) -> Option<String> {
        self.db.read().properties.get(CERTIFICATE).cloned()
    }

    /// Names a witness node and makes the token with which it joins.
    pub(crate) async fn name_witness_node(
        &self,
        name: String,
        addr: IpAddr,
        valid: Duration,
    ) -> Result<String> {
        self.no_witness_yet()?;
        let property = |key: &str, value| Command::Property { key: key.to_owned(), value };
        self.propose(property(CERTIFICATE, None), LIMIT).await?;
        self.set_witness(Witness::Node { name, addr }).await?;
        let text = self.make_token(valid, 1).await?;
        let sha256 = Token::parse(&text)?.sha256();
        self.propose(property(TOKEN, Some(sha256)), LIMIT).await?;
        Ok(text)
    }

    /// Is it the witness node that shows this token?
    pub(crate) fn is_witness_token(&self, sha256: &str) -> bool {
        self.db.read().properties.get(TOKEN).is_some_and(|token| token == sha256)
    }

    /// The witness node wants to join.
    pub(crate) async fn admit_witness(&self, joining: Joining) -> Result<JoinGrant, Refusal> {
        let failed = |text: String| Refusal::new(RefusalKind::Failed, text);
        let request = &joining.request;
        let ca = {
            let db = self.db.read();
            let good = db.tokens.get(&joining.token_sha256);
            if good.is_none_or(|token| token.uses_left == 0 || token.expires_unix_ms < unix_ms()) {
                return Err(failed("the token of the witness node is used up or out of date".into()));
            }
            match &db.quorum.witness {
                Witness::Node { name, addr } if *name == request.name && *addr == request.addr => {}
                other @ (Witness::None | Witness::Disk { .. } | Witness::Node { .. }) => {
                    return Err(failed(format!(
                        "the token is for the {other}, not for {} ({})",
                        request.name, request.addr
                    )));
                }
            }
            csv_net::join::check_clocks(request.now_unix_ms, unix_ms(), db.settings.clock_skew_max_ms)
                .map_err(failed)?;
            ClusterCa::load(&db.secrets.ca_cert_pem, &db.secrets.ca_key_pem)
                .map_err(|error| failed(error.to_string()))?
        };
        let cert = ca
            .issue(&request.name, WITNESS_NODE, request.addr, &request.csr_pem)
            .map_err(|error| failed(error.to_string()))?;
        let sha256 = sha256_hex(&cert).map_err(|error| failed(error.to_string()))?;
        // The token first: whoever comes second finds it used up.
        for command in [
            Command::TokenRevoke { sha256: joining.token_sha256.clone() },
            Command::Property { key: TOKEN.to_owned(), value: None },
            Command::Property { key: CERTIFICATE.to_owned(), value: Some(sha256) },
        ] {
            self.propose(command, LIMIT).await.map_err(|error| failed(error.to_string()))?;
        }
        Ok(self.grant(WITNESS_NODE, cert, ca.cert_pem))
    }
}

/// The running witness node.
#[derive(Debug)]
pub(crate) struct WitnessNode {
    pub(crate) identity: Identity,
    port: u16,
    peers: Peers,
    voter: WitnessVoter,
    stopping: AtomicBool,
    server: tokio::sync::Mutex<Option<ServerHandle>>,
}

/// Makes this machine the witness node of the token's cluster.
pub(crate) async fn join(config: &LocalConfig, token: &str) -> Result<Arc<WitnessNode>> {
    let admitted = ask_to_join(config, token, false).await?;
    if admitted.grant.node != WITNESS_NODE {
        bail!(
            "this token is for a node, and this csvd runs as a witness: use one of `csvctl quorum set --node`, and evict {} ({})",
            config.node,
            admitted.grant.node
        );
    }
    start(config, admitted.keep(config)?).await
}

/// Starts the witness node on what it has.
pub(crate) async fn start(config: &LocalConfig, identity: Identity) -> Result<Arc<WitnessNode>> {
    if identity.node != WITNESS_NODE {
        bail!(
            "{} is a node of cluster {}, start csvd without --witness",
            identity.name,
            identity.cluster_name
        );
    }
    let secrets = Arc::new(Secrets::load(&config.secrets_dir)?);
    let me = super::lun::voter(identity.cluster_id);
    let storage = csv_raft::storage::directory::open(&identity::raft_dir(&config.state_dir), me)?;
    let peers = Peers::new(secrets.clone(), PeersOptions::default());
    let net = Net {
        me: Voter::WITNESS.0,
        node: WITNESS_NODE,
        peers: peers.clone(),
        witness: LocalWitness::default(),
        own: LocalVoter::default(),
        witness_at: Mutex::default(),
    };
    let own = secrets.me();
    let named = Arc::new(move |db: &ClusterDb| is_witness_node(db, &own));
    let voter = WitnessVoter::start(storage, Arc::new(net), None, named).await?;
    let node = Arc::new(WitnessNode {
        identity,
        port: config.cluster_port,
        peers,
        voter,
        stopping: AtomicBool::new(false),
        server: tokio::sync::Mutex::new(None),
    });
    node.set_peers();
    let addr = SocketAddr::new(own_addr(config)?, config.cluster_port);
    let handler = Arc::new(WitnessHandler(node.clone()));
    *node.server.lock().await = Some(csv_net::serve(ServerOptions { addr, secrets, handler }).await?);
    tokio::spawn(node.clone().tend());
    Ok(node)
}

impl WitnessNode {
    fn set_peers(&self) {
        let mut peers: BTreeMap<NodeId, PeerAddr> = {
            let db = self.voter.db().read();
            let addr = |addr| SocketAddr::new(addr, self.port);
            db.nodes
                .values()
                .map(|node| (node.id, PeerAddr { name: node.name.clone(), addr: addr(node.addr) }))
                .collect()
        };
        if peers.is_empty() {
            let members = self.identity.members.iter();
            peers.extend(members.map(|m| (m.node, PeerAddr { name: m.name.clone(), addr: m.addr })));
        }
        self.peers.set(&peers);
    }

    async fn tend(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TICK);
        while !self.stopping.load(Ordering::Acquire) {
            ticks.tick().await;
            self.set_peers();
            self.voter.tend();
        }
    }

    pub(crate) async fn shutdown(&self) {
        self.stopping.store(true, Ordering::Release);
        self.voter.handle().shutdown().await;
        if let Some(server) = self.server.lock().await.take() {
            server.stop().await;
        }
    }
}

/// Serves Raft to the nodes.
struct WitnessHandler(Arc<WitnessNode>);

#[async_trait]
impl Handler for WitnessHandler {
    fn allowed(&self, peer: &Peer) -> bool {
        let db = self.0.voter.db().read();
        match db.nodes.get(&peer.node_id) {
            Some(node) => node.cert_sha256.is_empty() || node.cert_sha256 == peer.cert_sha256,
            None => peer.node_id.0 >= db.next_node_id,
        }
    }

    async fn raft(&self, _peer: Peer, call: RaftCall) -> Result<Bytes, Refusal> {
        if call.instance != Voter::WITNESS.0 {
            let text = format!("voter {} does not run here", call.instance);
            return Err(Refusal::new(RefusalKind::NotHere, text));
        }
        let rpc = match call.kind {
            RaftKind::Append => Rpc::Append,
            RaftKind::Vote => Rpc::Vote,
            RaftKind::Snapshot => Rpc::Snapshot,
        };
        let answer = self.0.voter.serve(rpc, &call.payload).await;
        answer.map(Bytes::from).map_err(|why| Refusal::new(RefusalKind::Stopped, why))
    }
}

/// Says why nothing but joining is to be asked here.
pub(crate) fn only_a_witness(node: &WitnessNode) -> anyhow::Error {
    anyhow::anyhow!(
        "this machine is the witness node {} of cluster {}; ask one of the cluster's nodes",
        node.identity.name,
        node.identity.cluster_name
    )
}
