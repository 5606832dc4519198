//! The lab's network: a bridge in a namespace of the lab, a namespace per node, a veth pair between.
//!
//! Nothing of it is in the host's own namespace, so labs cannot collide with the host or with each other.
//! A partition gives the two nodes a neighbour entry with a hardware address that nobody has: packets vanish
//! without an error, as with a dead switch, and no link goes down.

use super::spec::{Lab, LabNode};
use super::sys::{ip, run};
use std::path::Path;

/// Nobody's hardware address.
const NOWHERE: &str = "02:00:00:00:00:fe";

/// Makes namespaces, bridge and links.
pub(super) fn create(lab: &Lab) -> anyhow::Result<()> {
    let ns = lab.netns();
    ip(&format!("netns add {ns}"))?;
    ip(&format!("-n {ns} link set lo up"))?;
    ip(&format!("-n {ns} link add br0 type bridge"))?;
    ip(&format!("-n {ns} link set br0 up"))?;
    for node in &lab.nodes {
        let (name, node_ns, addr) = (&node.name, lab.node_netns(&node.name), lab.addr(node));
        ip(&format!("netns add {node_ns}"))?;
        ip(&format!("-n {node_ns} link set lo up"))?;
        ip(&format!("-n {ns} link add {name} type veth peer name eth0 netns {node_ns}"))?;
        ip(&format!("-n {ns} link set {name} master br0 up"))?;
        ip(&format!("-n {node_ns} addr add {addr}/24 dev eth0"))?;
        ip(&format!("-n {node_ns} link set eth0 up"))?;
    }
    Ok(())
}

/// The node's machine is switched on: it has its own address and no other, whatever resources had given it before.
pub(super) fn switch_on(lab: &Lab, node: &LabNode) -> anyhow::Result<()> {
    let (ns, own) = (lab.node_netns(&node.name), format!("{}/24", lab.addr(node)));
    let shown = ip(&format!("-n {ns} -o addr show dev eth0 scope global"))?;
    for addr in shown.lines().filter_map(|line| line.split_whitespace().nth(3)) {
        if addr != own {
            ip(&format!("-n {ns} addr del {addr} dev eth0"))?;
        }
    }
    ip(&format!("-n {} link set {} up", lab.netns(), node.name)).map(drop)
}

/// The node's machine has no power: its end of the network is dead, so the kernel, which lives on, does not answer for it.
pub(super) fn switch_off(lab: &Lab, node: &LabNode) -> anyhow::Result<()> {
    ip(&format!("-n {} link set {} down", lab.netns(), node.name)).map(drop)
}

/// Cuts `node` off from `others`, both ways.
pub(super) fn partition(lab: &Lab, node: &LabNode, others: &[&LabNode]) -> anyhow::Result<()> {
    for other in others {
        for (here, there) in [(node, *other), (*other, node)] {
            let (ns, addr) = (lab.node_netns(&here.name), lab.addr(there));
            ip(&format!("-n {ns} neigh replace {addr} lladdr {NOWHERE} dev eth0 nud permanent"))?;
        }
    }
    Ok(())
}

/// Undoes every partition.
pub(super) fn heal(lab: &Lab) -> anyhow::Result<()> {
    for node in &lab.nodes {
        let ns = lab.node_netns(&node.name);
        for line in ip(&format!("-n {ns} neigh show nud permanent dev eth0"))?.lines() {
            if let (Some(addr), true) = (line.split(' ').next(), line.contains(NOWHERE)) {
                ip(&format!("-n {ns} neigh del {addr} dev eth0"))?;
            }
        }
    }
    Ok(())
}

/// Namespaces of the lab of this name that are there, whatever its state file says.
pub(super) fn namespaces(lab: &str) -> Vec<String> {
    let own = format!("csv-{lab}");
    let prefix = format!("{own}-n");
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| *name == own || name.strip_prefix(&prefix).is_some_and(is_number))
        .collect()
}

/// Removes a namespace by name and, first, its links: they would live as long as anything holds the namespace.
pub(super) fn remove(ns: &str) -> anyhow::Result<()> {
    if let Ok(links) = ip(&format!("-n {ns} -o link show type veth")) {
        for name in links.lines().filter_map(|line| line.split([':', '@']).nth(1)) {
            // The other end may have taken it along already.
            let _ = run("ip", &["-n", ns, "link", "del", name.trim()]);
        }
    }
    ip(&format!("netns del {ns}")).map(drop)
}

/// Inode number of a named namespace, which tells it apart from any other that exists.
pub(super) fn inode(ns: &str) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(Path::new("/run/netns").join(ns)).ok().map(|meta| meta.ino())
}
