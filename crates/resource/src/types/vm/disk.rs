//! Disks of a virtual machine: the property's text, and what is looked at before QEMU is started.
//!
//! The format is never guessed from the image's content: a guest can write whatever it wants into a raw image, a header of
//! qcow2 that names any file of the node as well.

use crate::api::Failure;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// First bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// What the guest sees it on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    Virtio,
    Scsi,
    Sata,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    pub(crate) bus: Bus,
    pub(crate) readonly: bool,
}

/// Takes `a,b=c` apart at single commas; two commas stand for one.
pub(crate) fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        if char == ',' && chars.peek() != Some(&',') {
            parts.push(String::new());
            continue;
        }
        if char == ',' {
            chars.next();
        }
        if let Some(last) = parts.last_mut() {
            last.push(char);
        }
    }
    parts
}

impl Disk {
    /// Reads the property `name`.
    pub(crate) fn parse(name: &str, text: &str) -> Result<Disk, String> {
        let mut parts = split_commas(text.trim()).into_iter();
        let path = parts.next().unwrap_or_default();
        if !path.starts_with('/') {
            return Err(format!("{name} must begin with the absolute path of an image, not \"{path}\""));
        }
        let qcow2 = Path::new(&path).extension().is_some_and(|extension| extension == "qcow2");
        let format = if qcow2 { Format::Qcow2 } else { Format::Raw };
        let mut disk = Disk { path: PathBuf::from(path), format, bus: Bus::Virtio, readonly: false };
        for part in parts {
            match part.as_str() {
                "format=raw" => disk.format = Format::Raw,
                "format=qcow2" => disk.format = Format::Qcow2,
                "bus=virtio" => disk.bus = Bus::Virtio,
                "bus=scsi" => disk.bus = Bus::Scsi,
                "bus=sata" => disk.bus = Bus::Sata,
                "readonly=on" => disk.readonly = true,
                "readonly=off" => disk.readonly = false,
                other => {
                    return Err(format!(
                        "{name} does not take \"{other}\" after the path: it takes format=raw|qcow2, bus=virtio|scsi|sata and \
                         readonly=on|off (a comma within the path is written as two)"
                    ));
                }
            }
        }
        Ok(disk)
    }

    /// Is the image there, and is it what the property says? May hang with its storage. A block device that can be written is
    /// refused unless that is allowed: its lock is on the node's own file in /dev.
    ///
    /// # Errors
    /// `NotHere` for what another node may have, `Config` for an image of another format.
    pub(crate) fn probe(&self, allow_block_devices: bool) -> Result<(), Failure> {
        let path = self.path.display();
        let meta = std::fs::metadata(&self.path).map_err(|error| {
            Failure::NotHere(format!(
                "the image {path} cannot be found on this node: {error}; is its volume mounted, and the path right?"
            ))
        })?;
        let block = meta.file_type().is_block_device();
        if !meta.is_file() && !block {
            return Err(Failure::Config(format!("{path} is neither a file nor a block device")));
        }
        if block && !self.readonly && !allow_block_devices {
            // Not even opened.
            return Err(Failure::Config(format!(
                "{path} is a block device, on which QEMU's locks count on one node only: nothing but the cluster would keep two \
                 machines, or a node that was frozen, from writing it; put an image on a cluster volume, give readonly=on, or \
                 accept that by allow_block_devices=true"
            )));
        }
        let mut file =
            File::options().read(true).write(!self.readonly).open(&self.path).map_err(|error| {
                Failure::NotHere(format!(
                    "the image {path} cannot be opened for {}: {error}",
                    if self.readonly { "reading" } else { "reading and writing" }
                ))
            })?;
        if !block && meta.size() == 0 {
            return Err(Failure::Config(format!("the image {path} is empty")));
        }
        let mut magic = [0; 4];
        let qcow2 = match file.read_exact(&mut magic) {
            Ok(()) => magic == QCOW2_MAGIC,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => false,
            Err(error) => return Err(Failure::new(format!("the image {path} cannot be read: {error}"))),
        };
        match (self.format, qcow2) {
            (Format::Qcow2, false) => Err(Failure::Config(format!(
                "the image {path} is not in the format qcow2; give format=raw if it is a raw image"
            ))),
            (Format::Raw, true) => Err(Failure::Config(format!(
                "the image {path} is in the format qcow2, but the disk is format=raw, so that the guest would see qcow2's own \
                 tables as its disk; give format=qcow2"
            ))),
            (Format::Qcow2, true) | (Format::Raw, false) => Ok(()),
        }
    }

    pub(crate) fn is_block_device(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| meta.file_type().is_block_device())
    }
}

/// Processes of this node that have the file open, as `name (number)`.
pub(crate) fn holders(path: &Path) -> Vec<String> {
    let Ok(wanted) = std::fs::metadata(path) else { return Vec::new() };
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(fds) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let open = fds.flatten().any(|fd| {
            // The link first: to ask for the file itself could hang with its storage.
            std::fs::read_link(fd.path()).is_ok_and(|link| link == path)
                && std::fs::metadata(fd.path())
                    .is_ok_and(|meta| meta.dev() == wanted.dev() && meta.ino() == wanted.ino())
        });
        if open && pid != std::process::id() {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{} (process {pid})", name.trim()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_with_options() {
        let disk = Disk::parse("disk1", "/a/b.img,bus=scsi,readonly=on").unwrap();
        assert_eq!(
            disk,
            Disk { path: "/a/b.img".into(), format: Format::Raw, bus: Bus::Scsi, readonly: true }
        );
        assert_eq!(Disk::parse("disk", "/a/b.qcow2").unwrap().format, Format::Qcow2);
        assert_eq!(Disk::parse("disk", "/a,,b,format=qcow2").unwrap().path, Path::new("/a,b"));
        let error = Disk::parse("disk", "/a,b.img").unwrap_err();
        assert!(error.contains("b.img") && error.contains("two"), "{error}");
        assert!(Disk::parse("disk", "a.img").is_err());
    }

    #[test]
    fn an_image_of_another_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let disk = |format| Disk { path: path.clone(), format, bus: Bus::Virtio, readonly: false };
        assert!(matches!(disk(Format::Raw).probe(false), Err(Failure::NotHere(_))));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(disk(Format::Raw).probe(false), Err(Failure::Config(_))));
        std::fs::write(&path, b"ab").unwrap();
        assert_eq!(disk(Format::Raw).probe(false), Ok(()));
        assert!(matches!(disk(Format::Qcow2).probe(false), Err(Failure::Config(_))));
        std::fs::write(&path, b"QFI\xfb and more").unwrap();
        assert_eq!(disk(Format::Qcow2).probe(false), Ok(()));
        assert!(matches!(disk(Format::Raw).probe(false), Err(Failure::Config(_))));
    }

    #[test]
    fn a_block_device_that_can_be_written_must_be_allowed() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        File::create(&file).unwrap().set_len(1 << 20).unwrap();
        let device = crate::types::testbed::sh("losetup", &["--find", "--show", file.to_str().unwrap()]);
        let device = device.trim();
        let probe = |readonly, allowed| {
            let disk = Disk { path: device.into(), format: Format::Raw, bus: Bus::Virtio, readonly };
            disk.probe(allowed)
        };
        let results = [probe(false, false), probe(true, false), probe(false, true)];
        crate::types::testbed::sh("losetup", &["--detach", device]);
        let refused = |text: &str| text.contains("readonly=on") && text.contains("allow_block_devices=true");
        assert!(matches!(&results[0], Err(Failure::Config(text)) if refused(text)), "{results:?}");
        assert_eq!(results[1..], [Ok(()), Ok(())]);
    }

    #[test]
    fn who_has_a_file_open_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"x").unwrap();
        assert_eq!(holders(&path), Vec::<String>::new());
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::from(File::options().append(true).open(&path).unwrap()))
            .spawn()
            .unwrap();
        let found = holders(&path);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
    }
}
