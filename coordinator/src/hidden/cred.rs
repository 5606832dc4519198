//! Creating files as somebody else, atomically: the file-system user, group and umask of the *thread* are the
//! caller's while the system call runs, so the kernel applies set-group-id directories and default ACLs exactly
//! as for a local caller, and no crash can leave a file with root as its owner.
//!
//! Linux keeps the umask in a structure shared by all threads, and drops file capabilities when the file-system user
//! leaves 0; [`prepare_thread`] undoes both for the calling thread. Supplementary groups do not matter: the kernel
//! in front has checked permissions and stripped set-group-id bits that the caller may not set.

use super::Result;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;
use rustix::thread::{CapabilitiesSecureBits, capabilities_secure_bits, set_capabilities_secure_bits};
use std::cell::Cell;
use std::marker::PhantomData;

thread_local! {
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Makes the calling thread fit for [`CredScope`]: its own umask, and capabilities that stay. Cheap when done
/// before. The thread's working directory is its own from then on, too.
///
/// # Errors
/// EPERM without `CAP_SETPCAP`.
pub fn prepare_thread() -> Result<()> {
    if PREPARED.get() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_FS).map_err(|error| Errno::from_raw_os_error(error as i32))?;
    let bits = capabilities_secure_bits()?;
    set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    PREPARED.set(true);
    Ok(())
}

/// While it lives, what the thread creates belongs to the caller. Not to be nested, not to be sent elsewhere.
#[derive(Debug)]
#[must_use = "the caller's identity ends when this is dropped"]
pub struct CredScope {
    old_uid: Uid,
    old_gid: Gid,
    old_umask: Mode,
    this_thread: PhantomData<*const ()>,
}

impl CredScope {
    /// Takes on the identity; prepares the thread first if that was not done.
    ///
    /// # Errors
    /// EPERM when the kernel refuses the identity (nothing has changed then), or from [`prepare_thread`].
    pub fn enter(cred: &csv_proto::Cred) -> Result<CredScope> {
        prepare_thread()?;
        let (uid, gid) = (Uid::from_raw(cred.uid), Gid::from_raw(cred.gid));
        let scope = CredScope {
            old_gid: setfsgid(gid),
            old_uid: setfsuid(uid),
            old_umask: umask(Mode::from_raw_mode(cred.umask & 0o777)),
            this_thread: PhantomData,
        };
        // Both calls report the former id and never an error; an invalid id only reads the present one.
        let now = (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX)));
        if now == (uid, gid) { Ok(scope) } else { Err(Errno::PERM) }
    }
}

impl Drop for CredScope {
    fn drop(&mut self) {
        umask(self.old_umask);
        setfsuid(self.old_uid);
        setfsgid(self.old_gid);
    }
}
