//! The guest that is the storage, and the file behind its LUN.

use super::net::Network;
use super::vm::{Common, Role, Vm};
use crate::fsck;
use anyhow::Context as _;
use std::fs::File;
use std::path::PathBuf;

/// Last byte of its address.
const NUMBER: u8 = 9;
/// Names of target and initiators, as in `storage-init.sh`.
const IQN: &str = "iqn.2024-01.org.csvfs";

/// See the module.
#[derive(Debug)]
pub struct Storage {
    /// The guest.
    pub vm: Vm,
    image: PathBuf,
}

impl Storage {
    /// Makes the LUN, and the guest, switched off.
    ///
    /// # Errors
    /// The LUN's file cannot be made.
    pub fn new(common: &Common, lun_bytes: u64) -> anyhow::Result<Storage> {
        let image = common.dir.join("lun.img");
        let file = File::create(&image).with_context(|| format!("making {}", image.display()))?;
        file.set_len(lun_bytes)?;
        let disk = format!("file={},if=virtio,format=raw,cache=none", image.display());
        let vm = Vm::new(common, "storage", NUMBER, Role::Storage, vec!["-drive".into(), disk])?;
        Ok(Storage { vm, image })
    }

    /// Arguments of QEMU that give a node the LUN as `/dev/sda`.
    #[must_use]
    pub fn disk_of(node: &str) -> Vec<String> {
        let url = format!("iscsi://{}:3260/{IQN}:storage/1", Network::addr(NUMBER));
        ["-device", "virtio-scsi-pci", "-iscsi", &format!("initiator-name={IQN}:{node}"), "-drive"]
            .into_iter()
            .chain([format!("file={url},if=none,format=raw,id=lun,cache=none").as_str()])
            .chain(["-device", "scsi-block,drive=lun"])
            .map(str::to_owned)
            .collect()
    }

    /// Power cut of the storage, and its start. Returns when it is up.
    ///
    /// # Errors
    /// It does not come up again.
    pub fn restart(&mut self, common: &Common) -> anyhow::Result<()> {
        self.vm.power_cut()?;
        self.vm.power_on(common)?;
        self.vm.wait_up()
    }

    /// Checks the file system on the LUN. Every guest must be off.
    ///
    /// # Errors
    /// It is not clean.
    pub fn check(&self, fs: &str) -> anyhow::Result<()> {
        fsck::check(&self.image, fs)
    }
}
