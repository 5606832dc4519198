//! Memory for direct I/O: buffers whose address every block device takes, and a pool of them.
//!
//! A buffer is made of whole pages that are initialised once, so its full capacity may always be looked at. A
//! pooled buffer keeps what its last user left in it. The pool never blocks and never refuses: it keeps a
//! bounded number of free buffers per size and gives the rest back to the allocator.
//!
//! Large buffers lie in huge pages where the kernel has some: a request of 1 MiB is then one piece of memory for the
//! block layer, instead of 256 that it has to look up, count and split (docs/decisions/004).

use parking_lot::Mutex;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of every buffer's address, in bytes.
pub const ALIGN_BYTES: usize = 4096;

/// Size and alignment of a huge page, in bytes. Where it is another one the advice does nothing.
const HUGE_BYTES: usize = 2 << 20;
/// From this length on a buffer is made of huge pages, in bytes.
const HUGE_FROM: usize = 1 << 20;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; ALIGN_BYTES]);

/// Anonymous memory of its own, all zeros at first.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// What munmap(2) gets: the start is aligned within a larger mapping.
    whole: (NonNull<c_void>, usize),
}

// SAFETY: the mapping is owned by this value alone, as a Vec's memory is.
unsafe impl Send for Mapping {}
// SAFETY: shared references only read.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Huge pages for `len` bytes, or `None` when the kernel gives none.
    fn huge(len: usize) -> Option<Mapping> {
        let len = len.next_multiple_of(HUGE_BYTES);
        let whole_len = len + HUGE_BYTES;
        // SAFETY: a new mapping at a place that the kernel chooses touches nothing that is there.
        let whole = unsafe {
            mm::mmap_anonymous(
                std::ptr::null_mut(),
                whole_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        let whole = NonNull::new(whole.ok()?)?;
        let first = whole.as_ptr().cast::<u8>();
        let shift = first.align_offset(HUGE_BYTES);
        // SAFETY: the shift is less than HUGE_BYTES, by which the mapping is longer than `len`.
        let start = unsafe { whole.cast::<u8>().add(shift) };
        // SAFETY: the range lies in the new mapping. Advice changes no contents; without it the pages are small ones.
        let _ = unsafe { mm::madvise(start.as_ptr().cast(), len, Advice::LinuxHugepage) };
        Some(Mapping { start, len, whole: (whole, whole_len) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody else has this mapping, and nobody can look at it after this.
        let _ = unsafe { mm::munmap(self.whole.0.as_ptr(), self.whole.1) };
    }
}

enum Memory {
    // A Vec and not a Box: moving a Box asserts to the compiler that nobody else points to its contents.
    Pages(Vec<Page>),
    Huge(Mapping),
}

impl Memory {
    fn capacity(&self) -> usize {
        match self {
            Memory::Pages(pages) => pages.len() * ALIGN_BYTES,
            Memory::Huge(mapping) => mapping.len,
        }
    }
}

/// An owned buffer, aligned to [`ALIGN_BYTES`]. Its bytes stay at one address for as long as it lives, also
/// when the owner moves (needed by I/O that the kernel does in the background).
pub struct AlignedBuf {
    memory: Memory,
    len: usize,
}

impl AlignedBuf {
    /// `len` zero bytes; the memory is a whole number of pages.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let huge = if len >= HUGE_FROM { Mapping::huge(len) } else { None };
        let pages = || Memory::Pages(vec![Page([0; ALIGN_BYTES]); len.div_ceil(ALIGN_BYTES)]);
        AlignedBuf { memory: huge.map_or_else(pages, Memory::Huge), len }
    }

    /// A buffer with a copy of `bytes`, padded with zeros to a multiple of `block_bytes`.
    #[must_use]
    pub fn copy_padded(bytes: &[u8], block_bytes: usize) -> Self {
        let mut buf = AlignedBuf::new(bytes.len().next_multiple_of(block_bytes.max(1)));
        buf[..bytes.len()].copy_from_slice(bytes);
        buf
    }

    /// Bytes that the memory holds; at least the length.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.memory.capacity()
    }

    /// Makes the buffer `len` bytes long within its memory. Bytes that come into view hold what was there.
    ///
    /// # Panics
    /// When `len` is more than the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} bytes do not fit a buffer of {}", self.capacity());
        self.len = len;
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let start = match &self.memory {
            Memory::Pages(pages) => pages.as_ptr().cast::<u8>(),
            Memory::Huge(mapping) => mapping.start.as_ptr().cast_const(),
        };
        // SAFETY: the memory is initialised plain bytes without padding, and `len` is at most its size (kept by `new`
        // and `set_len`).
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = match &mut self.memory {
            Memory::Pages(pages) => pages.as_mut_ptr().cast::<u8>(),
            Memory::Huge(mapping) => mapping.start.as_ptr(),
        };
        // SAFETY: as in `deref`; `&mut self` makes the slice the only reference.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Contents may be a user's data: they have no place in a log.
        f.debug_struct("AlignedBuf").field("len", &self.len).field("capacity", &self.capacity()).finish()
    }
}

/// Size classes in bytes and how many free buffers of each are kept: 4 MiB, 8 MiB, 16 MiB and 64 MiB at most.
/// The last one holds the largest FUSE request and one block more, for requests that start inside a block.
const CLASSES: [(usize, usize); 4] = [(4 << 10, 1024), (64 << 10, 128), (256 << 10, 64), (HUGE_BYTES, 32)];

/// Free buffers by size class.
#[derive(Debug, Default)]
pub struct BufPool {
    free: [Mutex<Vec<AlignedBuf>>; CLASSES.len()],
}

impl BufPool {
    /// An empty pool; it fills as buffers come back.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(BufPool::default())
    }

    /// A buffer of `len` bytes that comes back by itself. **Its contents are whatever lies there.**
    #[must_use]
    pub fn get(self: &Arc<Self>, len: usize) -> PooledBuf {
        PooledBuf { buf: self.take(len), pool: Arc::clone(self) }
    }

    /// As [`BufPool::get`], without coming back by itself; hand it to [`BufPool::put`].
    #[must_use]
    pub fn take(&self, len: usize) -> AlignedBuf {
        let Some(class) = CLASSES.iter().position(|(class_bytes, _)| len <= *class_bytes) else {
            return AlignedBuf::new(len);
        };
        let reused = self.free[class].lock().pop();
        let mut buf = reused.unwrap_or_else(|| AlignedBuf::new(CLASSES[class].0));
        buf.set_len(len);
        buf
    }

    /// Takes a buffer back; drops it when it is of no class or the class is full.
    pub fn put(&self, buf: AlignedBuf) {
        let Some(class) = CLASSES.iter().position(|(class_bytes, _)| buf.capacity() == *class_bytes) else {
            return;
        };
        let mut free = self.free[class].lock();
        if free.len() < CLASSES[class].1 {
            free.push(buf);
        }
    }

    /// Free buffers now, smallest class first.
    #[must_use]
    pub fn free_counts(&self) -> [usize; CLASSES.len()] {
        std::array::from_fn(|class| self.free[class].lock().len())
    }
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub struct PooledBuf {
    buf: AlignedBuf,
    pool: Arc<BufPool>,
}

impl PooledBuf {
    /// The buffer itself; it does not go back to the pool any more.
    #[must_use]
    pub fn into_inner(mut self) -> AlignedBuf {
        std::mem::replace(&mut self.buf, AlignedBuf::new(0))
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        self.pool.put(std::mem::replace(&mut self.buf, AlignedBuf::new(0)));
    }
}

impl Deref for PooledBuf {
    type Target = AlignedBuf;

    fn deref(&self) -> &AlignedBuf {
        &self.buf
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut AlignedBuf {
        &mut self.buf
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_of_the_length_asked_for() {
        for len in [0, 1, 512, 4096, 4097, 1 << 20, (2 << 20) + 1] {
            let mut buf = AlignedBuf::new(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr().addr() % ALIGN_BYTES, 0);
            assert!(buf.iter().all(|b| *b == 0));
            buf.fill(7);
            assert!(buf.iter().all(|b| *b == 7));
        }
        let padded = AlignedBuf::copy_padded(b"abc", 512);
        assert_eq!((padded.len(), &padded[..4]), (512, &b"abc\0"[..]));
    }

    #[test]
    #[should_panic(expected = "do not fit")]
    fn set_len_past_the_memory_panics() {
        AlignedBuf::new(10).set_len(ALIGN_BYTES + 1);
    }

    #[test]
    fn pool_reuses_and_is_bounded() {
        let pool = BufPool::new();
        let first = pool.get(5000);
        let address = first.as_ptr().addr();
        assert_eq!((first.len(), first.capacity()), (5000, 64 << 10));
        drop(first);
        assert_eq!(pool.free_counts(), [0, 1, 0, 0]);
        assert_eq!(pool.get(65536).as_ptr().addr(), address);

        let many: Vec<_> = (0..CLASSES[3].1 + 3).map(|_| pool.get((1 << 20) + 4096)).collect();
        drop(many);
        assert_eq!(pool.free_counts(), [0, 1, 0, CLASSES[3].1]);
        let detached = pool.get(1).into_inner();
        assert_eq!(pool.free_counts()[0], 0);
        pool.put(detached);
        assert_eq!(pool.free_counts()[0], 1);
        drop(pool.get((2 << 20) + 1));
        assert_eq!(pool.free_counts(), [1, 1, 0, CLASSES[3].1]);
    }
}
