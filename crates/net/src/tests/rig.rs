//! A cluster of servers and clients on loopback, each with a handler that writes down what it gets.

use crate::*;
use bytes::Bytes;
use csv_types::NodeId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Far more than anything here takes; a wait this long means that what is awaited never comes.
pub(super) const LONG: Duration = Duration::from_secs(30);

pub(super) fn now_unix_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

pub(super) fn secrets_of(ca: &ClusterCa, node: u32) -> Arc<Secrets> {
    let identity = NodeIdentity::create().unwrap();
    let addr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let cert = ca.issue(&format!("n{node}"), NodeId(node), addr, &identity.csr_pem).unwrap();
    Arc::new(Secrets::from_pem(&ca.cert_pem, &cert, &identity.key_pem).unwrap())
}

/// Writes down what comes; answers a Raft call with its own payload.
pub(super) struct Recorder {
    pub(super) evicted: Mutex<BTreeSet<NodeId>>,
    pub(super) beats: Mutex<Vec<(NodeId, Beat)>>,
    pub(super) refused: Mutex<Vec<String>>,
    /// Held while a test wants calls to hang.
    pub(super) gate: tokio::sync::RwLock<()>,
    pub(super) joins: Mutex<Option<Admission>>,
    pub(super) joined: Mutex<Vec<Joining>>,
    pub(super) done: AtomicU64,
}

/// What a member needs to let machines in.
pub(super) struct Admission {
    pub(super) ca: ClusterCa,
    pub(super) token_sha256: String,
    pub(super) expires_unix_ms: u64,
    /// Put into the grant in place of the right one.
    pub(super) wrong_cert: Option<String>,
}

impl Recorder {
    pub(super) fn new() -> Arc<Recorder> {
        Arc::new(Recorder {
            evicted: Mutex::default(),
            beats: Mutex::default(),
            refused: Mutex::default(),
            gate: tokio::sync::RwLock::new(()),
            joins: Mutex::default(),
            joined: Mutex::default(),
            done: AtomicU64::new(0),
        })
    }

    fn admit(&self, joining: &Joining) -> Result<JoinGrant, Refusal> {
        self.joined.lock().push(joining.clone());
        let refused = |text: &str| Err(Refusal::new(RefusalKind::Failed, text));
        let joins = self.joins.lock();
        let Some(admission) = joins.as_ref() else {
            return Err(Refusal::new(RefusalKind::Busy, "no quorum"));
        };
        if joining.token_sha256 != admission.token_sha256 {
            return refused("the token is not known");
        }
        let now = now_unix_ms();
        if now > admission.expires_unix_ms {
            return refused("the token has expired");
        }
        if let Err(text) = join::check_clocks(joining.request.now_unix_ms, now, 60_000) {
            return refused(&text);
        }
        let (node, ca, request) = (NodeId(9), &admission.ca, &joining.request);
        let cert = ca
            .issue(&request.name, node, request.addr, &request.csr_pem)
            .map_err(|error| Refusal::new(RefusalKind::Failed, error.to_string()))?;
        Ok(JoinGrant {
            node,
            cluster_id: ca.cluster_id(),
            cluster_name: "lab".into(),
            cert_pem: admission.wrong_cert.clone().unwrap_or(cert),
            ca_pem: ca.cert_pem.clone(),
            smb_password: "password".into(),
            members: vec![],
        })
    }
}

#[async_trait]
impl Handler for Recorder {
    fn allowed(&self, peer: &Peer) -> bool {
        !self.evicted.lock().contains(&peer.node_id)
    }

    async fn raft(&self, _peer: Peer, call: RaftCall) -> Result<Bytes, Refusal> {
        let _passed = self.gate.read().await;
        if call.instance == 404 {
            return Err(Refusal::new(RefusalKind::NotHere, "no such voter here"));
        }
        Ok(call.payload)
    }

    fn beat(&self, peer: &Peer, beat: Beat) {
        self.beats.lock().push((peer.node_id, beat));
    }

    async fn propose(&self, _peer: Peer, envelope: Bytes) -> Proposed {
        let _passed = self.gate.read().await;
        self.done.fetch_add(1, Ordering::SeqCst);
        if envelope.is_empty() { Err(ProposeRefusal::NotLeader { leader: Some(2) }) } else { Ok(envelope) }
    }

    async fn admin(&self, peer: Peer, request_json: Bytes) -> Result<Bytes, Refusal> {
        Ok(Bytes::from(format!("{}:{}", peer.name, request_json.len())))
    }

    async fn join(&self, joining: Joining) -> Result<JoinGrant, Refusal> {
        let _passed = self.gate.read().await;
        self.admit(&joining)
    }

    fn refused(&self, _from: SocketAddr, why: &str) {
        self.refused.lock().push(why.to_owned());
    }
}

/// One node: server and client.
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) secrets: Arc<Secrets>,
    pub(super) handler: Arc<Recorder>,
    pub(super) server: ServerHandle,
    pub(super) peers: Peers,
}

pub(super) async fn server(
    secrets: &Arc<Secrets>,
    handler: &Arc<Recorder>,
    addr: SocketAddr,
) -> ServerHandle {
    let options = ServerOptions {
        addr,
        secrets: Arc::clone(secrets),
        handler: Arc::clone(handler) as Arc<dyn Handler>,
    };
    serve(options).await.unwrap()
}

pub(super) fn any() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

/// Loaded machines may take longer than the default for a handshake.
pub(super) fn patient() -> PeersOptions {
    PeersOptions { connect_timeout: Duration::from_secs(10), ..PeersOptions::default() }
}

impl Node {
    pub(super) async fn start(ca: &ClusterCa, node: u32) -> Node {
        let (secrets, handler) = (secrets_of(ca, node), Recorder::new());
        let server = server(&secrets, &handler, any()).await;
        let peers = Peers::new(Arc::clone(&secrets), patient());
        Node { id: NodeId(node), secrets, handler, server, peers }
    }

    pub(super) fn addr(&self) -> PeerAddr {
        PeerAddr { name: format!("n{}", self.id.0), addr: self.server.addr() }
    }
}

pub(super) fn ca() -> ClusterCa {
    ClusterCa::create("lab", Uuid::new_v4()).unwrap()
}

/// `count` nodes that know each other.
pub(super) async fn cluster(ca: &ClusterCa, count: u32) -> Vec<Node> {
    let mut nodes = Vec::new();
    for node in 1..=count {
        nodes.push(Node::start(ca, node).await);
    }
    let addrs: BTreeMap<NodeId, PeerAddr> = nodes.iter().map(|node| (node.id, node.addr())).collect();
    for node in &nodes {
        node.peers.set(&addrs);
    }
    nodes
}

pub(super) fn raft_call(from: u64, text: &'static str) -> RaftCall {
    RaftCall { from, instance: 2, kind: RaftKind::Append, payload: Bytes::from_static(text.as_bytes()) }
}

/// Waits until `done` says so; the states that tests wait for come by themselves.
pub(super) async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(LONG, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "never: {what}");
}

/// Calls until it goes well, as Raft does.
pub(super) async fn call_until_ok(peers: &Peers, target: NodeId, from: u64) {
    let deadline = tokio::time::Instant::now() + LONG;
    loop {
        let answer = peers.raft(target, raft_call(from, "again"), LONG).await;
        if answer.is_ok() {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "never: {answer:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A way to a node that can be frozen: bytes then lie where they are, and nobody is told.
pub(super) struct Way {
    pub(super) addr: SocketAddr,
    open: tokio::sync::watch::Sender<bool>,
}

impl Way {
    pub(super) async fn to(server: SocketAddr) -> Way {
        let listener = tokio::net::TcpListener::bind(any()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (open, gate) = tokio::sync::watch::channel(true);
        tokio::spawn(async move {
            loop {
                let (here, _) = listener.accept().await.unwrap();
                let gate = gate.clone();
                tokio::spawn(async move {
                    let there = tokio::net::TcpStream::connect(server).await.unwrap();
                    let ((here_in, here_out), (there_in, there_out)) =
                        (here.into_split(), there.into_split());
                    tokio::join!(pass(here_in, there_out, gate.clone()), pass(there_in, here_out, gate));
                });
            }
        });
        Way { addr, open }
    }

    pub(super) fn freeze(&self) {
        self.open.send_replace(false);
    }

    pub(super) fn thaw(&self) {
        self.open.send_replace(true);
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut gate: tokio::sync::watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = vec![0; 16 << 10];
    loop {
        // The test may be over, or one end gone.
        if gate.wait_for(|open| *open).await.is_err() {
            return;
        }
        let count = from.read(&mut buffer).await.unwrap_or(0);
        let open = gate.wait_for(|open| *open).await.is_ok();
        if count == 0 || !open || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
