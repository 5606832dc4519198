//! `csvctl resource online` and `offline`.

use crate::admin;
use crate::names;
use crate::wait::{self, Goal, Watch};
use anyhow::{Context, bail};
use csv_cluster::db::{Applied, ClusterDb, Command, Group, Resource, ResourceState};
use csv_types::config::LocalConfig;

fn find<'a>(db: &'a ClusterDb, name: &str) -> anyhow::Result<(&'a Resource, &'a Group)> {
    let resource = names::resource(db, name)?;
    Ok((resource, names::group(db, &resource.group)?))
}

/// Orders a resource online and waits for it.
pub(crate) fn online(config: &LocalConfig, name: &str, no_wait: bool, json: bool) -> anyhow::Result<()> {
    let mut db = admin::database(config)?;
    if must_go_first(find(&db, name)?) {
        db = take_offline(config, &db, name)?;
    }
    let (_, group) = find(&db, name)?;
    let applied = admin::give(config, &Command::ResourceOnline { name: name.to_owned() })?;
    if no_wait {
        return Ok(());
    }
    if !group.want_online {
        bail!(
            "{name} is to be online from now on when its group is, but group {0} is to be offline; \
             `csvctl group online {0}` brings both online",
            group.name
        );
    }
    let goal = Goal::ResourceOnline(name.to_owned());
    finish(config, Watch::new(&db, group, goal, applied != Applied::Unchanged), name, json)
}

/// Has it failed, so that it is tried again only when it is ordered afresh? The order to have it online is there
/// already, and would change nothing; with a group that was given up it does.
fn must_go_first((resource, group): (&Resource, &Group)) -> bool {
    resource.want_online
        && resource.status.state == ResourceState::Failed
        && group.owner.is_some()
        && group.given_up.is_none()
}

/// Its owner lets a resource that has failed be.
fn take_offline(config: &LocalConfig, db: &ClusterDb, name: &str) -> anyhow::Result<ClusterDb> {
    let (_, group) = find(db, name)?;
    let applied = admin::give(config, &Command::ResourceOffline { name: name.to_owned() })?;
    let goal = Goal::ResourceOffline(name.to_owned());
    wait::until(config, Watch::new(db, group, goal, applied != Applied::Unchanged)).with_context(|| {
        format!("{name} had failed, and what is left of it cannot be taken offline to start it afresh; it is to be offline now")
    })
}

/// Orders a resource offline and waits for it.
pub(crate) fn offline(config: &LocalConfig, name: &str, no_wait: bool, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let (_, group) = find(&db, name)?;
    let applied = admin::give(config, &Command::ResourceOffline { name: name.to_owned() })?;
    if no_wait {
        return Ok(());
    }
    let goal = Goal::ResourceOffline(name.to_owned());
    finish(config, Watch::new(&db, group, goal, applied != Applied::Unchanged), name, json)
}

fn finish(config: &LocalConfig, watch: Watch, name: &str, json: bool) -> anyhow::Result<()> {
    let db = wait::until(config, watch.clone())?;
    wait::notes(&db, &watch);
    let resource = names::resource(&db, name)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&super::show::row(&db, resource))?);
    } else {
        let node =
            super::show::node(&db, resource).filter(|_| resource.status.state != ResourceState::Offline);
        let on = node.map_or_else(String::new, |node| format!(" on {node}"));
        println!("resource {name} is {}{on}", resource.status.state);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;
    use csv_cluster::db::GroupState;

    #[test]
    fn only_what_has_failed_under_a_standing_order_goes_offline_first() {
        let mut bed = Bed::nodes(2);
        bed.group("g", &[("a", "GenericApplication", "")]);
        bed.want("g");
        let first = |bed: &Bed| must_go_first(find(&bed.db, "a").unwrap());
        assert!(!first(&bed));
        bed.assign("g", 1);
        let partial = GroupState::Partial { reason: "[a] broken".into() };
        bed.tell("g", &[("a", ResourceState::Failed, "broken")], Some(partial));
        assert!(first(&bed));
        let unchanged = bed.ok(Command::ResourceOnline { name: "a".into() });
        assert_eq!(unchanged, Applied::Unchanged, "without going offline first the order changes nothing");
        let failed = GroupState::Failed { reason: "[a] broken".into() };
        bed.tell("g", &[], Some(failed));
        bed.by_owner("g", |name, generation, _| Command::GroupGiveUp {
            name,
            generation,
            reason: "x".into(),
        });
        assert!(!first(&bed));
        bed.ok(Command::ResourceOffline { name: "a".into() });
        assert!(!first(&bed));
    }
}
