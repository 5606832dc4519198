//! The SMB side of a volume: data I/O by SMB from the nodes (redirected modes), and the private smbd of the
//! coordinator that serves it.
//!
//! * [`pool`]: `SmbPool`, blocking reads and writes from many threads. libsmbclient serves one call at a time
//!   per process, so the work is done by `csv-smbc` processes (`worker` starts them, [`serve`] is what runs
//!   inside, [`wire`] is what they speak). A stuck call ends by killing its process.
//! * [`smbd`]: a supervised smbd with a configuration of its own that touches nothing of the machine's Samba.
//! * [`names`]: how names that SMB cannot carry appear on the share.
//!
//! Failure: every error of the pool says whether nothing happened or the outcome is unknown
//! ([`error::Outcome`]); nothing is reported as done that the server has not confirmed.

pub mod error;
pub mod jobs;
pub mod names;
pub mod pool;
mod pool_config;
pub mod serve;
pub mod smbd;
mod smbd_conf;
mod smbd_config;
mod smbd_setup;
pub mod wire;
mod worker;

pub use error::{Outcome, SmbError};
pub use pool::{Counters, PoolConfig, SmbPool};
pub use smbd::{Smbd, SmbdConfig, SmbdError};
