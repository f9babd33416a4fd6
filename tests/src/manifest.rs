//! Objects that tests on a real cluster have in common. Each is a YAML document that begins with `---`, so that they
//! can be put together as they are.

use std::fmt;

use crate::mesh::{LAB, NGINX};

/// A namespace; `mode` is the mesh's, none is outside it.
pub fn namespace(name: &str, mode: Option<&str>) -> String {
    let labels = mode.map(|mode| format!(", labels: {{weft.mesh/mode: {mode}}}")).unwrap_or_default();
    format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}{labels}}}}}\n")
}

/// A service account.
pub fn account(namespace: &str, name: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}, namespace: {namespace}}}}}\n"
    )
}

/// A Service of the Pods with the label `app: NAME`; `spec` is the rest of it, such as `ports: [{port: 80}]`.
pub fn service(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{selector: {{app: {name}}}, {spec}}}
"
    )
}

/// A web server's Pod and its Service, of every address family that the cluster has, at port 80.
pub fn server(namespace: &str, name: &str, node: &str) -> String {
    let spec = "ipFamilyPolicy: PreferDualStack, ports: [{port: 80, appProtocol: http}]";
    format!("{}{}", Pod::nginx(namespace, name, node), service(namespace, name, spec))
}

/// A policy in `shop`: `account` may read the catalog of `web`, and nobody anything else.
pub fn catalog(account: &str) -> String {
    format!(
        "---
apiVersion: weft.mesh/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: web-callers, namespace: shop}}
spec:
  targetRefs: [{{group: '', kind: Pod, selector: {{matchLabels: {{app: web}}}}}}]
  action: ALLOW
  rules:
  - sources: [{{type: ServiceAccount, serviceAccount: {{name: {account}}}}}]
    networkAttributes: {{ports: [80]}}
    http: [{{methods: [GET], paths: [{{type: PathPrefix, value: /catalog}}]}}]
"
    )
}

/// A Pod of one container on a given node, which ends at once when it is deleted. Its label `app` is its name.
#[derive(Debug, Clone)]
pub struct Pod {
    namespace: String,
    name: String,
    node: String,
    labels: String,
    account: String,
    host_network: bool,
    container: String,
}

impl Pod {
    fn new(namespace: &str, name: &str, node: &str, container: String) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            node: node.into(),
            labels: format!("app: {name}"),
            account: "default".into(),
            host_network: false,
            container,
        }
    }

    /// A web server at port 80, ready when it answers.
    pub fn nginx(namespace: &str, name: &str, node: &str) -> Self {
        let probe = "readinessProbe: {httpGet: {path: /healthz, port: 80}, periodSeconds: 1}";
        let port = "ports: [{name: http, containerPort: 80}]";
        let container = format!("image: '{NGINX}', imagePullPolicy: IfNotPresent, {port}, {probe}");
        Self::new(namespace, name, node, container)
    }

    /// A Pod with a shell, in which nothing runs.
    pub fn busybox(namespace: &str, name: &str, node: &str) -> Self {
        Self::new(namespace, name, node, "image: 'busybox:1', command: [sleep, infinity]".into())
    }

    /// A Pod in which a shell's script runs.
    pub fn script(namespace: &str, name: &str, node: &str, script: &str) -> Self {
        let container = format!("image: 'busybox:1', command: [sh, -c, {script:?}]");
        Self::new(namespace, name, node, container)
    }

    /// The lab's program with `arguments`, such as `serve, --http, '80'`.
    pub fn lab(namespace: &str, name: &str, node: &str, arguments: &str) -> Self {
        Self::new(namespace, name, node, format!("image: '{LAB}', args: [{arguments}]"))
    }

    /// With that service account.
    #[must_use]
    pub fn account(mut self, account: &str) -> Self {
        self.account = account.into();
        self
    }

    /// With those labels, such as `app: web, on: node1`.
    #[must_use]
    pub fn labels(mut self, labels: &str) -> Self {
        self.labels = labels.into();
        self
    }

    /// In the node's own network.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dns = if self.host_network { "ClusterFirstWithHostNet" } else { "ClusterFirst" };
        let Self { namespace, name, node, labels, account, host_network, container } = self;
        write!(
            f,
            "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {account}
  hostNetwork: {host_network}
  dnsPolicy: {dns}
  terminationGracePeriodSeconds: 0
  containers: [{{name: c, {container}}}]
"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::objects;

    #[test]
    fn what_is_put_together_can_be_read() {
        let all = [
            namespace("shop", Some("strict")),
            account("shop", "client"),
            server("shop", "web", "node2"),
            Pod::script("shop", "client", "node1", "wget \"http://web/\"; sleep 1")
                .account("client")
                .to_string(),
            catalog("client"),
        ];
        let read = objects::documents(&all.concat()).unwrap_or_default();
        let names: Vec<_> =
            read.iter().map(objects::name_of).map(|(kind, _, name)| format!("{kind} {name}")).collect();
        assert_eq!(
            names,
            [
                "Namespace shop",
                "ServiceAccount client",
                "Pod web",
                "Service web",
                "Pod client",
                "AuthorizationPolicy web-callers"
            ]
        );
        assert_eq!(read[4]["spec"]["containers"][0]["command"][2], "wget \"http://web/\"; sleep 1");
    }
}
