//! The whole way over real sockets and real TLS: two nodes in one process, Pods with loopback addresses.

mod early;
mod expiry;
mod flow;
mod goaway;
mod guards;
mod http;
mod limits;
mod refusal;
mod support;
mod truncation;
mod v6;
mod workers;
