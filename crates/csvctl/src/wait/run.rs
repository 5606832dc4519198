//! Looks every [`LOOK_EVERY`] and shows how far it is.

use super::{Look, Verdict, Watch, progress};
use crate::admin;
use crate::output::tick;
use anyhow::{Context, anyhow};
use csv_cluster::db::{ClusterDb, Event, EventKind, GroupState, Level};
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use csvd::groups::{MoveProgress, Moving, Waiting};
use indicatif::{ProgressBar, ProgressStyle};
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
    bar.bar.finish_and_clear();
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
                    bar.show(progress::text(look, group));
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
            Err(_) => bar.show(("csvd does not answer; it may be starting anew".to_owned(), None)),
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
        self.looks = self.looks.wrapping_add(1);
        if !matches!(group.state, GroupState::Releasing { to: Some(_), .. }) {
            self.moving = None;
        } else if self.looks.is_multiple_of(ASK_EVERY)
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

/// A spinner with text, and a bar as soon as there is something to measure.
struct Bar {
    bar: ProgressBar,
}

impl Bar {
    fn new() -> Bar {
        let bar = ProgressBar::new_spinner();
        tick(&bar);
        Bar { bar }
    }

    fn show(&self, (text, percent): (String, Option<u8>)) {
        let template = match percent {
            Some(percent) => {
                self.bar.set_length(100);
                self.bar.set_position(u64::from(percent.min(100)));
                "{spinner} {msg} [{bar:30}] {pos} %"
            }
            None => "{spinner} {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_message(text);
        // Nothing else moves it inside a node of a lab.
        self.bar.tick();
    }
}

/// Writes to standard error what the cluster noted about the group since the event: that it did not go as ordered, or what does not
/// work as it should.
pub(crate) fn notes(db: &ClusterDb, watch: &Watch) {
    for event in noted(db, &watch.group, watch.event) {
        eprintln!("note: {}", event.message);
    }
}

fn noted<'a>(db: &'a ClusterDb, group: &str, after: u64) -> impl Iterator<Item = &'a Event> {
    db.events.after(after).filter(move |event| {
        let own =
            event.subject == group || db.resources.get(&event.subject).is_some_and(|of| of.group == group);
        let noted = event.id == EventKind::ResourceNote.id() && event.subject == group;
        own && (noted || event.level >= Level::Warning)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;
    use csv_cluster::db::{Command, NewEvent};

    #[test]
    fn what_was_noted_about_the_group_since_then_is_told() {
        let mut bed = Bed::nodes(2);
        bed.machine("vm", 1);
        bed.machine("other", 1);
        let after = bed.last_event();
        let event = |kind: EventKind, subject: &str, message: &str| NewEvent {
            id: kind.id(),
            at_unix_ms: 0,
            node: None,
            subject: subject.into(),
            level: kind.level(),
            message: message.into(),
        };
        bed.ok(Command::EventAdd {
            events: vec![
                event(EventKind::ResourceNote, "vm", "it is saved and resumed"),
                event(EventKind::ResourceNote, "other", "something else"),
                event(EventKind::ResourceWarning, "vm", "its disk is slow"),
                event(EventKind::ResourceOnline, "vm", "it is online"),
            ],
        });
        let told: Vec<&str> = noted(&bed.db, "vm", after).map(|event| event.message.as_str()).collect();
        assert_eq!(told, ["it is saved and resumed", "its disk is slow"]);
    }
}
