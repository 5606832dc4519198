//! What another node was told is done stays done, whatever becomes of this node: names and attributes that a call of another
//! node changed are on the disk before it is answered. Else that node would go on with files that a power cut here has
//! undone, and its next call would fail. The calls of this node's own applications are not made durable: those are gone
//! with the node too, and fsync(2) is there for the rest. So it is with sizes that are committed: what lies in front of them is on
//! the LUN already, and the node that wrote it may have given up its right to tell them again.
//!
//! Calls that are under way at the same time share the commits of the file system's journal.

use crate::coordinator::Coordinator;
use csv_proto::call::Op;
use csv_types::FileId;
use rustix::io::Errno;

/// What a call changes, as far as its success has to outlive this node.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// Directories whose names change.
    dirs: Vec<FileId>,
    /// Files whose attributes or data change.
    files: Vec<FileId>,
}

impl Changes {
    /// Of this call.
    pub(crate) fn of(op: &Op) -> Changes {
        let ids = |ids: &[Option<csv_proto::FileId>]| -> Vec<FileId> {
            let mut ids: Vec<FileId> = ids.iter().filter_map(|id| csv_proto::file_id(*id).ok()).collect();
            // A rename within one directory.
            ids.dedup();
            ids
        };
        let dirs = |dirs: &[Option<csv_proto::FileId>]| Changes { dirs: ids(dirs), files: Vec::new() };
        let files = |files: &[Option<csv_proto::FileId>]| Changes { dirs: Vec::new(), files: ids(files) };
        match op {
            Op::Mknod(op) => dirs(&[op.parent]),
            Op::Mkdir(op) => dirs(&[op.parent]),
            Op::Symlink(op) => dirs(&[op.parent]),
            Op::Create(op) => dirs(&[op.parent]),
            Op::Link(op) => dirs(&[op.new_parent]),
            Op::Unlink(op) => dirs(&[op.parent]),
            Op::Rmdir(op) => dirs(&[op.parent]),
            Op::Rename(op) => dirs(&[op.parent, op.new_parent]),
            Op::Setattr(op) => files(&[op.file]),
            Op::Setxattr(op) => files(&[op.file]),
            Op::Removexattr(op) => files(&[op.file]),
            Op::Fallocate(op) => files(&[op.file]),
            Op::CopyRange(op) => files(&[op.dst]),
            Op::Write(op) => files(&[op.file]),
            Op::LayoutCommit(op) if op.size.is_some() => files(&[op.file]),
            Op::Open(op) if !op.reclaim && op.flags & libc::O_TRUNC.cast_unsigned() != 0 => files(&[op.file]),
            Op::Lookup(_)
            | Op::Getattr(_)
            | Op::Readlink(_)
            | Op::Open(_)
            | Op::Close(_)
            | Op::Readdir(_)
            | Op::Statfs(_)
            | Op::Getxattr(_)
            | Op::Listxattr(_)
            | Op::Fsync(_)
            | Op::Syncfs(_)
            | Op::Seek(_)
            | Op::Read(_)
            | Op::LayoutGet(_)
            | Op::LayoutCommit(_)
            | Op::LayoutReclaim(_)
            | Op::Getlk(_)
            | Op::Setlk(_)
            | Op::AdminOrder(_)
            | Op::ListStates(_)
            | Op::MapFile(_) => Changes::default(),
        }
    }
}

impl Coordinator {
    /// Makes what a call of another node has changed durable. Blocks.
    ///
    /// # Errors
    /// EIO: the LUN failed, and what became of the changes is not known.
    pub(crate) fn make_durable(&self, changes: &Changes) -> Result<(), Errno> {
        if self.options.read_only {
            return Ok(());
        }
        for dir in &changes.dirs {
            gone_is_fine(self.fs.fsync_dir(*dir))?;
        }
        for file in &changes.files {
            match self.fs.fsync(*file, false) {
                Err(Errno::ISDIR) => gone_is_fine(self.fs.fsync_dir(*file))?,
                // Symbolic links and the like cannot be opened for that.
                Err(Errno::INVAL | Errno::LOOP) => self.fs.syncfs()?,
                other => gone_is_fine(other)?,
            }
        }
        Ok(())
    }
}

/// Somebody has removed it meanwhile.
fn gone_is_fine(outcome: Result<(), Errno>) -> Result<(), Errno> {
    match outcome {
        Err(Errno::STALE | Errno::NOENT) => Ok(()),
        other => other,
    }
}
