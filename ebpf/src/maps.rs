//! Every map of the object, with its types in BTF. User space may ask for other sizes when it creates them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SkStorage, SockHash,
    },
    macros::btf_map,
};
use weft_ebpf_common::{
    Addr, AddrInfo, Config, CountKey, Event, FlowSeen, FragKey, Front, FrontKey, ListenerKey, OrigDst, Pod,
    PolicyKey, PolicyVal, Probe, SkMeta, Tuple, VipKey, codes::stat,
};

/// Memory as it is needed: these maps are sized for the largest clusters.
const GROW: usize = BPF_F_NO_PREALLOC as usize;

/// What one end of a connection leaves for the other one.
pub(crate) type Handover = LruHashMap<Tuple, OrigDst, 131_072>;

/// Pods by the cookie of their network namespace.
#[btf_map]
pub(crate) static PODS: HashMap<u64, Pod, 8_192, GROW> = HashMap::new();

/// Pods by the index of their host-side interface.
#[btf_map]
pub(crate) static VETHS: HashMap<u32, Pod, 8_192, GROW> = HashMap::new();

/// Local enrolled Pods by address.
#[btf_map]
pub(crate) static POD_ADDRS: HashMap<Addr, Pod, 16_384, GROW> = HashMap::new();

/// What is known of a socket. Lives and dies with it.
#[btf_map]
pub(crate) static SK_META: SkStorage<SkMeta> = SkStorage::new();

/// What redirected connections dialled, until the proxy's end has it.
#[btf_map]
pub(crate) static ORIG_DST: Handover = Handover::new();

/// Who is behind connections of the proxy, until the application's end has it.
#[btf_map]
pub(crate) static CLIENT_OF: Handover = Handover::new();

/// The proxy's listeners.
#[btf_map]
pub(crate) static LISTENERS: SockHash<ListenerKey, 32_768> = SockHash::new();

/// What is known of addresses.
#[btf_map]
pub(crate) static ADDRS: HashMap<Addr, AddrInfo, 262_144, GROW> = HashMap::new();

/// What is known of ranges.
#[btf_map]
pub(crate) static CIDRS: LpmTrie<Addr, AddrInfo, 65_536> = LpmTrie::new();

/// Services whose every endpoint refuses a client.
#[btf_map]
pub(crate) static VIP_DENIED: HashMap<VipKey, u32, 262_144, GROW> = HashMap::new();

/// Policy rows.
#[btf_map]
pub(crate) static POLICY: HashMap<PolicyKey, PolicyVal, 1_048_576, GROW> = HashMap::new();

/// Allowed flows that are not TCP, a row for both directions.
#[btf_map]
pub(crate) static FLOW_PAIRS: LruHashMap<Tuple, FlowSeen, 131_072> = LruHashMap::new();

/// Datagrams whose first fragment passed.
#[btf_map]
pub(crate) static FRAGS: LruHashMap<FragKey, u64, 8_192> = LruHashMap::new();

/// The cgroups of the node's kubelet.
#[btf_map]
pub(crate) static KUBELETS: HashMap<u64, u32, 16, GROW> = HashMap::new();

/// The kubelet's SYNs between the packet hook and the choice of the socket.
#[btf_map]
pub(crate) static PROBES: LruHashMap<Tuple, Probe, 8_192> = LruHashMap::new();

/// Ports that are a Service's, on addresses that are not the Service's alone.
#[btf_map]
pub(crate) static FRONTS: HashMap<FrontKey, Front, 65_536, GROW> = HashMap::new();

/// Cgroups by which processes of the node's own network are told apart.
#[btf_map]
pub(crate) static CGROUPS: HashMap<u64, u32, 64, GROW> = HashMap::new();

/// Exact counters of decisions.
#[btf_map]
pub(crate) static COUNTS: PerCpuHashMap<CountKey, u64, 65_536> = PerCpuHashMap::new();

/// Named totals.
#[btf_map]
pub(crate) static STATS: PerCpuArray<u64, { stat::COUNT as usize }> = PerCpuArray::new();

/// Switches.
#[btf_map]
pub(crate) static CONFIG: Array<Config, 1> = Array::new();

/// Records for the agent.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, 1_048_576> = RingBuf::new();
