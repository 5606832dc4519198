//! The supervised smbd itself.

#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{config, free_port, pattern, serve, serve_with};
use csv_smb::smbd::{Smbd, SmbdError};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

fn pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

#[test]
fn two_instances_do_not_meet() {
    let (left, right) = (serve(), serve());
    let (left_pool, right_pool) = (left.pool(), right.pool());
    std::fs::write(left.file("same"), b"").unwrap();
    std::fs::write(right.file("same"), b"").unwrap();
    left_pool.write_at("/same", 0, &pattern(1, 9000)).unwrap();
    right_pool.write_at("/same", 0, &pattern(2, 9000)).unwrap();
    left.smbd.stop();
    right_pool.ping().unwrap();
    assert!(std::fs::read(left.dir.path().join("share/same")).unwrap() == pattern(1, 9000));
    assert!(std::fs::read(right.file("same")).unwrap() == pattern(2, 9000));
}

#[test]
fn a_port_in_use_is_named() {
    let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = holder.local_addr().unwrap().port();
    let dir = TempDir::new().unwrap();
    let error = Smbd::start(config(&dir, port), Box::new(|_| ())).unwrap_err();
    assert!(matches!(error, SmbdError::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains(&port.to_string()), "{error}");
}

#[test]
fn unusable_settings_are_refused() {
    let dir = TempDir::new().unwrap();
    let mut bad = config(&dir, free_port());
    bad.share = "a]\n[b".into();
    assert!(matches!(Smbd::start(bad, Box::new(|_| ())), Err(SmbdError::Invalid { .. })));
    let mut long = config(&dir, free_port());
    long.run_dir = dir.path().join("x".repeat(100));
    let error = Smbd::start(long, Box::new(|_| ())).unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
}

#[test]
fn an_smbd_that_ends_at_once_tells_its_log() {
    let dir = TempDir::new().unwrap();
    let broken = config(&dir, free_port());
    // A directory where smbd needs a database.
    std::fs::create_dir_all(broken.run_dir.join("lock/smbXsrv_version_global.tdb")).unwrap();
    let error = Smbd::start(broken, Box::new(|_| ())).unwrap_err();
    let SmbdError::Exited { lines, .. } = &error else { panic!("{error}") };
    assert!(lines.contains("smbXsrv_version_global.tdb"), "{error}");
}

#[test]
fn stop_ends_connections_too() {
    let server = serve();
    let pool = server.pool();
    pool.ping().unwrap();
    let main = pid(server.smbd.pid().unwrap());
    let port = server.port;
    server.smbd.stop();
    assert!(test_kill_process(main).is_err());
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    // A session process of its own would still answer.
    assert!(pool.ping().unwrap_err().is_rejected());
}

#[test]
fn an_smbd_that_lost_its_supervisor_is_replaced() {
    let server = serve();
    let pool = server.pool();
    pool.ping().unwrap();
    let again = config(&server.dir, server.port);
    server.smbd.stop();
    // What a supervisor that was killed leaves behind.
    let mut orphan = Command::new("smbd")
        .args(["--foreground", "--no-process-group", "--configfile"])
        .arg(again.base_dir.join("smb.conf"))
        .arg("--log-basename")
        .arg(again.base_dir.join("log"))
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).is_err() {
        assert!(orphan.try_wait().unwrap().is_none(), "the orphan ended");
        std::thread::yield_now();
    }
    pool.ping().unwrap();
    let next = Smbd::start(again, Box::new(|_| ())).unwrap();
    assert_ne!(next.pid(), Some(orphan.id()));
    assert!(!orphan.wait().unwrap().success());
    pool.ping().unwrap();
}

#[test]
fn exits_are_reported_and_smbd_comes_back() {
    let server = serve_with(|_| ());
    let first = server.smbd.pid().unwrap();
    kill_process(pid(first), Signal::TERM).unwrap();
    let event = server.events.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(event.contains("starting it again in 100ms"), "{event}");
    let pool = server.pool();
    pool.ping().unwrap();
    assert!(server.smbd.pid().is_some_and(|pid| pid != first) && !server.smbd.has_ended());
}
