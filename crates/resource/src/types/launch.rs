//! The last step before a program of a resource: csv-rhs runs itself, becomes the leader of a new session and the user that
//! the program is to run as, and then the program. So nothing has to be done between fork and exec in the host, which
//! has threads.
//!
//! Arguments: `--launch USER DIRECTORY PROGRAM ARGUMENT...`, user and directory empty for those of the host.

use std::ffi::{CString, OsString};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// First argument of csv-rhs.
pub const LAUNCH: &str = "--launch";

/// Becomes the program. Returns only when it cannot, with the reason.
pub fn launch(mut args: impl Iterator<Item = OsString>) -> String {
    let user = args.next().unwrap_or_default();
    let directory = args.next().unwrap_or_default();
    let Some(program) = args.next() else { return "no program to launch".to_owned() };
    if let Err(e) = nix::unistd::setsid() {
        return format!("setsid: {e}");
    }
    if let Err(e) = become_user(&user.to_string_lossy()) {
        return e;
    }
    let mut command = Command::new(&program);
    command.args(args);
    if !directory.is_empty() {
        command.current_dir(&directory);
    }
    let e = command.exec();
    format!("cannot run {} in {}: {e}", program.to_string_lossy(), Path::new(&directory).display())
}

fn become_user(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Ok(());
    }
    let user = nix::unistd::User::from_name(name).map_err(|e| format!("user {name}: {e}"))?;
    let user = user.ok_or_else(|| format!("there is no user {name} on this node"))?;
    let c_name = CString::new(name).map_err(|e| format!("user {name}: {e}"))?;
    nix::unistd::initgroups(&c_name, user.gid).map_err(|e| format!("groups of user {name}: {e}"))?;
    nix::unistd::setgid(user.gid).map_err(|e| format!("group of user {name}: {e}"))?;
    nix::unistd::setuid(user.uid).map_err(|e| format!("becoming user {name}: {e}"))
}
