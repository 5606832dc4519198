//! Which operation is done where, and which of them wait for the end of grace or of maintenance.

use crate::calls::{Call, Done, Fail};
use crate::coordinator::Coordinator;
use crate::ops_ns::Make;
use csv_proto::{Count, Data, ListXattr, MapFile, MapReply, StateList, call::Op, reply};
use rustix::io::Errno;

/// When an operation may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// At any time: it changes nothing, or it reclaims.
    Always,
    /// After grace.
    NoGrace,
    /// After grace, and not during maintenance.
    Normal,
}

fn when(op: &Op) -> When {
    match op {
        Op::Open(open) if open.flags & libc::O_TRUNC.cast_unsigned() == 0 => When::Always,
        Op::Setlk(lock) if lock.reclaim => When::Always,
        Op::Lookup(_)
        | Op::Getattr(_)
        | Op::Readlink(_)
        | Op::Close(_)
        | Op::Readdir(_)
        | Op::Statfs(_)
        | Op::Getxattr(_)
        | Op::Listxattr(_)
        | Op::Fsync(_)
        | Op::Syncfs(_)
        | Op::LayoutCommit(_)
        | Op::LayoutReclaim(_)
        | Op::AdminOrder(_)
        | Op::ListStates(_)
        | Op::MapFile(_) => When::Always,
        Op::Getlk(_) | Op::Setlk(_) | Op::Seek(_) => When::NoGrace,
        Op::Setattr(_)
        | Op::Mknod(_)
        | Op::Mkdir(_)
        | Op::Symlink(_)
        | Op::Link(_)
        | Op::Unlink(_)
        | Op::Rmdir(_)
        | Op::Rename(_)
        | Op::Open(_)
        | Op::Create(_)
        | Op::Setxattr(_)
        | Op::Removexattr(_)
        | Op::Fallocate(_)
        | Op::CopyRange(_)
        | Op::Read(_)
        | Op::Write(_)
        | Op::LayoutGet(_) => When::Normal,
    }
}

/// Does it take back what its node had at the former coordinator?
pub(crate) fn reclaims(op: &Op) -> bool {
    matches!(
        op,
        Op::LayoutReclaim(_)
            | Op::Open(csv_proto::Open { reclaim: true, .. })
            | Op::Setlk(csv_proto::SetLock { reclaim: true, .. })
    )
}

impl Coordinator {
    /// Does one operation.
    pub(crate) async fn perform(&self, call: &Call, op: Op) -> Result<Done, Fail> {
        let when = when(&op);
        if when != When::Always {
            self.grace_over().await;
        }
        if when == When::Normal {
            self.maintenance_over().await;
        }
        // Begun before the hand-over, but what counts is what has been done.
        if *self.moved.borrow() {
            return Err(Errno::INTR.into());
        }
        match op {
            Op::Lookup(op) => self.lookup(call, op).await,
            Op::Getattr(op) => self.getattr(call, op).await,
            Op::Setattr(op) => self.setattr(call, op).await,
            Op::Readdir(op) => self.readdir(call, op).await,
            Op::Mknod(op) => self.make(call, Make::Node(op)).await,
            Op::Mkdir(op) => self.make(call, Make::Dir(op)).await,
            Op::Symlink(op) => self.make(call, Make::Symlink(op)).await,
            Op::Link(op) => self.make(call, Make::Link(op)).await,
            Op::Unlink(op) => self.unlink(call, op).await,
            Op::Rmdir(op) => self.rmdir(call, op).await,
            Op::Rename(op) => self.rename(call, op).await,
            Op::Open(op) => self.open(call, op).await,
            Op::Create(op) => self.create(call, op).await,
            Op::Close(op) => self.close(call, op),
            Op::Setxattr(op) => self.setxattr(call, op).await,
            Op::Removexattr(op) => self.removexattr(call, op).await,
            Op::Fallocate(op) => self.fallocate(call, op).await,
            Op::Seek(op) => self.seek(op).await,
            Op::CopyRange(op) => self.copy_range(call, op).await,
            Op::Read(op) => self.read(op).await,
            Op::Write(op) => self.write(call, op).await,
            Op::LayoutGet(op) => self.layout_get(call, op).await,
            Op::LayoutCommit(op) => self.layout_commit(call, op).await,
            Op::LayoutReclaim(op) => self.layout_reclaim(call, op),
            Op::Getlk(op) => self.getlk(call, op),
            Op::Setlk(op) => self.setlk(call, op),
            Op::Fsync(op) => self.fsync(call, op).await,
            Op::AdminOrder(op) => Ok(self.order_from(call.at.node, op)),
            Op::Readlink(op) => Ok(data(self.fs.readlink(csv_proto::file_id(op.file)?)?)),
            Op::Statfs(_) => Ok(reply::Body::Statfs(self.fs.statfs()?).into()),
            Op::Getxattr(op) => Ok(data(self.fs.getxattr(csv_proto::file_id(op.file)?, &op.name)?)),
            Op::Listxattr(op) => self.listxattr(call, op),
            Op::Syncfs(_) => Ok(self.fs.syncfs().map(|()| Done::nothing())?),
            Op::ListStates(_) => Ok(reply::Body::States(StateList { state_json: self.states() }).into()),
            Op::MapFile(op) => self.map_file(op),
        }
    }

    fn listxattr(&self, call: &Call, op: ListXattr) -> Result<Done, Fail> {
        let names = self.fs.listxattr(csv_proto::file_id(op.file)?, call.cred.uid == 0)?;
        Ok(data(names.into_iter().flat_map(|name| [name, vec![0]].concat()).collect()))
    }

    fn map_file(&self, op: MapFile) -> Result<Done, Fail> {
        let extents = self.map_path(&op.path)?;
        let extents = extents.iter().map(crate::layouts::wire_extent).collect();
        Ok(reply::Body::Map(MapReply { extents }).into())
    }
}

fn data(data: Vec<u8>) -> Done {
    reply::Body::Data(Data { data: data.into() }).into()
}

/// A number as an answer.
pub(crate) fn count(value: u64, attr: Option<csv_proto::Attr>) -> reply::Body {
    reply::Body::Count(Count { value, attr })
}
