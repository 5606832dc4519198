//! What is mounted, by `/proc/self/mountinfo` (proc_pid_mountinfo(5)): cheap, and never asks the file system itself.

use std::io;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Device, `major:minor`.
    pub(crate) device: String,
    /// Where.
    pub(crate) point: PathBuf,
    /// File system, such as `ext4` or `fuse.csvfs`.
    pub(crate) fs: String,
    /// Read-only, by the mount or by the file system itself, as ext4 makes itself after an error.
    pub(crate) read_only: bool,
}

/// The mount on top at that path.
///
/// # Errors
/// When mountinfo cannot be read.
pub(crate) fn at(point: &Path) -> io::Result<Option<Mount>> {
    Ok(all()?.into_iter().rfind(|mount| mount.point == point))
}

/// All mounts.
///
/// # Errors
/// When mountinfo cannot be read.
pub(crate) fn all() -> io::Result<Vec<Mount>> {
    // Of the thread: a test looks at a namespace of its own.
    of(Path::new("/proc/thread-self/mountinfo"))
}

/// All mounts of a process, by its mountinfo.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn of(mountinfo: &Path) -> io::Result<Vec<Mount>> {
    let text = std::fs::read(mountinfo)?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mount> {
    let (mount, fs) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let device = fields.next()?.to_owned();
    let point = PathBuf::from(unescape(fields.nth(1)?));
    // ext4 since Linux 6.15 says why, too.
    let read_only =
        |options: &str| options.split(',').any(|option| matches!(option, "ro" | "emergency_ro" | "shutdown"));
    let by_mount = read_only(fields.next()?);
    let mut fields = fs.split(' ');
    let kind = fields.next()?.to_owned();
    let by_fs = fields.nth(1).is_some_and(read_only);
    Some(Mount { device, point, fs: kind, read_only: by_mount || by_fs })
}

/// `\040` and the like.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart() {
        let mount =
            parse("90 22 7:3 / /mnt/a\\040b rw,noatime shared:1 - ext4 /dev/loop3 ro,errors=remount-ro");
        let expected =
            Mount { device: "7:3".into(), point: "/mnt/a b".into(), fs: "ext4".into(), read_only: true };
        assert_eq!(mount, Some(expected));
        assert!(!parse("36 1 0:5 / / rw - fuse.csvfs csvfs rw").unwrap().read_only);
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert_eq!(at(Path::new("/no/such/mount")).unwrap(), None);
    }
}
