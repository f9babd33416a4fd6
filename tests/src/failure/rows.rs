//! The rows.

use super::{Fate, Place, Row, Sign};

const LAB: &str = "tests/tests/failure.rs";
const AGENTS: &str = "tests/tests/cluster_failure.rs";
const CONTROL: &str = "tests/tests/cluster_failure_control.rs";

const fn says(place: Place, says: &'static str) -> Sign {
    Sign { place, says }
}

/// Every failure, in the order of the page.
pub const ROWS: &[Row] = &[
    Row {
        name: "api-server",
        fault: "The API server is gone",
        mode: "strict",
        whose: "all",
        new: Fate::GoOn,
        running: Fate::GoOn,
        signs: &[
            says(Place::OperatorLog, "the lease weft-operator cannot be held or asked for"),
            says(Place::Check, "does not answer"),
        ],
        then: "An agent that restarts meanwhile begins from its snapshot, with the certificates that it keeps on tmpfs, and \
               serves. An operator goes on signing for agents whose tokens it has checked within the hour \
               (`operator/src/kubernetes/review.rs`); an agent that comes to a replica which has not turns to another one. \
               Objects that change when the API server is back are enforced within seconds.",
        test: CONTROL,
    },
    Row {
        name: "operator",
        fault: "Every operator is gone",
        mode: "strict",
        whose: "all, but for Pods that start meanwhile",
        new: Fate::GoOn,
        running: Fate::GoOn,
        signs: &[
            says(Place::Check, "0 of 2 replicas available"),
            says(Place::Status, "no link to the operator; the last configuration goes on"),
            says(Place::Metrics, "weft_operator_connected 0"),
        ],
        then: "A Pod that starts meanwhile in a meshed namespace is held: its connections are refused, and `weft status` at \
               the node says that the operator has not described it. It works when an operator is back. Certificates are \
               not renewed: after `svidLifetime` (1 h) connections would be refused.",
        test: CONTROL,
    },
    Row {
        name: "node-not-ready",
        fault: "A node is NotReady: its kubelet and container runtime are gone",
        mode: "strict",
        whose: "those of other nodes' Pods to a Service with Pods there and elsewhere",
        new: Fate::Move,
        running: Fate::GoOn,
        signs: &[says(Place::Check, "not ready: node2"), says(Place::Kubectl("get nodes"), "NotReady")],
        then: "No call fails: the Pods there serve until Kubernetes takes their endpoints away (after 50 s as it is set up \
               usually). They come back with the kubelet.",
        test: CONTROL,
    },
    Row {
        name: "policy-typo",
        fault: "A policy has a misspelled field",
        mode: "any",
        whose: "all",
        new: Fate::GoOn,
        running: Fate::GoOn,
        signs: &[says(Place::Kubectl("apply -f policy.yaml"), "spec.rules[0].sorces")],
        then: "It is refused when it is applied, and the message names the field; the form from before stays in force.",
        test: CONTROL,
    },
    Row {
        name: "policy-wrong",
        fault: "A policy fits the schema and cannot be meant: its target does not exist",
        mode: "any",
        whose: "all",
        new: Fate::GoOn,
        running: Fate::GoOn,
        signs: &[
            says(Place::Kubectl("get wap -A -o yaml"), "ResolvedRefs"),
            says(Place::Check, "no-such-service"),
        ],
        then: "A condition of the policy says what to do. The other policies are enforced, and change, as before.",
        test: CONTROL,
    },
    Row {
        name: "agent",
        fault: "A node's agent is gone",
        mode: "strict",
        whose: "those of that node's Pods through the proxy",
        new: Fate::Refused,
        running: Fate::End,
        signs: &[says(Place::Kubectl("-n weft-system get daemonset weft-agent"), "0")],
        then: "The pinned programs go on judging, and Pods outside the mesh work, also those that start meanwhile. A Pod that \
               starts meanwhile in a strict namespace waits in `ContainerCreating` (see operations, and \
               `tests/tests/cluster_guard.rs`). All of it ends when the agent is back.",
        test: AGENTS,
    },
    Row {
        name: "map-full",
        fault: "A BPF map is full: one Pod more than it holds",
        mode: "strict",
        whose: "those of the Pod that found no room",
        new: Fate::Refused,
        running: Fate::None,
        signs: &[
            says(
                Place::Status,
                "the map PODS is full (5 entries): give the agents a larger --map-size PODS=ENTRIES",
            ),
            says(Place::Status, "map PODS is nearly full: 5 of 5"),
            says(Place::Metrics, "weft_map_entries{map=\"PODS\"} 5"),
            says(Place::Metrics, "weft_enrolment_failures_total"),
        ],
        then: "On Kubernetes a strict Pod does not start at all, and `kubectl describe pod` says why; one that runs already \
               and becomes strict is closed (`tests/tests/cluster_limits.rs`). The other Pods of the node go on. It is tried \
               again each second, and works as soon as there is room.",
        test: LAB,
    },
    Row {
        name: "disk-full",
        fault: "The agent's run folder (`/run/weft`) is full",
        mode: "strict",
        whose: "all",
        new: Fate::GoOn,
        running: Fate::GoOn,
        signs: &[
            says(
                Place::Status,
                "cannot be used; check the run folder, and whether its file system is full (df)",
            ),
            says(Place::Metrics, "weft_snapshot_failures_total"),
            says(Place::AgentLog, "a restart without the operator would begin with older configuration"),
        ],
        then: "Changes of policy are enforced. An agent that restarts begins with the snapshot from before and takes the newest \
               configuration from the operator; without an operator it would go on with the older one. The snapshot is \
               tried again every 5 s.",
        test: LAB,
    },
    Row {
        name: "operator-disk-full",
        fault: "The operator's state folder (`--state-dir`) is full",
        mode: "strict",
        whose: "all",
        new: Fate::GoOn,
        running: Fate::GoOn,
        signs: &[says(Place::OperatorLog, "make the folder writable and large enough")],
        then: "Changes of policy are enforced. As installed by `weft install` the operator has no such folder.",
        test: LAB,
    },
    Row {
        name: "clock-ahead",
        fault: "A node's clock is one hour ahead",
        mode: "strict",
        whose: "those from and to that node's Pods",
        new: Fate::Refused,
        running: Fate::End,
        signs: &[says(Place::Status, "expired")],
        then: "To that node every certificate of an hour has expired when it comes. `weft check` compares the clocks of nodes \
               and API server, and says that this one is an hour ahead. It ends when the clock is set right.",
        test: LAB,
    },
    Row {
        name: "clock-behind",
        fault: "A node's clock is one hour behind when its agent begins, as after a reboot",
        mode: "strict",
        whose: "those from and to that node's Pods",
        new: Fate::Refused,
        running: Fate::End,
        signs: &[says(Place::Status, "not valid yet")],
        then: "To that node every certificate is of the future. Running connections ended with the agent before; an agent that \
               runs while its clock is set back has the certificates that it had. It ends when the clock is set right.",
        test: LAB,
    },
    Row {
        name: "ca-expired",
        fault: "The CA has expired",
        mode: "strict",
        whose: "all between nodes",
        new: Fate::Refused,
        running: Fate::End,
        signs: &[
            says(Place::Status, "SVID spiffe://cluster.local/ns/shop/sa/client:"),
            says(
                Place::AgentLog,
                "the credential expired before it could be renewed: connections are refused",
            ),
            says(Place::Metrics, "weft_svid_expired_total"),
        ],
        then: "No certificate outlives the CA. `weft check` warns 30 days before. A new CA in its place signs at once, without \
               the wait that a rotation in time has.",
        test: LAB,
    },
];
