//! The table of cases (`crates/cluster/cases`), and random histories.

mod cases;
mod simulated;
mod spec;
