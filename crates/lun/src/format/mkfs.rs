//! Runs mkfs.ext4 or mkfs.xfs with everything that matters said on the command line or in a configuration of
//! our own, so that a distribution's defaults cannot bring in a feature that layouts do not stand.

use super::CreateError;
use csv_ondisk::FsKind;
use csv_types::FS_BLOCK_BYTES;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::NamedTempFile;
use uuid::Uuid;

/// ext4 features that are not listed are off: no `inline_data` (data inside inodes cannot be lent), no
/// `bigalloc`, no quota, no encryption, no `orphan_file` (e2fsprogs before 1.47 does not know the word).
const MKE2FS_CONF: &str = "\
[defaults]
\tbase_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
\tdefault_mntopts = acl,user_xattr
\tenable_periodic_fsck = 0
\tblocksize = 4096
\tinode_size = 256
\tinode_ratio = 16384
[fs_types]
\text4 = {
\t\tfeatures = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
\t\tinode_size = 256
\t}
\tsmall = {
\t\tinode_ratio = 8192
\t}
\tbig = {
\t\tinode_ratio = 32768
\t}
\thuge = {
\t\tinode_ratio = 65536
\t}
";

/// Where administrators' programs lie, whatever the caller's PATH says.
const SBIN_DIRS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

pub(super) struct Mkfs<'a> {
    pub(super) lun: &'a Path,
    pub(super) fs: FsKind,
    pub(super) fs_bytes: u64,
    pub(super) logical_block_bytes: u32,
    pub(super) uuid: Uuid,
}

impl Mkfs<'_> {
    /// The program's name and where it lies.
    pub(super) fn program(&self) -> Result<(&'static str, PathBuf), CreateError> {
        let (program, package) = match self.fs {
            FsKind::Ext4 => ("mkfs.ext4", "e2fsprogs"),
            FsKind::Xfs => ("mkfs.xfs", "xfsprogs"),
        };
        match find_program(program) {
            Some(path) => Ok((program, path)),
            None => Err(CreateError::MkfsMissing { program, package }),
        }
    }

    pub(super) fn run(&self) -> Result<(), CreateError> {
        let (program, program_path) = self.program()?;
        let failed = |why: String| CreateError::MkfsFailed { program, why };
        let mut conf = NamedTempFile::new().map_err(|error| failed(format!("temporary file: {error}")))?;
        conf.write_all(MKE2FS_CONF.as_bytes()).map_err(|error| failed(format!("temporary file: {error}")))?;
        let args = match self.fs {
            FsKind::Ext4 => self.ext4_args(),
            FsKind::Xfs => self.xfs_args(),
        };
        let output = Command::new(program_path)
            .args(args)
            .env("MKE2FS_CONFIG", conf.path())
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        Err(failed(format!("{}: {text}", output.status)))
    }

    /// Inode tables and journal are written now and not in the background later, so that the first mount of
    /// a volume is as good as any other. Blocks are discarded first, which a thin LUN wants.
    fn ext4_args(&self) -> Vec<OsString> {
        let uuid = self.uuid.to_string();
        let mut args =
            strings(&["-F", "-q", "-t", "ext4", "-b", "4096", "-m", "0", "-O", "mmp", "-U", &uuid]);
        args.extend(strings(&["-E", "lazy_itable_init=0,lazy_journal_init=0"]));
        args.push(self.lun.into());
        args.push((self.fs_bytes / FS_BLOCK_BYTES).to_string().into());
        args
    }

    /// No reflinks: shared extents cannot be lent for writing.
    fn xfs_args(&self) -> Vec<OsString> {
        let meta = format!("crc=1,reflink=0,uuid={}", self.uuid);
        let data = format!("size={}", self.fs_bytes);
        let sector = format!("size={}", self.logical_block_bytes);
        let mut args = strings(&["-f", "-q", "-b", "size=4096", "-m", &meta, "-d", &data, "-s", &sector]);
        args.push(self.lun.into());
        args
    }
}

/// Sets ext4's multiple-mount protection back, as after a clean unmount. Only when whoever had the file system mounted is
/// known to be fenced: the kernel then need not wait (11 s) to see for itself. `tune2fs(8)` replays the journal first.
///
/// # Errors
/// `tune2fs` is missing or refuses.
pub fn clear_mmp(device: &Path) -> std::io::Result<()> {
    let program = find_program("tune2fs").unwrap_or_else(|| "tune2fs".into());
    let output = Command::new(program).args(["-f", "-E", "clear_mmp"]).arg(device).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(std::io::Error::other(format!(
        "tune2fs -E clear_mmp {}: {}: {text}",
        device.display(),
        output.status
    )))
}

fn strings(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn find_program(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    find_in(program, std::env::split_paths(&path).chain(SBIN_DIRS.iter().map(PathBuf::from)))
}

fn find_in(program: impl AsRef<OsStr>, dirs: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    let program = program.as_ref();
    dirs.map(|dir| dir.join(program)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_order_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("mkfs.ext4"), "").unwrap();
        let dirs = || [PathBuf::from("/nonexistent"), dir.path().to_path_buf()].into_iter();
        assert_eq!(find_in("mkfs.ext4", dirs()), Some(dir.path().join("mkfs.ext4")));
        assert_eq!(find_in("mkfs.xfs", dirs()), None);
    }
}
