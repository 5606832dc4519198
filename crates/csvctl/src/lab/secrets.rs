//! The lab's certificate authority, the nodes' certificates and the SMB password.
//!
//! Keys never leave the lab's directory, which only root can read, and go with `lab down`.

use super::spec::Lab;
use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes `ca.pem`, `node.pem`, `node.key` and `smb.password` into each node's `etc/secrets`.
pub(super) fn create(lab: &Lab) -> anyhow::Result<()> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::new(Vec::<String>::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.distinguished_name.push(DnType::CommonName, format!("csv lab {}", lab.name));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let issuer = Issuer::new(ca, ca_key);
    // 244 random bits; one password for all nodes, because any of them may become the server.
    let password = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
    for node in &lab.nodes {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![node.name.clone()])?;
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(lab.addr(node))));
        params.distinguished_name.push(DnType::CommonName, node.name.clone());
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let pem = params.signed_by(&key, &issuer)?.pem();
        let dir = lab.node_dir(&node.name).join("etc/secrets");
        fs::create_dir_all(&dir)?;
        write_secret(&dir.join("ca.pem"), &ca_pem)?;
        write_secret(&dir.join("node.pem"), &pem)?;
        write_secret(&dir.join("node.key"), &key.serialize_pem())?;
        write_secret(&dir.join("smb.password"), &password)?;
    }
    Ok(())
}

fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}
