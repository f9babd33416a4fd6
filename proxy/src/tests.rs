//! The whole way over real sockets and real TLS: two nodes in one process, Pods with loopback addresses.

mod flow;
mod http;
mod limits;
mod refusal;
mod support;
