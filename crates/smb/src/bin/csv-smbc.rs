//! SMB client worker of csvfs: one SMB connection, driven over the Unix socket on standard input. Started by the
//! pool in `csv-smb`, of no use by hand. Ends when the socket closes.

use anyhow::Context;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

fn main() -> anyhow::Result<()> {
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("cannot take the socket on standard input; csv-smbc is started by csvfs, not by hand")?;
    csv_smb::serve::serve(UnixStream::from(socket)).context("conversation with csvfs broke off")
}
