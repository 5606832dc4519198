//! The pool against a real smbd.

#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{pattern, serve, serve_with};
use csv_smb::error::{Outcome, SmbError};
use csv_smb::pool::{PoolConfig, SmbPool};
use csv_smb::wire::DATA_BYTES_MAX;
use rustix::process::{Pid, Signal, kill_process_group};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

fn group(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

#[test]
fn many_threads_read_and_write_patterns() {
    let server = serve();
    let pool = server.pool();
    std::fs::write(server.file("data"), b"").unwrap();
    std::thread::scope(|scope| {
        for thread in 0..16u64 {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..3 {
                    let place = (thread * 3 + round) * MIB as u64;
                    let data = pattern(place, MIB);
                    pool.write_at("/data", place, &data).unwrap();
                    let mut back = vec![0; MIB];
                    assert_eq!(pool.read_at("/data", place, &mut back).unwrap(), MIB);
                    assert!(back == data, "thread {thread} round {round}");
                }
            });
        }
    });
    let local = std::fs::read(server.file("data")).unwrap();
    assert_eq!(local.len(), 48 * MIB);
    for (at, part) in local.chunks(MIB).enumerate() {
        assert!(part == pattern((at * MIB) as u64, MIB), "MiB {at}");
    }
    let counters = pool.counters();
    assert_eq!((counters.read_bytes, counters.written_bytes), (48 << 20, 48 << 20));
    assert!(counters.spawns <= 4 && counters.kills == 0, "{counters:?}");
}

#[test]
fn ends_of_files_sizes_and_space() {
    let server = serve();
    let pool = server.pool();
    std::fs::write(server.file("short"), b"0123456789").unwrap();
    let mut out = [0; 32];
    assert_eq!(pool.read_at("short", 4, &mut out).unwrap(), 6);
    assert_eq!(&out[..6], b"456789");
    assert_eq!(pool.read_at("short", 10, &mut out).unwrap(), 0);
    assert_eq!(pool.size("/short").unwrap(), 10);
    pool.write_at("/short", 20, b"x").unwrap();
    assert_eq!(pool.size("/short").unwrap(), 21);
    let space = pool.statvfs("/").unwrap();
    assert!(space.blocks > 0 && space.blocks_free <= space.blocks);
    pool.ping().unwrap();
    let long = pattern(5, DATA_BYTES_MAX + 4097);
    pool.write_at("/short", 3, &long).unwrap();
    let mut back = vec![0; long.len() + 7];
    assert_eq!(pool.read_at("/short", 3, &mut back).unwrap(), long.len());
    assert!(back[..long.len()] == long);
}

#[test]
fn offsets_beyond_four_gib() {
    let server = serve();
    let pool = server.pool();
    std::fs::write(server.file("sparse"), b"").unwrap();
    let far = (5 << 30) + 12_345;
    pool.write_at("/sparse", far, b"far away").unwrap();
    let mut out = [0; 8];
    assert_eq!(pool.read_at("/sparse", far, &mut out).unwrap(), 8);
    assert_eq!(&out, b"far away");
}

#[test]
fn reserved_characters_reach_the_file() {
    let server = serve();
    let pool = server.pool();
    let name = "a \"b\" *:<>?|\\ % ü #;.qcow2";
    std::fs::write(server.file(name), b"found").unwrap();
    let shared = csv_smb::names::to_share(name.as_bytes()).unwrap();
    let mut out = [0; 5];
    assert_eq!(pool.read_at(&shared, 0, &mut out).unwrap(), 5);
    assert_eq!(&out, b"found");
}

#[test]
fn encrypted_and_by_a_path_below_a_directory() {
    let server = serve_with(|config| config.encrypt = true);
    std::fs::create_dir(server.file(".csvfs")).unwrap();
    std::fs::write(server.file(".csvfs/lun-abc"), b"").unwrap();
    let pool = SmbPool::new(PoolConfig { encrypt: true, ..server.pool_config() }).unwrap();
    pool.write_at("/.csvfs/lun-abc", 0, b"secret").unwrap();
    assert_eq!(std::fs::read(server.file(".csvfs/lun-abc")).unwrap(), b"secret");
}

#[test]
fn missing_file_is_a_refusal_and_costs_no_worker() {
    let server = serve();
    let pool = server.pool();
    let error = pool.read_at("/none", 0, &mut [0; 8]).unwrap_err();
    assert_eq!((error.outcome(), error.errno()), (Outcome::Rejected, Some(libc::ENOENT)));
    assert_eq!(pool.counters().kills, 0);
}

#[test]
fn wrong_password_is_told_as_such() {
    let server = serve();
    let config = PoolConfig { password: "wrong".into(), ..server.pool_config() };
    let error = SmbPool::new(config).unwrap().ping().unwrap_err();
    assert!(matches!(error, SmbError::Auth { .. }), "{error}");
    assert!(error.is_fatal() && error.to_string().contains("password of user csvnode"), "{error}");
}

#[test]
fn missing_program_and_missing_server_are_told() {
    let server = serve();
    let config = PoolConfig { program: "/nonexistent/csv-smbc".into(), ..server.pool_config() };
    let error = SmbPool::new(config).unwrap_err();
    assert!(matches!(&error, SmbError::Program { .. }) && error.to_string().contains("install"), "{error}");
    let pool = server.pool();
    server.smbd.stop();
    let error = pool.ping().unwrap_err();
    assert!(matches!(error, SmbError::Unavailable { .. }), "{error}");
    assert_eq!(error.outcome(), Outcome::Rejected);
}

#[test]
fn closing_a_path_releases_the_file_on_the_server() {
    let server = serve();
    let pool = server.pool();
    std::fs::write(server.file("old"), b"old").unwrap();
    let mut out = [0; 3];
    pool.read_at("/old", 0, &mut out).unwrap();
    std::fs::rename(server.file("old"), server.file("aside")).unwrap();
    std::fs::write(server.file("old"), b"new").unwrap();
    pool.read_at("/old", 0, &mut out).unwrap();
    assert_eq!(&out, b"old", "an open file stays the same file");
    pool.close_path("/old");
    pool.read_at("/old", 0, &mut out).unwrap();
    assert_eq!(&out, b"new");
}

#[test]
fn more_files_than_a_worker_keeps_open() {
    let server = serve();
    let pool = SmbPool::new(PoolConfig { workers: 1, ..server.pool_config() }).unwrap();
    for round in 0..2u8 {
        for file in 0..100u8 {
            let name = format!("f{file}");
            if round == 0 {
                std::fs::write(server.file(&name), [file]).unwrap();
            }
            let mut out = [0; 2];
            assert_eq!(pool.read_at(&name, 0, &mut out).unwrap(), 1);
            assert_eq!(out[0], file);
        }
    }
}

/// Repeats what may be repeated until it succeeds; how often it had to.
fn persist<T>(mut op: impl FnMut() -> Result<T, SmbError>) -> (T, u32) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut failures = 0;
    loop {
        match op() {
            Ok(value) => return (value, failures),
            Err(error) => {
                assert!(error.is_transient(), "{error}");
                assert!(Instant::now() < deadline, "{error}");
                failures += 1;
            }
        }
    }
}

#[test]
fn operations_go_on_after_smbd_was_killed() {
    let server = serve();
    let pool = server.pool();
    std::fs::write(server.file("data"), vec![0; 8 * MIB]).unwrap();
    let first = server.smbd.pid().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..40u64 {
                    let place = (thread << 20) + round * 4096;
                    let data = pattern(place, 4096);
                    persist(|| pool.write_at("/data", place, &data));
                    let mut back = vec![0; 4096];
                    persist(|| pool.read_at("/data", place, &mut back));
                    assert!(back == data);
                }
            });
        }
        while pool.counters().ops < 60 {
            std::thread::yield_now();
        }
        kill_process_group(group(first), Signal::KILL).unwrap();
    });
    let event = server.events.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(event.contains("smbd ended") && event.contains("starting it again"), "{event}");
    server.smbd.wait_ready(Duration::from_secs(10)).unwrap();
    assert_ne!(server.smbd.pid(), Some(first));
    assert!(pool.counters().kills > 0);
    let local = std::fs::File::open(server.file("data")).unwrap();
    for place in (0..8u64).flat_map(|thread| (0..40).map(move |round| (thread << 20) + round * 4096)) {
        let mut back = vec![0; 4096];
        local.read_exact_at(&mut back, place).unwrap();
        assert!(back == pattern(place, 4096), "{place}");
    }
}

#[test]
fn a_stuck_smbd_ends_in_time_and_the_worker_is_replaced() {
    let server = serve();
    let op_timeout = Duration::from_millis(700);
    let pool = SmbPool::new(PoolConfig { workers: 1, op_timeout, ..server.pool_config() }).unwrap();
    std::fs::write(server.file("data"), b"before").unwrap();
    pool.write_at("/data", 0, b"opened").unwrap();
    let smbd = group(server.smbd.pid().unwrap());
    kill_process_group(smbd, Signal::STOP).unwrap();
    let start = Instant::now();
    let error = pool.write_at("/data", 0, b"during").unwrap_err();
    let took = start.elapsed();
    kill_process_group(smbd, Signal::CONT).unwrap();
    assert_eq!(error.outcome(), Outcome::Unknown, "{error}");
    assert!(took >= op_timeout && took < op_timeout * 3, "{took:?}");
    assert_eq!(pool.counters().kills, 1);
    persist(|| pool.write_at("/data", 0, b"after!"));
    let mut out = [0; 6];
    persist(|| pool.read_at("/data", 0, &mut out));
    assert_eq!(&out, b"after!");
}

#[test]
fn callers_wait_their_turn_no_longer_than_the_time_out() {
    let server = serve();
    let op_timeout = Duration::from_millis(500);
    let pool = SmbPool::new(PoolConfig { workers: 1, op_timeout, ..server.pool_config() }).unwrap();
    pool.ping().unwrap();
    let smbd = group(server.smbd.pid().unwrap());
    kill_process_group(smbd, Signal::STOP).unwrap();
    let outcomes: Vec<SmbError> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..4).map(|_| scope.spawn(|| pool.ping().unwrap_err())).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    kill_process_group(smbd, Signal::CONT).unwrap();
    assert!(outcomes.iter().any(|error| matches!(error, SmbError::Unknown { .. })), "{outcomes:?}");
    assert!(outcomes.iter().any(|error| matches!(error, SmbError::Busy { .. })), "{outcomes:?}");
    persist(|| pool.ping());
}

#[test]
fn dropping_the_pool_ends_its_workers() {
    let server = serve();
    let pool = server.pool();
    pool.ping().unwrap();
    let children = || {
        let me = std::process::id();
        let all = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let environ = std::fs::read(entry.path().join("environ")).ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent: u32 = stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?;
            let home = format!("HOME={}\0", server.dir.path().join("client").display());
            let ours = environ.windows(home.len()).any(|part| part == home.as_bytes());
            (parent == me && ours).then_some(())
        });
        all.count()
    };
    assert_eq!(children(), 1);
    drop(pool);
    assert_eq!(children(), 0);
}

#[test]
fn a_pool_turns_to_another_server() {
    let (one, two) = (serve(), serve());
    std::fs::write(one.file("f"), b"one").unwrap();
    std::fs::write(two.file("f"), b"two").unwrap();
    let pool = std::sync::Arc::new(one.pool());
    let read = || {
        let mut buf = [0; 3];
        pool.read_at("f", 0, &mut buf).map(|_| buf)
    };
    assert_eq!(&read().unwrap(), b"one");
    // Somebody waits for the first server while it is left: the read is repeated at the second one.
    let first = group(one.smbd.pid().unwrap());
    kill_process_group(first, Signal::STOP).unwrap();
    let waits = {
        let pool = pool.clone();
        std::thread::spawn(move || {
            let mut buf = [0; 3];
            pool.read_at("f", 0, &mut buf).map(|_| buf)
        })
    };
    // Time for it to send its request; were it later, it would go to the second server at once.
    for _ in 0..10_000 {
        std::thread::yield_now();
    }
    pool.retarget(Ipv4Addr::LOCALHOST.into(), two.port);
    assert_eq!(&waits.join().unwrap().unwrap(), b"two");
    assert_eq!(&read().unwrap(), b"two");
    kill_process_group(first, Signal::CONT).unwrap();
}
