//! Extended attributes, of symbolic links themselves too. `trusted.csv.*` is ours: nobody reads, lists or
//! changes it through these functions. POSIX ACLs are the attributes `system.posix_acl_*`.

use super::{HiddenFs, Result, proc_path};
use csv_types::FileId;
use rustix::fs::{AtFlags, FileType, Mode, XattrFlags};
use rustix::io::Errno;
use std::ffi::CString;

/// Prefix of the attributes that are ours.
pub(super) const OWN_PREFIX: &[u8] = b"trusted.csv.";
const TRUSTED_PREFIX: &[u8] = b"trusted.";
/// XATTR_NAME_MAX.
const NAME_BYTES_MAX: usize = 255;
/// XATTR_SIZE_MAX and XATTR_LIST_MAX.
const VALUE_BYTES_MAX: usize = 64 << 10;
/// An attribute that grows between asking for its size and reading it is read again this often.
const TRIES_MAX: u32 = 8;

impl HiddenFs {
    /// Sets an attribute; `flags` as in setxattr(2). `acl_kill_sgid` clears the set-group-id bit, for an access
    /// ACL set by somebody outside the file's group.
    ///
    /// # Errors
    /// As setxattr; EPERM for our own names.
    pub fn setxattr(
        &self,
        file: FileId,
        name: &[u8],
        value: &[u8],
        flags: u32,
        acl_kill_sgid: bool,
    ) -> Result<()> {
        refuse_own(name)?;
        let name = attribute_name(name)?;
        if value.len() > VALUE_BYTES_MAX {
            return Err(Errno::TOOBIG);
        }
        let known = XattrFlags::CREATE | XattrFlags::REPLACE;
        let flags = XattrFlags::from_bits_retain(flags);
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let fd = self.open_path(file)?;
        let path = proc_path(&fd);
        rustix::fs::setxattr(&path, &name, value, flags)?;
        if acl_kill_sgid {
            let mode = rustix::fs::fstat(&fd)?.st_mode;
            if FileType::from_raw_mode(mode) != FileType::Symlink && mode & 0o2000 != 0 {
                let mode = Mode::from_raw_mode(mode & 0o5777);
                rustix::fs::chmodat(rustix::fs::CWD, &path, mode, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// An attribute's value.
    ///
    /// # Errors
    /// As getxattr; ENODATA for our own names.
    pub fn getxattr(&self, file: FileId, name: &[u8]) -> Result<Vec<u8>> {
        if name.starts_with(OWN_PREFIX) {
            return Err(Errno::NODATA);
        }
        let name = attribute_name(name)?;
        let fd = self.open_path(file)?;
        let path = proc_path(&fd);
        read_growing(|buf| rustix::fs::getxattr(&path, &name, buf))
    }

    /// Names of the attributes, without ours; `trusted.*` only when asked for (the kernel shows it to
    /// administrators only).
    ///
    /// # Errors
    /// As listxattr.
    pub fn listxattr(&self, file: FileId, trusted: bool) -> Result<Vec<Vec<u8>>> {
        let fd = self.open_path(file)?;
        let path = proc_path(&fd);
        let list = read_growing(|buf| rustix::fs::listxattr(&path, buf))?;
        let shown = |name: &&[u8]| {
            !name.is_empty()
                && !name.starts_with(OWN_PREFIX)
                && (trusted || !name.starts_with(TRUSTED_PREFIX))
        };
        Ok(list.split(|byte| *byte == 0).filter(shown).map(<[u8]>::to_vec).collect())
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// As removexattr; EPERM for our own names.
    pub fn removexattr(&self, file: FileId, name: &[u8]) -> Result<()> {
        refuse_own(name)?;
        let name = attribute_name(name)?;
        let fd = self.open_path(file)?;
        rustix::fs::removexattr(proc_path(&fd), &name)
    }
}

fn refuse_own(name: &[u8]) -> Result<()> {
    if name.starts_with(OWN_PREFIX) { Err(Errno::PERM) } else { Ok(()) }
}

fn attribute_name(name: &[u8]) -> Result<CString> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(Errno::RANGE);
    }
    CString::new(name).map_err(|_| Errno::INVAL)
}

/// Most values are small; the largest that Linux takes fits the second try.
fn read_growing(read: impl Fn(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    let mut buf = vec![0_u8; 256];
    for _ in 0..TRIES_MAX {
        match read(&mut buf) {
            Ok(len) => {
                buf.truncate(len);
                return Ok(buf);
            }
            Err(Errno::RANGE) => buf.resize(VALUE_BYTES_MAX, 0),
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::RANGE)
}
