//! Connections that break, peers that are silent, slow or gone.

use super::rig::*;
use crate::*;
use bytes::Bytes;
use csv_types::NodeId;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(200);
const NEVER: Duration = Duration::from_secs(24 * 3600);

fn n2(addr: std::net::SocketAddr) -> std::collections::BTreeMap<NodeId, PeerAddr> {
    [(NodeId(2), PeerAddr { name: "n2".into(), addr })].into()
}

#[tokio::test]
async fn a_peer_that_accepts_and_says_nothing_holds_nobody_up() {
    let listener = tokio::net::TcpListener::bind(any()).await.unwrap();
    let options = PeersOptions { connect_timeout: SHORT, backoff_min: NEVER, backoff_max: NEVER };
    let peers = Peers::new(secrets_of(&ca(), 1), options);
    peers.set(&n2(listener.local_addr().unwrap()));
    let error = peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable(why) if why.contains("within 200 ms")), "{error}");
    // A call with less time than that waits no longer than it has.
    let peers = Peers::new(secrets_of(&ca(), 1), patient());
    peers.set(&n2(listener.local_addr().unwrap()));
    let error = peers.raft(NodeId(2), raft_call(1, "x"), SHORT).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable(why) if why.contains("connecting")), "{error}");
}

#[tokio::test]
async fn a_peer_that_is_down_is_not_tried_in_a_tight_loop() {
    let listener = tokio::net::TcpListener::bind(any()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let accepted = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&accepted);
    let dropper = tokio::spawn(async move {
        loop {
            let _dropped = listener.accept().await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let ca = ca();
    let options = PeersOptions { backoff_min: NEVER, backoff_max: NEVER, ..patient() };
    let peers = Peers::new(secrets_of(&ca, 1), options);
    peers.set(&n2(addr));
    for _ in 0..50 {
        let error = peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
        assert!(matches!(error, CallError::Unreachable(_)), "{error}");
    }
    assert_eq!(accepted.load(Ordering::SeqCst), 1);
    // Now there is a node; only whoever heard it knows.
    dropper.abort();
    let _ended = dropper.await;
    let (secrets, handler) = (secrets_of(&ca, 2), Recorder::new());
    let _server = server(&secrets, &handler, addr).await;
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
    peers.retry_now(NodeId(2));
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
}

#[tokio::test]
async fn a_restart_is_recovered_from() {
    let ca = ca();
    let mut nodes = cluster(&ca, 2).await;
    let second = nodes.remove(1);
    let peers = nodes[0].peers.clone();
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
    let addr = second.server.addr();
    second.server.stop().await;
    let error = peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable(_) | CallError::Lost(_)), "{error}");
    let _server = server(&second.secrets, &second.handler, addr).await;
    call_until_ok(&peers, NodeId(2), 1).await;
}

#[tokio::test]
async fn a_silent_connection_goes_with_the_call_that_found_it() {
    let ca = ca();
    let second = Node::start(&ca, 2).await;
    let way = Way::to(second.server.addr()).await;
    let peers = Peers::new(secrets_of(&ca, 1), patient());
    peers.set(&n2(way.addr));
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
    way.freeze();
    let error = peers.raft(NodeId(2), raft_call(1, "x"), SHORT).await.unwrap_err();
    assert_eq!(error, CallError::TimedOut);
    assert!(error.may_have_happened());
    until("the connection is gone", || !peers.status()[&NodeId(2)].connected).await;
    way.thaw();
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
    assert_eq!(peers.status()[&NodeId(2)].connects, 2);
}

#[tokio::test]
async fn a_slow_handler_costs_no_connection() {
    let nodes = cluster(&ca(), 2).await;
    let (peers, handler) = (&nodes[0].peers, Arc::clone(&nodes[1].handler));
    let gate = handler.gate.write().await;
    let slow = tokio::spawn({
        let peers = peers.clone();
        async move { peers.raft(NodeId(2), raft_call(1, "x"), SHORT).await }
    });
    // Another call is answered in the meantime, on the same connection.
    while !slow.is_finished() {
        peers.admin(NodeId(2), Bytes::new(), LONG).await.unwrap();
    }
    assert_eq!(slow.await.unwrap(), Err(CallError::TimedOut));
    drop(gate);
    peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
    assert_eq!(peers.status()[&NodeId(2)].connects, 1);
}

#[tokio::test]
async fn what_was_begun_runs_to_its_end() {
    let nodes = cluster(&ca(), 2).await;
    let (peers, handler) = (&nodes[0].peers, Arc::clone(&nodes[1].handler));
    let gate = handler.gate.write().await;
    let error = peers.propose(NodeId(2), Bytes::from_static(b"put"), SHORT).await.unwrap_err();
    assert!(error.may_have_happened(), "{error}");
    drop(gate);
    until("the proposal is carried out", || handler.done.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_peer_that_is_taken_out_ends_its_calls() {
    let nodes = cluster(&ca(), 2).await;
    let handler = Arc::clone(&nodes[1].handler);
    let _gate = handler.gate.write().await;
    let peers = nodes[0].peers.clone();
    peers.admin(NodeId(2), Bytes::new(), LONG).await.unwrap();
    let call = tokio::spawn({
        let peers = peers.clone();
        async move { peers.raft(NodeId(2), raft_call(1, "x"), NEVER).await }
    });
    tokio::task::yield_now().await;
    peers.set(&Default::default());
    let error = tokio::time::timeout(LONG, call).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, CallError::Lost(_) | CallError::Unreachable(_)), "{error}");
    let error = peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable(_)), "{error}");
}

#[tokio::test]
async fn many_calls_share_one_connection() {
    let nodes = cluster(&ca(), 2).await;
    let peers = &nodes[0].peers;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..300 {
        let peers = peers.clone();
        calls.spawn(async move { peers.raft(NodeId(2), raft_call(1, "x"), LONG).await });
    }
    while let Some(answer) = calls.join_next().await {
        answer.unwrap().unwrap();
    }
    assert_eq!(peers.status()[&NodeId(2)].connects, 1);
}

#[tokio::test]
async fn a_port_that_is_taken_is_told() {
    let node = Node::start(&ca(), 1).await;
    let handler = Arc::clone(&node.handler) as Arc<dyn Handler>;
    let options = ServerOptions { addr: node.server.addr(), secrets: node.secrets, handler };
    let error = serve(options).await.unwrap_err();
    assert!(error.to_string().contains("another csvd"), "{error}");
}
