//! The fixed vocabulary of the benchmark: modes, jobs, and what fio is told for each.

use serde::Serialize;
use std::fmt;

/// A way to the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ModeName {
    /// The LUN itself, below every file system.
    Raw,
    /// Through the volume on the node that coordinates it.
    Coordinator,
    /// Through the volume on a node with a path to the LUN.
    Direct,
    /// Through the volume on a node without a path to the LUN.
    BlockRedirected,
    /// Through the volume on the direct node while it is redirected on request.
    FsRedirected,
    /// libsmbclient alone, in a loop, against the same smbd.
    SmbLibrary,
}

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Job {
    /// 4 KiB random reads, one at a time.
    #[value(name = "randread-qd1")]
    #[serde(rename = "randread-qd1")]
    RandreadQd1,
    /// 4 KiB random overwrites, one at a time.
    #[value(name = "randwrite-qd1")]
    #[serde(rename = "randwrite-qd1")]
    RandwriteQd1,
    /// 4 KiB random reads, 32 in flight.
    #[value(name = "randread-qd32")]
    #[serde(rename = "randread-qd32")]
    RandreadQd32,
    /// 4 KiB random overwrites, 32 in flight.
    #[value(name = "randwrite-qd32")]
    #[serde(rename = "randwrite-qd32")]
    RandwriteQd32,
    /// 1 MiB sequential reads, 8 in flight.
    #[value(name = "seqread-1m")]
    #[serde(rename = "seqread-1m")]
    Seqread1m,
    /// 1 MiB sequential overwrites, 8 in flight.
    #[value(name = "seqwrite-1m")]
    #[serde(rename = "seqwrite-1m")]
    Seqwrite1m,
    /// First writes that extend a new file, 1 MiB, 8 in flight.
    #[value(name = "alloc-seqwrite-1m")]
    #[serde(rename = "alloc-seqwrite-1m")]
    AllocSeqwrite1m,
    /// Create and close empty files in one directory.
    Create,
    /// stat of known files.
    Stat,
    /// Unlink of known files.
    Unlink,
}

/// What fio is told about a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) rw: &'static str,
    pub(super) block_bytes: u64,
    pub(super) depth: u32,
    pub(super) write: bool,
}

impl Job {
    /// Every job, in the order of the report.
    pub(super) const ALL: [Job; 10] = [
        Job::RandreadQd1,
        Job::RandwriteQd1,
        Job::RandreadQd32,
        Job::RandwriteQd32,
        Job::Seqread1m,
        Job::Seqwrite1m,
        Job::AllocSeqwrite1m,
        Job::Create,
        Job::Stat,
        Job::Unlink,
    ];

    /// The fio side of the job; `None` for the metadata jobs.
    pub(super) fn shape(self) -> Option<Shape> {
        let shape = |rw, block_bytes, depth, write| Some(Shape { rw, block_bytes, depth, write });
        match self {
            Job::RandreadQd1 => shape("randread", 4096, 1, false),
            Job::RandwriteQd1 => shape("randwrite", 4096, 1, true),
            Job::RandreadQd32 => shape("randread", 4096, 32, false),
            Job::RandwriteQd32 => shape("randwrite", 4096, 32, true),
            Job::Seqread1m => shape("read", 1 << 20, 8, false),
            Job::Seqwrite1m | Job::AllocSeqwrite1m => shape("write", 1 << 20, 8, true),
            Job::Create | Job::Stat | Job::Unlink => None,
        }
    }
}

fn value_name<T: clap::ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&value_name(self))
    }
}

impl fmt::Display for ModeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&value_name(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn names_on_the_command_line_and_in_json_are_the_same() {
        for job in Job::ALL {
            assert_eq!(serde_json::to_value(job).unwrap(), job.to_string());
        }
        assert_eq!(Job::value_variants(), Job::ALL);
        for mode in ModeName::value_variants() {
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.to_string());
        }
        assert_eq!(Job::AllocSeqwrite1m.to_string(), "alloc-seqwrite-1m");
    }
}
