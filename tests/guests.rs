//! A cluster of three virtual machines with a real kernel SCSI disk between them (`make test-vm`): what the reservations
//! do on it, and what the product does when a node loses power, freezes and wakes up, loses its path to the LUN or its
//! network, and when the storage restarts. No speed is measured here; failover times are printed, of emulated machines.
//!
//! Where QEMU or a kernel cannot be had, the suite says so and ends well.

#[path = "guests/cluster.rs"]
mod cluster;
#[path = "guests/faults.rs"]
mod faults;
#[path = "guests/load.rs"]
mod load;
#[path = "guests/reservations.rs"]
mod reservations;

use csv_tests::guest::{Rig, Start};

fn with_rig(
    test: &str,
    run: impl FnOnce(&mut Rig) -> anyhow::Result<()>,
) -> anyhow::Result<Option<Box<Rig>>> {
    let started = std::time::Instant::now();
    let mut rig = match Rig::start()? {
        Start::Up(rig) => rig,
        Start::Skipped(why) => {
            println!("{test}: SKIPPED: {why}");
            return Ok(None);
        }
    };
    println!("{test}: four guests up in {:.1} s", started.elapsed().as_secs_f64());
    let result = run(&mut rig);
    if result.is_err() {
        rig.print_logs();
    }
    result.map(|()| Some(rig))
}

#[test]
fn reservations_on_a_kernel_disk() -> anyhow::Result<()> {
    let rig = with_rig("reservations", reservations::run)?;
    rig.map_or(Ok(()), |rig| rig.finish(None))
}

#[test]
fn a_cluster_survives_its_faults() -> anyhow::Result<()> {
    let rig = with_rig("cluster", faults::run)?;
    rig.map_or(Ok(()), |rig| rig.finish(Some("ext4")))
}
