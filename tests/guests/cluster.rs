//! The product on the guests: its daemon, its cluster, its volume, made as an administrator makes them.

use anyhow::{Context as _, bail, ensure};
use csv_tests::guest::{Rig, Vm};
use csv_tests::lab::Row;
use csv_tests::wait;
use serde::Deserialize;
use std::time::Duration;

pub(crate) const VOLUME: &str = "Volume1";
pub(crate) const MOUNT: &str = "/ClusterStorage/Volume1";
/// A volume's state when it is served.
const ONLINE: &str = "Online";
/// For everything that a cluster of emulated machines comes to by itself.
pub(crate) const CONVERGE: Duration = Duration::from_secs(150);

/// Emulated machines share two processors or less: none may count as silent for being slow.
const SETTINGS: [&str; 3] = ["heartbeat_ms=1000", "recall_ms=5000", "quarantine_failures=0"];

/// A volume in `csvctl volume list --json`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Listed {
    pub(crate) state: String,
    pub(crate) owner: Option<String>,
    pub(crate) epoch: u64,
}

/// csvctl in a guest.
pub(crate) fn ctl(vm: &Vm, args: &str) -> anyhow::Result<String> {
    vm.sh(&format!("timeout 60 /csv/bin/csvctl {args}"))
}

/// Starts the node's daemon, as its init system does after a boot. Its configuration outlives a power cut.
pub(crate) fn start_csvd(vm: &Vm) -> anyhow::Result<()> {
    let config = format!("[local]\nnode = \"{}\"\naddr = \"{}\"\n", vm.name, vm.addr());
    vm.sh(&format!(
        "test -s /etc/csv/csv.toml || {{ printf '%s' '{config}' >/etc/csv/csv.toml; sync; }}
         setsid --fork /csv/bin/csvd >>/csv/own/log/csvd.log 2>&1 </dev/null
         for i in $(seq 300); do test -S /run/csv/csvd.sock && exit 0; sleep 0.1; done; exit 1"
    ))
    .with_context(|| format!("csvd of {} does not start", vm.name))
    .map(drop)
}

/// Makes cluster and volume and waits until every node serves it.
pub(crate) fn create(rig: &Rig) -> anyhow::Result<()> {
    rig.nodes.iter().try_for_each(start_csvd)?;
    let [first, others @ ..] = rig.nodes.as_slice() else { bail!("no node") };
    let settings: String = SETTINGS.iter().map(|setting| format!(" --set {setting}")).collect();
    ctl(first, &format!("cluster create guests{settings}"))?;
    let token = ctl(first, &format!("cluster token --uses {}", others.len()))?;
    for other in others {
        ctl(other, &format!("cluster join {}", token.trim()))?;
    }
    ctl(first, &format!("volume create --lun /dev/sda --name {VOLUME}"))?;
    ctl(first, &format!("volume add {VOLUME}"))?;
    rig.nodes.iter().try_for_each(|node| wait_mode(node, "direct"))
}

/// The volume as a node's database has it.
pub(crate) fn listed(vm: &Vm) -> anyhow::Result<Listed> {
    let text = ctl(vm, "volume list --json")?;
    let list: Vec<Listed> = serde_json::from_str(&text).with_context(|| format!("list: {text}"))?;
    list.into_iter().next().context("there is no volume")
}

/// The node's own row of the volume's state.
pub(crate) fn state(vm: &Vm) -> anyhow::Result<Row> {
    let text = ctl(vm, "volume state --json")?;
    let rows: Vec<Row> = serde_json::from_str(&text).with_context(|| format!("state: {text}"))?;
    rows.into_iter().find(|row| row.node == vm.name).with_context(|| format!("{} has no row", vm.name))
}

/// Waits until a node serves the volume in a mode.
pub(crate) fn wait_mode(vm: &Vm, mode: &str) -> anyhow::Result<()> {
    wait::until(&format!("{} in mode {mode}", vm.name), CONVERGE, || {
        let row = state(vm)?;
        ensure!(row.mode == mode, "it is {} ({})", row.mode, row.reason);
        Ok(Some(()))
    })
}

/// Waits until the volume is online on another node than this one, as a survivor sees it. The new owner.
pub(crate) fn wait_moved(survivor: &Vm, from: &str) -> anyhow::Result<String> {
    wait::until(&format!("{VOLUME} moved away from {from}"), CONVERGE, || {
        let volume = listed(survivor)?;
        let owner = volume.owner.filter(|owner| owner != from && volume.state == ONLINE);
        if owner.is_none() {
            bail!("it is {}", volume.state);
        }
        Ok(owner)
    })
}

/// Waits until these nodes agree on one owner, and only that one says that it coordinates. The owner.
pub(crate) fn wait_one_owner(nodes: &[&Vm]) -> anyhow::Result<String> {
    wait::until("one owner", CONVERGE, || {
        let first = listed(nodes.first().context("no node")?)?;
        let Some(owner) = first.owner.clone() else { bail!("nobody owns it: {first:?}") };
        for node in nodes {
            let (volume, row) = (listed(node)?, state(node)?);
            ensure!(volume == first && volume.state == ONLINE, "{}: {volume:?}, {first:?}", node.name);
            ensure!((row.role == "coordinator") == (node.name == owner), "{owner} owns it; {row:?}");
        }
        Ok(Some(owner))
    })
}
