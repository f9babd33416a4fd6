//! What the cryptography of a new tunnel costs: handshakes between two ends in one thread's memory, with the mesh's
//! own configurations. `cargo run --profile dist -p weft-identity --example handshake` prints microseconds for both
//! ends together.
//!
//! "full" is what Weft does; "resumed" is what a session ticket would leave of it, which Weft never uses.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "what it says is what it is for")]

use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, ServerConfig, ServerConnection, client::Resumption,
    crypto::aws_lc_rs::Ticketer,
};
use rustls_pki_types::ServerName;
use weft_identity::{Credentials, SpiffeId, SvidKey, TrustDomain, ca::EmbeddedCa};

/// Handshakes of a round.
const COUNT: u32 = 500;
/// Rounds; the fastest counts, in which least else was done.
const ROUNDS: u32 = 7;

fn main() -> Result<()> {
    let domain = TrustDomain::new("mesh.example")?;
    let ca = EmbeddedCa::generate(domain.clone())?;
    let credentials = |name: &str| -> Result<Credentials> {
        let id = SpiffeId::service_account(&domain, "shop", name);
        let key = SvidKey::generate()?;
        let signed = ca.sign(&id, &key.request(&id)?, Duration::from_secs(3600))?;
        Ok(Credentials::new(&id, key, signed, SystemTime::now())?)
    };
    let (web, api) = (credentials("web")?, credentials("api")?);
    let (client, server) = (web.client_config(api.id()), api.server_config());

    let mut resuming = (ClientConfig::clone(&client), ServerConfig::clone(&server));
    resuming.0.resumption = Resumption::in_memory_sessions(16);
    resuming.1.ticketer = Ticketer::new()?;
    // A ticket is used once, and each handshake brings the next.
    resuming.1.send_tls13_tickets = 1;
    let resuming = (Arc::new(resuming.0), Arc::new(resuming.1));

    println!("full    {:>6.0} µs", cost(&client, &server, HandshakeKind::Full)?);
    println!("resumed {:>6.0} µs", cost(&resuming.0, &resuming.1, HandshakeKind::Resumed)?);
    Ok(())
}

/// Microseconds of one handshake, which is of this kind.
fn cost(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, kind: HandshakeKind) -> Result<f64> {
    // Fills what is remembered: chains that were found good, and a ticket.
    shake(client, server)?;
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..COUNT {
            let was = shake(client, server)?;
            ensure!(was == Some(kind), "a handshake was {was:?}, not {kind:?}");
        }
        best = best.min(start.elapsed().as_secs_f64() * 1e6 / f64::from(COUNT));
    }
    Ok(best)
}

fn shake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Result<Option<HandshakeKind>> {
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let mut client = ClientConnection::new(client.clone(), name)?;
    let mut server = ServerConnection::new(server.clone())?;
    let mut wire = Vec::new();
    while client.is_handshaking() || server.is_handshaking() || server.wants_write() || client.wants_write() {
        client.write_tls(&mut wire)?;
        server.read_tls(&mut &wire[..]).context("the server reads")?;
        server.process_new_packets()?;
        wire.clear();
        server.write_tls(&mut wire)?;
        client.read_tls(&mut &wire[..]).context("the client reads")?;
        client.process_new_packets()?;
        wire.clear();
    }
    Ok(server.handshake_kind())
}
