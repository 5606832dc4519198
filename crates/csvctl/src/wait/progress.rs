//! How far a group is, in words.

use super::Look;
use crate::names::resources_of;
use csv_cluster::db::{ClusterDb, Group, GroupState, ResourceState};

/// Text and per cent of a progress bar.
pub(super) fn text(look: Look<'_>, group: &Group) -> (String, Option<u8>) {
    let (db, name) = (look.db, &group.name);
    let node = |node: Option<csv_types::NodeId>| node.map_or_else(String::new, |node| db.node_name(node));
    match &group.state {
        GroupState::Releasing { to: Some(to), .. } => {
            let to = db.node_name(*to);
            match look.moving {
                Some(moving) if moving.text.is_empty() => {
                    (format!("{name} goes to {to}: {}", moving.resource), moving.percent)
                }
                Some(moving) => (format!("{name} goes to {to}: {}", moving.text), moving.percent),
                None => (format!("{name} leaves {} for {to}{}", node(group.owner), going(db, group)), None),
            }
        }
        GroupState::Releasing { to: None, .. } => {
            (format!("{name} goes offline on {}{}", node(group.owner), going(db, group)), None)
        }
        GroupState::Offline { reason } => match look.waits {
            Some(waits) => (format!("{name} waits: {waits}"), None),
            None if group.want_online => (format!("{name} gets a node ({reason})"), None),
            None => (format!("{name} is offline"), None),
        },
        GroupState::Pending | GroupState::Online | GroupState::Partial { .. } | GroupState::Failed { .. } => {
            (format!("{name} is {}{}", super::place(db, group), coming(db, group)), None)
        }
    }
}

/// How many are online, and what one that is on its way does.
fn coming(db: &ClusterDb, group: &Group) -> String {
    let wanted: Vec<_> = resources_of(db, &group.name).filter(|of| of.want_online).collect();
    let online = wanted.iter().filter(|of| of.status.state == ResourceState::Online).count();
    let mut text = format!(", {online} of {} online", wanted.len());
    let on_its_way = wanted.iter().find(|of| super::is_pending(of.status.state));
    if let Some(of) = on_its_way {
        text += &format!("; {}", shown(&of.name, &of.status.why));
    }
    text
}

/// How many are offline, and what one that is not does.
fn going(db: &ClusterDb, group: &Group) -> String {
    let all: Vec<_> = resources_of(db, &group.name).collect();
    let left: Vec<_> = all.iter().filter(|of| of.status.state != ResourceState::Offline).collect();
    let gone = all.len() - left.len();
    let mut text = if gone == 0 { String::new() } else { format!(", {gone} of {} offline", all.len()) };
    if let Some(of) = left.iter().find(|of| super::is_pending(of.status.state)) {
        text += &format!("; {}", shown(&of.name, &of.status.why));
    }
    text
}

fn shown(name: &str, why: &str) -> String {
    if why.is_empty() { name.to_owned() } else { format!("{name}: {why}") }
}
