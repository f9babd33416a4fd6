//! Who a Pod is on the wire: X.509-SVIDs, the TLS configurations made of them, who issues them, and how the node
//! keeps them fresh.
//!
//! A [`CredentialManager`] fetches and renews through an [`Issuer`]; the proxy holds a [`CredentialReader`], which
//! can only read. What is published is one whole, validated [`Credentials`], never a loose key or chain.
#![forbid(unsafe_code)]

pub mod ca;
pub mod cache;
pub mod client;
mod credentials;
mod issuer;
mod key;
mod manager;
mod peer;
pub mod spire;
mod store;
#[cfg(test)]
mod testing;
mod tls;
mod verify;

pub use credentials::{CredentialError, Credentials};
pub use issuer::{BoxFuture, CsrSigner, IssueError, Issued, Issuer, Signed, Update};
pub use key::{KeyError, SvidKey};
pub use manager::{Clock, CredentialManager, ManagerConfig, SvidStatus};
pub use peer::{Peer, PeerError, peer_identity};
pub use store::{CredentialPublisher, CredentialReader, credentials};
pub use verify::IdentityError;
#[cfg(feature = "fuzzing")]
pub use verify::fuzz as fuzz_verify;
pub use weft_core::{SpiffeId, TrustDomain};
