//! The table against a naive model that keeps one entry per byte and owner and finds deadlocks by transitive
//! closure. Random histories over two files, four owners, two lock spaces.

use super::*;
use csv_types::{FileId, NodeId};
use proptest::prelude::*;

/// The last one stands for all bytes behind.
const BYTES: usize = 13;
const OWNERS: usize = 4;
const FILES: usize = 2;

/// Per file and lock space: what each owner has on each byte (flock uses byte 0 only).
#[derive(Clone)]
struct Model {
    held: [[[[Option<LockType>; BYTES]; OWNERS]; 2]; FILES],
    queue: Vec<(RequestId, LockRequest)>,
}

fn file_of(request: &LockRequest) -> usize {
    usize::try_from(request.file.ino).unwrap()
}

fn owner_of(request: &LockRequest) -> usize {
    usize::try_from(request.owner.owner).unwrap()
}

fn bytes_of(request: &LockRequest) -> std::ops::RangeInclusive<usize> {
    match request.kind {
        Kind::Flock => 0..=0,
        Kind::Posix => {
            let end = request.range.end.min(BYTES as u64 - 1);
            usize::try_from(request.range.start).unwrap()..=usize::try_from(end).unwrap()
        }
    }
}

impl Model {
    fn new() -> Self {
        Model { held: [[[[None; BYTES]; OWNERS]; 2]; FILES], queue: Vec::new() }
    }

    fn space(&mut self, request: &LockRequest) -> &mut [[Option<LockType>; BYTES]; OWNERS] {
        &mut self.held[file_of(request)][request.kind as usize]
    }

    fn blockers(&self, request: &LockRequest) -> Vec<usize> {
        let space = &self.held[file_of(request)][request.kind as usize];
        (0..OWNERS)
            .filter(|&other| other != owner_of(request))
            .filter(|&other| {
                bytes_of(request)
                    .any(|byte| space[other][byte].is_some_and(|held| held.conflicts(request.lock_type)))
            })
            .collect()
    }

    fn deadlock(&self, request: &LockRequest) -> bool {
        if request.kind == Kind::Flock {
            return false;
        }
        let mut reach = [[false; OWNERS]; OWNERS];
        let waiting = self.queue.iter().map(|(_, waiting)| waiting).filter(|w| w.kind == Kind::Posix);
        for waiting in waiting.chain([request]) {
            for blocker in self.blockers(waiting) {
                reach[owner_of(waiting)][blocker] = true;
            }
        }
        for via in 0..OWNERS {
            for from in 0..OWNERS {
                for to in 0..OWNERS {
                    reach[from][to] |= reach[from][via] && reach[via][to];
                }
            }
        }
        let me = owner_of(request);
        self.blockers(request).into_iter().any(|blocker| reach[blocker][me])
    }

    fn apply(&mut self, request: &LockRequest) {
        let value = (request.lock_type != LockType::Unlock).then_some(request.lock_type);
        let owner = owner_of(request);
        for byte in bytes_of(request) {
            self.space(request)[owner][byte] = value;
        }
    }

    fn set(&mut self, req: RequestId, request: LockRequest, effects: &mut Vec<Effect>) {
        let owner = owner_of(&request);
        if request.kind == Kind::Flock {
            let wanted = request.lock_type;
            let mine = &mut self.space(&request)[owner][0];
            if *mine != Some(wanted) {
                *mine = None;
            }
        }
        if self.blockers(&request).is_empty() {
            self.apply(&request);
            effects.push(Effect::Granted { req });
        } else if !request.wait {
            effects.push(Effect::Refused { req, refusal: Refusal::WouldBlock });
        } else if self.deadlock(&request) {
            effects.push(Effect::Refused { req, refusal: Refusal::Deadlock });
        } else {
            self.queue.push((req, request));
            effects.push(Effect::Queued { req });
        }
        self.wake(request.file, effects);
    }

    /// Always looks at every waiter, from the front again after each grant, and at every circle.
    fn wake(&mut self, file: FileId, effects: &mut Vec<Effect>) {
        let mut at = 0;
        while at < self.queue.len() {
            let (req, request) = self.queue[at];
            if request.file == file && self.blockers(&request).is_empty() {
                self.queue.remove(at);
                self.apply(&request);
                effects.push(Effect::Granted { req });
                at = 0;
            } else {
                at += 1;
            }
        }
        for (req, request) in self.queue.clone() {
            if request.file == file && self.deadlock(&request) {
                self.queue.retain(|(other, _)| *other != req);
                effects.push(Effect::Refused { req, refusal: Refusal::Deadlock });
            }
        }
        assert!(!self.queue.iter().any(|(_, request)| self.deadlock(request)), "a circle remains");
    }

    fn cancel(&mut self, req: RequestId, effects: &mut Vec<Effect>) {
        if self.queue.iter().any(|(other, _)| *other == req) {
            self.queue.retain(|(other, _)| *other != req);
            effects.push(Effect::Interrupted { req });
        }
    }

    fn drop_owner(&mut self, file: FileId, owner: u64, effects: &mut Vec<Effect>) {
        let owner = usize::try_from(owner).unwrap();
        for space in &mut self.held[usize::try_from(file.ino).unwrap()] {
            space[owner] = [None; BYTES];
        }
        self.wake(file, effects);
    }
}

/// Sessions are tied to owners here: owner `n` belongs to session `n % 2`.
fn owner(n: u64) -> Owner {
    Owner { session: n % 2, owner: n, pid: 1, node: NodeId(1) }
}

fn file(n: u64) -> FileId {
    FileId { ino: n, generation: 0 }
}

fn request() -> impl Strategy<Value = LockRequest> {
    let lock_type = prop_oneof![Just(LockType::Read), Just(LockType::Write), Just(LockType::Unlock)];
    let kind = prop_oneof![4 => Just(Kind::Posix), 1 => Just(Kind::Flock)];
    let bytes = BYTES as u64 - 1;
    let ends = (0..bytes, prop_oneof![9 => 0..bytes, 1 => Just(u64::MAX)]);
    (0..FILES as u64, 0..OWNERS as u64, kind, ends, lock_type, any::<bool>()).prop_map(
        |(on, by, kind, (a, b), lock_type, wait)| LockRequest {
            file: file(on),
            owner: owner(by),
            kind,
            range: LockRange { start: a.min(b), end: a.max(b) },
            lock_type,
            wait,
        },
    )
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        20 => request().prop_map(|request| Input::Set { req: RequestId(0), request }),
        2 => request().prop_map(|request| Input::Reclaim { req: RequestId(0), request }),
        2 => (0..60u64).prop_map(|req| Input::Cancel { req: RequestId(req) }),
        2 => (0..FILES as u64, 0..OWNERS as u64)
            .prop_map(|(on, by)| Input::DropOwner { file: file(on), owner: owner(by).key() }),
        1 => (0..2u64).prop_map(|session| Input::DropSession { session }),
    ]
}

fn step_model(model: &mut Model, input: Input, effects: &mut Vec<Effect>) {
    match input {
        Input::Set { req, request } => model.set(req, request, effects),
        Input::Reclaim { req, request } => model.set(req, LockRequest { wait: false, ..request }, effects),
        Input::Cancel { req } => model.cancel(req, effects),
        Input::DropOwner { file, owner } => model.drop_owner(file, owner.owner, effects),
        Input::DropSession { session } => {
            for on in 0..FILES as u64 {
                let mine: Vec<_> = model.queue.clone();
                for (req, waiting) in mine {
                    if waiting.owner.session == session && waiting.file == file(on) {
                        model.cancel(req, effects);
                    }
                }
            }
            for on in 0..FILES as u64 {
                for by in (0..OWNERS as u64).filter(|by| by % 2 == session) {
                    for space in &mut model.held[usize::try_from(on).unwrap()] {
                        space[usize::try_from(by).unwrap()] = [None; BYTES];
                    }
                }
                model.wake(file(on), effects);
            }
        }
    }
}

/// The table's locks byte by byte, checking the invariants of ranges on the way.
fn spread(table: &LockTable) -> [[[[Option<LockType>; BYTES]; OWNERS]; 2]; FILES] {
    let mut bytes = Model::new().held;
    for (on, spaces) in bytes.iter_mut().enumerate() {
        let held: Vec<HeldLock> = table.held(file(on as u64)).collect();
        for pair in held.windows(2) {
            if pair[0].kind == pair[1].kind && pair[0].owner.key() == pair[1].owner.key() {
                assert!(pair[0].range.end < pair[1].range.start, "overlap or disorder: {pair:?}");
                let touch = pair[0].range.touches(&pair[1].range);
                assert!(!touch || pair[0].lock_type != pair[1].lock_type, "not merged: {pair:?}");
            }
        }
        for lock in held {
            let by = usize::try_from(lock.owner.owner).unwrap();
            let end = usize::try_from(lock.range.end.min(BYTES as u64 - 1)).unwrap();
            let last = if lock.kind == Kind::Flock { 0 } else { end };
            let first = usize::try_from(lock.range.start).unwrap();
            spaces[lock.kind as usize][by][first..=last].fill(Some(lock.lock_type));
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn table_does_what_the_model_does(inputs in prop::collection::vec(input(), 1..60)) {
        let mut table = LockTable::new(Limits::default());
        let mut model = Model::new();
        for (at, mut input) in inputs.into_iter().enumerate() {
            match &mut input {
                Input::Set { req, .. } | Input::Reclaim { req, .. } => *req = RequestId(at as u64),
                Input::Cancel { .. } | Input::DropOwner { .. } | Input::DropSession { .. } => {}
            }
            let (mut got, mut expected) = (Vec::new(), Vec::new());
            table.step(input, &mut got);
            step_model(&mut model, input, &mut expected);
            prop_assert_eq!(&got, &expected, "after {:?}", input);
            prop_assert_eq!(spread(&table), model.held);
            prop_assert_eq!(table.waiter_count(), model.queue.len());
            let probe = LockRequest {
                file: file(0), owner: owner(0), kind: Kind::Posix, range: LockRange::ALL,
                lock_type: LockType::Write, wait: false,
            };
            prop_assert_eq!(table.get(&probe).is_some(), !model.blockers(&probe).is_empty());
        }
    }
}
