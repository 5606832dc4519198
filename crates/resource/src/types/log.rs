//! The log of a resource's programs, `log/NAME.log` in the node's state directory. It is a file, so that what outlives the
//! host can write on: a pipe to the host would end with it, and its writer by SIGPIPE.

use crate::api::{Failure, NodeInfo};
use std::fs::{self, File, OpenOptions};

/// A log file longer than this is put aside when it is opened.
const LOG_BYTES_MAX: u64 = 8 << 20;

/// To be written at its end, and read.
///
/// # Errors
/// It cannot be opened.
pub(super) fn open(node: &NodeInfo, name: &str) -> Result<File, Failure> {
    let directory = node.state_dir.join("log");
    let path = directory.join(format!("{}.log", crate::host::file_name(name)));
    let open = || {
        fs::create_dir_all(&directory)?;
        if fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX) {
            fs::rename(&path, path.with_extension("log.1"))?;
        }
        OpenOptions::new().create(true).append(true).read(true).open(&path)
    };
    open().map_err(|error| {
        Failure::new(format!(
            "its log {} cannot be opened: {error}; see to the node's state directory",
            path.display()
        ))
    })
}
