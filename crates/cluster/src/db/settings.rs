//! Cluster-wide settings: typed, each with a default, a unit and a range. `set` takes the text that an administrator types.

use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::str::FromStr;

/// What an election takes at most.
const ELECTION_MS: u64 = 1_500;
/// A lease that is over is given this much more: two clocks may run at different speeds.
const LEASE_MARGIN_MS: u64 = 2_000;

/// What moves volumes without need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rebalance {
    /// Nothing does.
    Off,
    /// A node that joined gets volumes that were placed before it came.
    OnJoin,
}

impl FromStr for Rebalance {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "off" => Ok(Rebalance::Off),
            "on-join" => Ok(Rebalance::OnJoin),
            _ => Err(()),
        }
    }
}

impl Display for Rebalance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Rebalance::Off => "off",
            Rebalance::OnJoin => "on-join",
        })
    }
}

/// When virtual machines are moved to nodes that are less busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceMode {
    /// Never.
    Off,
    /// When a node joined.
    OnJoin,
    /// When a node joined, and every `balance_period_ms`.
    Always,
}

impl FromStr for BalanceMode {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "off" => Ok(BalanceMode::Off),
            "on-join" => Ok(BalanceMode::OnJoin),
            "always" => Ok(BalanceMode::Always),
            _ => Err(()),
        }
    }
}

impl Display for BalanceMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BalanceMode::Off => "off",
            BalanceMode::OnJoin => "on-join",
            BalanceMode::Always => "always",
        })
    }
}

/// How readily virtual machines are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceLevel {
    /// Away from nodes that are loaded more than 80 %.
    Low,
    /// More than 70 %.
    Medium,
    /// More than 60 %.
    High,
}

impl BalanceLevel {
    /// A node that is loaded more than this gives virtual machines away; in thousandths.
    #[must_use]
    pub fn permille(self) -> u64 {
        match self {
            BalanceLevel::Low => 800,
            BalanceLevel::Medium => 700,
            BalanceLevel::High => 600,
        }
    }
}

impl FromStr for BalanceLevel {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "low" => Ok(BalanceLevel::Low),
            "medium" => Ok(BalanceLevel::Medium),
            "high" => Ok(BalanceLevel::High),
            _ => Err(()),
        }
    }
}

impl Display for BalanceLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BalanceLevel::Low => "low",
            BalanceLevel::Medium => "medium",
            BalanceLevel::High => "high",
        })
    }
}

/// Why a setting was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum SettingError {
    /// No such key.
    #[error("there is no setting \"{key}\"; `csvctl cluster settings` lists them")]
    Unknown {
        /// What was asked for.
        key: String,
    },
    /// Not a value of its type or outside its range.
    #[error("{key} cannot be \"{value}\": it takes {takes}")]
    Value {
        /// The setting.
        key: String,
        /// What was asked for.
        value: String,
        /// Range and unit.
        takes: String,
    },
    /// The values contradict each other.
    #[error("{key} cannot be {value}: {why}")]
    Contradiction {
        /// The setting.
        key: String,
        /// What was asked for.
        value: String,
        /// The other setting, and how they hang together.
        why: String,
    },
}

/// A row of the table of settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingEntry {
    /// Key.
    pub key: String,
    /// Present value.
    pub value: String,
    /// Value of a new cluster.
    pub default: String,
    /// Unit, or empty.
    pub unit: String,
    /// Range, or the words that it takes.
    pub takes: String,
    /// What it does.
    pub help: String,
}

fn number<T: FromStr + PartialOrd>(text: &str, min: T, max: T) -> Option<T> {
    text.parse().ok().filter(|value| *value >= min && *value <= max)
}

/// Makes the struct, its defaults, `set_one` and `entries` from one table.
macro_rules! settings {
    (
        numbers { $($num:ident: $type:ty = $default:literal, $min:literal..=$max:literal, $unit:literal, $num_help:literal;)* }
        words { $($word:ident: $word_type:ty = $word_default:expr, $takes:literal, $word_help:literal;)* }
    ) => {
        /// All settings.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Settings {
            $(#[doc = concat!($num_help, " Unit: ", $unit, "; ", stringify!($min), " to ", stringify!($max), ", default ", stringify!($default), ".")] pub $num: $type,)*
            $(#[doc = concat!($word_help, " Takes ", $takes, ".")] pub $word: $word_type,)*
        }

        impl Default for Settings {
            fn default() -> Self {
                Settings { $($num: $default,)* $($word: $word_default,)* }
            }
        }

        impl Settings {
            fn set_one(&mut self, key: &str, value: &str) -> Result<(), SettingError> {
                let bad = |takes: &str| SettingError::Value { key: key.into(), value: value.into(), takes: takes.into() };
                match key {
                    $(stringify!($num) => {
                        let takes = concat!(stringify!($min), " to ", stringify!($max), " ", $unit);
                        self.$num = number(value, $min, $max).ok_or_else(|| bad(takes))?;
                    })*
                    $(stringify!($word) => self.$word = value.parse().map_err(|_| bad($takes))?,)*
                    _ => return Err(SettingError::Unknown { key: key.into() }),
                }
                Ok(())
            }

            /// Every setting, for a table.
            #[must_use]
            pub fn entries(&self) -> Vec<SettingEntry> {
                let default = Settings::default();
                vec![
                    $(SettingEntry {
                        key: stringify!($num).into(),
                        value: self.$num.to_string(),
                        default: default.$num.to_string(),
                        unit: $unit.into(),
                        takes: concat!(stringify!($min), " to ", stringify!($max)).into(),
                        help: $num_help.into(),
                    },)*
                    $(SettingEntry {
                        key: stringify!($word).into(),
                        value: self.$word.to_string(),
                        default: default.$word.to_string(),
                        unit: String::new(),
                        takes: $takes.into(),
                        help: $word_help.into(),
                    },)*
                ]
            }
        }
    };
}

settings! {
    numbers {
        heartbeat_ms: u64 = 300, 50..=60_000, "ms", "Time between two heartbeats.";
        heartbeat_misses: u64 = 5, 2..=100, "heartbeats", "Heartbeats missed in a row before a node counts as silent.";
        isolation_ms: u64 = 0, 0..=600_000, "ms", "How long a silent node stays Isolated and keeps its volumes before it is Down; 0: Down at once, since reservations fence it.";
        quarantine_failures: u64 = 3, 0..=100, "failures", "Failures within quarantine_window_ms that keep a node out; 0: never.";
        quarantine_window_ms: u64 = 3_600_000, 60_000..=604_800_000, "ms", "Window in which failures of a node are counted.";
        quarantine_ms: u64 = 7_200_000, 1_000..=604_800_000, "ms", "How long a node is kept out.";
        lease_ms: u64 = 20_000, 1_000..=600_000, "ms", "A layout may be used for this long after the coordinator was last heard.";
        recall_ms: u64 = 10_000, 500..=300_000, "ms", "A recalled layout must be returned within this time; less than lease_ms.";
        op_timeout_ms: u64 = 60_000, 1_000..=3_600_000, "ms", "How long an operation waits for a coordinator before it fails with EIO.";
        witness_renew_ms: u64 = 3_000, 100..=60_000, "ms", "How often the holder of the disk witness renews its reservation.";
        witness_challenge_ms: u64 = 6_000, 200..=120_000, "ms", "How long a challenger waits for a renewal before it takes the disk witness over; at least twice witness_renew_ms.";
        control_port: u16 = 7450, 1..=65_535, "TCP port", "Port of the control protocol on every node.";
        smb_port: u16 = 7445, 1..=65_535, "TCP port", "Port of the private smbd on a coordinator.";
        smb_workers: u64 = 8, 1..=64, "processes", "SMB worker processes per volume and node.";
        clock_skew_max_ms: u64 = 60_000, 1_000..=86_400_000, "ms", "Difference of clocks beyond which a node cannot join.";
        max_parallel_moves: u64 = 4, 1..=64, "volumes", "Planned moves under way at once while a node is drained.";
        start_failures_max: u64 = 3, 1..=16, "failures", "Failed starts on each possible owner before a volume is Failed.";
        start_backoff_ms: u64 = 1_000, 10..=60_000, "ms", "Wait after the first failed start when every possible owner has failed; doubles, at most 60 s.";
        start_timeout_ms: u64 = 60_000, 1_000..=3_600_000, "ms", "A start that takes longer is given to another node.";
        release_timeout_ms: u64 = 120_000, 1_000..=3_600_000, "ms", "A planned move that takes longer is turned into a forced one.";
        failed_retry_ms: u64 = 900_000, 0..=604_800_000, "ms", "A Failed volume is tried again after this time; 0: never.";
        settle_ms: u64 = 30_000, 0..=3_600_000, "ms", "Quiet time after a join or a move before volumes are rebalanced.";
        report_grace_ms: u64 = 3_000, 100..=60_000, "ms", "How old a state must be before a node's report that contradicts it counts.";
        max_parallel_starts: u64 = 8, 1..=256, "groups", "Groups that come online on one node at once.";
        group_start_wait_ms: u64 = 120_000, 0..=3_600_000, "ms", "A group waits at most this long for one of higher priority that starts.";
        group_settle_ms: u64 = 20_000, 0..=600_000, "ms", "After a start of the whole cluster, groups wait this long for their last or a preferred owner.";
        balance_period_ms: u64 = 1_800_000, 60_000..=604_800_000, "ms", "Time between two looks at whether virtual machines are to be balanced.";
    }
    words {
        balance: BalanceMode = BalanceMode::Always, "off, on-join or always", "Move virtual machines to nodes that are less busy.";
        balance_level: BalanceLevel = BalanceLevel::Low, "low, medium or high", "How readily: away from nodes that are loaded more than 80, 70 or 60 %.";
        rebalance: Rebalance = Rebalance::OnJoin, "off or on-join", "Move volumes to a node that joined.";
        smb_encrypt: bool = false, "true or false", "Encrypt SMB traffic besides signing it.";
    }
}

impl Settings {
    /// Takes a value. On an error nothing changes.
    ///
    /// # Errors
    /// No such key, not a value of its type, outside its range, or in contradiction to another setting.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), SettingError> {
        let mut next = self.clone();
        next.set_one(key, value)?;
        let why = if next.recall_ms >= next.lease_ms {
            format!("recall_ms ({}) must be less than lease_ms ({})", next.recall_ms, next.lease_ms)
        } else if next.witness_challenge_ms < next.witness_renew_ms.saturating_mul(2) {
            format!(
                "witness_challenge_ms ({}) must be at least twice witness_renew_ms ({})",
                next.witness_challenge_ms, next.witness_renew_ms
            )
        } else if next.control_port == next.smb_port {
            format!("control_port and smb_port ({}) must differ", next.smb_port)
        } else if next.lease_over_ms() < next.contact_limit_ms() {
            format!(
                "a lease counts as over after lease_ms and {LEASE_MARGIN_MS} ms ({}), which must not be before a node that \
                 is cut off stops: four times heartbeat_ms * heartbeat_misses and {ELECTION_MS} ms ({})",
                next.lease_over_ms(),
                next.contact_limit_ms()
            )
        } else if next.lease_over_ms() >= next.start_timeout_ms {
            format!(
                "start_timeout_ms ({}) must be more than lease_ms and {LEASE_MARGIN_MS} ms ({}), for which a start may have \
                 to wait",
                next.start_timeout_ms,
                next.lease_over_ms()
            )
        } else {
            *self = next;
            return Ok(());
        };
        Err(SettingError::Contradiction { key: key.into(), value: value.into(), why })
    }

    /// Takes several values; only what comes out in the end must not contradict itself. On an error nothing changes.
    ///
    /// # Errors
    /// As [`Settings::set`].
    pub fn set_all(&mut self, values: &[(String, String)]) -> Result<(), SettingError> {
        let mut next = self.clone();
        for (key, value) in values {
            next.set_one(key, value)?;
        }
        for (key, value) in values {
            next.set(key, value)?;
        }
        *self = next;
        Ok(())
    }

    /// A node that has not reached a majority for this long stops its I/O, in milliseconds.
    #[must_use]
    pub fn contact_limit_ms(&self) -> u64 {
        self.silence_ms().saturating_mul(4).saturating_add(ELECTION_MS)
    }

    /// A lease is over for certain when its holder was not heard for this long, in milliseconds.
    #[must_use]
    pub fn lease_over_ms(&self) -> u64 {
        self.lease_ms.saturating_add(LEASE_MARGIN_MS)
    }

    /// A node that was not heard for this long counts as silent, in milliseconds.
    #[must_use]
    pub fn silence_ms(&self) -> u64 {
        self.heartbeat_ms.saturating_mul(self.heartbeat_misses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_can_be_set_and_is_in_its_range() {
        let mut settings = Settings::default();
        for entry in Settings::default().entries() {
            settings.set(&entry.key, &entry.default).unwrap();
        }
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn bad_values_change_nothing_and_say_what_is_taken() {
        let mut settings = Settings::default();
        for (key, value, word) in [
            ("heartbeat", "1", "there is no setting"),
            ("heartbeat_ms", "49", "50 to 60_000 ms"),
            ("heartbeat_ms", "-1", "50 to 60_000 ms"),
            ("control_port", "65536", "TCP port"),
            ("rebalance", "yes", "off or on-join"),
            ("recall_ms", "20000", "less than lease_ms"),
            ("witness_renew_ms", "4000", "twice"),
            ("smb_port", "7450", "must differ"),
            ("balance", "yes", "off, on-join or always"),
            ("balance_level", "1", "low, medium or high"),
            ("heartbeat_ms", "1100", "22000"),
            ("heartbeat_misses", "18", "23100"),
            ("start_timeout_ms", "22000", "must be more than lease_ms"),
            ("lease_ms", "58000", "start_timeout_ms (60000)"),
        ] {
            let error = settings.set(key, value).unwrap_err().to_string();
            assert!(error.contains(word), "{key}={value}: {error}");
        }
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn a_lease_outlives_the_node_that_is_cut_off_and_not_the_start() {
        let mut settings = Settings::default();
        assert_eq!((settings.contact_limit_ms(), settings.lease_over_ms()), (7_500, 22_000));
        settings.set("recall_ms", "2000").unwrap();
        settings.set("lease_ms", "5500").unwrap();
        assert!(settings.set("lease_ms", "5499").unwrap_err().to_string().contains("7499"));
        // Together they fit, one after the other they do not.
        let all = |values: &[(&str, &str)]| {
            let values: Vec<_> = values.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
            Settings::default().set_all(&values)
        };
        all(&[("heartbeat_ms", "2000"), ("lease_ms", "40000")]).unwrap();
        all(&[("lease_ms", "100000"), ("start_timeout_ms", "110000")]).unwrap();
        assert!(all(&[("heartbeat_ms", "3000"), ("lease_ms", "40000")]).is_err());
        assert!(all(&[("heartbeat_ms", "500"), ("nothing", "1")]).is_err());
    }

    #[test]
    fn settings_of_an_older_cluster_get_defaults() {
        let settings: Settings =
            serde_json::from_str(r#"{"heartbeat_ms": 500, "from_the_future": 1}"#).unwrap();
        assert_eq!(settings.heartbeat_ms, 500);
        assert_eq!(settings.lease_ms, 20_000);
        assert_eq!(settings.silence_ms(), 2_500);
    }
}
