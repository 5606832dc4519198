//! What is registered, and the updates that do it (RFC 2136). Pure but for the random id of each message.
//!
//! The owner of a name is told by a TXT record beside its addresses, `csvfs-owner=<cluster id>`. An update either asks that
//! this record is there exactly so, or that the name is not in use at all; the server checks that and makes the
//! change in one step, so two clusters never fight over a name.

use hickory_proto::op::{Message, OpCode, Query, UpdateMessage};
use hickory_proto::rr::rdata::{A, AAAA, PTR, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// A name with what it is to say.
#[derive(Debug, Clone)]
pub(super) struct Registration {
    /// Full name.
    pub(super) name: Name,
    /// Its zone.
    pub(super) zone: Name,
    /// Its addresses.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Of each record, in seconds.
    pub(super) ttl: u32,
    /// Text of the owner record.
    pub(super) owner: String,
}

/// On what an update depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// The name is this cluster's.
    Ours,
    /// Nobody has the name.
    Free,
    /// In any case.
    Always,
}

/// An empty update of a zone.
fn update(zone: &Name) -> Message {
    let mut query = Query::new();
    query.set_name(zone.clone()).set_query_class(DNSClass::IN).set_query_type(RecordType::SOA);
    let mut message = Message::query();
    message.metadata.op_code = OpCode::Update;
    message.metadata.recursion_desired = false;
    message.add_zone(query);
    message
}

/// "Delete this set" as update (RFC 2136 2.5.2); with `ANY` all sets of the name.
fn delete(name: &Name, kind: RecordType) -> Record {
    let mut record = Record::update0(name.clone(), 0, kind);
    record.dns_class = DNSClass::ANY;
    record.into_record_of_rdata()
}

impl Registration {
    fn owner_record(&self, ttl: u32) -> Record {
        Record::from_rdata(self.name.clone(), ttl, RData::TXT(TXT::new(vec![self.owner.clone()])))
    }

    fn begin(&self, when: When) -> Message {
        let mut message = update(&self.zone);
        match when {
            // "The set exists with this value" (RFC 2136 2.4.2); its TTL has to be 0.
            When::Ours => {
                message.add_pre_requisite(self.owner_record(0));
            }
            // "The name is not in use" (RFC 2136 2.4.5).
            When::Free => {
                let mut record = Record::update0(self.name.clone(), 0, RecordType::ANY);
                record.dns_class = DNSClass::NONE;
                message.add_pre_requisite(record.into_record_of_rdata());
            }
            When::Always => {}
        }
        message
    }

    /// Makes the addresses these and the owner this cluster.
    pub(super) fn register(&self, when: When) -> Message {
        let mut message = self.begin(when);
        // An alias excludes every other record.
        for kind in [RecordType::A, RecordType::AAAA, RecordType::TXT, RecordType::CNAME] {
            message.add_update(delete(&self.name, kind));
        }
        for addr in &self.addresses {
            let data = match addr {
                IpAddr::V4(addr) => RData::A(A(*addr)),
                IpAddr::V6(addr) => RData::AAAA(AAAA(*addr)),
            };
            message.add_update(Record::from_rdata(self.name.clone(), self.ttl, data));
        }
        message.add_update(self.owner_record(self.ttl));
        message
    }

    /// Takes the addresses and the owner away, if the name is this cluster's.
    pub(super) fn remove(&self) -> Message {
        let mut message = self.begin(When::Ours);
        for kind in [RecordType::A, RecordType::AAAA, RecordType::TXT] {
            message.add_update(delete(&self.name, kind));
        }
        message
    }

    /// Makes the address say this name.
    pub(super) fn reverse(&self, zone: &Name, addr: IpAddr) -> Message {
        let mut message = Self::remove_reverse(zone, addr);
        let data = RData::PTR(PTR(self.name.clone()));
        message.add_update(Record::from_rdata(reverse_name(addr), self.ttl, data));
        message
    }

    /// Makes the address say nothing.
    pub(super) fn remove_reverse(zone: &Name, addr: IpAddr) -> Message {
        let mut message = update(zone);
        message.add_update(delete(&reverse_name(addr), RecordType::PTR));
        message
    }
}

/// Under which an address is asked for its name.
pub(super) fn reverse_name(addr: IpAddr) -> Name {
    let mut name = Name::from(addr);
    name.set_fqdn(true);
    name
}
