//! Attributes and names that this node may keep under a lease, until the coordinator takes it back.
//!
//! A reply with `lease` may be cached; `Invalidate` must have removed it before it is acknowledged, and whatever was
//! asked before an invalidation arrived must not be cached after it. That is what the change number is for: a
//! caller notes it before it asks, and what it learned is stored only when the number is still the same. The node's
//! own changes drop what they touch in the same way, when their reply has arrived (whatever it says).
//!
//! Nothing is served from here when the session is not open or the lease is over: a node that may have been
//! given up by the coordinator has not been told of changes.
//!
//! Bounded: when a table is full it is emptied, which costs calls but is never wrong.

use csv_proto as proto;
use csv_types::FileId;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Files with attributes, at most.
const ATTRS_MAX: usize = 65_536;
/// Names, at most.
const NAMES_MAX: usize = 65_536;

type Names = HashMap<bytes::Bytes, Option<FileId>>;

#[derive(Debug, Default)]
struct Tables {
    attrs: HashMap<FileId, proto::Attr>,
    names: HashMap<FileId, Names>,
    names_len: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct MetaCache {
    tables: Mutex<Tables>,
    changes: AtomicU64,
}

/// Change number at the time of asking.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked(u64);

/// What is known of a name.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Known {
    /// It names a file with these attributes.
    File(proto::Attr),
    /// It does not exist.
    Absent,
}

impl MetaCache {
    /// To be called before asking the coordinator.
    pub(crate) fn ask(&self) -> Asked {
        Asked(self.changes.load(Ordering::Acquire))
    }

    /// Attributes of a file.
    pub(crate) fn attr(&self, file: FileId) -> Option<proto::Attr> {
        self.tables.lock().attrs.get(&file).copied()
    }

    /// A name in a directory.
    pub(crate) fn name(&self, dir: FileId, name: &[u8]) -> Option<Known> {
        let tables = self.tables.lock();
        match tables.names.get(&dir)?.get(name)? {
            Some(file) => tables.attrs.get(file).copied().map(Known::File),
            None => Some(Known::Absent),
        }
    }

    /// The file behind a name, whether or not its attributes are known.
    pub(crate) fn file(&self, dir: FileId, name: &[u8]) -> Option<FileId> {
        self.tables.lock().names.get(&dir)?.get(name).copied().flatten()
    }

    /// Attributes arrived under a lease.
    pub(crate) fn learn_attr(&self, asked: Asked, file: FileId, attr: &proto::Attr) {
        let mut tables = self.tables.lock();
        if asked.0 == self.changes.load(Ordering::Acquire) {
            tables.put_attr(file, *attr);
        }
    }

    /// The answer of a lookup arrived under a lease; `found` is `None` for ENOENT.
    pub(crate) fn learn_name(
        &self,
        asked: Asked,
        dir: FileId,
        name: &bytes::Bytes,
        found: Option<(FileId, &proto::Attr)>,
    ) {
        let mut tables = self.tables.lock();
        if asked.0 != self.changes.load(Ordering::Acquire) {
            return;
        }
        if let Some((file, attr)) = found {
            tables.put_attr(file, *attr);
        }
        tables.put_name(dir, name.clone(), found.map(|(file, _)| file));
    }

    /// The coordinator takes leases back.
    pub(crate) fn invalidate(&self, file: FileId, attr: bool, names: bool) {
        let mut tables = self.tables.lock();
        self.changes.fetch_add(1, Ordering::AcqRel);
        if attr {
            tables.attrs.remove(&file);
        }
        if names && let Some(gone) = tables.names.remove(&file) {
            tables.names_len -= gone.len();
        }
    }

    /// This node changed (or may have changed) files and a name.
    pub(crate) fn changed(&self, files: &[FileId], names: &[(FileId, &[u8])]) {
        let mut tables = self.tables.lock();
        self.changes.fetch_add(1, Ordering::AcqRel);
        for file in files {
            tables.attrs.remove(file);
        }
        for (dir, name) in names {
            if let Some(Some(file)) = tables.remove_name(*dir, name) {
                tables.attrs.remove(&file);
            }
        }
    }

    /// The reply to a call of this node that made or removed a name (it may have failed, too). Everything that the
    /// call may have changed is dropped; then what the reply says under a lease is kept, unless something else changed
    /// while the call was under way. `file` is what the name stands for now.
    pub(crate) fn named(
        &self,
        asked: Asked,
        dir: FileId,
        name: &[u8],
        reply: Option<&proto::Reply>,
        file: Option<(FileId, &proto::Attr)>,
    ) {
        let mut tables = self.tables.lock();
        let changes = self.changes.fetch_add(1, Ordering::AcqRel);
        tables.attrs.remove(&dir);
        match tables.remove_name(dir, name) {
            Some(Some(old)) => drop(tables.attrs.remove(&old)),
            Some(None) => {}
            // A file whose link count is another now may be known by another name.
            None if file.is_none() => tables.attrs.clear(),
            None => {}
        }
        let Some(reply) = reply.filter(|reply| reply.errno == 0 && reply.lease && asked.0 == changes) else {
            return;
        };
        if let Some(attr) = reply.dir_attr {
            tables.put_attr(dir, attr);
        }
        if let Some((file, attr)) = file {
            tables.put_attr(file, *attr);
        }
        tables.put_name(dir, bytes::Bytes::copy_from_slice(name), file.map(|(file, _)| file));
    }

    /// This node removed a name, or renamed something away from it or over it: the file's link count or change time
    /// is another now. Which file that is may not be known here; then no attributes are kept.
    pub(crate) fn removed(&self, dir: FileId, name: &[u8]) {
        let mut tables = self.tables.lock();
        self.changes.fetch_add(1, Ordering::AcqRel);
        tables.attrs.remove(&dir);
        match tables.remove_name(dir, name) {
            Some(Some(file)) => drop(tables.attrs.remove(&file)),
            Some(None) => {}
            None => tables.attrs.clear(),
        }
    }

    /// The session is a new one: nothing is leased any more.
    pub(crate) fn clear(&self) {
        let mut tables = self.tables.lock();
        self.changes.fetch_add(1, Ordering::AcqRel);
        *tables = Tables::default();
    }
}

impl Tables {
    fn put_attr(&mut self, file: FileId, attr: proto::Attr) {
        if self.attrs.len() >= ATTRS_MAX {
            self.attrs.clear();
        }
        self.attrs.insert(file, attr);
    }

    fn put_name(&mut self, dir: FileId, name: bytes::Bytes, file: Option<FileId>) {
        if self.names_len >= NAMES_MAX {
            self.names.clear();
            self.names_len = 0;
        }
        if self.names.entry(dir).or_default().insert(name, file).is_none() {
            self.names_len += 1;
        }
    }

    /// What was known of the name.
    fn remove_name(&mut self, dir: FileId, name: &[u8]) -> Option<Option<FileId>> {
        let removed = self.names.get_mut(&dir)?.remove(name)?;
        self.names_len -= 1;
        Some(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(ino: u64) -> FileId {
        FileId { ino, generation: 1 }
    }

    fn attr(ino: u64) -> proto::Attr {
        proto::Attr { file: Some(file(ino).into()), ..proto::Attr::default() }
    }

    fn name(text: &'static str) -> bytes::Bytes {
        bytes::Bytes::from_static(text.as_bytes())
    }

    #[test]
    fn what_was_asked_before_an_invalidation_is_not_kept() {
        let cache = MetaCache::default();
        let asked = cache.ask();
        cache.invalidate(file(5), true, false);
        cache.learn_attr(asked, file(5), &attr(5));
        assert!(cache.attr(file(5)).is_none());
        cache.learn_attr(cache.ask(), file(5), &attr(5));
        assert!(cache.attr(file(5)).is_some());
        cache.invalidate(file(5), true, false);
        assert!(cache.attr(file(5)).is_none());
    }

    #[test]
    fn own_changes_drop_the_name_and_its_file() {
        let cache = MetaCache::default();
        let a = name("a");
        cache.learn_name(cache.ask(), file(2), &a, Some((file(7), &attr(7))));
        cache.learn_name(cache.ask(), file(2), &name("b"), None);
        assert!(matches!(cache.name(file(2), b"a"), Some(Known::File(_))));
        assert!(matches!(cache.name(file(2), b"b"), Some(Known::Absent)));
        cache.changed(&[file(2)], &[(file(2), b"a"), (file(2), b"b")]);
        assert!(cache.name(file(2), b"a").is_none());
        assert!(cache.name(file(2), b"b").is_none());
        assert!(cache.attr(file(7)).is_none());
        assert_eq!(cache.tables.lock().names_len, 0);
    }

    #[test]
    fn a_made_name_is_kept_under_its_lease_and_dropped_without() {
        let cache = MetaCache::default();
        let reply = proto::Reply { lease: true, dir_attr: Some(attr(2)), ..proto::Reply::default() };
        let asked = cache.ask();
        cache.named(asked, file(2), b"a", Some(&reply), Some((file(7), &attr(7))));
        assert!(matches!(cache.name(file(2), b"a"), Some(Known::File(_))));
        assert!(cache.attr(file(2)).is_some());
        // Asked before the call above was answered.
        cache.named(asked, file(2), b"b", Some(&reply), Some((file(8), &attr(8))));
        assert!(cache.name(file(2), b"b").is_none());
        assert!(cache.attr(file(2)).is_none());
        cache.named(cache.ask(), file(2), b"a", Some(&reply), None);
        assert!(matches!(cache.name(file(2), b"a"), Some(Known::Absent)));
        assert!(cache.attr(file(7)).is_none());
        let refused = proto::Reply { errno: 2, lease: true, ..proto::Reply::default() };
        cache.named(cache.ask(), file(2), b"a", Some(&refused), None);
        assert!(cache.name(file(2), b"a").is_none());
        assert_eq!(cache.tables.lock().names_len, 0);
    }

    #[test]
    fn a_name_without_its_attributes_is_asked_again() {
        let cache = MetaCache::default();
        cache.learn_name(cache.ask(), file(2), &name("a"), Some((file(7), &attr(7))));
        cache.invalidate(file(7), true, false);
        assert!(cache.name(file(2), b"a").is_none());
        cache.invalidate(file(2), false, true);
        assert_eq!(cache.tables.lock().names_len, 0);
    }
}
