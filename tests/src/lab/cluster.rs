//! Pods and other objects of the lab's cluster: they come and go.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::atomic::Ordering,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{LABS_MADE, Lab, Place, Pod, Record, net, objects};

impl Lab {
    /// Takes objects in: Pods are raised and completed, Services get addresses and EndpointSlices; the rest is
    /// written as it is, into `<file>.yaml`.
    ///
    /// # Errors
    /// When a Pod cannot be raised.
    pub fn add_objects(&mut self, file: &str, all: &[Value]) -> Result<()> {
        let mut plain = Vec::new();
        for object in all {
            let (kind, namespace, name) = objects::name_of(object);
            match kind.as_str() {
                "Pod" => self.add_pod(object.clone())?,
                "Service" => {
                    let mut service = object.clone();
                    objects::complete_service(&mut service, 10 + self.services.len() as u8);
                    self.services.insert(format!("{namespace}/{name}"), service);
                }
                _ => plain.push(object.clone()),
            }
        }
        if !plain.is_empty() {
            self.source.write_objects(file, &plain)?;
        }
        self.write_cluster()
    }

    /// Writes Pods, Services and EndpointSlices as they stand.
    pub(super) fn write_cluster(&self) -> Result<()> {
        let pods: Vec<(Value, Pod)> = self
            .pod_objects
            .iter()
            .filter_map(|(key, object)| Some((object.clone(), self.pods.get(key)?.clone())))
            .collect();
        let mut all = objects::cluster(&self.nodes);
        all.extend(pods.iter().map(|(object, _)| object.clone()));
        for service in self.services.values() {
            all.push(service.clone());
            all.extend(objects::slices(service, &pods));
        }
        self.source.write_objects("cluster", &all)
    }

    /// Raises a Pod of that object on its `nodeName` and writes the object with it.
    ///
    /// # Errors
    /// When the namespace or link cannot be made.
    pub fn add_pod(&mut self, mut object: Value) -> Result<()> {
        let host = self.pods.values().map(|pod| pod.v4.octets()[3]).max().unwrap_or(9) + 1;
        self.raise_pod(&mut object, host)
    }

    /// As [`Lab::add_pod`], at the address of a Pod that is gone (the last byte is `host`).
    ///
    /// # Errors
    /// As [`Lab::add_pod`].
    pub fn raise_pod(&mut self, object: &mut Value, host: u8) -> Result<()> {
        let (_, namespace, name) = objects::name_of(object);
        let wanted = object.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default().to_owned();
        let node = self.nodes.iter().find(|node| node.name == wanted);
        let node =
            node.with_context(|| format!("Pod {name} wants node {wanted:?}; there are node-a and node-b"))?;
        let key = format!("{namespace}/{name}");
        ensure!(!self.pods.contains_key(&key), "Pod {key} is there already");
        let serial = LABS_MADE.fetch_add(1, Ordering::Relaxed);
        let netns_name = format!("{}-{name}", self.record.name);
        let uid = format!("{:08x}-0000-4000-8000-{:012x}", std::process::id(), serial);
        let pod = Pod {
            v4: Ipv4Addr::new(10, 77, node.index, host),
            v6: Ipv6Addr::new(0xfd77, 0, node.index.into(), 0, 0, 0, 0, host.into()),
            veth: format!("p{serial}"),
            place: Place {
                netns: Path::new("/run/netns").join(&netns_name),
                cgroup: node.cgroup.join(format!("pod{uid}")),
            },
            netns_name,
            node: wanted,
            namespace,
            name,
            uid,
        };
        self.record.netns.push(pod.netns_name.clone());
        self.record.save()?;
        pod.raise(node)?;
        net::sysctls(&pod.place.netns, &self.options.sysctls)?;
        fs::create_dir_all(pod.folder(&self.dir))?;
        objects::complete_pod(object, &pod, node.wire());
        self.pod_objects.insert(key.clone(), object.clone());
        self.pods.insert(key, pod);
        Ok(())
    }

    /// Ends a Pod: its processes, object, namespace and cgroup.
    ///
    /// # Errors
    /// When there is none, or something of it stays.
    pub fn remove_pod(&mut self, name: &str) -> Result<Pod> {
        let pod = self.pod(name)?.clone();
        self.pods.remove(&pod.key());
        self.pod_objects.remove(&pod.key());
        self.write_cluster()?;
        let part = Record {
            name: format!("{}/pods/{}", self.record.name, pod.name),
            cgroup: pod.place.cgroup.clone(),
            netns: vec![pod.netns_name.clone()],
            ..Record::default()
        };
        part.remove()?;
        self.record.netns.retain(|name| *name != pod.netns_name);
        self.record.save()?;
        Ok(pod)
    }

    /// Writes all Pods again, after [`Lab::raise_pod`].
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish(&self) -> Result<()> {
        self.write_cluster()
    }
}
