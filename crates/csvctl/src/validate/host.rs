//! Checks of this machine that need no cluster: kernel, programs, clock, limits, configuration, state directory.

use super::report::{Run, Verdict, failed, passed, warning};
use crate::validate::Configuration;
use csv_lun::sys::ClockStatus;
use nix::sys::statvfs::statvfs;
use rustix::process::{Resource, getrlimit};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const AREA: &str = "this machine";
/// Oldest kernel on which csvfs is known to work.
const KERNEL_MIN: (u32, u32) = (5, 15);
/// From this one on files on a volume can be mapped shared (`FUSE_DIRECT_IO_ALLOW_MMAP`).
const KERNEL_MMAP: (u32, u32) = (6, 6);
const OPEN_FILES_MIN: u64 = 4_096;
const OPEN_FILES_GOOD: u64 = 65_536;
const MIB: u64 = 1 << 20;
const FREE_BYTES_MIN: u64 = 100 * MIB;
const FREE_BYTES_GOOD: u64 = 1024 * MIB;
/// How often and how long fsync is tried.
const SYNCS_MAX: usize = 100;
const SYNCS_TIME_MAX: Duration = Duration::from_secs(3);
const SYNC_GOOD: Duration = Duration::from_millis(100);
const SYNC_MAX: Duration = Duration::from_secs(1);
/// Programs, the package that has them, and whether a node cannot do without.
const PROGRAMS: [(&str, &str, &str, bool); 5] = [
    ("smbd", "--version", "samba", true),
    ("mkfs.ext4", "-V", "e2fsprogs", true),
    ("e2fsck", "-V", "e2fsprogs", true),
    ("mkfs.xfs", "-V", "xfsprogs", false),
    ("fio", "--version", "fio", false),
];

/// How many checks there are, about.
pub(super) const COUNT: u64 = 15;

/// Runs them.
pub(super) fn run(run: &mut Run, configuration: &Configuration) {
    run.begin("kernel");
    run.add(
        AREA,
        "kernel",
        kernel(fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim()),
    );
    run.add(AREA, "FUSE", fuse());
    run.add(
        AREA,
        "io_uring",
        io_uring(fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok().as_deref()),
    );
    run.begin("programs");
    for (program, argument, package, needed) in PROGRAMS {
        run.add(AREA, program, version(program, argument, package, needed));
    }
    run.add(AREA, "csvfs programs", own_programs());
    run.add(AREA, "clock", clock(csv_lun::sys::clock_status()));
    let limit = getrlimit(Resource::Nofile);
    run.add(AREA, "open files", open_files(limit.maximum));
    run.add(AREA, "configuration", configured(configuration));
    run.begin("state directory");
    let dir = existing(&configuration.local.state_dir);
    run.add(AREA, "free space", free_space(&dir));
    run.begin("fsync latency");
    run.add(AREA, "fsync latency", fsync(&dir));
}

fn kernel(release: &str) -> Verdict {
    let mut numbers = release.split(['.', '-', '+']).map_while(|part| part.parse::<u32>().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        return warning(
            format!("Linux {release}"),
            "its version is not understood; csvfs needs Linux 5.15 or later",
        );
    };
    if (major, minor) < KERNEL_MIN {
        return failed(
            format!("Linux {release} is too old"),
            "install Linux 5.15 or later, best 6.6 or later",
        );
    }
    if (major, minor) < KERNEL_MMAP {
        let next = "programs that map files shared and write need Linux 6.6 or later";
        return warning(format!("Linux {release}: files on a volume cannot be mapped shared"), next);
    }
    passed(format!("Linux {release} has what csvfs uses of FUSE"))
}

fn fuse() -> Verdict {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|line| line.split_whitespace().last() == Some("fuse")) {
        return failed("the kernel does not know FUSE", "load it with `modprobe fuse`, at each boot");
    }
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(file) if file.metadata().is_ok_and(|meta| meta.file_type().is_char_device()) => {
            passed("/dev/fuse can be opened")
        }
        Ok(_) => failed("/dev/fuse is no device", "remove it and run `modprobe fuse`"),
        Err(error) => failed(
            format!("/dev/fuse cannot be opened: {error}"),
            "run `modprobe fuse`; in a container, pass the device in",
        ),
    }
}

fn io_uring(disabled: Option<&str>) -> Verdict {
    match disabled.map(str::trim) {
        Some("2") => failed(
            "io_uring is switched off: no direct I/O",
            "set `sysctl kernel.io_uring_disabled=0`, or 1 to leave it to root",
        ),
        Some("1") => passed("io_uring is for root, which is enough"),
        _ => passed("io_uring can be used"),
    }
}

fn version(program: &str, argument: &str, package: &str, needed: bool) -> Verdict {
    let install = format!("install the package {package}");
    let missing = |text: String| {
        if needed {
            failed(text, install.clone())
        } else {
            warning(text, format!("{install}, if volumes or checks here need it"))
        }
    };
    match Command::new(program).arg(argument).output() {
        Ok(output) => {
            let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
            let said = String::from_utf8_lossy(&said).lines().next().unwrap_or_default().trim().to_owned();
            if output.status.success() {
                passed(said)
            } else {
                missing(format!("{program} {argument} fails: {said}"))
            }
        }
        Err(error) => missing(format!("{program} cannot be run: {error}")),
    }
}

fn own_programs() -> Verdict {
    let Some(dir) = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf)) else {
        return failed("csvctl does not know where it is", "run it by its full path");
    };
    let missing: Vec<&str> = ["csvd", "csvfs", "csv-smbc", "csv-rhs"]
        .into_iter()
        .filter(|name| !dir.join(name).is_file())
        .collect();
    if missing.is_empty() {
        return passed(format!("csvd, csvfs, csv-smbc and csv-rhs are in {}", dir.display()));
    }
    failed(
        format!("{} missing in {}", missing.join(", "), dir.display()),
        "install them beside csvctl, of the same version",
    )
}

fn clock(status: io::Result<ClockStatus>) -> Verdict {
    match status {
        Ok(status) if status.synchronised => {
            let error_ms = status.error_us_max / 1000;
            passed(format!("a time service keeps it right, to {error_ms} ms at worst"))
        }
        Ok(_) => warning(
            "no time service keeps the clock right",
            "run chrony, ntpd or systemd-timesyncd: a node whose clock is far off cannot join, and events lie in wrong order",
        ),
        Err(error) => warning(
            format!("the kernel does not say: {error}"),
            "look with `timedatectl` or `chronyc tracking`",
        ),
    }
}

fn open_files(limit: Option<u64>) -> Verdict {
    match limit {
        Some(limit) if limit < OPEN_FILES_MIN => failed(
            format!("a process can open {limit} files at most"),
            "raise LimitNOFILE of csvd's service to 65536 or more",
        ),
        Some(limit) if limit < OPEN_FILES_GOOD => warning(
            format!("a process can open {limit} files at most"),
            "raise LimitNOFILE of csvd's service to 65536 or more, if many files are open at once",
        ),
        Some(limit) => passed(format!("a process can open {limit}")),
        None => passed("no limit"),
    }
}

fn configured(configuration: &Configuration) -> Verdict {
    let path = configuration.path.display();
    if let Some(problem) = &configuration.problem {
        let next = format!("write the section [local] with `node` and `addr` into {path}");
        return if configuration.missing {
            warning(problem.clone(), next)
        } else {
            failed(problem.clone(), next)
        };
    }
    let Some(addr) = configuration.local.addr else {
        return failed("this node has no address", format!("set `addr` in the section [local] of {path}"));
    };
    match UdpSocket::bind((addr, 0)) {
        Ok(_) => passed(format!("this is {} at {addr}", configuration.local.node)),
        Err(error) => failed(
            format!("{addr} is no address of this machine: {error}"),
            format!("correct `addr` in the section [local] of {path}, or give the address to an interface"),
        ),
    }
}

/// The directory, or the nearest above it that is there.
fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn free_space(dir: &Path) -> Verdict {
    let stat = match statvfs(dir) {
        Ok(stat) => stat,
        Err(error) => {
            return failed(format!("{} cannot be read: {error}", dir.display()), "repair or mount it");
        }
    };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    let text = format!("{} MiB in {}", free / MIB, dir.display());
    let next = "free some: a node whose database finds no space stops";
    match free {
        0..FREE_BYTES_MIN => failed(text, next),
        FREE_BYTES_MIN..FREE_BYTES_GOOD => warning(text, next),
        FREE_BYTES_GOOD.. => passed(text),
    }
}

fn fsync(dir: &Path) -> Verdict {
    match sync_times(dir) {
        Ok(times) => judge_fsync(&times),
        Err(error) => {
            failed(format!("no file can be written in {}: {error}", dir.display()), "repair or mount it")
        }
    }
}

/// Appends and syncs, as the database does; shortest first.
fn sync_times(dir: &Path) -> io::Result<Vec<Duration>> {
    let path = dir.join(format!(".csvctl-validate-{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    let times = append_and_sync(&mut file);
    fs::remove_file(&path)?;
    times
}

fn append_and_sync(file: &mut File) -> io::Result<Vec<Duration>> {
    let mut times = Vec::new();
    let begun = Instant::now();
    while times.len() < SYNCS_MAX && begun.elapsed() < SYNCS_TIME_MAX {
        let at = Instant::now();
        file.write_all(&[0; 4096])?;
        file.sync_data()?;
        times.push(at.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

fn judge_fsync(times: &[Duration]) -> Verdict {
    let at =
        |percent: usize| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied();
    let (Some(median), Some(p99), Some(most)) = (at(50), at(99), times.last()) else {
        return failed("not a single write was synced", "look at the disk of the state directory");
    };
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let text = format!(
        "median {:.2} ms, 99% {:.2} ms, longest {:.2} ms of {}",
        ms(median),
        ms(p99),
        ms(*most),
        times.len()
    );
    let next = "put the state directory on a faster disk: every change of the cluster waits for it";
    if p99 > SYNC_MAX {
        failed(text, next)
    } else if p99 > SYNC_GOOD {
        warning(text, next)
    } else {
        passed(text)
    }
}

/// Ports that a node must have for itself, when it is in no cluster yet.
pub(super) fn ports_free(run: &mut Run, configuration: &Configuration, ports: &[(u16, &str)]) {
    for (port, what) in ports {
        let addr = configuration.local.addr.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED.into());
        let verdict = match TcpListener::bind((addr, *port)) {
            Ok(_) => passed(format!("it is free for {what}")),
            Err(error) => failed(
                format!("it is needed for {what}: {error}"),
                format!("end what uses it (`ss -ltnp sport = :{port}`), or choose another port"),
            ),
        };
        run.add("network", format!("TCP port {port}"), verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Outcome;
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        for (release, outcome) in [
            ("5.10.0-30-amd64", Outcome::Failed),
            ("5.15.0", Outcome::Warning),
            ("6.1.0-18-amd64", Outcome::Warning),
            ("6.6.1+", Outcome::Passed),
            ("7.0.0-rc1", Outcome::Passed),
            ("strange", Outcome::Warning),
        ] {
            assert_eq!(kernel(release).outcome, outcome, "{release}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_what_to_do() {
        assert_eq!(version("/nonexistent/smbd", "-V", "samba", true).outcome, Outcome::Failed);
        assert_eq!(version("/nonexistent/fio", "-V", "fio", false).outcome, Outcome::Warning);
        assert!(version("/nonexistent/fio", "-V", "fio", false).next.unwrap().contains("package fio"));
        let unkept = ClockStatus { synchronised: false, error_us_max: 16_000_000 };
        assert_eq!(clock(Ok(unkept)).outcome, Outcome::Warning);
        assert_eq!(clock(Ok(ClockStatus { synchronised: true, error_us_max: 5 })).outcome, Outcome::Passed);
        assert_eq!(open_files(Some(1024)).outcome, Outcome::Failed);
        assert_eq!(open_files(None).outcome, Outcome::Passed);
        assert_eq!(io_uring(Some("2\n")).outcome, Outcome::Failed);
        assert_eq!(fsync(Path::new("/proc")).outcome, Outcome::Failed);
        let slow = [Duration::from_millis(3), Duration::from_millis(300)];
        assert_eq!(judge_fsync(&slow).outcome, Outcome::Warning);
        assert_eq!(judge_fsync(&[Duration::from_secs(2)]).outcome, Outcome::Failed);
        assert_eq!(judge_fsync(&[]).outcome, Outcome::Failed);
    }

    #[test]
    fn a_missing_state_directory_is_judged_by_what_is_above() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(existing(&dir.path().join("a/b")), dir.path());
        assert_ne!(fsync(dir.path()).text, "");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    }
}
