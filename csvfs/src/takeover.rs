//! What happens between "this node is to coordinate the volume" and a coordinator that serves: the label is checked,
//! nobody else may have the file system mounted, the epoch begins, the file system is mounted.
//!
//! Whatever fails leaves nothing mounted; the epoch may be used up.

use crate::client::VolumeClient;
use crate::heartbeat::Heartbeat;
use anyhow::{Context, Result, bail};
use csv_coordinator::{Coordinator, FsKind};
use csv_lun::{Lun, LunOptions};
use csv_ondisk::Label;
use csv_types::admin::{Answer, Request, TakeOrder};
use csv_types::config::{Config, VolumeConfig};
use csv_types::{Epoch, NodeId};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Heartbeat periods for which a label that says "in use" is watched.
const HEARTBEATS_WATCHED: u32 = 3;
/// How long the cluster has to fence a node before its lease is waited out.
const FENCE_LIMIT: Duration = Duration::from_secs(10);

/// Opens the volume's LUN, which must carry the label of this volume and cluster.
pub(crate) fn open_labelled(config: &Config, volume: &VolumeConfig, path: &Path) -> Result<Arc<Lun>> {
    let lun = Lun::open(path, LunOptions::default())?;
    let label = csv_lun::label::read_label(&lun)?.with_context(|| {
        format!(
            "{} carries no csvfs volume; make one with `csvctl volume create --lun {} --name {}`",
            path.display(),
            path.display(),
            volume.name
        )
    })?;
    if label.cluster_id != config.cluster.id {
        bail!(
            "{} belongs to another cluster (id {}); this cluster is {}. If that cluster is gone, make the volume \
             again with `csvctl volume create --force`",
            path.display(),
            label.cluster_id,
            config.cluster.id
        );
    }
    if label.name != volume.name {
        bail!(
            "{} is volume {}, not {}; correct [local.luns] in /etc/csv/csv.toml of this node and start csvd again",
            path.display(),
            label.name,
            volume.name
        );
    }
    Ok(Arc::new(lun))
}

/// What a take-over is made of.
pub(crate) struct Takeover<'a> {
    pub(crate) config: &'a Config,
    pub(crate) volume: &'a VolumeConfig,
    pub(crate) client: &'a Arc<VolumeClient>,
    pub(crate) lun: &'a Arc<Lun>,
    pub(crate) heartbeat: &'a Heartbeat,
}

impl Takeover<'_> {
    /// Carries the order out. The heartbeat goes on afterwards, unless it fails: then nothing is mounted.
    pub(crate) fn run(&self, order: &TakeOrder) -> Result<Arc<Coordinator>> {
        let taken = self.mount(order);
        if taken.is_err() {
            self.heartbeat.end();
        }
        taken
    }

    fn mount(&self, order: &TakeOrder) -> Result<Arc<Coordinator>> {
        let name = &self.volume.name;
        let me = self.client.node;
        let device = self.volume.lun.clone().context("no LUN")?;
        if let Some(user) = csv_lun::is_mounted(&device)? {
            bail!("{} is in use: {user}; end that first, csvfs mounts it itself", device.display());
        }
        let label = self.label()?;
        if label.in_use && label.owner != me && !order.certain {
            self.refuse_in_use_elsewhere(&label, order)?;
        }
        {
            let _one = WRITING.lock();
            csv_lun::label::begin_epoch(self.lun, me, order.epoch)?;
        }
        self.heartbeat.begin(order.epoch);
        // What this node's page cache knows of the LUN is older than what other coordinators wrote.
        self.lun.drop_page_cache()?;
        let unsynced_lost = self.unsynced_lost(&label)?;
        if label.in_use && order.certain && label.fs == csv_ondisk::FsKind::Ext4 {
            // The kernel would wait 11 seconds to see what the fence has made certain.
            csv_lun::format::clear_mmp(&device)?;
        }
        let (events, orders) = (self.client.events.clone(), order);
        let options = csv_coordinator::Options {
            volume_name: name.clone(),
            volume_id: label.volume_id.0,
            epoch: order.epoch,
            device,
            fs_kind: match label.fs {
                csv_ondisk::FsKind::Ext4 => FsKind::Ext4,
                csv_ondisk::FsKind::Xfs => FsKind::Xfs,
            },
            read_only: false,
            unsynced_lost,
            lease_ms: self.config.cluster.lease_ms,
            recall_ms: self.config.cluster.recall_ms,
            limits: csv_coordinator::Limits::default(),
            nodes: orders.nodes.iter().map(|node| (node.id, node.name.clone())).collect(),
            gone: orders.gone.clone(),
            redirect_all: orders.redirect_all,
            redirect_nodes: orders.redirect_nodes.clone(),
            maintenance: orders.maintenance,
            own_node: me,
            on_event: Arc::new(move |kind, message| events.report(kind, message)),
            fence: self.fence(order.epoch),
            confirm: self.confirm(order.epoch),
        };
        Coordinator::start(options).with_context(|| format!("volume {name} cannot be taken"))
    }

    fn label(&self) -> Result<Label> {
        csv_lun::label::read_label(self.lun)?.context("the LUN has no label any more")
    }

    /// Watches the heartbeat in the label when another node has the volume in use by its own account: the first guard
    /// for every file system, before ext4's `mmp`.
    fn refuse_in_use_elsewhere(&self, seen: &Label, order: &TakeOrder) -> Result<()> {
        std::thread::sleep(csv_lun::label::HEARTBEAT_PERIOD * HEARTBEATS_WATCHED);
        let now = self.label()?;
        if (now.heartbeat, now.epoch) != (seen.heartbeat, seen.epoch) {
            let name = order.nodes.iter().find(|node| node.id == now.owner);
            let name = name.map_or_else(|| now.owner.to_string(), |node| node.name.clone());
            bail!(
                "volume {0} is mounted on node {name} right now (epoch {1}); stop csvd there, or its \
                 csvfs if csvd is gone, then `csvctl volume online {0}` has it taken again",
                now.name,
                now.epoch
            );
        }
        Ok(())
    }

    /// Did the last ownership end without writing back what was not synced? See [`may_have_lost`].
    fn unsynced_lost(&self, label: &Label) -> Result<bool> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let note = mount_note(self.config, &self.volume.name);
        let same_boot = !boot.is_empty() && std::fs::read_to_string(&note).is_ok_and(|noted| noted == boot);
        let only_killed = label.owner == self.client.node && same_boot;
        let lost = may_have_lost(csv_lun::probe::ext4_needs_recovery(self.lun)?, label.in_use, only_killed);
        std::fs::write(&note, boot).with_context(|| format!("cannot write {}", note.display()))?;
        Ok(lost)
    }

    /// The label can be written by whoever owns the volume, and by nobody else.
    fn confirm(&self, epoch: Epoch) -> csv_coordinator::Confirm {
        let (lun, client) = (self.lun.clone(), self.client.clone());
        Arc::new(move || match beat(&lun, epoch) {
            Ok(()) => true,
            Err(error) => {
                client.events.report("disk-lost", format!("nobody is answered here any more: {error}"));
                if let csv_lun::LabelIoError::Lun(lost) = &error
                    && matches!(client.direct_failed(lost), Ok(()))
                {
                    return false;
                }
                !matches!(error, csv_lun::LabelIoError::Stale { .. })
            }
        })
    }

    /// The majority decides who is fenced, so csvd is asked.
    fn fence(&self, epoch: Epoch) -> csv_coordinator::Fence {
        let socket = self.config.local.run_dir.join("csvd.sock");
        let (volume, events) = (self.volume.name.clone(), self.client.events.clone());
        Arc::new(move |node: NodeId| {
            let reason = "it did not give back what it was lent".to_owned();
            let request = Request::Fence { volume: volume.clone(), epoch, node, reason };
            match ask_csvd(&socket, &request) {
                Ok(()) => true,
                Err(error) => {
                    let text = format!("node {node} cannot be fenced: {error:#}; its lease has to run out");
                    events.report("fence", text);
                    false
                }
            }
        })
    }
}

/// ext4 tells by its superblock that its journal was not written back, XFS does not. Neither tells that data could not be
/// written: that label stays in use, as after any end that was not in good order. Only a csvfs that was killed (same node,
/// same boot: the kernel has unmounted and written back) has lost nothing; it is told from a power cut by a note of the
/// boot. Whatever is not certain counts as lost.
fn may_have_lost(ext4_needs_recovery: Option<bool>, in_use: bool, only_killed: bool) -> bool {
    ext4_needs_recovery == Some(true) || (in_use && !only_killed)
}

/// The label has one writer at a time.
static WRITING: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// Counts the heartbeat in the label up.
pub(crate) fn beat(lun: &Lun, epoch: Epoch) -> std::result::Result<(), csv_lun::LabelIoError> {
    let _one = WRITING.lock();
    csv_lun::label::beat(lun, epoch).map(drop)
}

/// Marks the volume as unused in the label.
pub(crate) fn mark_unused(lun: &Lun, epoch: Epoch) -> std::result::Result<(), csv_lun::LabelIoError> {
    let _one = WRITING.lock();
    csv_lun::label::mark_unused(lun, epoch)
}

/// Where this node notes that it has the volume mounted, and since which boot.
pub(crate) fn mount_note(config: &Config, volume: &str) -> PathBuf {
    config.local.state_dir.join(format!("{volume}.mounted"))
}

fn ask_csvd(socket: &Path, request: &Request) -> Result<()> {
    let mut stream = UnixStream::connect(socket).context("csvd is not running")?;
    stream.set_read_timeout(Some(FENCE_LIMIT))?;
    stream.set_write_timeout(Some(FENCE_LIMIT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("csvd does not answer")?;
    match serde_json::from_str(&answer).context("csvd's answer is not understood")? {
        Answer::Ok => Ok(()),
        Answer::Error { message } => bail!(message),
        other @ (Answer::Role { .. }
        | Answer::Cluster { .. }
        | Answer::State { .. }
        | Answer::Map { .. }
        | Answer::Events { .. }) => {
            bail!("csvd answered {other:?}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_end_in_good_order_or_a_kill_has_lost_nothing() {
        for ext4 in [Some(false), None] {
            assert!(!may_have_lost(ext4, false, false), "handed over");
            assert!(!may_have_lost(ext4, true, true), "csvfs was killed, on this node and in this boot");
            assert!(may_have_lost(ext4, true, false), "a sync failed, or the end is not known");
        }
        for (in_use, only_killed) in [(false, false), (true, true), (true, false)] {
            assert!(may_have_lost(Some(true), in_use, only_killed), "the journal was not written back");
        }
    }
}
