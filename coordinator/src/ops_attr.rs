//! Attributes, extended attributes, and what holders of layouts commit and reclaim.

use crate::calls::{Answer, Call, Done, Fail};
use crate::coordinator::Coordinator;
use crate::layouts::access_of;
use crate::leases::{Change, Note, Subject};
use crate::state::{Core, Eof};
use csv_layout::table::Input;
use csv_proto::{
    Attr, GetAttr, LayoutCommit, LayoutGrant, LayoutReclaim, RemoveXattr, SetAttr, SetXattr, reply,
};
use csv_types::{ByteRange, FileId, NodeId};
use rustix::io::Errno;

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

impl Coordinator {
    pub(crate) async fn getattr(&self, call: &Call, get: GetAttr) -> Result<Done, Fail> {
        let file = csv_proto::file_id(get.file)?;
        Ok(self.attr_answer(call.at.node, file, Vec::new()).await?.into())
    }

    /// A file's attributes for a node, with a lease if there can be one; `others` are leases that the reply carries
    /// besides, and it carries all or none.
    pub(crate) async fn attr_answer(
        &self,
        node: NodeId,
        file: FileId,
        others: Vec<Option<Note>>,
    ) -> Result<Answer, Errno> {
        let mut notes = others;
        notes.push(self.lease(node, file, Subject::Attr));
        let attr = self.attr_for(node, file).await?;
        let leases = notes.into_iter().collect::<Option<Vec<Note>>>().unwrap_or_default();
        Ok(Answer { body: Some(reply::Body::Attr(attr)), leases, ..Answer::default() })
    }

    /// Attributes as of now. During grace the size of a file whose end somebody was moving is not known.
    async fn attr_for(&self, node: NodeId, file: FileId) -> Result<Attr, Errno> {
        let attr = self.fresh_attr(file, Some(node)).await?;
        let mine =
            || self.core.lock().files.get(&file).is_some_and(|s| s.eof.is_some_and(|eof| eof.node == node));
        if *self.grace.borrow()
            && attr.mode & S_IFMT == S_IFREG
            && self.fs.logical_size(file)?.is_some()
            && !mine()
        {
            self.grace_over().await;
            return self.fresh_attr(file, Some(node)).await;
        }
        Ok(attr)
    }

    pub(crate) async fn setattr(&self, call: &Call, set: SetAttr) -> Result<Done, Fail> {
        let file = csv_proto::file_id(set.file)?;
        if let Some(size) = set.size {
            self.truncate(file, size).await?;
        }
        let rest = SetAttr { size: None, ..set };
        if rest != (SetAttr { file: rest.file, ..SetAttr::default() }) {
            if rest.mtime.is_some() || rest.mtime_now {
                // What was written before must not move the time afterwards.
                self.freshen(file, Some(call.at.node)).await?;
            }
            // Whoever fills or cuts the file puts its time back afterwards.
            let lock = self.exclusive(file).await;
            if rest.mtime.is_some() || rest.mtime_now {
                self.flush_locked(&lock, file)?;
            }
            self.fs.setattr(file, &rest)?;
        }
        self.changed(call.at.node, &[Change::attr(file)]).await;
        Ok(self.attr_answer(call.at.node, file, Vec::new()).await?.into())
    }

    pub(crate) async fn setxattr(&self, call: &Call, set: SetXattr) -> Result<Done, Fail> {
        let file = csv_proto::file_id(set.file)?;
        match self.fs.setxattr(file, &set.name, &set.value, set.flags, set.acl_kill_sgid) {
            // The call before may have created it.
            Err(Errno::EXIST)
                if call.resent && self.fs.getxattr(file, &set.name).is_ok_and(|now| set.value == now) => {}
            other => other?,
        }
        self.changed(call.at.node, &[Change::attr_untold(file)]).await;
        Ok(Done::nothing())
    }

    pub(crate) async fn removexattr(&self, call: &Call, remove: RemoveXattr) -> Result<Done, Fail> {
        let file = csv_proto::file_id(remove.file)?;
        match self.fs.removexattr(file, &remove.name) {
            Err(Errno::NODATA) if call.resent => {}
            other => other?,
        }
        self.changed(call.at.node, &[Change::attr_untold(file)]).await;
        Ok(Done::nothing())
    }

    /// The size and time were noted when the message came; here they are written down.
    pub(crate) async fn layout_commit(&self, call: &Call, commit: LayoutCommit) -> Result<Done, Fail> {
        let file = csv_proto::file_id(commit.file)?;
        self.flush(file).await?;
        if commit.kill_suidgid {
            self.fs.setattr(file, &SetAttr { kill_suidgid: true, ..SetAttr::default() })?;
        }
        self.changed(call.at.node, &[Change::attr(file)]).await;
        Ok(self.attr_answer(call.at.node, file, Vec::new()).await?.into())
    }

    /// A node tells what it holds from the former coordinator. Its blocks may be in flight, so it is believed as
    /// long as nobody contradicts.
    pub(crate) fn layout_reclaim(&self, call: &Call, reclaim: LayoutReclaim) -> Result<Done, Fail> {
        let file = csv_proto::file_id(reclaim.file)?;
        may_reclaim(&mut self.core.lock(), call)?;
        self.fs.attr(file)?;
        for grant in reclaim.grants {
            self.reclaim_grant(call, file, &grant)?;
        }
        Ok(Done::nothing())
    }

    fn reclaim_grant(&self, call: &Call, file: FileId, grant: &LayoutGrant) -> Result<(), Fail> {
        let node = call.at.node;
        let range = csv_proto::byte_range(grant.offset, grant.end)?;
        let access = access_of(grant.access)?;
        let known = self.fs.attr(file)?.size.max(grant.alloc_end);
        // Not from the message: the block service is to trust nobody but the file system.
        let extents = self.fs.map(file, range.intersect(&ByteRange::new(0, known)))?;
        let core = &mut *self.core.lock();
        // Once more: grace may have ended, or the session, while the file was looked at.
        may_reclaim(core, call)?;
        self.step(core, Input::Reclaim { node, file, range, access, seq: grant.seq });
        if !core.table.holds(node, file, range, access) {
            return Err(Fail::new(Errno::STALE, "another node holds a part of this; everything is revoked"));
        }
        if let Some(session) = core.session(node, call.at.session) {
            session.pieces.granted(file, range, grant.seq, &extents);
        }
        let state = core.file(file);
        // Nobody lent it while it was being cached here: this coordinator has only just begun.
        if grant.eof && range.end == u64::MAX {
            state.eof = Some(Eof { node, start: range.start, alloc_end: grant.alloc_end });
            state.settle = false;
            state.pending.size = state.pending.size.max(Some(grant.size));
        }
        Ok(())
    }
}

fn may_reclaim(core: &mut Core, call: &Call) -> Result<(), Fail> {
    let node = call.at.node;
    if core.grace.as_ref().is_some_and(|grace| grace.members.contains(&node))
        && core.session(node, call.at.session).is_some()
    {
        return Ok(());
    }
    Err(Fail::new(Errno::STALE, "the grace period is over; what was held is gone"))
}
