//! UEFI firmware: its code, which all machines share, and its variables, which belong to one machine.

use super::config::{Config, Firmware};
use crate::api::Failure;
use std::path::{Path, PathBuf};

/// Where distributions have OVMF's code.
const CODE: [&str; 4] = [
    "/usr/share/OVMF/OVMF_CODE_4M.fd",
    "/usr/share/OVMF/OVMF_CODE.fd",
    "/usr/share/edk2/ovmf/OVMF_CODE.fd",
    "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
];

/// Files of a machine's firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) code: PathBuf,
    pub(crate) variables: PathBuf,
}

/// The files; `None` for the BIOS, which QEMU has.
pub(crate) fn find(config: &Config) -> Result<Option<Files>, Failure> {
    let code = match &config.firmware {
        Firmware::Bios => return Ok(None),
        Firmware::Image(path) => path.clone(),
        Firmware::Uefi => {
            let there = CODE.iter().map(PathBuf::from).find(|path| path.is_file());
            there.ok_or_else(|| {
                Failure::NotHere(
                    "UEFI firmware is not on this node; install the package ovmf, or give its path in firmware".into(),
                )
            })?
        }
    };
    let beside = config.disks.first().map(|disk| {
        let mut path = disk.path.clone().into_os_string();
        path.push(".nvram");
        PathBuf::from(path)
    });
    let variables = config.nvram.clone().or(beside).ok_or_else(|| {
        Failure::Config("firmware needs nvram, since there is no disk to keep the variables beside".into())
    })?;
    Ok(Some(Files { code, variables }))
}

impl Files {
    /// Makes the variables at the first start, from the template that comes with the code.
    pub(crate) fn prepare(&self) -> Result<(), Failure> {
        if !self.code.is_file() {
            return Err(Failure::NotHere(format!(
                "the firmware {} is not on this node",
                self.code.display()
            )));
        }
        if self.variables.exists() {
            return Ok(());
        }
        let name = self.code.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let template = self.code.with_file_name(name.replace("CODE", "VARS"));
        if template == self.code || !template.is_file() {
            return Err(Failure::Config(format!(
                "the variables {} of the firmware are not there, and no template of them is beside {}; make them",
                self.variables.display(),
                self.code.display()
            )));
        }
        copy(&template, &self.variables).map_err(|error| {
            Failure::new(format!(
                "the firmware's variables {} cannot be made: {error}",
                self.variables.display()
            ))
        })
    }
}

/// Whole or not at all.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut part = to.as_os_str().to_owned();
    part.push(".part");
    std::fs::copy(from, &part)?;
    std::fs::File::open(&part)?.sync_all()?;
    std::fs::rename(&part, to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_made_once_from_the_template() {
        let dir = tempfile::tempdir().unwrap();
        let code = dir.path().join("X_CODE.fd");
        let files = Files { code: code.clone(), variables: dir.path().join("vm.nvram") };
        assert!(matches!(files.prepare(), Err(Failure::NotHere(_))));
        std::fs::write(&code, b"code").unwrap();
        assert!(matches!(files.prepare(), Err(Failure::Config(_))));
        std::fs::write(dir.path().join("X_VARS.fd"), b"empty").unwrap();
        files.prepare().unwrap();
        std::fs::write(&files.variables, b"of the guest").unwrap();
        files.prepare().unwrap();
        assert_eq!(std::fs::read(&files.variables).unwrap(), b"of the guest");
    }
}
