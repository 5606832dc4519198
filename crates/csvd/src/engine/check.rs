//! What this node answers when the cluster is checked (`csvctl cluster validate`), and how it asks the others.
//!
//! A check changes nothing: it reads labels, and sends pings over the connections that are there anyhow. A node that does
//! not answer in time is a fact, not an error.

use super::Engine;
use super::lifecycle::VERSION;
use bytes::Bytes;
use csv_cluster::db::FEATURE_LEVEL;
use csv_lun::{Lun, LunOptions};
use csv_net::{Refusal, RefusalKind};
use csv_types::{NodeId, VolumeId};
use csvd::check::{ClusterFacts, LinkFacts, LunFacts, NodeFacts, NodeRequest, PeerFacts, Pong, VolumeFacts};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pings of which the best counts.
const PINGS: usize = 5;
const PING_LIMIT: Duration = Duration::from_secs(2);
/// A node asks all others itself, and reads labels.
const CHECK_LIMIT: Duration = Duration::from_secs(20);

impl Engine {
    /// Answers another node.
    pub(crate) async fn answer_node(self: &Arc<Self>, request_json: &[u8]) -> Result<Bytes, Refusal> {
        let failed = |text: String| Refusal::new(RefusalKind::Failed, text);
        let request: NodeRequest = serde_json::from_slice(request_json)
            .map_err(|error| failed(format!("this csvd does not know the request: {error}")))?;
        let json = |answer: Result<Vec<u8>, serde_json::Error>| {
            answer.map(Bytes::from).map_err(|error| failed(error.to_string()))
        };
        match request {
            NodeRequest::Ping => json(serde_json::to_vec(&Pong { unix_ms: super::unix_ms() })),
            NodeRequest::Group { request } => {
                let request = serde_json::from_value(request)
                    .map_err(|error| failed(format!("this csvd does not know the request: {error}")))?;
                json(serde_json::to_vec(&self.answer_about_groups(request).await))
            }
            NodeRequest::Check => json(serde_json::to_vec(&self.facts().await)),
            NodeRequest::SeesWitness { name, id, device } => {
                let engine = self.clone();
                let seen = tokio::task::spawn_blocking(move || engine.sees_witness(&name, id, &device));
                json(serde_json::to_vec(&seen.await.map_err(|error| failed(error.to_string()))?))
            }
        }
    }

    /// This node, and what every other one answers.
    pub(crate) async fn check_cluster(self: &Arc<Self>) -> ClusterFacts {
        let others = self.others();
        let mut asked = tokio::task::JoinSet::new();
        for (node, name) in others {
            let engine = self.clone();
            asked.spawn(async move {
                let facts = engine.ask_node::<NodeFacts>(node, NodeRequest::Check, CHECK_LIMIT).await;
                (name, facts)
            });
        }
        let own = self.facts().await;
        let mut others = asked.join_all().await;
        others.sort_by(|a, b| a.0.cmp(&b.0));
        ClusterFacts { asked: own, others }
    }

    fn others(&self) -> Vec<(NodeId, String)> {
        let db = self.db.read();
        let others = db.nodes.values().filter(|node| node.id != self.me());
        others.map(|node| (node.id, node.name.clone())).collect()
    }

    pub(super) async fn ask_node<T: serde::de::DeserializeOwned>(
        &self,
        node: NodeId,
        request: NodeRequest,
        limit: Duration,
    ) -> Result<T, String> {
        let json = to_bytes(&request)?;
        let answer = self.peers().admin(node, json, limit).await.map_err(|error| error.to_string())?;
        serde_json::from_slice(&answer).map_err(|error| format!("its answer is not understood: {error}"))
    }

    async fn facts(self: &Arc<Self>) -> NodeFacts {
        let mut pinged = tokio::task::JoinSet::new();
        for (node, name) in self.others() {
            let engine = self.clone();
            pinged.spawn(async move { PeerFacts { node, name, link: engine.ping(node).await } });
        }
        let known: Vec<(String, VolumeId)> =
            self.db.read().volumes.values().map(|volume| (volume.name.clone(), volume.id)).collect();
        let device = |name: &str| self.volumes.find(name).and_then(|agent| agent.device.clone());
        let volumes: Vec<(String, VolumeId, Option<PathBuf>)> = known
            .into_iter()
            .map(|(name, id)| {
                let device = device(&name);
                (name, id, device)
            })
            .collect();
        let read = move || (volumes.into_iter().map(volume_facts).collect::<Vec<_>>(), samba());
        // A LUN without a path may take long; the caller's limit ends the wait.
        let (volumes, samba) = tokio::task::spawn_blocking(read).await.unwrap_or_default();
        let mut peers = pinged.join_all().await;
        peers.sort_by_key(|peer| peer.node);
        NodeFacts {
            node: self.me(),
            name: self.identity.name.clone(),
            version: VERSION.to_owned(),
            feature_level: FEATURE_LEVEL,
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            samba,
            cut_off: self.cut_off(),
            applied: self.raft().metrics().applied.unwrap_or(0),
            volumes,
            peers,
        }
    }

    async fn ping(&self, node: NodeId) -> LinkFacts {
        let mut best: Option<(u64, i64)> = None;
        let mut worst = 0;
        for _ in 0..PINGS {
            let (at, sent_unix_ms) = (Instant::now(), super::unix_ms());
            let pong: Pong = match self.ask_node(node, NodeRequest::Ping, PING_LIMIT).await {
                Ok(pong) => pong,
                Err(why) => return LinkFacts::Bad(why),
            };
            let rtt_us = u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX);
            worst = rtt_us.max(worst);
            let middle = sent_unix_ms.saturating_add(rtt_us / 2000);
            let ahead = i64::try_from(pong.unix_ms).unwrap_or(0) - i64::try_from(middle).unwrap_or(0);
            if best.is_none_or(|(rtt, _)| rtt_us < rtt) {
                best = Some((rtt_us, ahead));
            }
        }
        let (rtt_us, clock_ahead_ms) = best.unwrap_or_default();
        LinkFacts::Good { rtt_us, rtt_us_max: worst, clock_ahead_ms }
    }
}

/// A request as it goes over the network.
pub(crate) fn to_bytes(request: &impl Serialize) -> Result<Bytes, String> {
    serde_json::to_vec(request).map(Bytes::from).map_err(|error| error.to_string())
}

fn samba() -> Option<String> {
    let output = std::process::Command::new("smbd").arg("--version").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn volume_facts((volume, id, device): (String, VolumeId, Option<PathBuf>)) -> VolumeFacts {
    let lun = device.as_deref().map(|device| lun_facts(device, id));
    VolumeFacts { volume, device: device.map(|device| device.display().to_string()), lun }
}

fn lun_facts(device: &Path, id: VolumeId) -> LunFacts {
    let label = Lun::open(device, LunOptions::default())
        .map_err(|error| error.to_string())
        .and_then(|lun| csv_lun::read_label(&lun).map_err(|error| error.to_string()));
    match label {
        Ok(Some(label)) if label.volume_id == id => LunFacts::Right,
        Ok(Some(label)) => LunFacts::Other(format!("volume {} ({})", label.name, label.volume_id)),
        Ok(None) => LunFacts::Other("no csvfs volume".to_owned()),
        Err(error) => LunFacts::Failed(error),
    }
}
