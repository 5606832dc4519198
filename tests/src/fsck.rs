//! Is the file system on a LUN image clean? Run when every node has stopped.

use crate::wait;
use anyhow::bail;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(600);

/// Checks without repairing.
///
/// # Errors
/// Anything that the checker would repair, in its words.
pub fn check(image: &Path, fs: &str) -> anyhow::Result<()> {
    let mut command = match fs {
        "ext4" => {
            let mut command = Command::new("e2fsck");
            command.args(["-f", "-n"]);
            command
        }
        "xfs" => {
            let mut command = Command::new("xfs_repair");
            // -f: an image in a file.
            command.args(["-n", "-f"]);
            command
        }
        other => bail!("no checker for {other}"),
    };
    let ended = wait::run(command.arg(image), DEADLINE)?;
    let text = ended.ok(&format!("checking {} with {fs}'s own checker", image.display()))?;
    println!("fsck: {}", text.lines().last().unwrap_or("clean"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn a_damaged_image_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("ext4.img");
        std::fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
        let made = wait::run(Command::new("mkfs.ext4").arg("-q").arg(&image), DEADLINE).unwrap();
        made.ok("mkfs.ext4").unwrap();
        check(&image, "ext4").unwrap();
        // Wipe part of the group descriptors and bitmaps behind the superblock.
        let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
        file.write_all_at(&vec![0xff; 256 << 10], 4096).unwrap();
        assert!(check(&image, "ext4").is_err());
    }
}
