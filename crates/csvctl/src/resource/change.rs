//! `csvctl resource add` and `set`. Properties are checked against the type by csvd, everything else by the database.

use super::policy::PolicyArgs;
use super::types;
use crate::admin;
use crate::args::{Names, key_value, names as name_list, unique};
use crate::names::{self, node_ids};
use anyhow::bail;
use csv_cluster::db::{ClusterDb, Command, NewResource, Resource, ResourceChange, ResourceState};
use csv_resource::api::TypeInfo;
use csv_types::config::LocalConfig;

/// Arguments of `csvctl resource add`.
#[derive(Debug, clap::Args)]
pub(crate) struct AddArgs {
    /// Name of the resource, unique in the cluster.
    #[arg(value_name = "RESOURCE")]
    name: String,
    /// Its group.
    #[arg(long, value_name = "GROUP")]
    group: String,
    /// Its type; `csvctl resource types` lists them.
    #[arg(long = "type", value_name = "TYPE")]
    kind: String,
    /// A property; may be repeated. `csvctl resource types TYPE` lists them.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    properties: Vec<(String, String)>,
    /// It stays offline until it is ordered online.
    #[arg(long)]
    offline: bool,
    #[command(flatten)]
    common: CommonArgs,
}

/// Arguments of `csvctl resource set`.
#[derive(Debug, clap::Args)]
pub(crate) struct SetArgs {
    /// Name of the resource.
    #[arg(value_name = "RESOURCE")]
    name: String,
    /// A property and its new value; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    properties: Vec<(String, String)>,
    /// A property that goes back to its default; may be repeated.
    #[arg(long, value_name = "KEY")]
    unset: Vec<String>,
    /// Another group; the resource must be offline.
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Clone, Default, clap::Args)]
struct CommonArgs {
    // Not a doc comment: brackets would be links.
    #[arg(
        long,
        value_name = "EXPR",
        help = "What of its group must be online before it, such as \"[Disk] and ([Address1] or [Address2])\". '' for nothing"
    )]
    depends: Option<String>,
    /// Nodes that may have it, and so its group. '' for all.
    #[arg(long, value_name = "NODE,...", value_parser = name_list)]
    possible: Option<Names>,
    /// A file outside the volumes that follows it to the next node, by its absolute path, or a kernel setting, such as
    /// sysctl:net.core.somaxconn; may be repeated. '' for none.
    #[arg(long = "checkpoint", value_name = "PATH|sysctl:NAME")]
    checkpoints: Vec<String>,
    #[command(flatten)]
    policy: PolicyArgs,
}

impl CommonArgs {
    /// `None` when none is given.
    fn checkpoints(&self) -> Option<Vec<String>> {
        if self.checkpoints.is_empty() {
            return None;
        }
        Some(self.checkpoints.iter().filter(|path| !path.is_empty()).cloned().collect())
    }
}

impl AddArgs {
    fn into_resource(self, db: &ClusterDb) -> anyhow::Result<NewResource> {
        names::group(db, &self.group)?;
        let policy = self.common.policy.applied(&Default::default()).unwrap_or_default();
        let checkpoints = self.common.checkpoints().unwrap_or_default();
        let Names(possible) = self.common.possible.unwrap_or_default();
        Ok(NewResource {
            name: self.name,
            kind: self.kind,
            group: self.group,
            properties: unique(self.properties)?,
            depends: self.common.depends.unwrap_or_default(),
            possible: node_ids(db, &possible)?,
            policy,
            checkpoints,
            want_online: !self.offline,
        })
    }
}

impl SetArgs {
    fn into_change(self, db: &ClusterDb, old: &Resource) -> anyhow::Result<ResourceChange> {
        let mut change = ResourceChange {
            depends: self.common.depends.clone(),
            possible: match &self.common.possible {
                Some(Names(nodes)) => Some(node_ids(db, nodes)?),
                None => None,
            },
            policy: self.common.policy.applied(&old.policy),
            checkpoints: self.common.checkpoints(),
            group: self.group,
            ..ResourceChange::default()
        };
        for (key, value) in unique(self.properties)? {
            change.properties.insert(key, Some(value));
        }
        for key in self.unset {
            if change.properties.contains_key(&key) {
                bail!("{key} is given to --set and to --unset; give it to one of them");
            }
            if !old.properties.contains_key(&key) {
                bail!("{key} is not set; `csvctl resource show {}` shows what is", old.name);
            }
            change.properties.insert(key, None);
        }
        if change == ResourceChange::default() {
            bail!(
                "nothing is to be changed: give at least one option, `csvctl resource set --help` lists them"
            );
        }
        Ok(change)
    }
}

/// `csvctl resource add`.
pub(super) fn add(config: &LocalConfig, args: AddArgs) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let resource = args.into_resource(&db)?;
    let (name, group) = (resource.name.clone(), resource.group.clone());
    let wanted = resource.want_online;
    admin::command(config, &Command::ResourceAdd { resource })?;
    let online = db.groups.get(&group).is_some_and(|group| group.want_online);
    println!(
        "resource {name} is in group {group}; {}",
        match (wanted, online) {
            (false, _) => format!("`csvctl resource online {name}` brings it online"),
            (true, true) => format!("it comes online now, see `csvctl resource show {name}`"),
            (true, false) => format!("`csvctl group online {group}` brings it online with its group"),
        }
    );
    Ok(())
}

/// `csvctl resource set`.
pub(super) fn set(config: &LocalConfig, args: SetArgs) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let old = names::resource(&db, &args.name)?;
    let change = args.into_change(&db, old)?;
    let keys: Vec<String> = change.properties.keys().cloned().collect();
    admin::command(config, &Command::ResourceSet { name: old.name.clone(), change })?;
    // One that has failed is tried again with what it was given.
    let there = match old.status.state {
        ResourceState::Online | ResourceState::OnlinePending | ResourceState::OfflinePending => true,
        ResourceState::Offline | ResourceState::Failed | ResourceState::Unknown => false,
    };
    if there && !keys.is_empty() {
        // Only to say when it takes effect; it is changed already.
        let info = types::ask(config, Some(&old.kind)).ok();
        let later = later(&keys, info.as_ref().and_then(|types| types.first()));
        if !later.is_empty() {
            println!(
                "{later} takes effect when {0} goes online the next time: `csvctl resource offline {0}`, then \
                 `csvctl resource online {0}`",
                old.name
            );
        }
    }
    Ok(())
}

/// Those of the properties that do not take effect at once, where the type is known.
fn later(keys: &[String], info: Option<&TypeInfo>) -> String {
    let Some(info) = info else { return String::new() };
    let live = |key: &&String| info.properties.iter().any(|property| property.names(key) && property.live);
    keys.iter().filter(|key| !live(key)).cloned().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::{Bed, n};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Add {
        #[command(flatten)]
        args: AddArgs,
    }

    #[derive(Debug, Parser)]
    struct Set {
        #[command(flatten)]
        args: SetArgs,
    }

    fn bed() -> Bed {
        let mut bed = Bed::nodes(2);
        bed.group("g", &[("ip", "IPAddress", "")]);
        bed
    }

    fn add(bed: &Bed, words: &[&str]) -> anyhow::Result<NewResource> {
        let words = [&["x", "web", "--group", "g", "--type", "GenericApplication"], words].concat();
        Add::try_parse_from(words)?.args.into_resource(&bed.db)
    }

    fn set(bed: &Bed, words: &[&str]) -> anyhow::Result<ResourceChange> {
        let args = Set::try_parse_from([&["x", "ip"], words].concat())?.args;
        args.into_change(&bed.db, &bed.db.resources["ip"])
    }

    #[test]
    fn a_new_resource_is_what_was_given() {
        let mut bed = bed();
        let made = add(
            &bed,
            &[
                "--set",
                "command=web --port=80",
                "--depends",
                "[ip]",
                "--possible",
                "n2,n1",
                "--checkpoint",
                "/etc/web.conf",
                "--checkpoint",
                "/etc/web.key",
                "--restart-threshold",
                "3",
                "--offline",
            ],
        );
        let made = made.unwrap();
        assert_eq!(made.properties["command"], "web --port=80");
        assert_eq!((made.depends.as_str(), made.possible.as_slice()), ("[ip]", &[n(2), n(1)][..]));
        assert_eq!(made.checkpoints, ["/etc/web.conf", "/etc/web.key"]);
        assert!(!made.want_online && made.policy.restart_threshold == 3);
        bed.ok(Command::ResourceAdd { resource: made });
        let plain = add(&bed, &[]).unwrap();
        assert!(plain.want_online && plain.possible.is_empty() && plain.policy == Default::default());
        let error = |words: &[&str]| add(&bed, words).unwrap_err().to_string();
        assert!(error(&["--possible", "n3"]).contains("nodes: n1, n2"));
        assert!(error(&["--set", "a=1", "--set", "a=2"]).contains("twice"));
        let elsewhere = Add::try_parse_from(["x", "web", "--group", "h", "--type", "T"]).unwrap();
        assert!(elsewhere.args.into_resource(&bed.db).unwrap_err().to_string().contains("groups: g"));
    }

    #[test]
    fn a_change_is_only_what_was_given() {
        let mut bed = bed();
        let change = set(&bed, &["--set", "address=10.0.0.5/24"]).unwrap();
        assert_eq!(
            (change.depends.as_ref(), change.policy.as_ref(), change.possible.as_ref()),
            (None, None, None)
        );
        bed.ok(Command::ResourceSet { name: "ip".into(), change });
        let change =
            set(&bed, &["--unset", "address", "--possible", "", "--depends", "", "--checkpoint", ""]);
        let change = change.unwrap();
        assert_eq!(change.properties["address"], None);
        assert_eq!((change.possible, change.checkpoints), (Some(vec![]), Some(vec![])));
        let policy = set(&bed, &["--restart-delay", "3s"]).unwrap().policy.unwrap();
        assert_eq!((policy.restart_delay_ms, policy.restart_threshold), (3_000, 1));
        let error = |words: &[&str]| set(&bed, words).unwrap_err().to_string();
        assert!(error(&[]).contains("nothing is to be changed"));
        assert!(error(&["--unset", "label"]).contains("label is not set"));
        assert!(error(&["--unset", "address", "--set", "address=x"]).contains("one of them"));
    }

    #[test]
    fn what_takes_effect_later_is_named() {
        let info = csv_resource::types::find("IPAddress", None).unwrap().info();
        let keys = ["address".to_owned(), "label".to_owned()];
        let live = |key: &str| info.properties.iter().any(|of| of.names(key) && of.live);
        let expected: Vec<&str> = ["address", "label"].into_iter().filter(|key| !live(key)).collect();
        assert_eq!(later(&keys, Some(&info)), expected.join(", "));
        assert_eq!(later(&keys, None), "");
        let mut all_live = info.clone();
        all_live.properties.iter_mut().for_each(|property| property.live = true);
        assert_eq!(later(&keys, Some(&all_live)), "");
    }
}
