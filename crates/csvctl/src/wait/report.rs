//! What became of an order that was not reached: what happened, to what, and what to do next.

use super::Look;
use crate::args::duration_text;
use crate::names::resources_of;
use crate::output::table;
use csv_cluster::db::{ClusterDb, Event, Group, GroupState, Level, ResourceState};
use std::time::Duration;

/// Events and resources that a text names at most.
const NAMED_MAX: usize = 8;

/// State and owner, such as `failed on n1`.
pub(crate) fn place(db: &ClusterDb, group: &Group) -> String {
    match group.owner {
        Some(owner) => format!("{} on {}", group.state, db.node_name(owner)),
        None => group.state.to_string(),
    }
}

fn reason(state: &GroupState) -> &str {
    match state {
        GroupState::Offline { reason }
        | GroupState::Partial { reason }
        | GroupState::Failed { reason }
        | GroupState::Releasing { reason, .. } => reason,
        GroupState::Pending | GroupState::Online => "",
    }
}

fn with_reason(db: &ClusterDb, group: &Group) -> String {
    let reason = reason(&group.state);
    let colon = if reason.is_empty() { "" } else { ": " };
    format!("group {} is {}{colon}{reason}", group.name, place(db, group))
}

/// The wanted resources that are not online, a line each.
fn lacking(db: &ClusterDb, group: &Group) -> String {
    let lacking: Vec<_> = resources_of(db, &group.name)
        .filter(|resource| resource.want_online && resource.status.state != ResourceState::Online)
        .collect();
    let row = |resource: &&csv_cluster::db::Resource| {
        let status = &resource.status;
        vec![String::new(), resource.name.clone(), status.state.to_string(), status.why.clone()]
    };
    let rows: Vec<Vec<String>> = lacking.iter().take(NAMED_MAX).map(row).collect();
    let more = lacking.len().saturating_sub(NAMED_MAX);
    let tail = if more == 0 { String::new() } else { format!("  and {more} more\n") };
    table(&rows) + &tail
}

/// A group that is to be online and is not.
pub(super) fn trouble(db: &ClusterDb, group: &Group) -> String {
    let name = &group.name;
    let mut text = with_reason(db, group);
    text.push('\n');
    if group.owner.is_none() {
        text += &format!(
            "next: `csvctl group candidates {name}` says of each node why not; the group starts by itself as soon as a node \
             can have it"
        );
        return text;
    }
    text += &lacking(db, group);
    if let Some(why) = &group.given_up {
        text += &format!("it is not moved any more: {why}\n");
    }
    if group.maintenance {
        text += &format!(
            "it is in maintenance, in which nothing is restarted or moved; `csvctl group maintenance {name} off` ends that\n"
        );
    }
    let failed: Vec<&str> = resources_of(db, name)
        .filter(|resource| resource.want_online && resource.status.state == ResourceState::Failed)
        .map(|resource| resource.name.as_str())
        .collect();
    text += &match failed.as_slice() {
        _ if matches!(group.state, GroupState::Failed { .. }) => {
            format!("next: mend what the reasons name, then `csvctl group online {name}`")
        }
        [] => format!("next: `csvctl group show {name}` has what depends on what"),
        [one] => format!("next: mend what the reason names, then `csvctl resource online {one}`"),
        [first, ..] => {
            format!("next: mend what the reasons name, then `csvctl resource online {first}`, and so on")
        }
    };
    text
}

/// A wait that is given up.
pub(super) fn stuck(look: Look<'_>, group: &Group, still: Duration) -> String {
    let db = look.db;
    let mut text = with_reason(db, group);
    text += &format!(", without any change for {}", duration_text(still.as_secs() * 1000));
    if let Some(waits) = look.waits {
        text += &format!("; it waits: {waits}");
    }
    text.push('\n');
    if group.want_online {
        text += &lacking(db, group);
    }
    text + &format!(
        "what was ordered goes on without csvctl; `csvctl group show {}` tells how it is, `csvctl events` what happened",
        group.name
    )
}

/// Warnings and errors about the group since the event, to be put behind a sentence.
pub(super) fn what_happened(db: &ClusterDb, group: &Group, after: u64) -> String {
    let about = |event: &&Event| {
        let own = event.subject == group.name
            || db.resources.get(&event.subject).is_some_and(|of| of.group == group.name);
        own && event.level >= Level::Warning
    };
    let bad: Vec<&Event> = db.events.after(after).filter(about).collect();
    let newest = &bad[bad.len().saturating_sub(NAMED_MAX)..];
    newest.iter().map(|event| format!("\n  {}", event.message)).collect()
}

pub(super) fn move_again(group: &Group) -> String {
    let name = &group.name;
    format!(
        "next: mend what it says and move it again; `csvctl group candidates {name}` says which nodes can have it, and --quick \
         or --shutdown moves what cannot go while it runs"
    )
}
