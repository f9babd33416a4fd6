//! Whose connections enter a Pod beside the proxy: the kubelet's.

use std::collections::BTreeSet;

use super::{Datapath, DatapathError};

impl Datapath {
    /// Says which cgroups (cgroup2 ids) are the kubelet's: their connections enter Pods of any mode beside the proxy.
    ///
    /// # Errors
    /// When a newer agent is in charge, or the map refuses a write.
    pub fn exempt(&self, cgroups: &BTreeSet<u64>) -> Result<(), DatapathError> {
        let _pods = self.inner.pods.lock();
        self.inner.in_charge()?;
        let kubelets = &self.inner.maps.kubelets;
        let told: BTreeSet<u64> = kubelets.keys()?.into_iter().collect();
        for gone in told.difference(cgroups) {
            kubelets.delete(gone)?;
        }
        cgroups.difference(&told).try_for_each(|new| kubelets.set(new, &1))
    }
}
