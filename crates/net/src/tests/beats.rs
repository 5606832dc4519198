//! Heartbeats.

use super::rig::*;
use crate::*;
use bytes::Bytes;
use csv_types::NodeId;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const PERIOD: Duration = Duration::from_millis(10);

/// Numbers its beats; the first on a stream has a report.
#[derive(Default)]
struct Source {
    seq: AtomicU64,
    refused: Mutex<Vec<CallError>>,
    report_bytes: usize,
}

impl BeatSource for Source {
    fn next(&self, _peer: NodeId, first: bool) -> Option<Beat> {
        let seq = self.seq.fetch_add(1, Ordering::SeqCst) + 1;
        let report = (first || self.report_bytes > 0).then(|| Bytes::from(vec![b' '; self.report_bytes]));
        Some(Beat { incarnation: 1, seq, report_json: report, ..Beat::default() })
    }

    fn refused(&self, _peer: NodeId, error: &CallError) {
        self.refused.lock().push(error.clone());
    }
}

fn count(node: &Node, from: u32) -> usize {
    node.handler.beats.lock().iter().filter(|(node, _)| node.0 == from).count()
}

#[tokio::test]
async fn each_node_hears_each_other() {
    let nodes = cluster(&ca(), 3).await;
    for node in &nodes {
        node.peers.start_beats(Arc::new(Source::default()), PERIOD);
    }
    for (node, from) in [(0, 2), (0, 3), (1, 1), (1, 3), (2, 1), (2, 2)] {
        until("ten beats", || count(&nodes[node], from) >= 10).await;
    }
    let beats = nodes[0].handler.beats.lock().clone();
    let of_2: Vec<&Beat> = beats.iter().filter(|(from, _)| from.0 == 2).map(|(_, beat)| beat).collect();
    assert!(of_2.is_sorted_by(|a, b| a.seq < b.seq), "{of_2:?}");
    assert!(of_2[0].report_json.is_some(), "the first tells everything");
    assert!(of_2[1..].iter().all(|beat| beat.report_json.is_none()));
    nodes[0].peers.stop_beats();
    tokio::task::yield_now().await;
    until("silence", || {
        let before = count(&nodes[1], 1);
        std::thread::sleep(PERIOD * 5);
        before == count(&nodes[1], 1)
    })
    .await;
    // Calls do not need beats.
    nodes[0].peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap();
}

#[tokio::test]
async fn beats_survive_a_restart_of_the_peer() {
    let mut nodes = cluster(&ca(), 2).await;
    let second = nodes.remove(1);
    let source = Arc::new(Source::default());
    nodes[0].peers.start_beats(source, PERIOD);
    until("beats", || count(&second, 1) >= 3).await;
    let addr = second.server.addr();
    second.server.stop().await;
    until("the loss is noticed", || !nodes[0].peers.status()[&NodeId(2)].connected).await;
    let handler = Recorder::new();
    let _server = server(&second.secrets, &handler, addr).await;
    until("beats again", || handler.beats.lock().len() >= 3).await;
    assert!(handler.beats.lock()[0].1.report_json.is_some(), "a new stream begins with everything");
}

#[tokio::test]
async fn beats_come_again_when_a_cut_heals() {
    let ca = ca();
    let second = Node::start(&ca, 2).await;
    let way = Way::to(second.server.addr()).await;
    let peers = Peers::new(secrets_of(&ca, 1), patient());
    peers.set(&[(NodeId(2), PeerAddr { name: "n2".into(), addr: way.addr })].into());
    peers.start_beats(Arc::new(Source::default()), PERIOD);
    until("beats", || count(&second, 1) >= 3).await;
    way.freeze();
    // Nothing but a ping can find out.
    until("the loss is noticed", || {
        peers.status()[&NodeId(2)].connects >= 2 || !peers.status()[&NodeId(2)].connected
    })
    .await;
    way.thaw();
    let first_of_stream = || {
        let beats = second.handler.beats.lock();
        beats.iter().filter(|(_, beat)| beat.report_json.is_some()).count()
    };
    until("a new stream", || first_of_stream() >= 2).await;
}

#[tokio::test]
async fn a_peer_that_takes_nothing_delays_nobody() {
    let ca = ca();
    let (second, third) = (Node::start(&ca, 2).await, Node::start(&ca, 3).await);
    let way = Way::to(second.server.addr()).await;
    let peers = Peers::new(secrets_of(&ca, 1), patient());
    let stuck = PeerAddr { name: "n2".into(), addr: way.addr };
    peers.set(&[(NodeId(2), stuck), (NodeId(3), third.addr())].into());
    let source = Source { report_bytes: 256 << 10, ..Source::default() };
    peers.start_beats(Arc::new(source), PERIOD);
    until("beats", || count(&second, 1) >= 3 && count(&third, 1) >= 3).await;
    way.freeze();
    until("beats are dropped", || peers.status()[&NodeId(2)].beats_dropped > 0).await;
    let before = count(&third, 1);
    until("the other hears more", || count(&third, 1) > before + 5).await;
}

#[tokio::test]
async fn an_evicted_nodes_beats_are_refused() {
    let nodes = cluster(&ca(), 2).await;
    let source = Arc::new(Source::default());
    nodes[0].peers.start_beats(Arc::clone(&source) as Arc<dyn BeatSource>, PERIOD);
    until("beats", || count(&nodes[1], 1) >= 3).await;
    nodes[1].handler.evicted.lock().insert(NodeId(1));
    until("the refusal", || !source.refused.lock().is_empty()).await;
    assert!(matches!(source.refused.lock()[0], CallError::NotAllowed(_)));
    let before = count(&nodes[1], 1);
    nodes[0].peers.raft(NodeId(2), raft_call(1, "x"), LONG).await.unwrap_err();
    assert_eq!(count(&nodes[1], 1), before);
    nodes[1].handler.evicted.lock().clear();
    until("beats again", || count(&nodes[1], 1) > before).await;
}

#[tokio::test]
async fn the_period_can_be_changed() {
    let nodes = cluster(&ca(), 2).await;
    let source = Arc::new(Source::default());
    nodes[0].peers.start_beats(Arc::clone(&source) as Arc<dyn BeatSource>, LONG * 100);
    until("the first beat", || count(&nodes[1], 1) == 1).await;
    nodes[0].peers.start_beats(source, PERIOD);
    until("more beats", || count(&nodes[1], 1) >= 5).await;
}
