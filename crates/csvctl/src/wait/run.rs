//! Looks every [`LOOK_EVERY`] and shows how far it is.

use super::{Goal, Look, Verdict, Watch, progress};
use crate::admin;
use crate::output::Bar;
use anyhow::{Context, anyhow};
use csv_cluster::db::{ClusterDb, Event, EventKind, GroupState, Level};
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use csvd::groups::{MoveProgress, Moving, Waiting};
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The owner of a group is asked how far a move is, which may be another node.
const ASK_EVERY: u32 = 3;
/// How long csvd may be away while it is started anew.
const AWAY_MAX: Duration = Duration::from_secs(20);

/// Waits until it is as ordered. Returns the database that says so.
///
/// # Errors
/// It will not be, or does not become so; csvd does not answer any more.
pub(crate) fn until(config: &LocalConfig, watch: Watch) -> anyhow::Result<ClusterDb> {
    let bar = Bar::new();
    let result = looks(config, watch, &bar);
    bar.clear();
    result
}

fn looks(config: &LocalConfig, mut watch: Watch, bar: &Bar) -> anyhow::Result<ClusterDb> {
    let begin = Instant::now();
    let mut heard = begin;
    let mut beside = Beside::default();
    loop {
        match admin::database(config) {
            Ok(db) => {
                heard = Instant::now();
                beside.ask(config, &db, &watch.group);
                let look = Look {
                    db: &db,
                    waits: beside.waits.as_deref(),
                    moving: beside.moving.as_ref(),
                    at: begin.elapsed(),
                };
                match watch.look(look) {
                    Verdict::Reached => return Ok(db),
                    Verdict::Not(why) => return Err(anyhow!(why)),
                    Verdict::Wait => {}
                }
                if let Some(group) = db.groups.get(&watch.group) {
                    let (text, percent) = progress::text(look, group);
                    bar.show(text, percent);
                }
            }
            Err(error) if heard.elapsed() >= AWAY_MAX => {
                return Err(error).with_context(|| {
                    format!(
                        "what was ordered of group {0} goes on, but it cannot be seen from here any more; \
                         see `csvctl group show {0}` later or on another node",
                        watch.group
                    )
                });
            }
            Err(_) => bar.show("csvd does not answer; it may be starting anew".to_owned(), None),
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// What csvd tells beside the database.
#[derive(Debug, Default)]
struct Beside {
    waits: Option<String>,
    moving: Option<MoveProgress>,
    looks: u32,
}

impl Beside {
    /// What cannot be had now leaves what there was: it is for people, and the next look asks again.
    fn ask(&mut self, config: &LocalConfig, db: &ClusterDb, name: &str) {
        let Some(group) = db.groups.get(name) else { return };
        let asks = self.looks.is_multiple_of(ASK_EVERY);
        self.looks = self.looks.wrapping_add(1);
        if !matches!(group.state, GroupState::Releasing { to: Some(_), .. }) {
            self.moving = None;
            self.looks = 0;
        } else if asks
            && let Ok(moving) =
                admin::ask_typed::<Moving>(config, ClusterRequest::MoveProgress { group: name.to_owned() })
        {
            self.moving = moving;
        }
        if db.group_owner_stands(group) || !group.want_online {
            self.waits = None;
        } else if let Ok(mut all) = admin::ask_typed::<Waiting>(config, ClusterRequest::GroupsWaiting) {
            self.waits = all.remove(name);
        }
    }
}

/// Writes to standard error what the cluster noted about the group since the event: that it did not go as ordered, or what does not
/// work as it should.
pub(crate) fn notes(db: &ClusterDb, watch: &Watch) {
    for event in noted(db, watch) {
        eprintln!("note: {}", event.message);
    }
}

/// Events reach the database later than they happened, so those from before the order are left out by their time.
fn noted<'a>(db: &'a ClusterDb, watch: &'a Watch) -> impl Iterator<Item = &'a Event> {
    let group = &watch.group;
    let ordered = db.events.after(watch.event).find(|event| event.subject == *group);
    let since_unix_ms = ordered.map_or(0, |event| event.at_unix_ms);
    let (moves, ends) = match watch.goal {
        Goal::Moved(_) => (true, false),
        Goal::Offline | Goal::ResourceOffline(_) => (false, true),
        Goal::Online | Goal::ResourceOnline(_) => (false, false),
    };
    let is = |event: &Event, kind: EventKind| event.id == kind.id();
    db.events.after(watch.event).filter(move |event| {
        let own =
            event.subject == *group || db.resources.get(&event.subject).is_some_and(|of| of.group == *group);
        let note = moves && event.subject == *group && is(event, EventKind::ResourceNote);
        // What goes offline need not work.
        let expected = ends && (is(event, EventKind::GroupFailed) || is(event, EventKind::GroupPartial));
        own && event.at_unix_ms >= since_unix_ms && (note || (event.level >= Level::Warning && !expected))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;
    use csv_cluster::db::{Command, NewEvent};

    #[test]
    fn what_was_noted_about_the_group_since_the_order_is_told() {
        let mut bed = Bed::nodes(2);
        bed.machine("vm", 1);
        bed.machine("other", 1);
        let before = bed.db.clone();
        let watch = |goal| Watch::new(&before, &before.groups["vm"], goal, true);
        bed.release("vm", 2);
        let ordered = bed.now;
        let event = |kind: EventKind, subject: &str, at_unix_ms: u64, message: &str| NewEvent {
            id: kind.id(),
            at_unix_ms,
            node: None,
            subject: subject.into(),
            level: kind.level(),
            message: message.into(),
        };
        bed.ok(Command::EventAdd {
            events: vec![
                event(EventKind::ResourceNote, "vm", ordered - 1, "it was paused before"),
                event(EventKind::ResourceNote, "vm", ordered + 1, "it is saved and resumed"),
                event(EventKind::ResourceNote, "other", ordered + 1, "something else"),
                event(EventKind::ResourceWarning, "vm", ordered + 2, "its disk is slow"),
                event(EventKind::GroupPartial, "vm", ordered + 2, "it is partial"),
                event(EventKind::ResourceOnline, "vm", ordered + 2, "it is online"),
            ],
        });
        let told = |goal| -> Vec<String> {
            noted(&bed.db, &watch(goal)).map(|event| event.message.clone()).collect()
        };
        let moved = told(Goal::Moved(crate::testbed::n(2)));
        assert_eq!(moved, ["it is saved and resumed", "its disk is slow", "it is partial"]);
        assert_eq!(told(Goal::Offline), ["its disk is slow"]);
        assert_eq!(told(Goal::Online), ["its disk is slow", "it is partial"]);
    }
}
