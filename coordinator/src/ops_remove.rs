//! Removing and replacing names. A regular file that would die while somebody needs it becomes an orphan instead.

use crate::calls::{Call, Done, Fail};
use crate::coordinator::Coordinator;
use crate::layouts::Exclusive;
use crate::leases::Change;
use csv_proto::{Attr, Rename, RmDir, Unlink, component, file_id};
use csv_types::FileId;
use rustix::io::Errno;

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

impl Coordinator {
    pub(crate) async fn unlink(&self, call: &Call, unlink: Unlink) -> Result<Done, Fail> {
        let (parent, name) = (file_id(unlink.parent)?, component(&unlink.name)?);
        let file = {
            let _names = self.exclusive(parent).await;
            let attr = match self.fs.lookup(parent, name) {
                Err(Errno::NOENT) if call.resent => return Ok(Done::nothing()),
                other => other?,
            };
            let file = file_id(attr.file)?;
            let (_lock, last) = self.last_name(file, &attr).await?;
            if last && self.in_use(file) {
                self.fs.orphan_in(parent, name, file)?;
                self.orphaned(file);
            } else {
                self.fs.unlink(parent, name)?;
                self.died(file, last);
            }
            file
        };
        self.changed(call.at.node, &[Change::directory_told(parent), Change::attr_untold(file)]).await;
        Ok(self.removed_answer(call.at.node, parent))
    }

    pub(crate) async fn rmdir(&self, call: &Call, rmdir: RmDir) -> Result<Done, Fail> {
        let (parent, name) = (file_id(rmdir.parent)?, component(&rmdir.name)?);
        let dir = {
            let _names = self.exclusive(parent).await;
            let attr = match self.fs.lookup(parent, name) {
                Err(Errno::NOENT) if call.resent => return Ok(Done::nothing()),
                other => other?,
            };
            self.fs.rmdir(parent, name)?;
            file_id(attr.file)?
        };
        self.changed(call.at.node, &[Change::directory_told(parent), Change::directory(dir)]).await;
        Ok(self.removed_answer(call.at.node, parent))
    }

    pub(crate) async fn rename(&self, call: &Call, rename: Rename) -> Result<Done, Fail> {
        let (parent, name) = (file_id(rename.parent)?, component(&rename.name)?);
        let (new_parent, new_name) = (file_id(rename.new_parent)?, component(&rename.new_name)?);
        let mut changes = vec![Change::directory(parent), Change::directory(new_parent)];
        {
            // In order of their ids, so that two renames cannot wait for each other.
            let (first, second) = (parent.min(new_parent), parent.max(new_parent));
            let _first = self.exclusive(first).await;
            let _second = if first == second { None } else { Some(self.exclusive(second).await) };
            let target = match self.fs.lookup(new_parent, new_name) {
                Ok(attr) => Some(attr),
                Err(Errno::NOENT) => None,
                Err(errno) => return Err(errno.into()),
            };
            let source = match self.fs.lookup(parent, name) {
                Err(Errno::NOENT) if call.resent && done_before(&rename, target.as_ref()) => {
                    return Ok(Done::nothing());
                }
                other => other?,
            };
            changes.push(moved(&source)?);
            match target {
                Some(target) if rename.flags == 0 && target.file != source.file => {
                    changes.push(moved(&target)?);
                    self.rename_over(&target, (parent, name), (new_parent, new_name)).await?;
                }
                other => {
                    if let Some(target) = other {
                        changes.push(moved(&target)?);
                    }
                    self.fs.rename(parent, name, new_parent, new_name, rename.flags)?;
                }
            }
        }
        self.changed(call.at.node, &changes).await;
        Ok(Done::nothing())
    }

    /// Replaces `target`. If it is needed it first gets its orphan name, so that it has a name at every moment and
    /// the replaced name never points nowhere.
    async fn rename_over(
        &self,
        target: &Attr,
        from: (FileId, &[u8]),
        to: (FileId, &[u8]),
    ) -> Result<(), Fail> {
        let file = file_id(target.file)?;
        let (_lock, last) = self.last_name(file, target).await?;
        if !last || !self.in_use(file) {
            self.fs.rename(from.0, from.1, to.0, to.1, 0)?;
            self.died(file, last);
            return Ok(());
        }
        let kept_before = self.fs.is_orphan(file);
        self.fs.orphan_keep(file)?;
        if let Err(errno) = self.fs.rename(from.0, from.1, to.0, to.1, 0) {
            if !kept_before && let Err(undo) = self.fs.orphan_delete(file) {
                self.event("orphan", format!("file {file} keeps an orphan name beside its own: {undo}"));
            }
            return Err(errno.into());
        }
        self.orphaned(file);
        Ok(())
    }

    /// Is the name by which `file` was found its last one? True of regular files only. The link count is read again
    /// under the file's lock, which is handed over: two names in two directories can be on their way out at once, and
    /// one of them is the last.
    async fn last_name(&self, file: FileId, found: &Attr) -> Result<(Option<Exclusive>, bool), Fail> {
        // Never a directory's lock: those are taken in the order of their ids.
        if !is_regular(found) {
            return Ok((None, false));
        }
        let lock = self.exclusive(file).await;
        let last = self.fs.attr(file)?.nlink <= 1;
        Ok((Some(lock), last))
    }

    /// A name of a file that nobody needed is gone; with the last one its descriptors here must go too.
    fn died(&self, file: FileId, last: bool) {
        if last {
            self.fs.forget(file);
        }
    }
}

fn is_regular(attr: &Attr) -> bool {
    attr.mode & S_IFMT == S_IFREG
}

/// What a rename does to the file that it moves or replaces. A directory's `..` is a name in it.
fn moved(attr: &Attr) -> Result<Change, Fail> {
    let file = file_id(attr.file)?;
    Ok(if is_regular(attr) { Change::attr_untold(file) } else { Change::directory(file) })
}

/// Has the call that is now sent again renamed already (safety rule 9)?
fn done_before(rename: &Rename, target: Option<&Attr>) -> bool {
    rename.expect.is_some() && target.is_some_and(|attr| attr.file == rename.expect)
}
