//! `csvctl resource online` and `offline`.

use crate::admin;
use crate::names;
use crate::wait::{self, Goal, Watch};
use anyhow::bail;
use csv_cluster::db::{Applied, ClusterDb, Command, Group, Resource, ResourceState};
use csv_types::config::LocalConfig;

fn find<'a>(db: &'a ClusterDb, name: &str) -> anyhow::Result<(&'a Resource, &'a Group)> {
    let resource = names::resource(db, name)?;
    Ok((resource, names::group(db, &resource.group)?))
}

/// Orders a resource online and waits for it.
pub(crate) fn online(config: &LocalConfig, name: &str, no_wait: bool, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
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
