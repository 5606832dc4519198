//! The policy of a group: from arguments, and in words.

use crate::args::{
    Names, OrDefault, Switch, duration_ms, duration_text, names as name_list, number_or_default,
};
use crate::names::{dash, node_ids, node_names};
use clap::ValueEnum;
use csv_cluster::db::{AntiAffinity, ClusterDb, Failback, GroupPolicy, MoveKind, PRIORITY_MAX};
use serde_json::{Value, json};

/// Words for priorities.
const PRIORITIES: [(&str, u32); 4] = [("high", 3000), ("medium", 2000), ("low", 1000), ("no-auto-start", 0)];

/// How virtual machines go to another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Running, without a pause that anybody notices.
    Live,
    /// Saved to a file, resumed from there.
    Quick,
    /// Shut down, started there.
    Shutdown,
}

impl From<Kind> for MoveKind {
    fn from(kind: Kind) -> MoveKind {
        match kind {
            Kind::Live => MoveKind::Live,
            Kind::Quick => MoveKind::Quick,
            Kind::Shutdown => MoveKind::Shutdown,
        }
    }
}

/// POLICY of `csvctl group add` and `set`, and of `csvctl vm add`. What is not given stays as it is.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Policy")]
pub(crate) struct PolicyArgs {
    /// Owners by preference, best first; others may have it too. '' for none.
    #[arg(long, value_name = "NODE,...", value_parser = name_list)]
    pub(crate) preferred: Option<Names>,
    /// After a start of the whole cluster, go to the node where it was last.
    #[arg(long, value_name = "on|off")]
    persistent: Option<Switch>,
    /// Start order: high (3000), medium (2000), low (1000) or any number up to 10000. no-auto-start (0): it is not started by
    /// itself after it lost its node.
    #[arg(long, value_name = "PRIORITY", value_parser = priority)]
    priority: Option<u32>,
    /// Groups that are online before this one starts. '' for none.
    #[arg(long, value_name = "GROUP,...", value_parser = name_list)]
    start_after: Option<Names>,
    /// Moves for failure within the period; the next failure leaves it failed. default: one less than there are nodes.
    #[arg(long, value_name = "COUNT|default", value_parser = number_or_default)]
    failover_threshold: Option<OrDefault<u32>>,
    /// For --failover-threshold, such as 6h.
    #[arg(long, value_name = "DURATION", value_parser = duration_ms)]
    failover_period: Option<u64>,
    /// When it goes back to its most preferred owner that it had to leave: never, at-once, or only in a part of the day.
    #[arg(long, value_name = "never|at-once|HH:MM-HH:MM", value_parser = failback)]
    failback: Option<Failback>,
    /// Keep away from groups of the same class; with :hard rather offline than on one node with them. '' for none.
    #[arg(long, value_name = "CLASS[:hard],...", value_parser = anti_affinity)]
    anti_affinity: Option<Classes>,
    /// How its virtual machines leave a node that is drained, and go by failback.
    #[arg(long, value_name = "KIND")]
    move_kind: Option<Kind>,
}

/// Classes of anti-affinity.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Classes(Vec<AntiAffinity>);

impl PolicyArgs {
    /// Is nothing given?
    pub(crate) fn is_empty(&self) -> bool {
        let PolicyArgs {
            preferred,
            persistent,
            priority,
            start_after,
            failover_threshold,
            failover_period,
            failback,
            anti_affinity,
            move_kind,
        } = self;
        preferred.is_none()
            && persistent.is_none()
            && priority.is_none()
            && start_after.is_none()
            && failover_threshold.is_none()
            && failover_period.is_none()
            && failback.is_none()
            && anti_affinity.is_none()
            && move_kind.is_none()
    }

    /// The policy with what is given.
    pub(crate) fn applied(self, db: &ClusterDb, mut policy: GroupPolicy) -> anyhow::Result<GroupPolicy> {
        if let Some(Names(names)) = self.preferred {
            policy.preferred = node_ids(db, &names)?;
        }
        if let Some(Names(groups)) = self.start_after {
            policy.start_after = groups;
        }
        if let Some(OrDefault(threshold)) = self.failover_threshold {
            policy.failover_threshold = threshold;
        }
        if let Some(Classes(classes)) = self.anti_affinity {
            policy.anti_affinity = classes;
        }
        policy.persistent = self.persistent.map_or(policy.persistent, Switch::is_on);
        policy.priority = self.priority.unwrap_or(policy.priority);
        policy.failover_period_ms = self.failover_period.unwrap_or(policy.failover_period_ms);
        policy.failback = self.failback.unwrap_or(policy.failback);
        policy.move_kind = self.move_kind.map_or(policy.move_kind, MoveKind::from);
        Ok(policy)
    }
}

fn priority(text: &str) -> Result<u32, String> {
    if let Some((_, priority)) = PRIORITIES.iter().find(|(word, _)| *word == text) {
        return Ok(*priority);
    }
    let number = text.parse().ok().filter(|number| *number <= PRIORITY_MAX);
    number.ok_or_else(|| format!("it must be high, medium, low, no-auto-start or 0 to {PRIORITY_MAX}"))
}

fn failback(text: &str) -> Result<Failback, String> {
    match text {
        "never" => Ok(Failback::Never),
        "at-once" => Ok(Failback::AtOnce),
        window => {
            let minutes = window.split_once('-').and_then(|(from, to)| Some((minute(from)?, minute(to)?)));
            let (from_minute, to_minute) =
                minutes.ok_or("it must be never, at-once or a part of the day such as 22:00-04:00")?;
            if from_minute == to_minute {
                return Err("it begins when it ends; at-once is the whole day".to_owned());
            }
            Ok(Failback::Window { from_minute, to_minute })
        }
    }
}

/// Minute of the day, from `HH:MM`.
fn minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let digits = |part: &str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(hour) || !digits(minute) {
        return None;
    }
    let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
    (hour < 24 && minute < 60).then_some(hour * 60 + minute)
}

fn anti_affinity(text: &str) -> Result<Classes, String> {
    let class = |text: String| match text.split_once(':') {
        None => Ok(AntiAffinity { class: text, hard: false }),
        Some((class, "hard")) => Ok(AntiAffinity { class: class.to_owned(), hard: true }),
        Some((class, "soft")) => Ok(AntiAffinity { class: class.to_owned(), hard: false }),
        Some((_, other)) => Err(format!("after the colon stands hard, not \"{other}\"")),
    };
    name_list(text)?.0.into_iter().map(class).collect::<Result<_, _>>().map(Classes)
}

/// As `--priority` takes it.
pub(crate) fn priority_word(priority: u32) -> String {
    let word = PRIORITIES.iter().find(|(_, number)| *number == priority);
    word.map_or_else(|| priority.to_string(), |(word, _)| (*word).to_owned())
}

fn failback_word(failback: Failback) -> String {
    match failback {
        Failback::Never => "never".to_owned(),
        Failback::AtOnce => "at-once".to_owned(),
        Failback::Window { from_minute, to_minute } => {
            let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
            format!("{}-{}", clock(from_minute), clock(to_minute))
        }
    }
}

fn classes_word(classes: &[AntiAffinity]) -> String {
    let word = |class: &AntiAffinity| format!("{}{}", class.class, if class.hard { ":hard" } else { "" });
    dash(classes.iter().map(word).collect::<Vec<_>>().join(","))
}

/// Failovers for failure that the policy allows within its period.
pub(crate) fn threshold(db: &ClusterDb, policy: &GroupPolicy) -> u32 {
    let others = u32::try_from(db.nodes.len().saturating_sub(1)).unwrap_or(u32::MAX);
    policy.failover_threshold.unwrap_or(others.max(1))
}

/// The policy by the names of its options, each as the option takes it.
pub(crate) fn rows(db: &ClusterDb, policy: &GroupPolicy) -> Vec<(&'static str, String)> {
    let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
    let threshold = match policy.failover_threshold {
        Some(count) => count.to_string(),
        None => format!("default ({})", threshold(db, policy)),
    };
    vec![
        ("preferred", node_names(db, &policy.preferred)),
        ("persistent", on_off(policy.persistent)),
        ("priority", priority_word(policy.priority)),
        ("start-after", dash(policy.start_after.join(","))),
        ("failover-threshold", threshold),
        ("failover-period", duration_text(policy.failover_period_ms)),
        ("failback", failback_word(policy.failback)),
        ("anti-affinity", classes_word(&policy.anti_affinity)),
        ("move-kind", policy.move_kind.to_string()),
    ]
}

/// The same for programs.
pub(crate) fn object(db: &ClusterDb, policy: &GroupPolicy) -> Value {
    json!({
        "preferred": policy.preferred.iter().map(|node| db.node_name(*node)).collect::<Vec<_>>(),
        "persistent": policy.persistent,
        "priority": policy.priority,
        "start_after": policy.start_after,
        "failover_threshold": policy.failover_threshold,
        "failover_period_ms": policy.failover_period_ms,
        "failback": failback_word(policy.failback),
        "anti_affinity": policy.anti_affinity,
        "move_kind": policy.move_kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::{Bed, n};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        policy: PolicyArgs,
    }

    fn parse(words: &[&str]) -> Result<PolicyArgs, clap::Error> {
        Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.policy)
    }

    #[test]
    fn every_option_reaches_the_policy_and_is_shown_as_it_was_given() {
        let bed = Bed::nodes(3);
        let given = [
            ("--preferred", "n2,n1"),
            ("--persistent", "off"),
            ("--priority", "high"),
            ("--start-after", "db,web"),
            ("--failover-threshold", "4"),
            ("--failover-period", "2h"),
            ("--failback", "22:00-04:05"),
            ("--anti-affinity", "dc:hard,web"),
            ("--move-kind", "quick"),
        ];
        let words: Vec<&str> = given.iter().flat_map(|(option, value)| [*option, *value]).collect();
        let policy = parse(&words).unwrap().applied(&bed.db, GroupPolicy::default()).unwrap();
        assert_eq!(policy.preferred, [n(2), n(1)]);
        assert!(!policy.persistent && policy.priority == 3000 && policy.move_kind == MoveKind::Quick);
        assert_eq!((policy.failover_threshold, policy.failover_period_ms), (Some(4), 7_200_000));
        assert_eq!(policy.failback, Failback::Window { from_minute: 1320, to_minute: 245 });
        assert!(policy.anti_affinity[0].hard && !policy.anti_affinity[1].hard);
        let shown = rows(&bed.db, &policy);
        let expected: Vec<_> =
            given.iter().map(|(option, value)| (&option[2..], (*value).to_owned())).collect();
        assert_eq!(shown, expected);
        assert_eq!(object(&bed.db, &policy)["preferred"], json!(["n2", "n1"]));
    }

    #[test]
    fn what_is_not_given_stays_and_what_is_empty_is_cleared() {
        let bed = Bed::nodes(3);
        let before = GroupPolicy {
            preferred: vec![n(1)],
            start_after: vec!["db".into()],
            failover_threshold: Some(9),
            ..GroupPolicy::default()
        };
        assert!(parse(&[]).unwrap().is_empty());
        assert_eq!(parse(&[]).unwrap().applied(&bed.db, before.clone()).unwrap(), before);
        let words = ["--preferred", "", "--start-after", "", "--failover-threshold", "default"];
        let args = parse(&words).unwrap();
        assert!(!args.is_empty());
        assert_eq!(args.applied(&bed.db, before).unwrap(), GroupPolicy::default());
        assert!(
            rows(&bed.db, &GroupPolicy::default()).contains(&("failover-threshold", "default (2)".into()))
        );
        assert!(rows(&bed.db, &GroupPolicy::default()).contains(&("preferred", "-".into())));
    }

    #[test]
    fn nonsense_is_refused_with_what_it_takes() {
        for (option, value, word) in [
            ("--priority", "urgent", "no-auto-start"),
            ("--priority", "10001", "10000"),
            ("--failback", "25:00-01:00", "22:00-04:00"),
            ("--failback", "1:00-2:00", "22:00-04:00"),
            ("--failback", "01:00-01:00", "at-once"),
            ("--failover-period", "6", "unit"),
            ("--anti-affinity", "web:hot", "hard"),
            ("--preferred", "n1,,n2", "comma"),
        ] {
            let error = parse(&[option, value]).unwrap_err().to_string();
            assert!(error.contains(word), "{option} {value}: {error}");
        }
        let bed = Bed::nodes(1);
        let unknown = parse(&["--preferred", "n7"]).unwrap().applied(&bed.db, GroupPolicy::default());
        assert!(unknown.unwrap_err().to_string().contains("no node \"n7\""));
        assert_eq!(priority("no-auto-start"), Ok(0));
        assert_eq!(priority_word(1234), "1234");
    }
}
