//! The reference: a directory of files in memory, as POSIX has it. One model for all nodes, because every node must
//! see the same at once.
//!
//! Variants with a known fault exist so that it can be shown that the driver notices faults.

use crate::ops::{Allocate, How, Op, Reply};
use crate::rng::pattern;
use std::collections::BTreeMap;

/// A fault to put into the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// Punched ranges keep their data.
    PunchForgets,
    /// A rename over a name leaves the old name too.
    RenameCopies,
    /// An append goes where the appender last saw the end.
    AppendStale,
    /// Cutting a file and growing it again brings the old data back.
    TruncateKeepsTail,
    /// Unlinked files lose their data though they are open.
    UnlinkDrops,
}

#[derive(Debug, Clone, Default)]
struct File {
    data: Vec<u8>,
    nlink: u64,
    /// Behind the end, for [`Broken::TruncateKeepsTail`].
    tail: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    ino: u64,
    append: bool,
    seen_end: u64,
}

/// The directory.
#[derive(Debug, Clone)]
pub struct Model {
    broken: Option<Broken>,
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, File>,
    /// Open files, by node and slot.
    slots: BTreeMap<(usize, u32), Slot>,
    next_ino: u64,
}

type Outcome = Result<Reply, i32>;

impl Model {
    /// An empty directory.
    #[must_use]
    pub fn new(broken: Option<Broken>) -> Model {
        Model { broken, names: BTreeMap::new(), files: BTreeMap::new(), slots: BTreeMap::new(), next_ino: 1 }
    }

    /// Size of an open file, for choosing operations.
    #[must_use]
    pub fn slot_size(&self, node: usize, slot: u32) -> Option<u64> {
        let slot = self.slots.get(&(node, slot))?;
        self.files.get(&slot.ino).map(|file| file.data.len() as u64)
    }

    /// A slot of another node that has the same file open.
    #[must_use]
    pub fn twin(&self, node: usize, slot: u32) -> Option<(usize, u32)> {
        let ino = self.slots.get(&(node, slot))?.ino;
        self.slots.iter().find(|((other, _), open)| *other != node && open.ino == ino).map(|(key, _)| *key)
    }

    /// Does an operation as `node`. `Stat` answers have no inode number and no time: those are compared otherwise.
    pub fn run(&mut self, node: usize, op: &Op) -> Reply {
        self.try_run(node, op).unwrap_or_else(|errno| Reply::Failed { errno })
    }

    fn try_run(&mut self, node: usize, op: &Op) -> Outcome {
        match op {
            Op::Open { slot, name, how } => self.open(node, *slot, name, *how),
            Op::Close { slot } => {
                let slot = self.slots.remove(&(node, *slot)).ok_or(libc::EBADF)?;
                self.reap(slot.ino);
                Ok(Reply::Done)
            }
            Op::Read { slot, offset, len } | Op::MapRead { slot, offset, len } => {
                let data = &self.file(node, *slot)?.data;
                let start = index(*offset).min(data.len());
                Ok(Reply::data(&data[start..index(offset + len).min(data.len())]))
            }
            Op::Write { slot, offset, len, seed } => self.write(node, *slot, *offset, *len, *seed),
            Op::SetLen { slot, size } => self.set_len(self.slot(node, *slot)?.ino, *size),
            Op::Truncate { name, size } => self.set_len(*self.names.get(name).ok_or(libc::ENOENT)?, *size),
            Op::Allocate { slot, kind, offset, len } => self.allocate(node, *slot, *kind, *offset, *len),
            Op::Sync { slot } => self.slot(node, *slot).map(|_| Reply::Done),
            Op::Rename { from, to } => self.rename(from, to),
            Op::Link { from, to } => {
                let ino = *self.names.get(from).ok_or(libc::ENOENT)?;
                if self.names.contains_key(to) {
                    return Err(libc::EEXIST);
                }
                self.names.insert(to.clone(), ino);
                self.inode(ino)?.nlink += 1;
                Ok(Reply::Done)
            }
            Op::Unlink { name } => {
                let ino = self.names.remove(name).ok_or(libc::ENOENT)?;
                self.drop_link(ino)
            }
            Op::Stat { name } => {
                let ino = *self.names.get(name).ok_or(libc::ENOENT)?;
                Ok(stat(self.inode(ino)?))
            }
            Op::StatSlot { slot } => self.file(node, *slot).map(|file| stat(file)),
            Op::SyncDir => Ok(Reply::Done),
            Op::List => Ok(Reply::Names { names: self.names.keys().cloned().collect() }),
            // Locks have a suite of their own.
            Op::Lock { .. } => Err(libc::ENOSYS),
        }
    }

    fn slot(&self, node: usize, slot: u32) -> Result<Slot, i32> {
        self.slots.get(&(node, slot)).copied().ok_or(libc::EBADF)
    }

    fn inode(&mut self, ino: u64) -> Result<&mut File, i32> {
        self.files.get_mut(&ino).ok_or(libc::EIO)
    }

    fn file(&mut self, node: usize, slot: u32) -> Result<&mut File, i32> {
        let ino = self.slot(node, slot)?.ino;
        self.inode(ino)
    }

    fn open(&mut self, node: usize, slot: u32, name: &str, how: How) -> Outcome {
        let ino = match self.names.get(name) {
            Some(_) if how.create && how.exclusive => return Err(libc::EEXIST),
            Some(ino) => *ino,
            None if !how.create => return Err(libc::ENOENT),
            None => {
                let ino = self.next_ino;
                self.next_ino += 1;
                self.names.insert(name.to_owned(), ino);
                self.files.insert(ino, File { nlink: 1, ..File::default() });
                ino
            }
        };
        if how.truncate {
            self.set_len(ino, 0)?;
        }
        let seen_end = self.inode(ino)?.data.len() as u64;
        let old = self.slots.insert((node, slot), Slot { ino, append: how.append, seen_end });
        if let Some(old) = old {
            self.reap(old.ino);
        }
        Ok(Reply::Done)
    }

    fn write(&mut self, node: usize, slot: u32, offset: u64, len: u64, seed: u64) -> Outcome {
        let at = self.slot(node, slot)?;
        let stale = self.broken == Some(Broken::AppendStale);
        let file = self.inode(at.ino)?;
        let start = match at.append {
            true if stale => index(at.seen_end),
            true => file.data.len(),
            false => index(offset),
        };
        let end = start + index(len);
        if file.data.len() < end {
            file.data.resize(end, 0);
        }
        file.data[start..end].copy_from_slice(&pattern(seed, index(len)));
        if let Some(slot) = self.slots.get_mut(&(node, slot)) {
            slot.seen_end = end as u64;
        }
        Ok(Reply::Count { count: len })
    }

    fn set_len(&mut self, ino: u64, size: u64) -> Outcome {
        let keep = self.broken == Some(Broken::TruncateKeepsTail);
        let file = self.inode(ino)?;
        let size = index(size);
        if size < file.data.len() {
            file.tail = file.data.split_off(size);
        } else {
            let old = file.data.len();
            file.data.resize(size, 0);
            if keep {
                let back = file.tail.len().min(size - old);
                file.data[old..old + back].copy_from_slice(&file.tail[..back]);
            }
        }
        Ok(Reply::Done)
    }

    fn allocate(&mut self, node: usize, slot: u32, kind: Allocate, offset: u64, len: u64) -> Outcome {
        let forget = self.broken == Some(Broken::PunchForgets);
        let file = self.file(node, slot)?;
        let (start, end) = (index(offset), index(offset + len));
        let grows = matches!(kind, Allocate::Extend | Allocate::Zero);
        if grows && file.data.len() < end {
            file.data.resize(end, 0);
        }
        let zeros = kind == Allocate::Zero || (kind == Allocate::Punch && !forget);
        let end = end.min(file.data.len());
        if zeros && start < end {
            file.data[start..end].fill(0);
        }
        Ok(Reply::Done)
    }

    fn rename(&mut self, from: &str, to: &str) -> Outcome {
        let ino = *self.names.get(from).ok_or(libc::ENOENT)?;
        if self.names.get(to) == Some(&ino) {
            // Two links of one file: rename does nothing, and both stay.
            return Ok(Reply::Done);
        }
        if self.broken == Some(Broken::RenameCopies) && self.names.contains_key(to) {
            self.inode(ino)?.nlink += 1;
        } else {
            self.names.remove(from);
        }
        match self.names.insert(to.to_owned(), ino) {
            Some(old) => self.drop_link(old),
            None => Ok(Reply::Done),
        }
    }

    fn drop_link(&mut self, ino: u64) -> Outcome {
        let drops = self.broken == Some(Broken::UnlinkDrops);
        let file = self.inode(ino)?;
        file.nlink -= 1;
        if file.nlink == 0 && drops {
            file.data.fill(0);
        }
        self.reap(ino);
        Ok(Reply::Done)
    }

    /// Forgets a file without names that nobody has open.
    fn reap(&mut self, ino: u64) {
        let open = self.slots.values().any(|slot| slot.ino == ino);
        if !open && self.files.get(&ino).is_some_and(|file| file.nlink == 0) {
            self.files.remove(&ino);
        }
    }
}

fn stat(file: &File) -> Reply {
    Reply::Stat { size: file.data.len() as u64, nlink: file.nlink, ino: 0, mtime_ns: 0 }
}

/// Sizes in the model are far below 4 GiB; more is a fault of the driver and shows at once as a huge allocation.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
