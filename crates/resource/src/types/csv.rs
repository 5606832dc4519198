//! `ClusterSharedVolume`: a volume of the cluster as something that other resources depend on.
//!
//! csvd mounts volumes on every node by itself; the resource only waits for one and watches it. So it may be online on
//! several nodes, going offline does nothing, and nothing of it outlives a host. A volume that is paused (its coordinator is
//! changing) answers late rather than never: only what does not answer for `tolerate_ms` has failed.

use super::mounts;
use super::run::{Bounded, pause};
use super::settings::{number, optional, required, text};
use crate::api::{Context, Failure, Form, Resource, ResourceType, Spec, TypeInfo};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often a volume that is not mounted yet is looked for.
const LOOK: Duration = Duration::from_millis(200);
/// How often somebody is told that it is still waited for.
const TELL: Duration = Duration::from_secs(10);
/// How long one listing is waited for before it counts as late.
const LISTING: Duration = Duration::from_secs(5);
/// File system of a volume.
const FS: &str = "fuse.csvfs";

/// The type.
#[derive(Debug, Clone, Copy, Default)]
pub struct ClusterSharedVolume;

impl ResourceType for ClusterSharedVolume {
    fn info(&self) -> TypeInfo {
        let tolerate = Form::Number { min: 0, max: 3_600_000 };
        TypeInfo {
            name: "ClusterSharedVolume".into(),
            help: "A volume that every node has mounted; others depend on it".into(),
            properties: vec![
                required("volume", Form::Text, "name of the volume, as csvctl volume list shows it"),
                optional(
                    "tolerate_ms",
                    tolerate,
                    Some("60000"),
                    "how long the volume may be paused or missing before it counts as failed, in milliseconds",
                ),
            ],
            verbs: Vec::new(),
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: true,
        }
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        let volume = text(properties, "volume").unwrap_or_default();
        if volume.is_empty() || volume.contains('/') || volume == "." || volume == ".." {
            return Err(format!("volume \"{volume}\" is no name of a volume; give the name without a path"));
        }
        Ok(())
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        self.check(&spec.properties).map_err(Failure::Config)?;
        let volume = text(&spec.properties, "volume").unwrap_or_default().to_owned();
        Ok(Box::new(Volume {
            point: context.node().mount_dir.join(&volume),
            volume,
            tolerate: Duration::from_millis(number(&spec.properties, "tolerate_ms", 60_000)),
            fs: FS,
            listing_limit: LISTING,
            failing_since: None,
            listing: Bounded::default(),
            context,
        }))
    }
}

#[derive(Debug)]
struct Volume {
    context: Context,
    volume: String,
    point: PathBuf,
    tolerate: Duration,
    fs: &'static str,
    listing_limit: Duration,
    /// The first look of those that have failed without a good one since.
    failing_since: Option<Instant>,
    listing: Bounded,
}

impl Volume {
    fn mounted(&self) -> Result<(), Failure> {
        let mount = mounts::at(&self.point)
            .map_err(|error| Failure::new(format!("mounts of this node cannot be read: {error}")))?;
        match mount {
            Some(mount) if mount.fs == self.fs => Ok(()),
            Some(mount) => Err(Failure::new(format!(
                "{} is a mount of {}, not the volume \"{}\"; unmount it",
                self.point.display(),
                mount.fs,
                self.volume
            ))),
            None => Err(Failure::new(format!(
                "the volume \"{}\" is not mounted at {}; see csvctl volume list",
                self.volume,
                self.point.display()
            ))),
        }
    }

    /// A failure counts once it has lasted.
    fn tolerated(&mut self, look: Result<(), Failure>) -> Result<(), Failure> {
        let Err(error) = look else {
            self.failing_since = None;
            return Ok(());
        };
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= self.tolerate { Err(error) } else { Ok(()) }
    }

    fn listed(&mut self) -> Result<(), Failure> {
        self.mounted()?;
        let point = self.point.clone();
        self.listing.call(self.listing_limit, &format!("listing {}", self.point.display()), move || {
            let said = |error: std::io::Error| format!("{} cannot be listed: {error}", point.display());
            std::fs::read_dir(&point).map_err(said)?.next().transpose().map_err(said).map(drop)
        })
    }
}

impl Resource for Volume {
    fn adopt(&mut self) -> Result<(), Failure> {
        let look = self.mounted();
        self.tolerated(look)
    }

    fn online(&mut self) -> Result<(), Failure> {
        let mut told = Instant::now();
        while let Err(why) = self.mounted() {
            if told.elapsed() >= TELL {
                self.context.progress(&format!("waiting: {why}"));
                told = Instant::now();
            }
            pause(&self.context, LOOK)?;
        }
        self.failing_since = None;
        Ok(())
    }

    fn offline(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        // Mounted is not yet good, since a volume that hangs is mounted too: once it fails, every look is thorough.
        let look = self.mounted();
        if look.is_ok() && self.failing_since.is_none() { Ok(()) } else { self.is_alive() }
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        let look = self.listed();
        self.tolerated(look)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::{Bed, properties, sh, spec};

    fn volume(bed: &Bed, tolerate: Duration) -> Volume {
        let point = bed.node().mount_dir.join("vol1");
        std::fs::create_dir_all(&point).unwrap();
        Volume {
            context: bed.context(),
            volume: "vol1".into(),
            point,
            tolerate,
            fs: "tmpfs",
            listing_limit: LISTING,
            failing_since: None,
            listing: Bounded::default(),
        }
    }

    #[test]
    fn a_path_is_no_volume() {
        for bad in ["", "a/b", ".."] {
            assert!(ClusterSharedVolume.check(&properties(&[("volume", bad)])).is_err(), "{bad}");
        }
        let bed = Bed::new();
        bed.open(&ClusterSharedVolume, spec("ClusterSharedVolume", &[("volume", "vol1")]));
        assert!(ClusterSharedVolume.info().shared);
    }

    #[test]
    fn waiting_ends_when_nobody_waits() {
        let bed = Bed::new();
        bed.cancel();
        assert_eq!(volume(&bed, Duration::ZERO).online(), Err(Failure::Cancelled));
    }

    #[test]
    fn it_comes_online_once_mounted_and_fails_when_it_stays_away() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let bed = Bed::new();
        let mut volume = volume(&bed, Duration::ZERO);
        let point = volume.point.to_str().unwrap().to_owned();
        assert!(volume.is_alive().unwrap_err().to_string().contains("not mounted"));
        let waiter = std::thread::scope(|scope| {
            let online = scope.spawn(|| volume.online());
            sh("mount", &["-t", "tmpfs", "csv-test", &point]);
            online.join().unwrap()
        });
        assert_eq!(waiter, Ok(()));
        assert_eq!(volume.is_alive(), Ok(()));
        assert_eq!(volume.offline(), Ok(()));
        sh("umount", &[&point]);
        volume.tolerate = Duration::from_secs(3600);
        assert_eq!((volume.looks_alive(), volume.is_alive()), (Ok(()), Ok(())));
        volume.tolerate = Duration::ZERO;
        assert!(volume.looks_alive().is_err());
        assert!(volume.adopt().is_err());
    }

    #[test]
    fn a_mount_of_something_else_is_not_the_volume() {
        let bed = Bed::new();
        let mut volume = volume(&bed, Duration::ZERO);
        volume.point = "/".into();
        assert!(volume.looks_alive().unwrap_err().to_string().contains("not the volume"));
    }

    #[test]
    fn a_volume_that_hangs_is_tolerated_for_a_time_and_lets_go_when_it_answers() {
        use std::os::fd::AsRawFd as _;
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let bed = Bed::new();
        let mut volume = volume(&bed, Duration::from_secs(3600));
        (volume.fs, volume.listing_limit) = (FS, Duration::from_millis(200));
        // A FUSE mount that nobody serves: whoever looks into it waits.
        let fuse = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_raw_fd());
        let none = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("csvfs"), &volume.point, Some(FS), none, Some(data.as_str())).unwrap();
        assert_eq!((volume.looks_alive(), volume.failing_since), (Ok(()), None), "mounted it is");
        assert_eq!((volume.is_alive(), volume.looks_alive()), (Ok(()), Ok(())));
        volume.tolerate = Duration::ZERO;
        let error = volume.looks_alive().unwrap_err();
        assert!(error.to_string().contains("hangs since"), "{error}");
        sh("umount", &["--lazy", volume.point.to_str().unwrap()]);
        // The thread that waits returns with an error now.
        drop(fuse);
        volume.listing_limit = LISTING;
        assert!(volume.is_alive().unwrap_err().to_string().contains("not mounted"));
        sh("mount", &["-t", "tmpfs", "csv-test", volume.point.to_str().unwrap()]);
        volume.fs = "tmpfs";
        let healed = volume.is_alive();
        sh("umount", &[volume.point.to_str().unwrap()]);
        assert_eq!(healed, Ok(()));
    }
}
