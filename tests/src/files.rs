//! Files whose every byte is known from their number, written and checked by programs of this package: to see
//! whether anything else wrote into them.

use crate::rng::pattern;
use anyhow::{Context as _, bail};
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// Pieces in which files are written and read.
const CHUNK_BYTES: usize = 1 << 20;

fn path_of(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("pattern{number:05}"))
}

fn chunk(number: u64, at: u64) -> Vec<u8> {
    pattern(number.wrapping_mul(1_000_003) ^ at, CHUNK_BYTES)
}

/// Writes pattern files of `chunks` MiB until the file system is full (the one that did not fit is removed), or
/// until there are `files_max`. Gives their number.
///
/// # Errors
/// Anything but "no space".
pub fn fill(dir: &Path, chunks: u64, files_max: u64) -> anyhow::Result<u64> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    for number in 0..files_max {
        let path = path_of(dir, number);
        let written = write_one(&path, number, chunks);
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => {
                std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
                return Ok(number);
            }
            Err(error) => return Err(error).with_context(|| format!("writing {}", path.display())),
        }
    }
    Ok(files_max)
}

fn write_one(path: &Path, number: u64, chunks: u64) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    for at in 0..chunks {
        file.write_all(&chunk(number, at))?;
    }
    file.sync_all()
}

/// Reads `files` pattern files back and compares every byte.
///
/// # Errors
/// The first difference, with file and offset.
pub fn verify(dir: &Path, chunks: u64, files: u64) -> anyhow::Result<()> {
    let mut read = vec![0; CHUNK_BYTES];
    for number in 0..files {
        let path = path_of(dir, number);
        let mut file = std::fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        for at in 0..chunks {
            file.read_exact(&mut read).with_context(|| format!("reading {} MiB {at}", path.display()))?;
            let want = chunk(number, at);
            if let Some(byte) = read.iter().zip(&want).position(|(a, b)| a != b) {
                let show = |bytes: &[u8]| format!("{:02x?}", &bytes[byte..(byte + 16).min(CHUNK_BYTES)]);
                bail!(
                    "{} differs at byte {}: expected {}, got {}",
                    path.display(),
                    at * CHUNK_BYTES as u64 + byte as u64,
                    show(&want),
                    show(&read)
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn one_foreign_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(fill(dir.path(), 2, 3).unwrap(), 3);
        verify(dir.path(), 2, 3).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(path_of(dir.path(), 1)).unwrap();
        let byte = chunk(1, 1)[77] ^ 1;
        file.write_all_at(&[byte], (CHUNK_BYTES + 77) as u64).unwrap();
        let error = verify(dir.path(), 2, 3).unwrap_err().to_string();
        assert!(error.contains("pattern00001") && error.contains(&(CHUNK_BYTES + 77).to_string()), "{error}");
    }
}
