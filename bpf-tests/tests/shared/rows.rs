//! A compiled policy in the real maps.

use weft_bpf_tests::tables::Maps;
use weft_core::policy::kernel::{KernelPolicy, Row, RowVerdict};
use weft_ebpf_common::{
    PolicyKey, PolicyVal,
    codes::{info, map, verdict},
};

fn key(row: &Row) -> PolicyKey {
    PolicyKey { src: row.source.0, dst: row.destination.0, port: row.port, proto: row.protocol, pad: 0 }
}

/// Puts rows and ranges in.
pub(crate) fn insert(maps: &mut Maps<'_>, compiled: &KernelPolicy) {
    for row in &compiled.rows {
        let verdict = match row.verdict {
            RowVerdict::Allow => verdict::ALLOW,
            RowVerdict::AllowPlaintext => verdict::ALLOW_PLAINTEXT,
            RowVerdict::Deny => verdict::DENY,
            RowVerdict::Proxy => verdict::PROXY,
        };
        maps.set(map::POLICY, key(row), PolicyVal { verdict, pad: [0; 3], policy: row.policy }).unwrap();
    }
    for class in &compiled.cidrs {
        let prefix = class.cidr.prefix.into();
        maps.describe_range(class.cidr.address, prefix, class.subject.0, info::CIDR).unwrap();
    }
}

/// Takes them out again.
pub(crate) fn remove(maps: &mut Maps<'_>, compiled: &KernelPolicy) {
    for row in &compiled.rows {
        maps.delete::<_, PolicyVal>(map::POLICY, key(row)).unwrap();
    }
    for class in &compiled.cidrs {
        maps.forget_range(class.cidr.address, class.cidr.prefix.into()).unwrap();
    }
}
