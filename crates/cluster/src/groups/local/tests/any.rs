//! Everything at random: what [`World`] checks holds at every step; and when the faults are over, the group gets where it is to be.

use super::super::{Input, Outcome};
use super::world::{Alive, World, resource};
use crate::db::{GroupState, ResourceState};
use proptest::prelude::*;

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// What happens; resources by their place in [`NAMES`].
#[derive(Debug, Clone)]
enum Deed {
    /// The host carries out a call.
    Execute { of: usize, good: bool, retry: bool },
    /// The driver hears of that many things.
    Deliver(usize),
    /// The last answer comes twice.
    Twice,
    /// All hosts do all they are told.
    Obey,
    /// It fails by itself, and tells.
    Breaks { of: usize, leaves: bool },
    /// It is gone, and nobody notices.
    Vanishes(usize),
    /// The host of that resource ends.
    HostEnds { of: usize, culprit: bool, hung: bool },
    /// A call gets on.
    Progress(usize),
    /// Time goes by, with a step at every deadline.
    Time(u64),
    /// An administrator does something.
    Order(Order),
}

/// What an administrator, or the manager, wants.
#[derive(Debug, Clone)]
enum Order {
    Want { of: usize, online: bool },
    Forgive,
    Maintenance(bool),
    GroupWanted(bool),
    Property(usize),
    Depends { of: usize, on: String },
    AddOrRemove(usize),
    Release,
    CancelRelease,
}

/// What `of` can depend on: those before it.
fn depends(of: usize, bits: u8, any: bool) -> String {
    let on: Vec<&str> = (0..of).filter(|at| bits >> at & 1 == 1).map(|at| NAMES[at]).collect();
    on.join(if any { " or " } else { " and " })
}

fn any_order() -> impl Strategy<Value = Order> {
    let of = || 0..NAMES.len();
    prop_oneof![
        2 => (of(), any::<bool>()).prop_map(|(of, online)| Order::Want { of, online }),
        1 => Just(Order::Forgive),
        2 => any::<bool>().prop_map(Order::Maintenance),
        1 => any::<bool>().prop_map(Order::GroupWanted),
        1 => of().prop_map(Order::Property),
        1 => (of(), any::<u8>(), any::<bool>())
            .prop_map(|(of, bits, any)| Order::Depends { of, on: depends(of, bits, any) }),
        1 => of().prop_map(Order::AddOrRemove),
        1 => Just(Order::Release),
        1 => Just(Order::CancelRelease),
    ]
}

fn any_deed() -> impl Strategy<Value = Deed> {
    let of = || 0..NAMES.len();
    prop_oneof![
        12 => (of(), prop::bool::weighted(0.75), any::<bool>())
            .prop_map(|(of, good, retry)| Deed::Execute { of, good, retry }),
        8 => (1usize..4).prop_map(Deed::Deliver),
        2 => Just(Deed::Twice),
        3 => Just(Deed::Obey),
        4 => (of(), any::<bool>()).prop_map(|(of, leaves)| Deed::Breaks { of, leaves }),
        1 => of().prop_map(Deed::Vanishes),
        3 => (of(), any::<bool>(), any::<bool>())
            .prop_map(|(of, culprit, hung)| Deed::HostEnds { of, culprit, hung }),
        1 => of().prop_map(Deed::Progress),
        5 => prop_oneof![1u64..1_000, 1_000u64..20_000, Just(900_000u64), Just(4_000_000u64)]
            .prop_map(Deed::Time),
        10 => any_order().prop_map(Deed::Order),
    ]
}

fn any_world() -> impl Strategy<Value = World> {
    let one = (any::<u8>(), any::<bool>(), any::<bool>(), 0u32..3, any::<bool>(), prop::bool::weighted(0.3));
    (2..=NAMES.len(), prop::collection::vec(one, NAMES.len())).prop_map(|(count, ones)| {
        let mut world = World::new(&[]);
        for (of, (bits, any, affects, threshold, own_host, was_there)) in ones.into_iter().enumerate() {
            if of >= count {
                break;
            }
            let mut resource = resource(NAMES[of], &depends(of, bits, any));
            // No second try with fresh counts but by an administrator: the model counts restarts.
            resource.policy.retry_after_ms = 0;
            resource.policy.affects_group = affects;
            resource.policy.restart_threshold = threshold;
            resource.policy.separate_monitor = own_host;
            if was_there {
                resource.status.state = ResourceState::Online;
                world.thing(NAMES[of]).alive = if bits & 128 == 0 { Alive::Yes } else { Alive::Partly };
            }
            world.config.resources.insert(NAMES[of].into(), resource);
        }
        world
    })
}

fn carry_out(world: &mut World, deed: Deed) {
    match deed {
        Deed::Execute { of, good, retry } => world.execute(NAMES[of], good, retry),
        Deed::Deliver(mut count) => {
            while count > 0 && world.deliver() {
                count -= 1;
            }
        }
        Deed::Twice => {
            if let Some(last) = world.mail.back().cloned() {
                world.mail.push_back(last);
            }
        }
        Deed::Obey => world.obey(),
        Deed::Breaks { of, leaves } => {
            // In the order in which the host said it.
            while world.deliver() {}
            let thing = world.thing(NAMES[of]);
            if thing.told && thing.queue.is_empty() {
                world.breaks(NAMES[of], if leaves { Alive::Partly } else { Alive::No });
            }
        }
        Deed::Vanishes(of) => {
            let thing = world.thing(NAMES[of]);
            if thing.alive == Alive::Yes {
                thing.alive = Alive::Partly;
            }
        }
        Deed::HostEnds { of, culprit, hung } => {
            let host = world.thing(NAMES[of]).host.clone();
            world.host_ends(&host, culprit.then_some(NAMES[of]), hung);
        }
        Deed::Progress(of) => {
            if let Some((call, _)) = world.thing(NAMES[of]).queue.front().copied() {
                world.feed(Input::Progress { resource: NAMES[of].into(), call, text: "on it".into() });
            }
        }
        Deed::Time(ms) => idle(world, ms),
        Deed::Order(order) => administer(world, order),
    }
}

fn administer(world: &mut World, order: Order) {
    match order {
        Order::Want { of, online } => {
            if let Some(resource) = world.config.resources.get_mut(NAMES[of]) {
                resource.want_online = online;
                world.forgive();
            }
        }
        Order::Forgive => world.forgive(),
        Order::Maintenance(on) => {
            world.config.group.maintenance = on;
            world.configure();
        }
        Order::GroupWanted(wanted) => {
            world.config.group.want_online = wanted;
            world.forgive();
        }
        Order::Property(of) => {
            let now_ms = world.now_ms;
            if let Some(resource) = world.config.resources.get_mut(NAMES[of]) {
                resource.properties.insert("k".into(), now_ms.to_string());
                world.forgive();
            }
        }
        Order::Depends { of, on } => {
            if let Some(resource) = world.config.resources.get_mut(NAMES[of]) {
                resource.depends = on;
                world.forgive();
            }
        }
        Order::AddOrRemove(of) => {
            if world.config.resources.remove(NAMES[of]).is_none() {
                let mut added = resource(NAMES[of], "");
                added.policy.retry_after_ms = 0;
                world.config.resources.insert(NAMES[of].into(), added);
            }
            world.forgive();
        }
        Order::Release => world.release(),
        Order::CancelRelease => {
            world.config.group.state = GroupState::Pending;
            world.configure();
        }
    }
}

/// Time goes by, and no host does anything.
fn idle(world: &mut World, ms: u64) {
    let end_ms = world.now_ms + ms;
    let mut steps = 0;
    while let Some(at_ms) = world.group.next_deadline().filter(|at_ms| *at_ms <= end_ms) {
        world.now_ms = at_ms;
        world.feed(Input::Tick);
        steps += 1;
        assert!(steps < 1_000, "it does not come to rest");
    }
    world.now_ms = end_ms;
    world.feed(Input::Tick);
}

/// Whatever a resource depends on and is not there any more does not matter any more.
fn mend(world: &mut World) {
    let there: Vec<String> = world.config.resources.keys().cloned().collect();
    for resource in world.config.resources.values_mut() {
        resource.want_online = true;
        let names = crate::groups::expr::Expr::parse(&resource.depends).unwrap();
        if names.names().into_iter().any(|name| !there.iter().any(|there| there == name)) {
            resource.depends = String::new();
        }
    }
    world.config.group.want_online = true;
    world.config.group.maintenance = false;
    world.config.group.state = GroupState::Pending;
    world.forgive();
}

/// Nothing more is done without a reason.
fn at_rest(world: &mut World) {
    world.log.clear();
    world.events.clear();
    idle(world, 100_000_000);
    assert_eq!((world.did(), world.events.len()), (String::new(), 0));
    assert_eq!(world.group.next_deadline(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_group_comes_online_once_it_can(
        mut world in any_world(),
        deeds in prop::collection::vec(any_deed(), 0..120),
    ) {
        world.configure();
        for deed in deeds {
            carry_out(&mut world, deed);
        }
        world.pass(1_000);
        mend(&mut world);
        // What vanished without a word is found out by a poll.
        for name in NAMES {
            let thing = world.thing(name);
            if thing.told && thing.alive == Alive::Partly {
                world.breaks(name, Alive::Partly);
            }
        }
        // The longest waits: for an end that failed, and a restart.
        world.pass(130_000);
        world.forgive();
        world.pass(130_000);
        prop_assert_eq!(world.group.state(), GroupState::Online, "{:?} {:?}", world.group, world.log);
        for (name, status) in world.group.statuses() {
            prop_assert_eq!(status.state, ResourceState::Online, "{}: {}", name, status.why);
            prop_assert_eq!(world.thing(&name).alive, Alive::Yes);
        }
        at_rest(&mut world);
    }

    #[test]
    fn whatever_happened_a_release_or_a_stop_ends_everything(
        mut world in any_world(),
        deeds in prop::collection::vec(any_deed(), 0..80),
        more in prop::collection::vec(any_deed(), 0..20),
        stop in any::<bool>(),
    ) {
        world.configure();
        for deed in deeds {
            carry_out(&mut world, deed);
        }
        if stop {
            world.feed(Input::Stop("cut off".into()));
            world.log.clear();
            for deed in more {
                carry_out(&mut world, deed);
            }
            world.pass(130_000);
            prop_assert!(world.group.is_quiet(), "{:?}", world.group);
            prop_assert!(!world.log.iter().any(|did| did.starts_with("online")));
        } else {
            world.release();
            world.pass(130_000);
            prop_assert!(world.group.release_done(), "{:?}", world.group);
            prop_assert!(world.group.statuses().values().all(|status| status.state == ResourceState::Offline));
        }
        at_rest(&mut world);
    }

    #[test]
    fn no_answer_makes_it_panic(
        mut world in any_world(),
        inputs in prop::collection::vec((0..NAMES.len(), 0u64..40, 0u8..8), 0..200),
    ) {
        world.configure();
        for (of, call, what) in inputs {
            let (resource, why) = (NAMES[of].to_owned(), "x".to_owned());
            let input = match what {
                0 => Input::Found { resource, call, online: false, why },
                1 => Input::Answer { resource, call, outcome: Outcome::Done },
                2 => Input::Answer { resource, call, outcome: Outcome::Failed { why, retry: true, elsewhere: true } },
                3 => Input::Failed { resource, why },
                4 => Input::HostGone { resources: vec![resource.clone()], why, culprit: Some(resource) },
                5 => Input::Hung { resource, resources: Vec::new(), why },
                6 => Input::Progress { resource, call, text: why },
                _ => Input::Tick,
            };
            // Straight in: the model knows nothing of answers that no host gave.
            let now = super::super::Now { now_ms: world.now_ms + call, at_unix_ms: 0 };
            let mut out = Vec::new();
            world.group.step(now, input, &mut out);
            prop_assert!(out.len() < 64);
        }
    }
}
