//! The policy of a resource: from arguments, and in words.

use crate::args::{OrDefault, Switch, duration_ms, duration_or_default, duration_or_never, duration_text};
use csv_cluster::db::ResourcePolicy;

/// RPOLICY of `csvctl resource add` and `set`. What is not given stays as it is.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Policy")]
pub(crate) struct PolicyArgs {
    /// Restarts on the same node within the period, before it has failed there; 0 for none.
    #[arg(long, value_name = "COUNT")]
    restart_threshold: Option<u32>,
    /// For --restart-threshold, such as 15m.
    #[arg(long, value_name = "DURATION", value_parser = duration_ms)]
    restart_period: Option<u64>,
    /// Wait before a restart.
    #[arg(long, value_name = "DURATION", value_parser = duration_ms)]
    restart_delay: Option<u64>,
    /// After its group has failed with it: try again after so long.
    #[arg(long, value_name = "DURATION|never", value_parser = duration_or_never)]
    retry_after: Option<u64>,
    /// Its group fails, and moves, when it has failed. If not, the group is partially online then.
    #[arg(long, value_name = "on|off")]
    affects_group: Option<Switch>,
    /// Between two quick looks. default: as its type has it.
    #[arg(long, value_name = "DURATION|default", value_parser = duration_or_default)]
    looks_alive: Option<OrDefault<u64>>,
    /// Between two thorough looks. default: as its type has it.
    #[arg(long, value_name = "DURATION|default", value_parser = duration_or_default)]
    is_alive: Option<OrDefault<u64>>,
    /// For going online or offline, counted from the last progress.
    #[arg(long, value_name = "DURATION", value_parser = duration_ms)]
    pending_timeout: Option<u64>,
    /// An entry point that does not return for so long hangs, and its resource host is ended.
    #[arg(long, value_name = "DURATION", value_parser = duration_ms)]
    deadlock_timeout: Option<u64>,
    /// A resource host of its own, so that it cannot harm others.
    #[arg(long, value_name = "on|off")]
    separate_monitor: Option<Switch>,
}

impl PolicyArgs {
    /// The policy with what is given; `None` when nothing is.
    pub(crate) fn applied(&self, policy: &ResourcePolicy) -> Option<ResourcePolicy> {
        let PolicyArgs {
            restart_threshold,
            restart_period,
            restart_delay,
            retry_after,
            affects_group,
            looks_alive,
            is_alive,
            pending_timeout,
            deadlock_timeout,
            separate_monitor,
        } = *self;
        let given = [restart_period, restart_delay, retry_after, pending_timeout, deadlock_timeout];
        let nothing = given.iter().all(Option::is_none)
            && restart_threshold.is_none()
            && affects_group.is_none()
            && looks_alive.is_none()
            && is_alive.is_none()
            && separate_monitor.is_none();
        if nothing {
            return None;
        }
        Some(ResourcePolicy {
            restart_threshold: restart_threshold.unwrap_or(policy.restart_threshold),
            restart_period_ms: restart_period.unwrap_or(policy.restart_period_ms),
            restart_delay_ms: restart_delay.unwrap_or(policy.restart_delay_ms),
            retry_after_ms: retry_after.unwrap_or(policy.retry_after_ms),
            affects_group: affects_group.map_or(policy.affects_group, Switch::is_on),
            looks_alive_ms: looks_alive.map_or(policy.looks_alive_ms, |OrDefault(ms)| ms),
            is_alive_ms: is_alive.map_or(policy.is_alive_ms, |OrDefault(ms)| ms),
            pending_timeout_ms: pending_timeout.unwrap_or(policy.pending_timeout_ms),
            deadlock_timeout_ms: deadlock_timeout.unwrap_or(policy.deadlock_timeout_ms),
            separate_monitor: separate_monitor.map_or(policy.separate_monitor, Switch::is_on),
        })
    }
}

/// The policy by the names of its options, each as the option takes it.
pub(crate) fn rows(policy: &ResourcePolicy) -> Vec<(&'static str, String)> {
    let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
    let or_default = |ms: Option<u64>| ms.map_or_else(|| "default".to_owned(), duration_text);
    let retry = match policy.retry_after_ms {
        0 => "never".to_owned(),
        ms => duration_text(ms),
    };
    vec![
        ("restart-threshold", policy.restart_threshold.to_string()),
        ("restart-period", duration_text(policy.restart_period_ms)),
        ("restart-delay", duration_text(policy.restart_delay_ms)),
        ("retry-after", retry),
        ("affects-group", on_off(policy.affects_group)),
        ("looks-alive", or_default(policy.looks_alive_ms)),
        ("is-alive", or_default(policy.is_alive_ms)),
        ("pending-timeout", duration_text(policy.pending_timeout_ms)),
        ("deadlock-timeout", duration_text(policy.deadlock_timeout_ms)),
        ("separate-monitor", on_off(policy.separate_monitor)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let given = [
            ("--restart-threshold", "0"),
            ("--restart-period", "1h"),
            ("--restart-delay", "2s"),
            ("--retry-after", "never"),
            ("--affects-group", "off"),
            ("--looks-alive", "700ms"),
            ("--is-alive", "30s"),
            ("--pending-timeout", "10m"),
            ("--deadlock-timeout", "20m"),
            ("--separate-monitor", "on"),
        ];
        let words: Vec<&str> = given.iter().flat_map(|(option, value)| [*option, *value]).collect();
        let policy = parse(&words).unwrap().applied(&ResourcePolicy::default()).unwrap();
        assert_eq!((policy.looks_alive_ms, policy.retry_after_ms), (Some(700), 0));
        assert!(!policy.affects_group && policy.separate_monitor);
        let expected: Vec<_> =
            given.iter().map(|(option, value)| (&option[2..], (*value).to_owned())).collect();
        assert_eq!(rows(&policy), expected);
        let back = parse(&["--looks-alive", "default"]).unwrap().applied(&policy).unwrap();
        assert_eq!(back, ResourcePolicy { looks_alive_ms: None, ..policy });
    }

    #[test]
    fn nothing_given_is_no_change() {
        assert_eq!(parse(&[]).unwrap().applied(&ResourcePolicy::default()), None);
        assert!(parse(&["--looks-alive", "5"]).unwrap_err().to_string().contains("unit"));
        assert!(parse(&["--affects-group", "maybe"]).is_err());
    }
}
