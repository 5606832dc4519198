//! Making a disk witness, and changing which witness there is.
//!
//! A new witness has the voter number of the one before and an empty database, so it may come in only when the former one is no
//! member any more: otherwise one voter could vote twice. The leader sees to that ([`Engine::give`]), and the database
//! refuses to go from one witness to another directly.

use super::driver::find;
use super::lun::{Region, key_of, voter};
use crate::engine::Engine;
use crate::engine::propose::Failed;
use anyhow::{Context, Result, bail};
use csv_cluster::db::{Command, NodeState, Witness};
use csv_cluster::quorum::VoterId as Voter;
use csv_lun::reservation::Reservations;
use csv_lun::witness as records;
use csv_ondisk::WitnessHeader;
use csv_raft::storage::blocks;
use csv_types::NodeId;
use csvd::check::NodeRequest;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

const LIMIT: Duration = Duration::from_secs(30);
/// For another node to look for the LUN.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

impl Engine {
    /// Makes a disk witness on a device of this node and gives it to the cluster. Returns which nodes cannot see it, in words.
    pub(crate) async fn make_disk_witness(
        self: &Arc<Self>,
        device: PathBuf,
        name: String,
        force: bool,
    ) -> Result<Vec<String>> {
        self.no_witness_yet()?;
        let header = WitnessHeader {
            witness_id: Uuid::new_v4(),
            cluster_id: self.identity.cluster_id,
            name: name.clone(),
            created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs()),
        };
        let (made, key) = (header.clone(), key_of(self.identity.cluster_id, self.me()));
        let at = device.clone();
        tokio::task::spawn_blocking(move || format(&at, &made, key, force))
            .await
            .context("making the witness was broken off")??;
        let warnings = self.who_cannot_see(&name, header.witness_id, &device).await;
        let witness = Witness::Disk { name, lun_id: header.witness_id, device: device.display().to_string() };
        self.set_witness(witness).await?;
        Ok(warnings)
    }

    pub(crate) fn no_witness_yet(&self) -> Result<()> {
        let witness = self.db.read().quorum.witness.clone();
        if witness != Witness::None {
            bail!("the cluster has the {witness}; take it away first with `csvctl quorum set --no-witness`");
        }
        Ok(())
    }

    /// Puts another witness into the database.
    pub(crate) async fn set_witness(&self, witness: Witness) -> Result<(), Failed> {
        let mut config = self.db.read().quorum.clone();
        config.witness = witness;
        self.propose(Command::QuorumSet { config }, LIMIT).await.map(drop)
    }

    /// Can this node find a disk witness? Why not, if not.
    pub(crate) fn sees_witness(&self, name: &str, id: Uuid, device: &Path) -> Option<String> {
        find(&self.config, name, id, device).err().map(|error| format!("{error:#}"))
    }

    async fn who_cannot_see(&self, name: &str, id: Uuid, device: &Path) -> Vec<String> {
        let others: Vec<(NodeId, String, NodeState)> = {
            let db = self.db.read();
            let nodes = db.nodes.values().filter(|node| node.id != self.me());
            nodes.map(|node| (node.id, node.name.clone(), node.state)).collect()
        };
        let mut warnings: Vec<String> = self
            .sees_witness(name, id, device)
            .map(|why| format!("{}: {why}", self.identity.name))
            .into_iter()
            .collect();
        let request = NodeRequest::SeesWitness { name: name.to_owned(), id, device: device.to_owned() };
        let json = serde_json::to_vec(&request).unwrap_or_default();
        for (node, called, state) in others {
            if !matches!(state, NodeState::Up | NodeState::Isolated) {
                warnings.push(format!("{called} is not up and was not asked"));
                continue;
            }
            match self.peers().admin(node, json.clone().into(), LOOK_LIMIT).await {
                Ok(answer) => match serde_json::from_slice::<Option<String>>(&answer) {
                    Ok(None) => {}
                    Ok(Some(why)) => warnings.push(format!("{called}: {why}")),
                    Err(error) => {
                        warnings.push(format!("{called} gave no answer that is understood: {error}"))
                    }
                },
                Err(error) => warnings.push(format!("{called} could not be asked: {error}")),
            }
        }
        warnings
    }

    /// May a new witness come in? Only when this leader's own log has no membership with one.
    pub(crate) fn check_new_witness(&self, command: &Command) -> Result<(), String> {
        let Command::QuorumSet { config } = command else { return Ok(()) };
        if config.witness == Witness::None || config.witness == self.db.read().quorum.witness {
            return Ok(());
        }
        if self.raft().metrics().nodes.contains_key(&Voter::WITNESS.0) {
            return Err("the former witness is still a member".to_owned());
        }
        Ok(())
    }
}

/// Everything on the LUN; the header last.
fn format(device: &Path, header: &WitnessHeader, key: u64, force: bool) -> Result<()> {
    check_reservations(device, key, force)?;
    let lun = Arc::new(records::prepare(device, force)?);
    let mut region = Region { lun: lun.clone(), revoked: None, failed: Arc::default() };
    blocks::format(&mut region, voter(header.cluster_id))?;
    Ok(records::finish(&lun, header)?)
}

/// Tries on the LUN what the witness needs: to be held by one node, and that this can be seen.
fn check_reservations(device: &Path, key: u64, force: bool) -> Result<()> {
    let reservations = Reservations::open(device)?;
    let kind = reservations.exclusive_type();
    let held = reservations.read_reservation().with_context(|| {
        format!("{} cannot be a disk witness: it does not show its reservations", device.display())
    })?;
    if let Some(holder) = held
        && !force
    {
        bail!(
            "{} is reserved (key {:#x}, {}); nothing was changed. If whoever did that is gone, repeat with --force",
            device.display(),
            holder.key,
            holder.kind
        );
    }
    reservations.register_ignore(key)?;
    let tried = match held {
        Some(holder) if holder.key != key => reservations.preempt(key, holder.key, kind, true).map(drop),
        Some(_) => Ok(()),
        None => reservations.reserve(key, kind),
    };
    let seen = tried.and_then(|()| reservations.read_reservation());
    let given_back = reservations.unregister(key);
    if seen?.is_none_or(|holder| holder.key != key) {
        bail!("{} cannot be a disk witness: a reservation does not stay on it", device.display());
    }
    Ok(given_back?)
}
