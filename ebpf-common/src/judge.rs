//! The verdict over the policy rows: one function for every hook and for the host's tests.

use crate::{
    PolicyKey, PolicyVal,
    codes::{info, reason, subject, verdict},
};

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Query {
    /// The client's subject; ignored (taken for the class of its address) where it is not authenticated.
    pub src: u32,
    /// The server's subject.
    pub dst: u32,
    /// The port at the server; 0 where the protocol has none.
    pub port: u16,
    /// IP protocol.
    pub proto: u8,
    /// True for a client whose identity is proven: an enrolled Pod of this node.
    pub authenticated: bool,
    /// [`crate::codes::info`] of the server.
    pub dst_flags: u32,
}

/// What is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// [`crate::codes::verdict`].
    pub verdict: u8,
    /// [`crate::codes::reason`]; not `NONE` only with `DENY`.
    pub reason: u8,
    /// The policy that decided; 0 where none did.
    pub policy: u32,
}

impl Judgement {
    /// True where it may not pass.
    #[inline(always)]
    pub fn denied(&self) -> bool {
        self.verdict == verdict::DENY
    }
}

/// Judges: `rows` looks one row up.
///
/// A server without rows takes every authenticated client; one that is not authenticated only where the server is
/// not strict. A server with rows takes what a row allows: the row of the port, of the protocol, of the pair, in
/// that order; no row means no.
#[inline(always)]
pub fn judge(query: &Query, mut rows: impl FnMut(&PolicyKey) -> Option<PolicyVal>) -> Judgement {
    if query.dst_flags & info::POLICED == 0 {
        return if query.authenticated || query.dst_flags & info::STRICT == 0 {
            Judgement { verdict: verdict::ALLOW, reason: reason::NONE, policy: 0 }
        } else {
            Judgement { verdict: verdict::DENY, reason: reason::PLAINTEXT_REFUSED, policy: 0 }
        };
    }
    let mut key = PolicyKey { src: query.src, dst: query.dst, port: query.port, proto: query.proto, pad: 0 };
    let mut row = rows(&key);
    if row.is_none() && query.port != 0 {
        key.port = 0;
        row = rows(&key);
    }
    if row.is_none() {
        key.port = 0;
        key.proto = 0;
        row = rows(&key);
    }
    match row {
        Some(row) if row.verdict != verdict::DENY => {
            Judgement { verdict: row.verdict, reason: reason::NONE, policy: row.policy }
        }
        row => {
            let policy = row.map_or(0, |row| row.policy);
            let why = if policy != 0 {
                reason::POLICY_DENY_RULE
            } else if !query.authenticated && query.dst_flags & info::STRICT != 0 {
                reason::PLAINTEXT_REFUSED
            } else {
                reason::POLICY_DENIED
            };
            Judgement { verdict: verdict::DENY, reason: why, policy }
        }
    }
}

/// Judges what is not TCP towards a Service with rows ([`info::POLICED`]), where plaintext would cross nodes and one
/// side is strict. The packet is not addressed to an endpoint yet, so the Service's own row of this very port decides:
/// only a row that allows plaintext lets pass.
#[inline(always)]
pub fn judge_service(query: &Query, mut rows: impl FnMut(&PolicyKey) -> Option<PolicyVal>) -> Judgement {
    let key = PolicyKey { src: query.src, dst: query.dst, port: query.port, proto: query.proto, pad: 0 };
    let (row, policy) = rows(&key).map_or((0, 0), |row| (row.verdict, row.policy));
    let (verdict, reason) = match row {
        verdict::ALLOW_PLAINTEXT => (verdict::ALLOW_PLAINTEXT, reason::NONE),
        verdict::DENY if policy != 0 => (verdict::DENY, reason::POLICY_DENY_RULE),
        verdict::DENY => (verdict::DENY, reason::POLICY_DENIED),
        _ => (verdict::DENY, reason::PLAINTEXT_REFUSED),
    };
    Judgement { verdict, reason, policy }
}

/// The subject of a client whose address is all that is known: the class of its address in the policies' CIDRs.
#[inline(always)]
pub fn outside_subject(class: Option<(u32, u32)>) -> u32 {
    match class {
        Some((subject, flags)) if flags & info::CIDR != 0 => subject,
        _ => subject::WORLD,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const POLICED: u32 = info::ENROLLED | info::POLICED;

    fn query(port: u16, proto: u8, authenticated: bool, dst_flags: u32) -> Query {
        Query { src: 300, dst: 301, port, proto, authenticated, dst_flags }
    }

    fn row(port: u16, proto: u8, verdict: u8) -> (PolicyKey, PolicyVal) {
        (PolicyKey { src: 300, dst: 301, port, proto, pad: 0 }, PolicyVal { verdict, pad: [0; 3], policy: 7 })
    }

    fn ask(query: Query, rows: &[(PolicyKey, PolicyVal)]) -> u8 {
        let rows: HashMap<_, _> = rows.iter().copied().collect();
        judge(&query, |key| rows.get(key).copied()).verdict
    }

    #[test]
    fn without_rows_identity_and_mode_decide() {
        assert_eq!(ask(query(80, 6, true, info::STRICT), &[]), verdict::ALLOW);
        assert_eq!(ask(query(80, 6, false, info::STRICT), &[]), verdict::DENY);
        assert_eq!(ask(query(80, 6, false, 0), &[]), verdict::ALLOW);
    }

    #[test]
    fn the_nearest_row_decides() {
        let rows = [row(80, 6, verdict::PROXY), row(0, 6, verdict::DENY), row(0, 0, verdict::ALLOW)];
        assert_eq!(ask(query(80, 6, true, POLICED), &rows), verdict::PROXY);
        assert_eq!(ask(query(81, 6, true, POLICED), &rows), verdict::DENY);
        assert_eq!(ask(query(80, 17, true, POLICED), &rows), verdict::ALLOW);
        assert_eq!(ask(query(80, 6, true, POLICED), &[]), verdict::DENY);
    }

    #[test]
    fn a_refusal_says_why() {
        let judged = judge(&query(80, 6, false, POLICED | info::STRICT), |_| None);
        assert_eq!((judged.reason, judged.policy), (reason::PLAINTEXT_REFUSED, 0));
        let judged = judge(&query(80, 6, true, POLICED), |_| None);
        assert_eq!(judged.reason, reason::POLICY_DENIED);
        let judged = judge(&query(80, 6, true, POLICED), |_| Some(row(0, 0, verdict::DENY).1));
        assert_eq!((judged.reason, judged.policy), (reason::POLICY_DENY_RULE, 7));
    }

    #[test]
    fn a_service_takes_only_what_a_row_of_the_port_allows_in_plaintext() {
        let ask = |verdict, policy| {
            let val = PolicyVal { verdict, pad: [0; 3], policy };
            let judged = judge_service(&query(53, 17, true, info::SERVICE | info::POLICED), |key| {
                (key.port == 53 && key.proto == 17).then_some(val)
            });
            (judged.denied(), judged.reason, judged.policy)
        };
        assert_eq!(ask(verdict::ALLOW_PLAINTEXT, 7), (false, reason::NONE, 7));
        assert_eq!(ask(verdict::ALLOW, 7), (true, reason::PLAINTEXT_REFUSED, 7));
        assert_eq!(ask(verdict::PROXY, 7), (true, reason::PLAINTEXT_REFUSED, 7));
        assert_eq!(ask(verdict::DENY, 7), (true, reason::POLICY_DENY_RULE, 7));
        assert_eq!(ask(verdict::DENY, 0), (true, reason::POLICY_DENIED, 0));
        // Rows of other ports, of the protocol or of the pair say nothing of this one.
        for (port, proto) in [(54, 17), (0, 17), (0, 0), (53, 132)] {
            let allow = PolicyVal { verdict: verdict::ALLOW_PLAINTEXT, pad: [0; 3], policy: 7 };
            let judged = judge_service(&query(53, 17, true, info::SERVICE | info::POLICED), |key| {
                ((key.port, key.proto) == (port, proto)).then_some(allow)
            });
            assert_eq!((judged.denied(), judged.reason), (true, reason::PLAINTEXT_REFUSED));
        }
    }

    #[test]
    fn only_a_class_of_a_policy_is_a_subject() {
        assert_eq!(outside_subject(None), subject::WORLD);
        assert_eq!(outside_subject(Some((900, info::MESH_RANGE))), subject::WORLD);
        assert_eq!(outside_subject(Some((900, info::CIDR))), 900);
    }

    proptest! {
        #[test]
        fn a_policed_server_never_takes_what_no_row_allows(
            port in 0_u16..4, proto in prop::sample::select(vec![1_u8, 6, 17]), authenticated: bool, strict: bool,
            rows in prop::collection::hash_map((0_u16..4, prop::sample::select(vec![0_u8, 6, 17])), 1_u8..5, 0..8),
        ) {
            let flags = POLICED | if strict { info::STRICT } else { 0 };
            let rows: Vec<_> = rows.into_iter().map(|((port, proto), verdict)| row(port, proto, verdict)).collect();
            let got = ask(query(port, proto, authenticated, flags), &rows);
            let find = |port: u16, proto: u8| {
                rows.iter().find(|(key, _)| key.port == port && key.proto == proto).map(|(_, val)| val.verdict)
            };
            let want = find(port, proto).or(find(0, proto)).or(find(0, 0)).unwrap_or(verdict::DENY);
            prop_assert_eq!(got, want);
        }
    }
}
