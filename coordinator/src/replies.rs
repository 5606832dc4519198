//! Replies of one session that may be asked for again: after a lost connection the node sends its calls once more,
//! and a call that changed something must be answered, not done again. Bounded; the oldest go first. Calls that only
//! read are not kept here, they are simply done again.

use csv_proto::Reply;
use std::collections::{HashMap, VecDeque};

#[derive(Debug)]
pub(crate) struct ReplyCache {
    max: usize,
    order: VecDeque<u64>,
    replies: HashMap<u64, Reply>,
}

impl ReplyCache {
    pub(crate) fn new(max: usize) -> ReplyCache {
        ReplyCache { max: max.max(1), order: VecDeque::new(), replies: HashMap::new() }
    }

    pub(crate) fn get(&self, id: u64) -> Option<&Reply> {
        self.replies.get(&id)
    }

    pub(crate) fn put(&mut self, mut reply: Reply) {
        // What may be cached under a lease is only certain at the time of the first reply.
        reply.lease = false;
        let id = reply.id;
        if self.replies.insert(id, reply).is_none() {
            self.order.push_back(id);
        }
        while self.order.len() > self.max {
            if let Some(oldest) = self.order.pop_front() {
                self.replies.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_first_and_a_repeat_carries_no_lease() {
        let mut cache = ReplyCache::new(2);
        for id in 1..=3 {
            cache.put(Reply { id, lease: true, ..Reply::default() });
        }
        assert!(cache.get(1).is_none());
        assert_eq!(cache.get(3).map(|reply| reply.lease), Some(false));
    }
}
