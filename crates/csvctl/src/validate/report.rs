//! Results of checks, and how they are shown.

use crate::output::tick;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fmt;

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// As it should be.
    Passed,
    /// It works, with a drawback.
    Warning,
    /// It does not work.
    Failed,
    /// Not tried.
    Skipped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Outcome::Passed => "Passed",
            Outcome::Warning => "Warning",
            Outcome::Failed => "Failed",
            Outcome::Skipped => "Skipped",
        })
    }
}

/// What was found, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    pub(super) text: String,
    pub(super) next: Option<String>,
}

pub(super) fn passed(text: impl Into<String>) -> Verdict {
    Verdict { outcome: Outcome::Passed, text: text.into(), next: None }
}

pub(super) fn warning(text: impl Into<String>, next: impl Into<String>) -> Verdict {
    Verdict { outcome: Outcome::Warning, text: text.into(), next: Some(next.into()) }
}

pub(super) fn failed(text: impl Into<String>, next: impl Into<String>) -> Verdict {
    Verdict { outcome: Outcome::Failed, text: text.into(), next: Some(next.into()) }
}

pub(super) fn skipped(text: impl Into<String>, next: impl Into<String>) -> Verdict {
    Verdict { outcome: Outcome::Skipped, text: text.into(), next: Some(next.into()) }
}

/// One check, as it stands in the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// What kind of thing was checked.
    pub(super) area: String,
    /// What was checked, in a few words.
    pub(super) name: String,
    /// How it went.
    pub(super) outcome: Outcome,
    /// What was found.
    pub(super) text: String,
    /// What to do next, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<String>,
}

/// The checks so far, and the progress bar.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) checks: Vec<Check>,
    bar: ProgressBar,
}

impl Run {
    /// `checks`: about how many there will be.
    pub(super) fn new(checks: u64) -> Run {
        let bar = ProgressBar::new(checks);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:24} {pos}/{len} {elapsed} {msg}") {
            bar.set_style(style);
        }
        tick(&bar);
        Run { checks: Vec::new(), bar }
    }

    /// There are that many checks more.
    pub(super) fn more(&self, checks: u64) {
        self.bar.inc_length(checks);
    }

    /// Something begins that may take its time.
    pub(super) fn begin(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    pub(super) fn add(&mut self, area: &str, name: impl Into<String>, verdict: Verdict) {
        let Verdict { outcome, text, next } = verdict;
        self.bar.inc(1);
        self.checks.push(Check { area: area.to_owned(), name: name.into(), outcome, text, next });
    }

    /// Takes the bar away.
    pub(super) fn finish(self) -> Vec<Check> {
        self.bar.finish_and_clear();
        self.checks
    }
}

/// For a terminal: each check with what to do below it, then the sum.
pub(super) fn text(checks: &[Check]) -> String {
    let mut text = String::new();
    let mut area = "";
    for check in checks {
        if check.area != area {
            if !area.is_empty() {
                text.push('\n');
            }
            area = &check.area;
            text += &format!("{area}\n");
        }
        text += &format!("  {:8} {}: {}\n", check.outcome, check.name, check.text);
        if let Some(next) = &check.next {
            text += &format!("           -> {next}\n");
        }
    }
    text += &format!("\n{}\n", sum(checks));
    text
}

/// How many went how.
pub(super) fn sum(checks: &[Check]) -> String {
    let count = |outcome| checks.iter().filter(|check| check.outcome == outcome).count();
    format!(
        "{} passed, {} with warnings, {} failed, {} skipped",
        count(Outcome::Passed),
        count(Outcome::Warning),
        count(Outcome::Failed),
        count(Outcome::Skipped)
    )
}

/// Did anything fail?
pub(super) fn any_failed(checks: &[Check]) -> bool {
    checks.iter().any(|check| check.outcome == Outcome::Failed)
}
