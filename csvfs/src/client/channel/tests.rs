//! Calls, links that break, interrupts, time-outs.

use super::*;

#[derive(Debug, Default)]
struct FakeLink {
    sent: Mutex<Vec<proto::ClientMessage>>,
}
impl Link for FakeLink {
    fn send(&self, message: proto::ClientMessage) {
        self.sent.lock().push(message);
    }
}

fn calls(link: &FakeLink) -> Vec<proto::Call> {
    let calls = link.sent.lock();
    calls
        .iter()
        .filter_map(|m| match &m.body {
            Some(Out::Call(call)) => Some(call.clone()),
            Some(_) | None => None,
        })
        .collect()
}

fn stat_op() -> Op {
    Op::Statfs(proto::StatFs {})
}

fn until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "did not happen within 10 s");
        std::thread::yield_now();
    }
}

#[test]
fn a_call_survives_a_broken_link_and_is_marked_only_for_a_new_coordinator() {
    let channel = Arc::new(Channel::new(Duration::from_secs(10)));
    let first = Arc::new(FakeLink::default());
    channel.linked(first.clone(), Epoch(1));
    channel.open(true);
    let caller = {
        let channel = channel.clone();
        std::thread::spawn(move || channel.call(Caller::default(), stat_op()))
    };
    until(|| calls(&first).len() == 1);
    let id = calls(&first)[0].id;
    channel.unlinked();
    let second = Arc::new(FakeLink::default());
    channel.linked(second.clone(), Epoch(1));
    channel.open(true);
    assert_eq!(calls(&second).len(), 1);
    assert!(!calls(&second)[0].resent);
    channel.unlinked();
    let third = Arc::new(FakeLink::default());
    channel.linked(third.clone(), Epoch(2));
    channel.open(false);
    assert!(calls(&third)[0].resent);
    assert_eq!(calls(&third)[0].id, id);
    channel.replied(proto::Reply { id, ..Default::default() });
    assert!(caller.join().unwrap().is_ok());
}

#[test]
fn unreachable_coordinator_ends_with_eio_and_interrupt_with_eintr() {
    let channel = Arc::new(Channel::new(Duration::from_millis(20)));
    assert_eq!(channel.call(Caller::default(), stat_op()).unwrap_err(), Errno::IO);
    let channel = Arc::new(Channel::new(Duration::from_secs(60)));
    let caller = {
        let channel = channel.clone();
        let who = Caller { request: 77, ..Caller::default() };
        std::thread::spawn(move || channel.call(who, stat_op()))
    };
    until(|| !channel.state.lock().calls.is_empty());
    channel.interrupt(77);
    assert_eq!(caller.join().unwrap().unwrap_err(), Errno::INTR);
}

#[test]
fn an_interrupt_that_comes_first_is_not_lost() {
    let channel = Channel::new(Duration::from_secs(60));
    channel.interrupt(5);
    let who = Caller { request: 5, ..Caller::default() };
    assert_eq!(channel.call(who, stat_op()).unwrap_err(), Errno::INTR);
}

#[test]
fn an_interrupted_call_that_is_out_is_cancelled_at_the_coordinator() {
    let channel = Arc::new(Channel::new(Duration::from_secs(60)));
    let link = Arc::new(FakeLink::default());
    channel.linked(link.clone(), Epoch(1));
    channel.open(true);
    let caller = {
        let channel = channel.clone();
        let who = Caller { request: 9, ..Caller::default() };
        std::thread::spawn(move || channel.call(who, stat_op()))
    };
    until(|| calls(&link).len() == 1);
    channel.interrupt(9);
    until(|| link.sent.lock().iter().any(|m| matches!(m.body, Some(Out::Cancel(_)))));
    let id = calls(&link)[0].id;
    channel.replied(proto::Reply { id, errno: 4, ..Default::default() });
    assert_eq!(caller.join().unwrap().unwrap_err(), Errno::INTR);
}

#[test]
fn a_lock_that_is_granted_to_nobody_is_given_back() {
    let channel = Channel::new(Duration::from_millis(20));
    let link = Arc::new(FakeLink::default());
    channel.linked(link.clone(), Epoch(1));
    channel.open(true);
    let lock = proto::Lock { start: 0, end: 9, r#type: 1, pid: 7 };
    let set = proto::SetLock { lock: Some(lock), owner: 3, ..proto::SetLock::default() };
    assert_eq!(channel.call(Caller::default(), Op::Setlk(set)).unwrap_err(), Errno::IO);
    let id = calls(&link)[0].id;
    channel.replied(proto::Reply { id, ..Default::default() });
    let sent = calls(&link);
    let Some(Op::Setlk(undo)) = &sent[1].op else { panic!("no unlock was sent") };
    assert_eq!(undo.lock.unwrap().r#type, 2);
    assert!(channel.state.lock().calls.is_empty());
}

#[test]
fn a_sent_call_is_not_answered_by_guess_at_once() {
    let channel = Arc::new(Channel::new(Duration::from_secs(60)));
    let first = Arc::new(FakeLink::default());
    channel.linked(first.clone(), Epoch(1));
    channel.open(true);
    let who = Caller { request: 4, ..Caller::default() };
    let caller = {
        let channel = channel.clone();
        std::thread::spawn(move || channel.call(who, stat_op()))
    };
    until(|| calls(&first).len() == 1);
    channel.unlinked();
    channel.interrupt(4);
    let id = calls(&first)[0].id;
    until(|| channel.state.lock().calls.get(&id).is_some_and(|pending| pending.cancelled));
    let second = Arc::new(FakeLink::default());
    channel.linked(second.clone(), Epoch(1));
    channel.open(true);
    assert!(second.sent.lock().iter().any(|m| matches!(m.body, Some(Out::Cancel(_)))));
    channel.replied(proto::Reply { id, ..Default::default() });
    assert!(caller.join().unwrap().is_ok());
}

/// What `done` was told, for looking at from outside.
fn told() -> (OnDone, std::sync::mpsc::Receiver<Result<proto::Reply, Errno>>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    (Box::new(move |outcome| drop(sender.send(outcome))), receiver)
}

fn watched(op_timeout: Duration) -> Arc<Channel> {
    let channel = Arc::new(Channel::new(op_timeout));
    let watching = channel.clone();
    std::thread::spawn(move || watching.watch());
    channel
}

#[test]
fn a_started_call_ends_once_with_its_reply() {
    let channel = watched(Duration::from_secs(60));
    let link = Arc::new(FakeLink::default());
    channel.linked(link.clone(), Epoch(1));
    channel.open(true);
    let (done, outcome) = told();
    let who = Caller { request: 8, ..Caller::default() };
    assert!(channel.start(who, stat_op(), done).is_ok());
    let id = calls(&link)[0].id;
    channel.replied(proto::Reply { id, errno: 2, ..Default::default() });
    channel.replied(proto::Reply { id, ..Default::default() });
    assert_eq!(outcome.recv_timeout(Duration::from_secs(10)).unwrap().unwrap().errno, 2);
    assert!(outcome.recv().is_err(), "the function is gone, and was run once");
    let state = channel.state.lock();
    assert!(state.calls.is_empty() && state.by_request.is_empty());
    drop(state);
    channel.close();
}

#[test]
fn a_started_call_ends_at_its_time_and_when_interrupted() {
    let channel = watched(Duration::from_millis(20));
    let (done, outcome) = told();
    assert!(channel.start(Caller::default(), stat_op(), done).is_ok());
    assert_eq!(outcome.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err(), Errno::IO);

    let channel = watched(Duration::from_secs(60));
    let who = Caller { request: 77, ..Caller::default() };
    let (done, outcome) = told();
    assert!(channel.start(who, stat_op(), done).is_ok());
    channel.interrupt(77);
    assert_eq!(outcome.try_recv().unwrap().unwrap_err(), Errno::INTR);

    let (done, outcome) = told();
    channel.interrupt(78);
    assert!(channel.start(Caller { request: 78, ..who }, stat_op(), done).is_ok());
    assert_eq!(outcome.try_recv().unwrap().unwrap_err(), Errno::INTR);
}

#[test]
fn a_started_call_that_was_sent_is_cancelled_and_what_it_took_is_given_back() {
    let channel = watched(Duration::from_millis(50));
    let link = Arc::new(FakeLink::default());
    channel.linked(link.clone(), Epoch(1));
    channel.open(true);
    let (done, outcome) = told();
    let who = Caller { request: 5, ..Caller::default() };
    let open = proto::Open { handle: 4, ..proto::Open::default() };
    assert!(channel.start(who, Op::Open(open), done).is_ok());
    channel.interrupt(5);
    assert!(outcome.try_recv().is_err(), "its outcome is not known yet");
    assert!(link.sent.lock().iter().any(|m| matches!(m.body, Some(Out::Cancel(_)))));
    assert_eq!(outcome.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err(), Errno::IO);
    let id = calls(&link)[0].id;
    channel.replied(proto::Reply { id, ..Default::default() });
    let sent = calls(&link);
    assert!(matches!(&sent[1].op, Some(Op::Close(close)) if close.handle == 4));
    assert!(channel.state.lock().calls.is_empty());
}

#[test]
fn a_started_call_is_refused_when_there_is_no_place_and_waits_if_it_may() {
    let channel = watched(Duration::from_secs(60));
    let link = Arc::new(FakeLink::default());
    channel.linked(link.clone(), Epoch(1));
    channel.open(true);
    for _ in 0..CALLS_MAX {
        assert!(channel.start(Caller::default(), stat_op(), told().0).is_ok());
    }
    let (done, outcome) = told();
    let Err(refused) = channel.start(Caller::default(), stat_op(), done) else {
        panic!("one call too many was taken")
    };
    let NotStarted { op, done } = *refused;
    let waiting = {
        let channel = channel.clone();
        std::thread::spawn(move || channel.start_waiting(Caller::default(), op, done))
    };
    let first = calls(&link)[0].id;
    channel.replied(proto::Reply { id: first, ..Default::default() });
    waiting.join().unwrap();
    let last = calls(&link).last().unwrap().id;
    channel.replied(proto::Reply { id: last, ..Default::default() });
    assert!(outcome.recv_timeout(Duration::from_secs(10)).unwrap().is_ok());
}
