//! Attributes as this node shows them: what the coordinator says, and over it what this node knows better.

use super::VolumeClient;
use super::inode::Inode;
use csv_proto as proto;
use proto::call::Op;
use proto::reply::Body;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

/// The attributes in a reply.
///
/// # Errors
/// The reply's errno; EPROTO when there are none.
pub(crate) fn attr_of(reply: &proto::Reply) -> Result<proto::Attr, Errno> {
    match (reply.errno, &reply.body) {
        (0, Some(Body::Attr(attr))) => Ok(*attr),
        (0, _) => Err(Errno::PROTO),
        (errno, _) => Err(Errno::from_raw_os_error(errno)),
    }
}

impl VolumeClient {
    /// Takes a kernel reference to a file that an entry reply names.
    ///
    /// # Errors
    /// EPROTO when the attributes name no file.
    pub(crate) fn enter(&self, attr: &proto::Attr) -> Result<(Arc<Inode>, proto::Attr), Errno> {
        let file = proto::file_id(attr.file).map_err(|_| Errno::PROTO)?;
        let inode = self.inodes.reference(file);
        let attr = self.note(&inode, attr);
        Ok((inode, attr))
    }

    /// Remembers what attributes say about a file, and puts what this node knows better over them.
    pub(crate) fn note(&self, inode: &Inode, attr: &proto::Attr) -> proto::Attr {
        let mut shown = *attr;
        if attr.mode & S_IFMT == S_IFREG {
            inode.setid.store(attr.mode & 0o6000 != 0, Ordering::Relaxed);
            let mut io = inode.io.lock();
            match io.cache.eof() {
                Some(eof) => shown.size = eof.size,
                None => io.known_size = attr.size,
            }
            if io.wrote_at.is_some() {
                shown.mtime = later(shown.mtime, io.wrote_at);
                shown.ctime = later(shown.ctime, io.wrote_at);
            }
        }
        shown
    }

    /// Attributes that this node may show without asking.
    pub(crate) fn known_attr(&self, inode: &Inode) -> Option<proto::Attr> {
        if holds_something(inode) || !self.session_live() {
            return None;
        }
        self.meta.attr(inode.file).map(|attr| self.note(inode, &attr))
    }

    /// The question for a file's attributes.
    pub(crate) fn getattr_op(inode: &Inode) -> Op {
        Op::Getattr(proto::GetAttr { file: Some(inode.file.into()) })
    }

    /// Takes the answer to [`VolumeClient::getattr_op`], asked at `asked`.
    ///
    /// # Errors
    /// Those of the reply.
    pub(crate) fn got_attr(
        &self,
        inode: &Inode,
        asked: super::meta::Asked,
        reply: &proto::Reply,
    ) -> Result<proto::Attr, Errno> {
        let attr = attr_of(reply)?;
        if reply.lease && !holds_something(inode) {
            self.meta.learn_attr(asked, inode.file, &attr);
        }
        Ok(self.note(inode, &attr))
    }
}

/// May this node know something about the file that the coordinator does not?
pub(crate) fn holds_something(inode: &Inode) -> bool {
    let io = inode.io.lock();
    !io.cache.is_empty() || io.wrote_at.is_some()
}

fn later(a: Option<proto::Time>, b: Option<proto::Time>) -> Option<proto::Time> {
    let key = |time: &Option<proto::Time>| time.map(|time| (time.s, time.ns));
    if key(&a) < key(&b) { b } else { a }
}
