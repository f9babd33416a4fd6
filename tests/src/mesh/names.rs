//! What the cluster's DNS knows.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Context as _, Result, bail, ensure};

use super::Mesh;

impl Mesh {
    /// Waits until every replica of the cluster's DNS gives the addresses that the API server has for these names of a
    /// namespace: Services (`web`) of every kind, and Pods of headless ones (`db-0.db`). Before that a call by name may
    /// fail: each replica learns of an object at another moment, and one that was asked too early repeats for seconds
    /// that there is no such name. So each is asked itself, from beside the nodes.
    ///
    /// # Errors
    /// With what they say last.
    pub fn named(&self, namespace: &str, names: &[&str]) -> Result<()> {
        self.eventually("the names in DNS", || {
            let path = "jsonpath={.items[*].status.podIP}";
            let replicas = ["-n", "kube-system", "get", "pods", "-l", "k8s-app=kube-dns", "-o", path];
            let replicas = self.cluster.kubectl(&replicas)?;
            let count = replicas.split_whitespace().count();
            ensure!(count == usize::from(self.cluster.options().nodes), "replicas of the DNS: {replicas:?}");
            let full = |name: &str| format!("{name}.{namespace}.svc.cluster.local");
            let all: Vec<String> = names.iter().map(|name| full(name)).collect();
            let mut words = vec!["resolve"];
            words.extend(replicas.split_whitespace().flat_map(|replica| ["--server", replica]));
            words.extend(all.iter().flat_map(|name| ["--name", name]));
            let said = self.app_outside(&words)?;
            for name in names {
                let wanted = self.addresses_of(namespace, name)?;
                let of_name = said[full(name)].as_object().context("it says nothing of a name")?;
                for (replica, found) in of_name {
                    let found: BTreeSet<IpAddr> = serde_json::from_value(found.clone())?;
                    ensure!(
                        found == wanted,
                        "{replica} gives {found:?} for {name}.{namespace}, not {wanted:?}"
                    );
                }
            }
            Ok(())
        })
    }

    /// What the API server says that a name stands for.
    fn addresses_of(&self, namespace: &str, name: &str) -> Result<BTreeSet<IpAddr>> {
        let found = match name.split_once('.') {
            Some((pod, _)) => self.field(namespace, &format!("pod/{pod}"), ".status.podIPs[*].ip")?,
            None => self.field(namespace, &format!("service/{name}"), ".spec.clusterIPs[*]")?,
        };
        let found = match found.as_str() {
            "None" => {
                let label = format!("kubernetes.io/service-name={name}");
                let path = "jsonpath={.items[*].endpoints[*].addresses[*]}";
                self.cluster.kubectl(&["-n", namespace, "get", "endpointslices", "-l", &label, "-o", path])?
            }
            "" => {
                let other = self.field(namespace, &format!("service/{name}"), ".spec.externalName")?;
                let mut labels = other.split('.');
                let (Some(name), Some(namespace)) = (labels.next(), labels.next()) else {
                    bail!("{name} stands for {other:?}, which is no Service");
                };
                return self.addresses_of(namespace, name);
            }
            _ => found,
        };
        // kubectl gives a list within a list with its brackets.
        let words = found.split(|c: char| " []\",".contains(c)).filter(|word| !word.is_empty());
        let all: Result<BTreeSet<IpAddr>, _> = words.map(str::parse).collect();
        let all = all.with_context(|| format!("{name} of {namespace} has the addresses {found:?}"))?;
        ensure!(!all.is_empty(), "{name} of {namespace} has no address");
        Ok(all)
    }
}
