//! Writing a node's secrets: each file is replaced whole, or not at all, and only root can read it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Names in the secrets directory.
pub(crate) const CA_FILE: &str = "ca.pem";
pub(crate) const CERT_FILE: &str = "node.pem";
pub(crate) const KEY_FILE: &str = "node.key";
const SMB_FILE: &str = "smb.password";

/// Writes `ca.pem`, `node.pem`, `node.key` and `smb.password` into `dir`, which is made (mode 0700) when absent.
///
/// Durable when it returns. After a crash in the midst each file is either the old or the new one; a certificate that
/// then does not belong to its key is noticed by [`crate::Secrets::load`], and the node joins again.
///
/// # Errors
/// Of the file system; the text names the file.
pub fn write_secrets(
    dir: &Path,
    ca_pem: &str,
    cert_pem: &str,
    key_pem: &str,
    smb_password: &str,
) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| named(dir, &error))?;
    for (name, text) in
        [(CA_FILE, ca_pem), (KEY_FILE, key_pem), (CERT_FILE, cert_pem), (SMB_FILE, smb_password)]
    {
        let path = dir.join(name);
        replace(dir, name, text).map_err(|error| named(&path, &error))?;
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| named(dir, &error))
}

fn replace(dir: &Path, name: &str, text: &str) -> io::Result<()> {
    let new = dir.join(format!(".{name}.new"));
    match fs::remove_file(&new) {
        // Left by a crash.
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, dir.join(name))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_replaced_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("etc/secrets");
        write_secrets(&dir, "ca", "cert", "key", "password").unwrap();
        fs::write(dir.join(".node.key.new"), "half").unwrap();
        fs::set_permissions(dir.join("ca.pem"), fs::Permissions::from_mode(0o644)).unwrap();
        write_secrets(&dir, "ca2", "cert2", "key2", "password2").unwrap();
        for (name, text) in
            [("ca.pem", "ca2"), ("node.pem", "cert2"), ("node.key", "key2"), ("smb.password", "password2")]
        {
            let path = dir.join(name);
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600, "{name}");
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 4, "nothing is left over");
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7777, 0o700);
    }

    #[test]
    fn an_error_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("node.key")).unwrap();
        let error = write_secrets(dir.path(), "ca", "cert", "key", "password").unwrap_err();
        assert!(error.to_string().contains("node.key"), "{error}");
    }
}
