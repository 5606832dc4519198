//! Creating a cluster, joining one, letting others join, leaving.

use super::identity::{self, Identity};
use super::{Engine, VOTE_LIMIT, unix_ms};
use crate::events::EventLog;
use anyhow::{Context, Result, bail};
use csv_cluster::db::{Applied, Command, FEATURE_LEVEL, Init, NewNode, NodeState, Secrets};
use csv_net::{
    ClusterCa, JoinGrant, JoinOptions, JoinRequest, Joining, Member as Told, NodeIdentity, Refusal,
    RefusalKind, Token, sha256_hex, write_secrets,
};
use csv_raft::RaftNode;
use csv_types::NodeId;
use csv_types::config::LocalConfig;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Version of this software, for people.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
/// For the former life of a machine that rejoins to be given up; less than the joiner waits for its answer.
const SILENCE_LIMIT: Duration = Duration::from_secs(12);
/// Members that a token names.
const TOKEN_ADDRS_MAX: usize = 8;

pub(crate) type Log = Arc<std::sync::Mutex<EventLog>>;

pub(crate) fn own_addr(config: &LocalConfig) -> Result<IpAddr> {
    config.addr.context(
        "this node has no address: set `addr` in the section [local] of /etc/csv/csv.toml and start csvd again",
    )
}

/// Sixteen random bytes as text.
fn random_password() -> String {
    Uuid::new_v4().simple().to_string()
}

/// Makes a cluster with this node as its first.
pub(crate) async fn create(
    config: &LocalConfig,
    events: Log,
    name: &str,
    id: Option<Uuid>,
    settings: Vec<(String, String)>,
) -> Result<Arc<Engine>> {
    let (addr, id) = (own_addr(config)?, id.unwrap_or_else(Uuid::new_v4));
    let node = NodeId(1);
    let ca = ClusterCa::create(name, id)?;
    let keys = NodeIdentity::create()?;
    let cert = ca.issue(&config.node, node, addr, &keys.csr_pem)?;
    let secrets = Secrets {
        ca_cert_pem: ca.cert_pem.clone(),
        ca_key_pem: ca.key_pem.clone(),
        smb_password: random_password(),
    };
    write_secrets(&config.secrets_dir, &ca.cert_pem, &cert, &keys.key_pem, &secrets.smb_password)?;
    let identity = Identity {
        cluster_id: id,
        cluster_name: name.to_owned(),
        node,
        name: config.node.clone(),
        members: Vec::new(),
    };
    make_storage(config, &identity)?;
    let engine = Engine::start(config.clone(), identity.clone(), events).await?;
    let at = SocketAddr::new(addr, config.cluster_port).to_string();
    let members = BTreeMap::from([(1, RaftNode { name: config.node.clone(), addr: at })]);
    engine.raft().initialize(members).await.context("the database cannot be made")?;
    let cert_sha256 = sha256_hex(&cert)?;
    let first = NewNode {
        name: config.node.clone(),
        addr,
        feature_level: FEATURE_LEVEL,
        version: VERSION.to_owned(),
        cert_sha256,
    };
    let init = Init { name: name.to_owned(), id, node: first, secrets, settings };
    if let Err(error) = engine.propose(Command::Init(Box::new(init)), LIMIT).await {
        engine.shutdown().await;
        identity::set_aside(&config.state_dir, unix_ms())?;
        return Err(error.into());
    }
    identity.save(&config.state_dir)?;
    Ok(engine)
}

/// A database is never written over.
pub(crate) fn aside_remains(config: &LocalConfig) -> Result<()> {
    if let Some(aside) = identity::set_aside(&config.state_dir, unix_ms())? {
        tracing::warn!(aside = %aside.display(), "what was there was put aside");
    }
    Ok(())
}

fn make_storage(config: &LocalConfig, identity: &Identity) -> Result<()> {
    aside_remains(config)?;
    let dir = identity::raft_dir(&config.state_dir);
    std::fs::create_dir_all(identity::dir(&config.state_dir))
        .with_context(|| format!("cannot create {}", dir.display()))?;
    let me = csv_raft::Identity { cluster: identity.cluster_id, voter: identity.node.0.into() };
    csv_raft::storage::directory::create(&dir, me)?;
    Ok(())
}

/// A cluster lets this machine in: what it gave, and the key of this machine's new certificate.
pub(crate) struct Admitted {
    pub(crate) grant: JoinGrant,
    key_pem: String,
}

impl Admitted {
    /// Writes what was given, and makes an empty database. What was there is put aside.
    pub(crate) fn keep(&self, config: &LocalConfig) -> Result<Identity> {
        let Admitted { grant, key_pem } = self;
        write_secrets(&config.secrets_dir, &grant.ca_pem, &grant.cert_pem, key_pem, &grant.smb_password)?;
        let identity = Identity::granted(grant, &config.node);
        make_storage(config, &identity)?;
        identity.save(&config.state_dir)?;
        Ok(identity)
    }
}

/// Asks the token's cluster. Nothing is changed on this machine.
pub(crate) async fn ask_to_join(config: &LocalConfig, token: &str, rejoin: bool) -> Result<Admitted> {
    let (addr, token) = (own_addr(config)?, Token::parse(token)?);
    let keys = NodeIdentity::create()?;
    let request = JoinRequest {
        name: config.node.clone(),
        addr,
        csr_pem: keys.csr_pem.clone(),
        feature_level: FEATURE_LEVEL,
        software_version: VERSION.to_owned(),
        now_unix_ms: unix_ms(),
        rejoin,
    };
    let grant = csv_net::join(&token, request, &JoinOptions::default()).await?;
    Ok(Admitted { grant, key_pem: keys.key_pem })
}

/// Becomes a node of the cluster that let this machine in. What was there is put aside.
pub(crate) async fn settle(config: &LocalConfig, events: Log, admitted: &Admitted) -> Result<Arc<Engine>> {
    Engine::start(config.clone(), admitted.keep(config)?, events).await
}

impl Engine {
    /// A token with which machines can join.
    pub(crate) async fn make_token(&self, valid: Duration, uses: u32) -> Result<String> {
        let (ca_pem, addrs) = {
            let db = self.db.read();
            let mut addrs: Vec<SocketAddr> = vec![];
            addrs.extend(
                db.nodes.get(&self.me()).map(|node| SocketAddr::new(node.addr, self.config.cluster_port)),
            );
            let others = db.nodes.values().filter(|node| node.id != self.me());
            addrs.extend(others.map(|node| SocketAddr::new(node.addr, self.config.cluster_port)));
            addrs.truncate(TOKEN_ADDRS_MAX);
            (db.secrets.ca_cert_pem.clone(), addrs)
        };
        let expires = unix_ms().saturating_add(u64::try_from(valid.as_millis()).unwrap_or(u64::MAX));
        let ca_sha256 = csv_net::pki::cert_sha256(&ca_pem)?;
        let token =
            Token::create(self.identity.cluster_id, &self.identity.cluster_name, addrs, ca_sha256, expires)?;
        let command = Command::TokenAdd { sha256: token.sha256(), expires_unix_ms: expires, uses };
        self.propose(command, LIMIT).await?;
        Ok(token.encode()?)
    }

    /// Somebody wants to become a node.
    pub(crate) async fn admit_node(&self, joining: Joining) -> Result<JoinGrant, Refusal> {
        if self.is_witness_token(&joining.token_sha256) {
            return self.admit_witness(joining).await;
        }
        let failed = |text: String| Refusal::new(RefusalKind::Failed, text);
        let request = &joining.request;
        let (ca, next, skew_max_ms) = {
            let db = self.db.read();
            let ca = ClusterCa::load(&db.secrets.ca_cert_pem, &db.secrets.ca_key_pem);
            (ca.map_err(|error| failed(error.to_string()))?, db.next_node_id, db.settings.clock_skew_max_ms)
        };
        csv_net::join::check_clocks(request.now_unix_ms, unix_ms(), skew_max_ms).map_err(failed)?;
        let node = NodeId(next);
        let cert = ca
            .issue(&request.name, node, request.addr, &request.csr_pem)
            .map_err(|error| failed(error.to_string()))?;
        let new = NewNode {
            name: request.name.clone(),
            addr: request.addr,
            feature_level: request.feature_level,
            version: request.software_version.clone(),
            cert_sha256: sha256_hex(&cert).map_err(|error| failed(error.to_string()))?,
        };
        let token_sha256 = joining.token_sha256.clone();
        let command = match self.replaced(request).await {
            Some(old) => Command::NodeReplace { old, node: new, token_sha256, expect_id: node },
            None => Command::NodeAdd { node: new, token_sha256, expect_id: Some(node) },
        };
        match self.propose(command, LIMIT).await {
            Ok(Applied::Node(id)) if id == node => {}
            Ok(other) => return Err(failed(format!("unexpected answer {other:?}"))),
            Err(error @ super::propose::Failed::Unknown(_)) => {
                return Err(Refusal::new(RefusalKind::UnknownOutcome, error.to_string()));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
        Ok(self.grant(node, cert, ca.cert_pem))
    }

    /// What a machine gets that may come in.
    pub(crate) fn grant(&self, node: NodeId, cert_pem: String, ca_pem: String) -> JoinGrant {
        let (smb_password, members) = {
            let db = self.db.read();
            let told = |node: &csv_cluster::db::Node| Told {
                node: node.id,
                name: node.name.clone(),
                addr: SocketAddr::new(node.addr, self.config.cluster_port),
            };
            (db.secrets.smb_password.clone(), db.nodes.values().map(told).collect())
        };
        JoinGrant {
            node,
            cluster_id: self.identity.cluster_id,
            cluster_name: self.identity.cluster_name.clone(),
            cert_pem,
            ca_pem,
            smb_password,
            members,
        }
    }

    /// The node whose place a machine takes that comes back without its database. Its silence is waited for.
    async fn replaced(&self, request: &JoinRequest) -> Option<NodeId> {
        if !request.rejoin {
            return None;
        }
        let old = self.db.read().node_by_name(&request.name)?.id;
        let is_in = || {
            let db = self.db.read();
            let state = db.nodes.get(&old).map(|node| node.state);
            matches!(state, Some(NodeState::Up | NodeState::Isolated))
        };
        let deadline = tokio::time::Instant::now() + SILENCE_LIMIT;
        let mut changes = self.db.changes();
        while is_in() && tokio::time::timeout_at(deadline, changes.changed()).await.is_ok() {}
        self.db.read().nodes.contains_key(&old).then_some(old)
    }

    /// This node leaves the cluster for good.
    pub(crate) async fn leave(&self) -> Result<()> {
        let node = self.me();
        if self.db.read().nodes.len() == 1 {
            bail!(
                "this is the cluster's last node; `csvctl cluster destroy` ends the cluster, the data on its LUNs stays"
            );
        }
        self.propose(Command::NodePause { node, drain: true }, LIMIT).await?;
        let deadline = tokio::time::Instant::now() + LIMIT * 6;
        let mut changes = self.db.changes();
        while self.has_something() {
            if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
                bail!(
                    "this node could not be drained; see `csvctl events`, move its volumes and groups and try again"
                );
            }
        }
        self.hand_vote_over().await?;
        self.groups.stop_all(LIMIT).await;
        self.volumes.stop_all();
        let incarnation = self.incarnation.get();
        let reason = "it leaves the cluster".to_owned();
        self.propose(Command::NodeDown { node, incarnation, reason, planned: true }, LIMIT).await?;
        self.propose(Command::NodeEvict { node }, LIMIT).await?;
        Ok(())
    }

    /// The others must have a majority without this node before it is gone: of two nodes without a witness one has the only vote.
    async fn hand_vote_over(&self) -> Result<()> {
        let (node, incarnation) = (self.me(), self.incarnation.get());
        self.propose(Command::NodeLeave { node, incarnation }, LIMIT).await?;
        if !self.is_expendable(LIMIT).await {
            // It stays, so it votes again.
            let resumed = self.propose(Command::NodeResume { node }, LIMIT).await;
            let state = resumed.map_or_else(
                |error| {
                    format!("; run `csvctl node resume` to have it take volumes and vote again ({error})")
                },
                |_| String::new(),
            );
            bail!(
                "the other nodes have no majority without this one, and would stand still: see `csvctl quorum show` and \
                 `csvctl node list`, bring the others up, then try again{state}"
            );
        }
        if self.raft().metrics().role == csv_raft::Role::Leader
            && self.raft().step_down(VOTE_LIMIT).await.is_err()
        {
            // Its last commands are committed by the others all the same; they elect one of them when it is silent.
            tracing::warn!("nobody has taken the lead over yet");
        }
        Ok(())
    }
}
