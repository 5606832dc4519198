//! What heartbeats cost: three nodes in one process, each with its server and a stream to each other one, as a cluster
//! at rest. Prints the processor time per node as a share of one core, and per beat.
//!
//! `cargo run --release -p csv-net --example idle_cost -- [PERIOD_MS [SECONDS [NODES]]]`

use bytes::Bytes;
use csv_net::{
    Beat, BeatSource, ClusterCa, Handler, NodeIdentity, Peer, PeerAddr, Peers, PeersOptions, RaftCall,
    RaftKind, Refusal, Secrets, ServerOptions, async_trait, serve,
};
use csv_types::NodeId;
use std::collections::BTreeMap;
use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Debug, Default)]
struct Counter(AtomicU64);

#[async_trait]
impl Handler for Counter {
    fn allowed(&self, _peer: &Peer) -> bool {
        true
    }

    async fn raft(&self, _peer: Peer, call: RaftCall) -> Result<Bytes, Refusal> {
        Ok(call.payload)
    }

    fn beat(&self, _peer: &Peer, _beat: Beat) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl BeatSource for Counter {
    fn next(&self, _peer: NodeId, _first: bool) -> Option<Beat> {
        Some(Beat { incarnation: 1, seq: self.0.fetch_add(1, Ordering::Relaxed), term: 7, ..Beat::default() })
    }
}

/// Processor time of this process so far.
fn cpu() -> Duration {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(spent.tv_sec.unsigned_abs(), u32::try_from(spent.tv_nsec).unwrap_or(0))
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<u64> = std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let arg = |at: usize, default| args.get(at).copied().unwrap_or(default);
    let (period, time) = (Duration::from_millis(arg(0, 300)), Duration::from_secs(arg(1, 20)));
    let count = u32::try_from(arg(2, 3))?;
    let ca = ClusterCa::create("idle", uuid::Uuid::new_v4())?;
    let handler = Arc::new(Counter::default());
    let (mut servers, mut clients, mut addrs) = (Vec::new(), Vec::new(), BTreeMap::new());
    for node in 1..=count {
        let (name, identity) = (format!("n{node}"), NodeIdentity::create()?);
        let addr = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let cert = ca.issue(&name, NodeId(node), addr, &identity.csr_pem)?;
        let secrets = Arc::new(Secrets::from_pem(&ca.cert_pem, &cert, &identity.key_pem)?);
        let options = ServerOptions {
            addr: SocketAddr::new(addr, 0),
            secrets: Arc::clone(&secrets),
            handler: Arc::clone(&handler) as Arc<dyn Handler>,
        };
        let server = serve(options).await?;
        addrs.insert(NodeId(node), PeerAddr { name, addr: server.addr() });
        servers.push(server);
        clients.push(Peers::new(secrets, PeersOptions::default()));
    }
    for client in &clients {
        client.set(&addrs);
        client.start_beats(Arc::new(Counter::default()), period);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (before, beats) = (cpu(), handler.0.load(Ordering::Relaxed));
    tokio::time::sleep(time).await;
    let (spent, beats) = (cpu() - before, handler.0.load(Ordering::Relaxed) - beats);
    let share = spent.as_secs_f64() / time.as_secs_f64() / f64::from(count) * 100.0;
    println!(
        "{count} nodes, period {} ms: {beats} beats in {} s, {share:.3}% of a core per node, {:.1} us per beat",
        period.as_millis(),
        time.as_secs(),
        spent.as_secs_f64() * 1e6 / beats as f64
    );
    calls(&clients[0]).await
}

/// What a call of Raft costs and how long it takes.
async fn calls(client: &Peers) -> Result<(), Box<dyn Error>> {
    const CALLS: u32 = 2000;
    let call =
        RaftCall { from: 1, instance: 2, kind: RaftKind::Append, payload: Bytes::from_static(&[0; 200]) };
    let (before, start) = (cpu(), std::time::Instant::now());
    for _ in 0..CALLS {
        client.raft(NodeId(2), call.clone(), Duration::from_secs(5)).await?;
    }
    let (spent, took) = (cpu() - before, start.elapsed());
    println!("a call: {:?} of time, {:?} of processor, both ends together", took / CALLS, spent / CALLS);
    Ok(())
}
