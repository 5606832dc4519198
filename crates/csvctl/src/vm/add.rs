//! `csvctl vm add`: a group with one virtual machine.

use crate::admin;
use crate::args::{key_value, unique};
use crate::group::{self, Told, policy::PolicyArgs};
use crate::names::{MACHINE, node_id};
use anyhow::{Context, bail};
use csv_cluster::db::{ClusterDb, Command, GroupPolicy, NewResource, ResourcePolicy};
use csv_types::config::LocalConfig;
use std::collections::BTreeMap;
use std::path::Path;

/// Arguments of `csvctl vm add`.
#[derive(Debug, clap::Args)]
pub(crate) struct AddArgs {
    /// Name of the virtual machine and of its group.
    #[arg(value_name = "VM")]
    name: String,
    /// A disk: an image on a volume or a block device, with options behind commas
    /// (format=raw|qcow2, bus=virtio|scsi|sata, readonly=on); may be repeated.
    #[arg(long = "disk", value_name = "PATH[,OPTION...]")]
    disks: Vec<String>,
    /// Memory, in MiB; 1024 without.
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Virtual processors; 1 without.
    #[arg(long, value_name = "COUNT")]
    cpus: Option<u64>,
    /// Any other property, such as nic=tap,bridge=br0; may be repeated. `csvctl resource types VirtualMachine` lists them.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    properties: Vec<(String, String)>,
    /// Node that should have it; the same as --preferred with one node.
    #[arg(long, value_name = "NODE", conflicts_with = "preferred")]
    node: Option<String>,
    /// Start it at once, and wait until it runs.
    #[arg(long)]
    start: bool,
    /// With --start: do not wait until it runs.
    #[arg(long, requires = "start")]
    no_wait: bool,
    #[command(flatten)]
    policy: PolicyArgs,
}

impl AddArgs {
    /// Properties of the machine. Paths count from `dir`.
    fn properties(&self, dir: &Path) -> anyhow::Result<BTreeMap<String, String>> {
        let mut pairs = self.properties.clone();
        for (i, disk) in self.disks.iter().enumerate() {
            let name = if i == 0 { "disk".to_owned() } else { format!("disk{i}") };
            pairs.push((name, absolute(dir, disk)?));
        }
        pairs.extend(self.memory.map(|mib| ("memory_mib".to_owned(), mib.to_string())));
        pairs.extend(self.cpus.map(|cpus| ("cpus".to_owned(), cpus.to_string())));
        let properties = unique(pairs)?;
        if !properties.keys().any(|key| key.starts_with("disk") || key == "kernel") {
            bail!(
                "{} has nothing to start from: give a disk with --disk, or a kernel with --set kernel=PATH",
                self.name
            );
        }
        Ok(properties)
    }

    fn policy(&self, db: &ClusterDb) -> anyhow::Result<GroupPolicy> {
        let mut policy = self.policy.clone().applied(db, GroupPolicy::default())?;
        if let Some(node) = &self.node {
            policy.preferred = vec![node_id(db, node)?];
        }
        Ok(policy)
    }
}

/// csvd and every node take the path as it is.
fn absolute(dir: &Path, disk: &str) -> anyhow::Result<String> {
    if disk.starts_with('/') {
        return Ok(disk.to_owned());
    }
    if disk.is_empty() || disk.starts_with(',') {
        bail!("--disk \"{disk}\" names no file: give the path of an image or a block device");
    }
    let path = dir.join(disk);
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Makes both or nothing.
pub(super) fn run(config: &LocalConfig, args: AddArgs, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let name = args.name.clone();
    let properties = args.properties(&std::env::current_dir()?)?;
    let policy = args.policy(&db)?;
    admin::command(config, &Command::GroupAdd { name: name.clone(), policy })?;
    let resource = NewResource {
        name: name.clone(),
        kind: MACHINE.to_owned(),
        group: name.clone(),
        properties,
        depends: String::new(),
        possible: Vec::new(),
        policy: ResourcePolicy::default(),
        checkpoints: Vec::new(),
        want_online: true,
    };
    if let Err(error) = admin::command(config, &Command::ResourceAdd { resource }) {
        let undone = admin::command(config, &Command::GroupRemove { name: name.clone() });
        let left = match undone {
            Ok(()) => "nothing was added".to_owned(),
            Err(why) => format!(
                "its group is there and could not be removed again ({why:#}); look with `csvctl group show {name}`, and remove \
                 it with `csvctl group remove {name}`"
            ),
        };
        return Err(error.context(format!("the virtual machine {name} cannot be made ({left})")));
    }
    if args.start {
        let told = Told { json, machine: Some(&name) };
        return group::online(config, &name, args.no_wait, told);
    }
    println!("virtual machine {name} is there; `csvctl vm start {name}` starts it");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::{Bed, n};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: AddArgs,
    }

    fn parse(words: &[&str]) -> Result<AddArgs, clap::Error> {
        Cli::try_parse_from([&["x", "web"], words].concat()).map(|cli| cli.args)
    }

    fn properties(words: &[&str]) -> anyhow::Result<BTreeMap<String, String>> {
        parse(words)?.properties(Path::new("/ClusterStorage/Volume1"))
    }

    #[test]
    fn disks_are_numbered_and_sizes_named() {
        let made = properties(&[
            "--disk",
            "/dev/mapper/a,bus=scsi",
            "--disk",
            "web.qcow2,format=qcow2",
            "--memory",
            "2048",
            "--cpus",
            "2",
            "--set",
            "nic=tap,bridge=br0",
        ]);
        let made: Vec<(String, String)> = made.unwrap().into_iter().collect();
        let expected = [
            ("cpus", "2"),
            ("disk", "/dev/mapper/a,bus=scsi"),
            ("disk1", "/ClusterStorage/Volume1/web.qcow2,format=qcow2"),
            ("memory_mib", "2048"),
            ("nic", "tap,bridge=br0"),
        ];
        assert_eq!(made, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert!(properties(&["--set", "kernel=/boot/vmlinuz"]).is_ok());
    }

    #[test]
    fn what_makes_no_machine_is_refused() {
        let error = |words: &[&str]| properties(words).unwrap_err().to_string();
        assert!(error(&[]).contains("--disk"));
        assert!(error(&["--disk", ""]).contains("names no file"));
        assert!(
            error(&["--disk", "/a", "--memory", "1", "--set", "memory_mib=2"])
                .contains("memory_mib is given twice")
        );
        assert!(error(&["--disk", "/a", "--set", "disk=/b"]).contains("disk is given twice"));
        assert!(parse(&["--disk", "/a", "--node", "n1", "--preferred", "n2"]).is_err());
        assert!(parse(&["--disk", "/a", "--no-wait"]).is_err());
    }

    #[test]
    fn the_type_takes_what_is_made() {
        let made = properties(&["--disk", "web.qcow2", "--memory", "512", "--cpus", "1"]).unwrap();
        let machine = csv_resource::types::find(MACHINE, None).unwrap();
        csv_resource::api::check_properties(&machine.info(), &made).unwrap();
        machine.check(&made).unwrap();
    }

    #[test]
    fn node_is_its_preferred_owner() {
        let bed = Bed::nodes(2);
        let policy = |words: &[&str]| parse(words).unwrap().policy(&bed.db);
        assert_eq!(policy(&["--node", "n2", "--priority", "low"]).unwrap().preferred, [n(2)]);
        assert_eq!(policy(&[]).unwrap(), GroupPolicy::default());
        assert!(policy(&["--node", "n3"]).unwrap_err().to_string().contains("nodes: n1, n2"));
    }
}
