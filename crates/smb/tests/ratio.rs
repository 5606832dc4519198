//! What the pool costs over libsmbclient alone: the same reads by a plain loop in this process and by the pool.
//! Run by hand: `cargo test -p csv-smb --test ratio -- --ignored --nocapture`.

#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{PASSWORD, pattern, serve};
use csv_smb::pool::SmbPool;
use pavao::{SmbClient, SmbCredentials, SmbDialect, SmbFile, SmbOpenOptions, SmbOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

const FILE_BYTES: u64 = 64 << 20;
const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_millis(600);

/// Bytes per second of `op`, called with growing offsets for `TIME`.
fn rate(block: usize, mut op: impl FnMut(u64)) -> f64 {
    let start = Instant::now();
    let mut count = 0u64;
    while start.elapsed() < TIME {
        op(count * block as u64 % FILE_BYTES);
        count += 1;
    }
    (count * block as u64) as f64 / start.elapsed().as_secs_f64()
}

/// The same by `depth` threads at once.
fn rate_of_many(pool: &SmbPool, depth: u64, block: usize) -> f64 {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..depth)
            .map(|thread| {
                scope.spawn(move || {
                    let mut data = vec![0; block];
                    rate(block, |at| {
                        let at = (at + thread * (FILE_BYTES / depth)) % FILE_BYTES;
                        assert_eq!(pool.read_at("/data", at, &mut data).unwrap(), block);
                    })
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn compare(pool: &SmbPool, plain: &mut SmbFile<'_>, block: usize) {
    let mut data = vec![0; block];
    let (mut by_pool, mut by_plain, mut writes, mut plain_writes) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        by_plain.push(rate(block, |at| {
            plain.seek(SeekFrom::Start(at)).unwrap();
            plain.read_exact(&mut data).unwrap();
        }));
        by_pool.push(rate(block, |at| assert_eq!(pool.read_at("/data", at, &mut data).unwrap(), block)));
        plain_writes.push(rate(block, |at| {
            plain.seek(SeekFrom::Start(at)).unwrap();
            plain.write_all(&data).unwrap();
        }));
        writes.push(rate(block, |at| pool.write_at("/data", at, &data).unwrap()));
    }
    let (plain, plain_writes) = (median(by_plain), median(plain_writes));
    let report = |what: &str, rate: f64, plain: f64| {
        println!(
            "{block:>8} B {what}: {:9.1} MiB/s {:8.0} op/s, plain loop {:9.1} MiB/s, ratio {:.2}",
            rate / f64::from(1 << 20),
            rate / block as f64,
            plain / f64::from(1 << 20),
            rate / plain
        );
    };
    report("read  qd1", median(by_pool), plain);
    report("write qd1", median(writes), plain_writes);
    for depth in [4, 16] {
        report(&format!("read qd{depth}"), rate_of_many(pool, depth, block), plain);
    }
}

#[test]
#[ignore = "measures; run by hand"]
fn ratio_to_a_plain_loop() {
    let server = serve();
    std::fs::write(server.file("data"), pattern(1, 64 << 20)).unwrap();
    let pool = server.pool();
    let credentials = SmbCredentials::default()
        .server(format!("smb://127.0.0.1:{}", server.port))
        .share("/vol")
        .username("csvnode")
        .password(PASSWORD)
        .workgroup("CSVFS");
    let options = SmbOptions::default()
        .min_protocol(SmbDialect::Smb311)
        .max_protocol(SmbDialect::Smb311)
        .no_auto_anonymous_login(true)
        .one_share_per_server(true);
    let client = SmbClient::new(credentials, options).unwrap();
    let mut plain = client.open_with("/data", SmbOpenOptions::default().read(true).write(true)).unwrap();
    for block in [4096, 1 << 20] {
        compare(&pool, &mut plain, block);
    }
    assert!(!server.smbd.has_ended() && server.events.try_recv().is_err(), "smbd ended meanwhile");
}
