//! Files without a name that somebody still has open or that are lent: `/.csvfs/orphans/<ino>.<generation>`.
//!
//! A crash of the coordinator so frees no block under a layout; the next coordinator finds the list and deletes
//! after its grace period what nobody reclaimed. The set in memory mirrors the directory: link counts that are
//! reported leave our own name out.

use super::{HiddenFs, Result, component};
use csv_types::FileId;
use rustix::fs::AtFlags;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::CString;

#[derive(Debug, Default)]
pub(super) struct OrphanSet(BTreeSet<FileId>);

impl HiddenFs {
    /// Takes away a name and keeps the file as an orphan: in place of `unlink`.
    ///
    /// # Errors
    /// ENOENT when the name stands for another file (by now) or none; else as rename.
    pub fn orphan_in(&self, parent: FileId, name: &[u8], file: FileId) -> Result<()> {
        if self.lookup(parent, name)?.file != Some(file.into()) {
            return Err(Errno::NOENT);
        }
        let mut orphans = self.orphans.lock();
        let (dir, name) = (self.open_path(parent)?, component(name)?);
        if orphans.0.contains(&file) {
            // A rename onto another name of the same file would do nothing at all.
            return rustix::fs::unlinkat(&dir, &name, AtFlags::empty());
        }
        let orphans_dir = self.open_path(self.orphans_dir)?;
        rustix::fs::renameat(&dir, &name, &orphans_dir, &orphan_name(file)?)?;
        orphans.0.insert(file);
        Ok(())
    }

    /// Gives a file its orphan name beside those it has: before a rename that replaces its last one, so that the
    /// name never points nowhere. If the rename fails, `orphan_delete` undoes this.
    ///
    /// # Errors
    /// As link; nothing when it is an orphan already.
    pub fn orphan_keep(&self, file: FileId) -> Result<()> {
        let mut orphans = self.orphans.lock();
        if orphans.0.contains(&file) {
            return Ok(());
        }
        let orphans_dir = self.open_path(self.orphans_dir)?;
        let fd = self.open_path(file)?;
        rustix::fs::linkat(&fd, c"", &orphans_dir, &orphan_name(file)?, AtFlags::EMPTY_PATH)?;
        orphans.0.insert(file);
        Ok(())
    }

    /// Takes the orphan name away; with the last name the file dies. Its cached descriptors go too.
    ///
    /// # Errors
    /// ENOENT when it is no orphan; else as unlink.
    pub fn orphan_delete(&self, file: FileId) -> Result<()> {
        let mut orphans = self.orphans.lock();
        rustix::fs::unlinkat(self.open_path(self.orphans_dir)?, &orphan_name(file)?, AtFlags::empty())?;
        orphans.0.remove(&file);
        drop(orphans);
        self.forget(file);
        Ok(())
    }

    /// All orphans, in order of their ids.
    #[must_use]
    pub fn orphans(&self) -> Vec<FileId> {
        self.orphans.lock().0.iter().copied().collect()
    }

    /// Is it one?
    #[must_use]
    pub fn is_orphan(&self, file: FileId) -> bool {
        self.orphans.lock().0.contains(&file)
    }

    /// Fills the set from the directory. A name that is none of ours stays where it is, with a warning.
    pub(super) fn load_orphans(&self) -> Result<()> {
        let mut cookie = 0;
        loop {
            let page = self.internal_readdir(self.orphans_dir, cookie, 64 << 10, false)?;
            for entry in &page.entries {
                match parse_name(&entry.name) {
                    Some(file) => {
                        self.orphans.lock().0.insert(file);
                    }
                    None if matches!(entry.name.as_ref(), b"." | b"..") => {}
                    None => {
                        tracing::warn!(name = %entry.name.escape_ascii(), "unknown name among the orphans; left alone");
                    }
                }
                cookie = entry.cookie;
            }
            if page.end {
                return Ok(());
            }
        }
    }
}

fn orphan_name(file: FileId) -> Result<CString> {
    CString::new(file.to_string()).map_err(|_| Errno::INVAL)
}

fn parse_name(name: &[u8]) -> Option<FileId> {
    let (ino, generation) = std::str::from_utf8(name).ok()?.split_once('.')?;
    let file = FileId { ino: ino.parse().ok()?, generation: generation.parse().ok()? };
    // Only the one spelling that `orphan_name` gives: "007.1" would never be found again.
    (file.to_string().as_bytes() == name && file.ino != 0).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_spelling_is_an_orphan_name() {
        let file = FileId { ino: 77, generation: 4_000_000_000 };
        assert_eq!(parse_name(orphan_name(file).unwrap().as_bytes()), Some(file));
        for bad in [&b"."[..], b"..", b"077.1", b"77", b"77.x", b"0.1", b"77.1.2", b"\xff.1", b"+7.1"] {
            assert_eq!(parse_name(bad), None, "{}", bad.escape_ascii());
        }
    }
}
