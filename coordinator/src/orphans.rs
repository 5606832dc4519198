//! Files that lose their last name while they are needed: they move to `/.csvfs/orphans`, so that no crash frees
//! blocks under a layout (safety rule 8), and are deleted when nobody has them open and nothing of them is lent.

use crate::coordinator::Coordinator;
use csv_types::{ByteRange, FileId};
use rustix::io::Errno;

impl Coordinator {
    /// Does anybody need the file besides its names? With its lock held, the answer cannot become yes.
    pub(crate) fn in_use(&self, file: FileId) -> bool {
        let core = self.core.lock();
        core.table.is_busy(file)
            || core
                .files
                .get(&file)
                .is_some_and(|state| state.opens > 0 || state.mapping > 0 || state.eof.is_some())
    }

    /// Marks a file as an orphan, and deletes it at once if it is no longer needed by now.
    pub(crate) fn orphaned(&self, file: FileId) {
        let core = &mut *self.core.lock();
        core.file(file).unlinked = true;
        self.look_after(core, file);
    }

    /// Deletes an orphan, if it is still true that nobody has it open. What is lent of it is taken back first.
    pub(crate) async fn free_orphan(&self, file: FileId) {
        let Ok(guard) = self.guard(file, ByteRange::ALL, None, false).await else { return };
        let lock = self.exclusive(file).await;
        let needed = {
            let core = &mut *self.core.lock();
            let grace = core.grace.is_some();
            let state = core.file(file);
            let needed = grace || !state.unlinked || state.opens > 0;
            if needed {
                state.freeing = false;
            }
            needed
        };
        if !needed {
            self.delete_orphan(file);
        }
        drop(lock);
        drop(guard);
    }

    fn delete_orphan(&self, file: FileId) {
        match self.fs.orphan_delete(file) {
            Ok(()) | Err(Errno::NOENT) => tracing::debug!(%file, "orphan deleted"),
            Err(errno) => {
                self.event(
                    "orphan",
                    format!("deleting orphan {file} failed: {errno}; the next start tries again"),
                );
            }
        }
        let core = &mut *self.core.lock();
        let state = core.file(file);
        state.unlinked = false;
        state.freeing = false;
        state.settle = false;
        state.eof = None;
        state.pending = crate::state::Pending::default();
    }
}
