//! Names: looking up, creating, listing. Removing and renaming are in `ops_remove`.
//!
//! A directory's lock is held while its names change, so that what was looked up is what is then removed or replaced.
//! It is free again before the leases of other nodes are taken.

use crate::calls::{Answer, Call, Done, Fail};
use crate::coordinator::Coordinator;
use crate::hidden::CredScope;
use crate::leases::{Change, Note, Subject};
use csv_proto::{
    Attr, Close, Create, DirPage, Link, Lookup, MkDir, MkNod, Open, ReadDir, Symlink, component, file_id,
    reply,
};
use csv_types::{FileId, NodeId};
use rustix::io::Errno;

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;
/// Clocks of two nodes may differ by this much; so a resent call recognises its own work.
const CLOCKS_DIFFER_MS: u64 = 2000;
/// A name that is replaced while it is looked up is looked up again this often.
const LOOKUP_TRIES_MAX: usize = 4;

/// What makes a name and is neither open nor rename.
#[derive(Debug)]
pub(crate) enum Make {
    Node(MkNod),
    Dir(MkDir),
    Symlink(Symlink),
    Link(Link),
}

impl Coordinator {
    pub(crate) async fn lookup(&self, call: &Call, lookup: Lookup) -> Result<Done, Fail> {
        let parent = file_id(lookup.parent)?;
        let name = match lookup.name.as_ref() {
            dots @ (b"." | b"..") => dots,
            name => component(name)?,
        };
        for _ in 0..LOOKUP_TRIES_MAX {
            let names = self.lease(call.at.node, parent, Subject::Names);
            let attr = match self.fs.lookup(parent, name) {
                Err(Errno::NOENT) => return Ok(absent(names)),
                other => other?,
            };
            let file = file_id(attr.file)?;
            match self.attr_answer(call.at.node, file, vec![names]).await {
                Err(Errno::STALE) => {}
                other => return Ok(other?.into()),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// mknod, mkdir, symlink, link.
    pub(crate) async fn make(&self, call: &Call, op: Make) -> Result<Done, Fail> {
        let (parent, name, kind, link) = match &op {
            Make::Node(op) => (op.parent, &op.name, op.mode & S_IFMT, None),
            Make::Dir(op) => (op.parent, &op.name, S_IFDIR, None),
            Make::Symlink(op) => (op.parent, &op.name, S_IFLNK, None),
            Make::Link(op) => (op.new_parent, &op.new_name, 0, Some(file_id(op.file)?)),
        };
        let (parent, name) = (file_id(parent)?, component(name)?);
        let attr = {
            let _names = self.exclusive(parent).await;
            match self.make_one(call, parent, name, &op) {
                Err(Errno::EXIST) if call.resent => self.made_before(call, parent, name, kind, link)?,
                other => other?,
            }
        };
        let file = file_id(attr.file)?;
        let mut changes = vec![Change::directory_told(parent)];
        changes.extend(link.map(Change::attr));
        self.changed(call.at.node, &changes).await;
        self.named_answer(call.at.node, parent, file).await
    }

    fn make_one(&self, call: &Call, parent: FileId, name: &[u8], op: &Make) -> Result<Attr, Errno> {
        let _as_caller = CredScope::enter(&call.cred)?;
        match op {
            Make::Node(op) => self.fs.mknod(parent, name, op.mode, op.rdev),
            Make::Dir(op) => self.fs.mkdir(parent, name, op.mode),
            Make::Symlink(op) => self.fs.symlink(parent, name, &op.target),
            Make::Link(op) => {
                let file = file_id(op.file).map_err(|_| Errno::INVAL)?;
                self.fs.link(file, parent, name)
            }
        }
    }

    /// Did the call that is now sent again make this (safety rule 9)? EEXIST when not.
    fn made_before(
        &self,
        call: &Call,
        parent: FileId,
        name: &[u8],
        kind: u32,
        link: Option<FileId>,
    ) -> Result<Attr, Errno> {
        let attr = self.fs.lookup(parent, name)?;
        let same = match link {
            Some(file) => attr.file == Some(file.into()),
            None => {
                let birth = attr.btime.unwrap_or_default();
                let birth_ms = u64::try_from(birth.s).unwrap_or(0) * 1000 + u64::from(birth.ns) / 1_000_000;
                attr.mode & S_IFMT == kind
                    && attr.uid == call.cred.uid
                    && birth_ms + CLOCKS_DIFFER_MS >= call.first_sent_ms
            }
        };
        if same { Ok(attr) } else { Err(Errno::EXIST) }
    }

    /// A new name's attributes and those of its directory, with leases on all.
    async fn named_answer(&self, node: NodeId, parent: FileId, file: FileId) -> Result<Done, Fail> {
        let (notes, dir) = self.dir_told(node, parent);
        Ok(Answer { dir, ..self.attr_answer(node, file, notes).await? }.into())
    }

    /// A directory whose names the node has changed: what it may cache of it, and the new attributes. Without them (the
    /// directory may be gone by now) there is no lease.
    fn dir_told(&self, node: NodeId, dir: FileId) -> (Vec<Option<Note>>, Option<Attr>) {
        let notes = vec![self.lease(node, dir, Subject::Names), self.lease(node, dir, Subject::Attr)];
        match self.fs.attr(dir) {
            Ok(attr) => (notes, Some(attr)),
            Err(_) => (vec![None], None),
        }
    }

    /// The answer to a call that has removed a name.
    pub(crate) fn removed_answer(&self, node: NodeId, dir: FileId) -> Done {
        let (notes, dir) = self.dir_told(node, dir);
        let leases = notes.into_iter().collect::<Option<Vec<Note>>>().unwrap_or_default();
        Answer { dir, leases, ..Answer::default() }.into()
    }

    pub(crate) async fn create(&self, call: &Call, create: Create) -> Result<Done, Fail> {
        let (parent, name) = (file_id(create.parent)?, component(&create.name)?);
        let (attr, existed) = {
            let _names = self.exclusive(parent).await;
            let created = {
                let _as_caller = CredScope::enter(&call.cred)?;
                self.fs.create(parent, name, create.mode, create.flags)
            };
            match created {
                Err(Errno::EXIST) if call.resent => {
                    (self.made_before(call, parent, name, S_IFREG, None)?, true)
                }
                other => {
                    let (attr, existed) = other?;
                    if !existed {
                        self.register(call, create.handle, file_id(attr.file)?)?;
                    }
                    (attr, existed)
                }
            }
        };
        let file = file_id(attr.file)?;
        if existed {
            match attr.mode & S_IFMT {
                S_IFREG => {}
                S_IFDIR => return Err(Errno::ISDIR.into()),
                // The kernel looks again and finds what it is.
                _ => return Err(Errno::STALE.into()),
            }
            self.open_file(call, create.handle, file, create.flags).await?;
        } else {
            self.changed(call.at.node, &[Change::directory_told(parent)]).await;
        }
        self.named_answer(call.at.node, parent, file).await
    }

    pub(crate) async fn open(&self, call: &Call, open: Open) -> Result<Done, Fail> {
        let file = file_id(open.file)?;
        self.open_file(call, open.handle, file, open.flags).await?;
        if open.reclaim {
            // The size of a file whose end somebody was moving is known only after grace, which waits for this.
            return Ok(Done::nothing());
        }
        Ok(self.attr_answer(call.at.node, file, Vec::new()).await?.into())
    }

    async fn open_file(&self, call: &Call, handle: u64, file: FileId, flags: u32) -> Result<(), Fail> {
        {
            // Shared with buffered I/O, but no unlink decides between the look and the registration.
            let _lock = self.shared(file).await;
            self.fs.attr(file)?;
            self.register(call, handle, file)?;
        }
        if flags & libc::O_TRUNC.cast_unsigned() != 0 {
            if let Err(fail) = self.truncate(file, 0).await {
                self.deregister(call, handle);
                return Err(fail);
            }
            self.changed(call.at.node, &[Change::attr(file)]).await;
        }
        Ok(())
    }

    fn register(&self, call: &Call, handle: u64, file: FileId) -> Result<(), Fail> {
        let core = &mut *self.core.lock();
        let max = self.options.limits.opens_per_session_max;
        let Some(session) = core.session(call.at.node, call.at.session) else {
            return Err(Fail::new(Errno::STALE, "the session is over"));
        };
        if session.opens.len() >= max {
            return Err(Fail::new(Errno::NFILE, "too many open files of one node"));
        }
        match session.opens.insert(handle, file) {
            // Sent twice.
            Some(old) if old == file => {}
            Some(old) => {
                session.opens.insert(handle, old);
                return Err(Fail::new(Errno::INVAL, "the handle stands for another file"));
            }
            None => core.file(file).opens += 1,
        }
        Ok(())
    }

    fn deregister(&self, call: &Call, handle: u64) {
        let core = &mut *self.core.lock();
        let Some(session) = core.session(call.at.node, call.at.session) else { return };
        if let Some(file) = session.opens.remove(&handle) {
            let state = core.file(file);
            state.opens = state.opens.saturating_sub(1);
            self.look_after(core, file);
        }
    }

    pub(crate) fn close(&self, call: &Call, close: Close) -> Result<Done, Fail> {
        self.deregister(call, close.handle);
        Ok(Done::nothing())
    }

    pub(crate) async fn readdir(&self, call: &Call, read: ReadDir) -> Result<Done, Fail> {
        let dir = file_id(read.dir)?;
        let node = call.at.node;
        let names = self.lease(node, dir, Subject::Names);
        let changes = self.core.lock().changes;
        let mut page = self.fs.readdir(dir, read.cookie, read.max_bytes, read.plus)?;
        if !read.plus {
            let leases = names.into_iter().collect();
            return Ok(Answer { body: Some(reply::Body::Dir(page)), leases, ..Answer::default() }.into());
        }
        self.freshen_page(node, &mut page).await?;
        let leases = self.lease_page(node, names, changes, &page);
        Ok(Answer { body: Some(reply::Body::Dir(page)), leases, ..Answer::default() }.into())
    }

    /// Entries that others may have written: ask them.
    async fn freshen_page(&self, node: NodeId, page: &mut DirPage) -> Result<(), Fail> {
        for attr in page.entries.iter_mut().filter_map(|entry| entry.attr.as_mut()) {
            let file = file_id(attr.file)?;
            let look = {
                let core = self.core.lock();
                core.written_by_others(file, node)
                    || core.files.get(&file).is_some_and(|state| !state.pending.is_empty())
            };
            if look {
                match self.fresh_attr(file, Some(node)).await {
                    // Removed meanwhile: what was read is as good as anything.
                    Err(Errno::STALE) => {}
                    other => *attr = other?,
                }
            }
        }
        Ok(())
    }

    /// Leases on everything in a page, or on nothing: attributes were read before a lease was noted, so nothing
    /// may have changed anywhere since.
    fn lease_page(&self, node: NodeId, names: Option<Note>, changes: u64, page: &DirPage) -> Vec<Note> {
        let core = &mut *self.core.lock();
        if core.changes != changes {
            return Vec::new();
        }
        let mut notes = vec![names];
        for attr in page.entries.iter().filter_map(|entry| entry.attr.as_ref()) {
            let Ok(file) = file_id(attr.file) else { return Vec::new() };
            notes.push(self.lease_locked(core, node, file, Subject::Attr));
        }
        notes.into_iter().collect::<Option<Vec<Note>>>().unwrap_or_default()
    }
}

/// No such name, which may be cached as well.
fn absent(names: Option<Note>) -> Done {
    let errno = Errno::NOENT.raw_os_error();
    Answer { errno, leases: names.into_iter().collect(), ..Answer::default() }.into()
}
