//! Configurations of the two HAProxies: a yardstick in C, not a mesh.

use std::path::Path;

use super::{
    ground::{H2, HTTP},
    subject::{End, PORTS},
};

/// How they take the traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Without TLS, by splice(2).
    Splice,
    /// One mTLS connection, with a full handshake, for each of the application's.
    L4,
    /// HTTP at both ends, pooled connections between them.
    L7,
}

/// The configuration of one end.
pub(crate) fn config(way: Way, end: &End, certificates: &Path) -> String {
    let mut text =
        "global\n  nbthread 2\n  maxconn 9000\n  no strict-limits\n  tune.ssl.default-dh-param 2048\n\
        \x20 ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets\n\
        \x20 ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets\n  tune.ssl.cachesize 0\n\
        defaults\n  timeout connect 5s\n  timeout client 600s\n  timeout server 600s\n  retries 2\n"
            .to_owned();
    let folder = certificates.display();
    for (port, entry, exit) in PORTS {
        let http = way == Way::L7 && [HTTP, H2].contains(&port);
        let (dial, accept) = match way {
            Way::Splice => (String::new(), String::new()),
            Way::L4 | Way::L7 => (
                format!(
                    "ssl verify required ca-file {folder}/ca.pem crt {folder}/client-all.pem no-ssl-reuse"
                ),
                format!("ssl crt {folder}/server-all.pem ca-file {folder}/ca.pem verify required"),
            ),
        };
        let protocol = if http && port == H2 { "proto h2" } else { "" };
        let mode = if http { "mode http\n  http-reuse safe" } else { "mode tcp" };
        let splice =
            if way == Way::Splice { "  option splice-request\n  option splice-response\n" } else { "" };
        text += &format!("listen p{port}\n  {mode}\n{splice}");
        text += &if end.first {
            format!(
                "  bind {}:{entry} {protocol}\n  server b {}:{exit} {dial} {protocol}\n",
                end.listen, end.tunnel
            )
        } else {
            format!(
                "  bind {}:{exit} {accept} {protocol}\n  server s {}:{port} {protocol}\n",
                end.tunnel, end.server
            )
        };
    }
    text
}
