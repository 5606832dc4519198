//! Virtual machines for the suites: a guest of a kernel and a few programs in memory, which boots in seconds without KVM, and
//! keeps a journal on its disk on the cluster's volume ([`counter`]). The host sees each line after it is durable
//! ([`Console`]), and reads the journal itself from the disk's image ([`Machine::journal`]).
//!
//! Kernel and modules are Debian's (scripts/guest-kernel.sh, kept in `target/tmp/vm-guest`); where they cannot be had the suites
//! fail, and say why.

pub mod console;
pub mod counter;
pub mod line;

pub use console::{Console, standstill};
pub use line::{Line, What};

use crate::lab::{Lab, MOUNT};
use crate::{tools, wait};
use anyhow::{Context as _, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// For fetching and unpacking the kernel.
const MAKE_DEADLINE: Duration = Duration::from_secs(600);
const DEADLINE: Duration = Duration::from_secs(60);
/// The guest is smaller than that; less memory is less to send in a live migration.
pub const MEMORY_MIB: u64 = 128;
/// The guest's disk.
const DISK: &str = "48M";

/// Kernel and initial RAM disk of all guests.
#[derive(Debug, Clone)]
pub struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
}

/// Behind the archive of scripts/guest-kernel.sh, so that this /init is the one that counts.
const ARCHIVE: &str = r#"
set -e
dir=$1 init=$2 counter=$3
root=$(mktemp -d "$dir/counter.XXXXXX")
trap 'rm -rf "$root" "$root.gz" "$root.all"' EXIT
cp "$init" "$root/init"
chmod +x "$root/init"
mkdir "$root/bin"
strip -o "$root/bin/csv-test-counter" "$counter"
for lib in $(ldd "$counter" | grep -o '/[^ ]*'); do
    mkdir -p "$root$(dirname "$lib")"
    cp -L "$lib" "$root$lib"
done
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$root.gz"
cat "$dir/initrd.gz" "$root.gz" >"$root.all"
mv "$root.all" "$dir/initrd-counter.gz"
"#;

impl Guest {
    /// Makes it, quickly when the kernel is there already.
    ///
    /// # Errors
    /// The kernel cannot be had, or a program is missing; with what to do.
    pub fn make() -> anyhow::Result<Guest> {
        let dir = tools::target_dir()?.join("tmp/vm-guest");
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let made = wait::run(Command::new(here.join("../scripts/guest-kernel.sh")).arg(&dir), MAKE_DEADLINE)?;
        made.ok("the guests' kernel cannot be had; scripts/guest-kernel.sh needs Debian's package sources")?;
        let mut archive = Command::new("bash");
        archive.args(["-c", ARCHIVE, "bash"]).arg(&dir).arg(here.join("src/vmguest/init.sh"));
        wait::run(archive.arg(tools::beside("csv-test-counter")?), DEADLINE)?
            .ok("the guests' programs cannot be packed (scripts/deps.sh)")?;
        Ok(Guest { kernel: dir.join("vmlinux"), initrd: dir.join("initrd-counter.gz") })
    }
}

/// A virtual machine whose guest counts.
#[derive(Debug)]
pub struct Machine {
    guest: Guest,
    name: String,
    /// Its console.
    pub console: Console,
}

impl Machine {
    /// Makes its disk, from a node, and watches its console. It is not started.
    ///
    /// # Errors
    /// The disk cannot be made.
    pub fn make(lab: &Lab, guest: &Guest, node: &str, name: &str) -> anyhow::Result<Machine> {
        let console = Console::watch(&lab.dir().join(format!("{name}.console")))?;
        let machine = Machine { guest: guest.clone(), name: name.to_owned(), console };
        lab.sh(node, &format!("mkfs.ext4 -q -F {} {DISK} && sync {0}", machine.image()))?;
        Ok(machine)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of its disk's image on every node.
    #[must_use]
    pub fn image(&self) -> String {
        format!("{MOUNT}/{}.img", self.name)
    }

    /// Properties of the resource, besides its disk and memory.
    #[must_use]
    pub fn properties(&self) -> Vec<(&'static str, String)> {
        vec![
            ("accelerator", "tcg".to_owned()),
            ("kernel", self.guest.kernel.display().to_string()),
            ("initrd", self.guest.initrd.display().to_string()),
            ("cmdline", "console=ttyS0 quiet panic=-1".to_owned()),
            ("serial", format!("file:{}", self.console.path().display())),
        ]
    }

    /// The journal as it is on the disk, and the disk's file system checked. The machine must be off.
    ///
    /// # Errors
    /// The file system has errors; there is no journal.
    pub fn journal(&self, lab: &Lab, node: &str) -> anyhow::Result<Vec<Line>> {
        let image = self.image();
        // Through the page cache of another node's writes: the volume sees to it that this is what is there.
        lab.sh(node, &format!("e2fsck -f -n {image} 2>&1"))?;
        let text = lab.sh(node, &format!("debugfs -R 'cat /journal' {image} 2>/dev/null"))?;
        let lines: Vec<Line> = text.lines().filter_map(Line::parse).collect();
        console::follows(&lines).with_context(|| format!("the journal of {}", self.name))?;
        Ok(lines)
    }

    /// Every line that the guest said to be durable is in the journal. Their number.
    ///
    /// # Errors
    /// One is not.
    pub fn check_durable(&self, journal: &[Line]) -> anyhow::Result<usize> {
        let seen = self.console.seen();
        for seen in &seen {
            let there = usize::try_from(seen.line.number).ok().and_then(|number| journal.get(number - 1));
            ensure!(
                there == Some(&seen.line),
                "{} had synced \"{}\", and its disk has {there:?}",
                self.name,
                seen.line
            );
        }
        Ok(seen.len())
    }
}
