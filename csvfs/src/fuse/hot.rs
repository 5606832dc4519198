//! One read or write of the data path that needs no thought any more: which LUN blocks, which buffer, and what is held
//! until it is over.

use super::abi::{InHeader, IoIn};
use super::hidden::{BlockIo, Hidden, OwnerRef};
use crate::client::VolumeClient;
use crate::client::channel::Caller;
use crate::client::inode::Inode;
use csv_layout::cache::IoToken;
use csv_lun::AlignedBuf;
use csv_types::{ByteRange, LunOffset};
use std::sync::Arc;

/// What an I/O holds until it is over.
#[derive(Debug)]
pub(super) enum Holds {
    /// A layout of this node.
    Layout { inode: Arc<Inode>, token: IoToken },
    /// Another node's right to blocks of the LUN.
    Blocks(BlockIo),
}

impl Holds {
    /// The I/O is over.
    pub(super) fn end(self, client: &VolumeClient, wrote: bool) {
        match self {
            Holds::Layout { inode, token } => client.end_io(&inode, token, wrote),
            Holds::Blocks(io) => drop(io),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Hot {
    pub(super) unique: u64,
    pub(super) caller: Caller,
    pub(super) holds: Holds,
    pub(super) place: LunOffset,
    /// Whole LUN blocks to move.
    pub(super) block_len: usize,
    /// Where the asked bytes begin in the buffer, and how many they are.
    pub(super) skip: usize,
    pub(super) len: usize,
    /// Offset in the file.
    pub(super) offset: u64,
    pub(super) write: bool,
    /// Asked for by another node: the number of the hidden file.
    pub(super) for_other: Option<u64>,
    /// Held for as long as something is done for another node.
    pub(super) _owner: Option<OwnerRef>,
    pub(super) buf: AlignedBuf,
}

impl Hot {
    /// A read of these blocks into `buf`.
    pub(super) fn read(
        header: &InHeader,
        io: IoIn,
        holds: Holds,
        (place, block_len, skip, len): Span,
        buf: AlignedBuf,
    ) -> Hot {
        Hot {
            unique: header.unique,
            caller: caller(header),
            holds,
            place,
            block_len,
            skip,
            len,
            offset: io.offset,
            write: false,
            for_other: Some(header.nodeid).filter(|nodeid| Hidden::owns(*nodeid)),
            _owner: None,
            buf,
        }
    }

    /// Done for another node, by the owner of the volume.
    pub(super) fn for_other_by(self, owner: OwnerRef) -> Hot {
        Hot { _owner: Some(owner), ..self }
    }

    /// A write of whole blocks to `place`; the data is to be put in.
    pub(super) fn write(header: &InHeader, io: IoIn, holds: Holds, place: LunOffset) -> Hot {
        let len = io.size as usize;
        Hot { write: true, ..Hot::read(header, io, holds, (place, len, 0, len), AlignedBuf::new(0)) }
    }
}

/// Who asks.
pub(super) fn caller(header: &InHeader) -> Caller {
    Caller {
        request: header.unique,
        uid: header.uid,
        gid: header.gid,
        pid: header.pid,
        umask: 0,
        bound: false,
    }
}

/// Whole blocks around some bytes: where they begin, how many bytes, where the asked ones begin in them, and how many
/// those are.
pub(super) type Span = (LunOffset, usize, usize, usize);

/// The blocks around `len` bytes at `place`. `None` when it does not fit one I/O.
pub(super) fn span(place: LunOffset, len: u64, block: u64) -> Option<Span> {
    let wide = ByteRange::at(place.0, len).align_out(block);
    let block_len = usize::try_from(wide.len()).ok()?;
    let skip = usize::try_from(place.0 - wide.start).ok()?;
    Some((LunOffset(wide.start), block_len, skip, usize::try_from(len).ok()?))
}
