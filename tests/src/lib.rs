//! Harness of the end-to-end suites: a lab per suite, processes on its nodes, waiting with deadlines, a reference
//! model of a directory, file-system checks at the end.
//!
//! The suites need root and the binaries of the project (`CSVCTL`, else `target/release/csvctl`). Each lab has its
//! own name and is taken down when its handle is dropped, also after a failed assertion. Labs run one at a time,
//! whatever the test runner does in parallel, because suites measure time and traffic.
//!
//! Environment: `CSVCTL` (path of csvctl), `CSV_SEED` (repeat a run), `CSV_TEST_FULL=1` (the long versions),
//! `CSV_TEST_FS` (`ext4` or `xfs`), `CSV_TEST_KEEP=1` (leave a lab up after a failure, to look at it).

pub mod agent;
pub mod client;
pub mod driver;
pub mod files;
pub mod fsck;
pub mod groups;
pub mod guest;
pub mod lab;
pub mod membership;
pub mod model;
pub mod node_agent;
pub mod ops;
pub mod rng;
pub mod tools;
pub mod vmguest;
pub mod wait;

/// Are the long versions wanted?
#[must_use]
pub fn full() -> bool {
    std::env::var_os("CSV_TEST_FULL").is_some_and(|value| value == "1")
}
