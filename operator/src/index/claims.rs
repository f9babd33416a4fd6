//! What only one Pod can have, and who has it: addresses, and uids, which a folder's files may hold twice.

use std::{cmp::Reverse, collections::HashMap, net::IpAddr, sync::Arc};

use k8s_openapi::jiff::Timestamp;
use weft_core::WorkloadUid;

use super::pods::Facts;
use crate::objects::ObjectKey;

/// Something of which there is one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Item {
    Address(IpAddr),
    Uid(WorkloadUid),
}

/// Who wants it. It belongs to the first in this order: to the youngest Pod that is not going away.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    deleting: bool,
    created: Reverse<Option<Timestamp>>,
    pod: Arc<ObjectKey>,
}

/// All claims of the Pods that are scheduled and not over.
#[derive(Debug, Default)]
pub(super) struct Claims(HashMap<Item, Vec<Claim>>);

impl Claims {
    /// A Pod is different. Returns the namespaces of the Pods for which something may have changed by it.
    pub(super) fn change(
        &mut self,
        key: &ObjectKey,
        old: Option<&Facts>,
        new: Option<&Facts>,
    ) -> Vec<String> {
        let mut touched = Vec::new();
        for item in old.into_iter().flat_map(items) {
            if let Some(claims) = self.0.get_mut(&item) {
                claims.retain(|c| *c.pod != *key);
                touched.extend(claims.iter().map(|c| c.pod.namespace.clone()));
                if claims.is_empty() {
                    self.0.remove(&item);
                }
            }
        }
        if let Some(facts) = new.filter(|f| f.scheduled) {
            let pod = Arc::new(key.clone());
            for item in items(facts) {
                let claims = self.0.entry(item).or_default();
                touched.extend(claims.iter().map(|c| c.pod.namespace.clone()));
                let (deleting, created) = (facts.deleting, Reverse(facts.created));
                let claim = Claim { deleting, created, pod: Arc::clone(&pod) };
                if let Err(place) = claims.binary_search(&claim) {
                    claims.insert(place, claim);
                }
            }
        }
        touched
    }

    /// The Pod that has an address.
    pub(super) fn address(&self, address: IpAddr) -> Option<&ObjectKey> {
        self.owner(&Item::Address(address))
    }

    /// The Pod that has a uid.
    pub(super) fn uid(&self, uid: &WorkloadUid) -> Option<&ObjectKey> {
        self.owner(&Item::Uid(uid.clone()))
    }

    fn owner(&self, item: &Item) -> Option<&ObjectKey> {
        Some(&*self.0.get(item)?.first()?.pod)
    }
}

fn items(facts: &Facts) -> impl Iterator<Item = Item> {
    let addresses = facts.template.addresses.iter().map(|a| Item::Address(*a));
    addresses.chain([Item::Uid(facts.template.uid.clone())])
}
