//! NFS file handles: a file by its identity instead of by its path.
//!
//! A handle stays good over renames and remounts and turns stale (`ESTALE`) once the inode is freed, also when
//! the inode number is reused, because it carries the generation.

use rustix::fs::OFlags;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Longest handle that the kernel makes or takes, in bytes (`MAX_HANDLE_SZ`).
pub const HANDLE_BYTES_MAX: usize = 128;

/// `struct file_handle` with room for the longest handle.
#[repr(C)]
struct HandleBuf {
    handle_bytes: u32,
    handle_type: i32,
    f_handle: [u8; HANDLE_BYTES_MAX],
}

/// The handle of `name` in `dir`, or of `dir` itself when `name` is empty: its type and its bytes. A symbolic
/// link is not followed. An `O_PATH` descriptor will do.
///
/// # Errors
/// The kernel's errno: `EOPNOTSUPP` when the file system has no handles, `ENOENT` when there is no such name.
pub fn name_to_handle(dir: impl AsFd, name: &CStr) -> io::Result<(i32, Vec<u8>)> {
    let mut buf = HandleBuf {
        handle_bytes: u32::try_from(HANDLE_BYTES_MAX).map_err(io::Error::other)?,
        handle_type: 0,
        f_handle: [0; HANDLE_BYTES_MAX],
    };
    let mut mount_id: libc::c_int = 0;
    let flags = if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    // SAFETY: `name` is NUL-terminated and outlives the call; `buf` has the layout of `struct file_handle`
    // followed by the `handle_bytes` bytes that it promises, and is exclusively ours, as is `mount_id`.
    let rc = unsafe {
        libc::name_to_handle_at(
            dir.as_fd().as_raw_fd(),
            name.as_ptr(),
            (&raw mut buf).cast::<libc::file_handle>(),
            &raw mut mount_id,
            flags,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    let len = usize::try_from(buf.handle_bytes).map_err(io::Error::other)?;
    match buf.f_handle.get(..len) {
        Some(bytes) => Ok((buf.handle_type, bytes.to_vec())),
        None => Err(io::Error::from_raw_os_error(libc::EOVERFLOW)),
    }
}

/// Opens the file of a handle on the file system that `mount` (any descriptor on it) lies on. Needs
/// `CAP_DAC_READ_SEARCH`; permissions on the way to the file are not checked. `O_CLOEXEC` is always added.
///
/// # Errors
/// `EINVAL` when the handle is longer than [`HANDLE_BYTES_MAX`] or malformed, `ESTALE` when the file is gone,
/// `ELOOP` for a symbolic link without `O_PATH`, else the errno of the open.
pub fn open_by_handle(
    mount: impl AsFd,
    handle_type: i32,
    handle: &[u8],
    flags: OFlags,
) -> io::Result<OwnedFd> {
    let mut buf = HandleBuf { handle_bytes: 0, handle_type, f_handle: [0; HANDLE_BYTES_MAX] };
    let Some(room) = buf.f_handle.get_mut(..handle.len()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    room.copy_from_slice(handle);
    buf.handle_bytes = u32::try_from(handle.len()).map_err(io::Error::other)?;
    let flags = (flags | OFlags::CLOEXEC).bits().cast_signed();
    loop {
        // SAFETY: `buf` has the layout of `struct file_handle` followed by `handle_bytes` initialised bytes and
        // outlives the call; the kernel only reads it.
        let fd = unsafe {
            libc::open_by_handle_at(
                mount.as_fd().as_raw_fd(),
                (&raw mut buf).cast::<libc::file_handle>(),
                flags,
            )
        };
        if fd >= 0 {
            // SAFETY: the kernel just returned this descriptor and nobody else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn handle_survives_rename_and_goes_stale_after_unlink() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir_fd = std::fs::File::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("a"), b"hello").unwrap();
        let (kind, bytes) = name_to_handle(&dir_fd, c"a").unwrap();
        std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();

        let fd = open_by_handle(&dir_fd, kind, &bytes, OFlags::RDONLY).unwrap();
        let (kind_of_fd, bytes_of_fd) = name_to_handle(&fd, c"").unwrap();
        assert_eq!((kind_of_fd, &bytes_of_fd), (kind, &bytes));
        let mut text = String::new();
        std::fs::File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");

        std::fs::remove_file(dir.path().join("b")).unwrap();
        let error = open_by_handle(&dir_fd, kind, &bytes, OFlags::RDONLY).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    }

    #[test]
    fn bad_arguments_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir_fd = std::fs::File::open(dir.path()).unwrap();
        let error = name_to_handle(&dir_fd, c"missing").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        let error = open_by_handle(&dir_fd, 1, &[0; HANDLE_BYTES_MAX + 1], OFlags::RDONLY).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
