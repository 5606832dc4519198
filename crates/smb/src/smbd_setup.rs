//! What has to be right before an smbd is started: directories, configuration, the user, a free port, and nothing
//! left of an earlier run.

use crate::smbd::{SmbdConfig, SmbdError};
use crate::smbd_conf::{Layout, smb_conf};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// Longest path of a Unix socket that the kernel takes, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Entries of the lock directory looked at for leftovers.
const LEFTOVERS_MAX: usize = 4_096;

/// Does all of it.
pub(crate) fn prepare(config: &SmbdConfig, layout: &Layout) -> Result<(), SmbdError> {
    check(config, layout)?;
    for dir in layout.dirs() {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| SmbdError::State { path: dir.to_owned(), source })?;
    }
    write_private(&layout.conf, &smb_conf(config, layout))?;
    // The user exists only for SMB; on this machine it is root, as the daemon itself.
    write_private(&layout.user_map, &format!("root = {}\n", config.user))?;
    end_leftovers(layout);
    // Under the mapped name: Samba looks the password up after mapping.
    set_password(config, layout)?;
    check_port(config)
}

/// Values that would change the meaning of the configuration file are refused.
fn check(config: &SmbdConfig, layout: &Layout) -> Result<(), SmbdError> {
    let plain =
        |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    let path_ok = |path: &Path| {
        path.is_absolute() && path.to_str().is_some_and(|path| !path.contains(['\n', '%', '"', ';', '#']))
    };
    let invalid = |what: String| Err(SmbdError::Invalid { what });
    if !plain(&config.share) || !plain(&config.user) {
        return invalid(format!("share {:?} or user {:?}", config.share, config.user));
    }
    for path in [&config.path, &config.base_dir, &config.run_dir] {
        if !path_ok(path) {
            return invalid(format!("path {path:?}"));
        }
    }
    if config.password.is_empty() || config.password.contains(['\n', '\0']) {
        return invalid("password (empty, or with a line break)".to_owned());
    }
    let socket = layout.lock.join("msg.sock/4194304");
    if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return invalid(format!("run directory {:?} (too long for sockets in it)", config.run_dir));
    }
    Ok(())
}

fn write_private(path: &Path, text: &str) -> Result<(), SmbdError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| SmbdError::State { path: path.to_owned(), source })
}

fn set_password(config: &SmbdConfig, layout: &Layout) -> Result<(), SmbdError> {
    let program = "smbpasswd";
    let start = |source: std::io::Error| {
        if source.kind() == ErrorKind::NotFound {
            SmbdError::Missing { program, package: "samba-common-bin" }
        } else {
            SmbdError::Start { program, source }
        }
    };
    let mut child = Command::new(program)
        .arg("-c")
        .arg(&layout.conf)
        .args(["-s", "-a", "root"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // When it has ended already, its exit status tells more than the broken pipe.
        let _ = write!(stdin, "{0}\n{0}\n", config.password);
    }
    let output = child.wait_with_output().map_err(start)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(SmbdError::User { user: config.user.clone(), text })
}

/// A port that somebody else listens on is told now and by name; smbd would only write it to its log.
fn check_port(config: &SmbdConfig) -> Result<(), SmbdError> {
    let addr = SocketAddr::new(config.addr, config.port);
    match TcpListener::bind(addr) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(SmbdError::PortInUse { addr }),
        Err(source) => Err(SmbdError::Address { addr, source }),
    }
}

/// Ends smbd processes of an earlier run of this instance, whose supervisor was killed. smbd keeps a file named
/// by pid for each of its processes; a process counts as ours only when it has our lock directory's files open,
/// so a pid that was used again is left alone.
fn end_leftovers(layout: &Layout) {
    let Ok(entries) = fs::read_dir(layout.lock.join("msg.lock")) else { return };
    for entry in entries.flatten().take(LEFTOVERS_MAX) {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { continue };
        // The descriptor first: then what is looked at and what is killed are the same process.
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if has_open_below(pid, &layout.lock) {
            tracing::info!(pid = pid.as_raw_nonzero().get(), "ending an smbd process of an earlier run");
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            crate::smbd::wait_gone(&pidfd, std::time::Duration::from_secs(2));
        }
        let _ = fs::remove_file(entry.path());
    }
}

fn has_open_below(pid: Pid, dir: &Path) -> bool {
    let Ok(dir) = dir.canonicalize() else { return false };
    let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())) else { return false };
    entries.flatten().any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(&dir)))
}
