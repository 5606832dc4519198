//! This node's incarnation: a number that grows with each life of the node. Taking a new one is a promise that nothing of
//! the former life can write a LUN any more (see `csv_cluster::db::node`). It is kept in `<run_dir>`, which is lost at
//! boot, so that a csvd that starts again and finds its csvfs processes running goes on in the same life.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// See the module.
#[derive(Debug)]
pub(crate) struct Incarnation {
    path: PathBuf,
    number: AtomicU64,
}

impl Incarnation {
    /// The one of this boot, or a new one.
    pub(crate) fn load(run_dir: &Path) -> Result<Incarnation> {
        let path = run_dir.join("incarnation");
        let kept = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        let incarnation = Incarnation { path, number: AtomicU64::new(kept.unwrap_or(0)) };
        if kept.is_none() {
            incarnation.renew(0)?;
        }
        Ok(incarnation)
    }

    /// The number.
    pub(crate) fn get(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    /// A new life, later than `known`. Only when nothing of the former one is left.
    pub(crate) fn renew(&self, known: u64) -> Result<u64> {
        // The clock may have been set back; the database refuses a number that does not grow.
        let next = super::unix_ms().max(known + 1).max(self.get() + 1);
        let new = self.path.with_extension("new");
        fs::write(&new, next.to_string())
            .and_then(|()| fs::rename(&new, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.number.store(next, Ordering::Release);
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_survives_csvd_but_not_the_boot_and_always_grows() {
        let dir = tempfile::tempdir().unwrap();
        let first = Incarnation::load(dir.path()).unwrap();
        let again = Incarnation::load(dir.path()).unwrap();
        assert_eq!(first.get(), again.get());
        let far = first.get() + 1_000_000;
        assert_eq!(again.renew(far).unwrap(), far + 1);
        fs::remove_file(dir.path().join("incarnation")).unwrap();
        assert!(Incarnation::load(dir.path()).unwrap().get() > 0);
    }
}
