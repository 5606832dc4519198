//! Carries out what [`super::plan`] decides, and what failures lead to.

use super::plan::Todo;
use super::unit::{Call, Doing, Presence, Trouble, back_off};
use super::{Effect, LocalGroup, Mode};
use crate::db::EventKind;

/// A failure, as it comes from a host.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) why: String,
    pub(super) retry: bool,
    pub(super) elsewhere: bool,
}

impl Failure {
    /// One after which another try is worth it, here or elsewhere.
    pub(super) fn passing(why: String) -> Failure {
        Failure { why, retry: true, elsewhere: true }
    }
}

impl LocalGroup {
    /// Steps until nothing is left to do without hearing from anybody.
    pub(super) fn settle(&mut self, out: &mut Vec<Effect>) {
        // A resource has few steps before it waits for an answer; the bound is against a mistake, never reached.
        let rounds = 8 + 4 * self.units.len();
        for _ in 0..rounds {
            let mut changed = false;
            let names: Vec<String> = self.units.keys().cloned().collect();
            let kept = self.kept();
            for name in names {
                let Some(unit) = self.units.get(&name) else { continue };
                let todo = self.todo(&name, unit, &kept);
                changed |= todo != Todo::Wait;
                self.carry_out(&name, todo, out);
            }
            if !changed {
                return;
            }
        }
        debug_assert!(false, "a step does not end: {self:?}");
    }

    fn carry_out(&mut self, name: &str, todo: Todo, out: &mut Vec<Effect>) {
        let now_ms = self.now.now_ms;
        match todo {
            Todo::Wait => {}
            Todo::Call(doing) => self.call(name, doing, out),
            Todo::Abort => {
                self.cancel(name, out);
                self.call(name, Doing::Terminate, out);
            }
            Todo::TimeOut => self.time_out(name, out),
            Todo::Again { fresh } => {
                let Some(unit) = self.units.get_mut(name) else { return };
                match unit.trouble.take() {
                    Some(Trouble::Restart { why, .. }) => {
                        unit.because = format!("started again after: {why}")
                    }
                    Some(Trouble::Final { why, .. }) => unit.because = format!("another try after: {why}"),
                    Some(Trouble::Noted { .. }) | None => {}
                }
                if fresh {
                    unit.restarts.clear();
                } else {
                    unit.restarts.push_back(now_ms);
                }
            }
            Todo::Polls(on) => {
                if let Some(unit) = self.units.get_mut(name) {
                    unit.polls = on;
                    out.push(Effect::Polls { resource: name.into(), on });
                }
            }
            Todo::Drop => {
                self.units.remove(name);
            }
            Todo::Replaced => {
                if let Some(unit) = self.units.get_mut(name) {
                    unit.replaced = false;
                    unit.own_host = false;
                    unit.forgive();
                }
            }
        }
    }

    fn call(&mut self, name: &str, doing: Doing, out: &mut Vec<Effect>) {
        self.last_call += 1;
        let (call, resource) = (self.last_call, name.to_owned());
        let Some(unit) = self.units.get_mut(name) else { return };
        let timeout_ms = unit.spec.policy.pending_timeout_ms;
        let timed = matches!(doing, Doing::Online | Doing::Offline);
        unit.call = Some(Call {
            id: call,
            doing,
            deadline_ms: timed.then(|| self.now.now_ms.saturating_add(timeout_ms)),
            text: String::new(),
            text_ms: None,
        });
        let own_host = unit.wants_own_host();
        out.push(match doing {
            Doing::Adopt => {
                unit.not_open();
                Effect::Open { resource, call, adopt: true, own_host }
            }
            Doing::Open => {
                unit.stale = false;
                Effect::Open { resource, call, adopt: false, own_host }
            }
            Doing::Online => {
                unit.presence = Presence::Dirty;
                unit.initial = false;
                Effect::Online { resource, call }
            }
            Doing::Offline => Effect::Offline { resource, call },
            Doing::Terminate => {
                unit.presence = Presence::Dirty;
                Effect::Terminate { resource, call }
            }
            Doing::Close => Effect::Close { resource, call },
        });
    }

    fn cancel(&mut self, name: &str, out: &mut Vec<Effect>) {
        if let Some(call) = self.units.get_mut(name).and_then(|unit| unit.call.take()) {
            out.push(Effect::Cancel { resource: name.into(), call: call.id });
        }
    }

    fn time_out(&mut self, name: &str, out: &mut Vec<Effect>) {
        let Some(unit) = self.units.get(name) else { return };
        let timeout_ms = unit.spec.policy.pending_timeout_ms;
        let (way, starting) = match unit.doing() {
            Some(Doing::Online) => ("online", true),
            _ => ("offline", false),
        };
        let last = unit.call.as_ref().map_or("", |call| &call.text);
        let last = if last.is_empty() { String::new() } else { format!(" (last heard of it: {last})") };
        let why = format!("it did not go {way}, nor get on, within {}{last}", span(timeout_ms));
        self.cancel(name, out);
        if starting {
            self.fail(name, Failure::passing(why), out);
        } else {
            self.call(name, Doing::Terminate, out);
        }
    }

    /// It failed. What is left of it will be terminated; then it is started again, or not.
    pub(super) fn fail(&mut self, name: &str, failure: Failure, out: &mut Vec<Effect>) {
        let (maintenance, now_ms) = (self.maintenance(), self.now.now_ms);
        let Some(unit) = self.units.get(name) else { return };
        let wanted = self.wanted(unit);
        let Some(unit) = self.units.get_mut(name) else { return };
        if unit.presence != Presence::Gone {
            unit.presence = Presence::Dirty;
        }
        let counted = matches!(unit.trouble, Some(Trouble::Restart { .. } | Trouble::Final { .. }));
        if !wanted || counted {
            return;
        }
        let Failure { why, retry, elsewhere } = failure;
        if maintenance {
            unit.trouble = Some(Trouble::Noted { why });
            return;
        }
        let number = unit.recent_restarts(now_ms) + 1;
        let policy = &unit.spec.policy;
        let threshold = policy.restart_threshold as usize;
        if retry && number <= threshold {
            let at_ms = now_ms.saturating_add(policy.restart_delay_ms);
            let period = span(policy.restart_period_ms);
            let text =
                format!("resource {name} is started again ({number} of {threshold} within {period}): {why}");
            out.push(Effect::Event { kind: EventKind::ResourceRestarted, resource: name.into(), text });
            unit.trouble = Some(Trouble::Restart { why, at_ms, number });
        } else {
            let retry_ms = policy.retry_after_ms;
            let retry_at_ms = (retry_ms > 0).then(|| now_ms.saturating_add(retry_ms));
            unit.trouble = Some(Trouble::Final { why, elsewhere, retry_at_ms });
        }
    }

    /// A host is gone. See [`super::Input::HostGone`].
    pub(super) fn host_gone(
        &mut self,
        names: &[String],
        why: &str,
        culprit: Option<&str>,
        out: &mut Vec<Effect>,
    ) {
        for name in names {
            self.lost_host(name, why, culprit == Some(name.as_str()), out);
        }
    }

    fn lost_host(&mut self, name: &str, why: &str, culprit: bool, out: &mut Vec<Effect>) {
        let now_ms = self.now.now_ms;
        let (maintenance, stopped) = (self.maintenance(), matches!(self.mode, Mode::Stop(_)));
        let Some(unit) = self.units.get_mut(name) else { return };
        unit.own_host |= culprit;
        let call = unit.call.take();
        let had_it = unit.open.is_some();
        let was_open = had_it || call.is_some();
        unit.not_open();
        let mut failed = culprit && was_open;
        match call.map(|call| call.doing) {
            // Nothing speaks for anything of it being here, but that it ends hosts: as if it could not be opened.
            Some(Doing::Adopt)
                if culprit && !stopped && unit.presence == (Presence::Asked { expected: false }) =>
            {
                unit.set_gone();
            }
            Some(Doing::Open) if !unit.is_gone() && !had_it => {
                unit.opening = Some(back_off(unit.opening.take(), why.into(), now_ms));
            }
            Some(Doing::Adopt) => unit.opening = Some(back_off(unit.opening.take(), why.into(), now_ms)),
            Some(Doing::Terminate) => unit.ending = Some(back_off(unit.ending.take(), why.into(), now_ms)),
            Some(Doing::Online) => failed = true,
            // It was on its way out; what is left is terminated.
            Some(Doing::Offline) => unit.presence = Presence::Dirty,
            // Nothing was there; that it is opened again and again is to count.
            Some(Doing::Open) if unit.is_gone() => failed = true,
            Some(Doing::Open | Doing::Close) | None => {}
        }
        match unit.presence {
            Presence::Here => unit.presence = Presence::Asked { expected: true },
            Presence::Asked { .. } | Presence::Gone | Presence::Dirty => {}
        }
        if !failed {
            return;
        }
        let asked = matches!(unit.presence, Presence::Asked { .. });
        self.fail(name, Failure::passing(why.into()), out);
        // In maintenance it is looked after again if it is still there.
        if let Some(unit) = self.units.get_mut(name).filter(|_| asked && maintenance) {
            unit.presence = Presence::Asked { expected: true };
        }
    }

    /// Maintenance is over: what failed meanwhile has failed now.
    pub(super) fn end_maintenance(&mut self, out: &mut Vec<Effect>) {
        let noted: Vec<String> = self.units.keys().cloned().collect();
        for name in noted {
            let Some(unit) = self.units.get_mut(&name) else { continue };
            if let Some(Trouble::Noted { why }) = unit.trouble.clone() {
                unit.trouble = None;
                self.fail(&name, Failure::passing(why), out);
            }
        }
    }

    /// Begins to take everything offline.
    pub(super) fn leave(&mut self, mode: Mode) {
        if !matches!(self.mode, Mode::Stop(_)) {
            self.mode = mode;
        }
        for unit in self.units.values_mut() {
            if matches!(unit.trouble, Some(Trouble::Noted { .. })) {
                unit.trouble = None;
            }
        }
    }
}

/// A time for people.
pub(super) fn span(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{} s", ms / 1_000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}
