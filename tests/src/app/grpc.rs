//! gRPC's health protocol (`grpc.health.v1`), both ends, straight on HTTP/2.

use std::net::TcpStream;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use clap::Args;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, time::timeout};

use super::calls::{Target, kind_of};
use crate::http as plain;

const CHECK: &str = "/grpc.health.v1.Health/Check";
/// `HealthCheckResponse{status: SERVING}` with its length before it.
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 8, 1];
/// `google.rpc.Code`.
const OK: &str = "0";
const UNIMPLEMENTED: &str = "12";

fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn adopt(stream: TcpStream) -> Result<tokio::net::TcpStream> {
    stream.set_nonblocking(true)?;
    Ok(tokio::net::TcpStream::from_std(stream)?)
}

/// Answers every call of a connection.
pub(super) fn serve(stream: TcpStream) -> Result<()> {
    runtime()?.block_on(async {
        let mut connection = h2::server::handshake(adopt(stream)?).await?;
        let mut calls = FuturesUnordered::new();
        loop {
            tokio::select! {
                call = connection.accept() => match call.transpose()? {
                    Some((request, respond)) => calls.push(answer(request, respond)),
                    None => return Ok(()),
                },
                // A caller that left needs no answer.
                Some(_) = calls.next(), if !calls.is_empty() => {}
            }
        }
    })
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<()> {
    let known = request.uri().path() == CHECK;
    let mut body = request.into_body();
    while let Some(part) = body.data().await {
        body.flow_control().release_capacity(part?.len())?;
    }
    let mut head = Response::new(());
    head.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let mut send = respond.send_response(head, false)?;
    if known {
        send.send_data(Bytes::from_static(SERVING), false)?;
    }
    let mut end = HeaderMap::new();
    end.insert("grpc-status", HeaderValue::from_static(if known { OK } else { UNIMPLEMENTED }));
    send.send_trailers(end)?;
    Ok(())
}

/// Calls `grpc.health.v1.Health/Check`.
#[derive(Debug, Clone, Args)]
pub struct Health {
    #[command(flatten)]
    target: Target,
    /// How many calls, one after another on one connection.
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Whose health.
    #[arg(long, default_value = "")]
    service: String,
    /// Milliseconds between calls.
    #[arg(long, default_value_t = 0)]
    pace_ms: u64,
}

/// Connections after one another.
const CONNECTIONS: usize = 5;

impl Health {
    pub(super) fn run(self) -> Result<Value> {
        let (mut serving, mut problem) = (0, None);
        // A connection that ends in order, after a GOAWAY, is followed by another, as every gRPC client does it.
        let result = (0..CONNECTIONS).try_for_each(|_| {
            if serving == self.count {
                return Ok(());
            }
            plain::dial(&self.target.to, self.target.timeout()).and_then(|stream| {
                runtime()?.block_on(async {
                    let (mut requests, connection) = h2::client::handshake(adopt(stream)?).await?;
                    let calls = async {
                        while serving < self.count {
                            let call = check(&mut requests, &self.target.to, &self.service);
                            timeout(self.target.timeout(), call).await.context("no answer in time")??;
                            serving += 1;
                            tokio::time::sleep(std::time::Duration::from_millis(self.pace_ms)).await;
                        }
                        anyhow::Ok(())
                    };
                    tokio::select! {
                        biased;
                        ended = connection => Ok(ended?),
                        done = calls => done,
                    }
                })
            })
        });
        let result = result.and_then(|()| {
            anyhow::ensure!(serving == self.count, "the server ended {CONNECTIONS} connections");
            Ok(())
        });
        if let Err(error) = result {
            problem = Some(format!("{}: {error:#}", kind_of(&error)));
        }
        Ok(json!({"serving": serving, "failed": self.count - serving, "problem": problem}))
    }
}

/// `HealthCheckRequest` with its length before it.
fn question(service: &str) -> Result<Bytes> {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.extend([10, u8::try_from(service.len()).ok().filter(|n| *n < 128).context("a long name")?]);
        message.extend(service.as_bytes());
    }
    let mut whole = vec![0];
    whole.extend(u32::try_from(message.len())?.to_be_bytes());
    whole.extend(message);
    Ok(whole.into())
}

async fn check(requests: &mut h2::client::SendRequest<Bytes>, authority: &str, service: &str) -> Result<()> {
    std::future::poll_fn(|context| requests.poll_ready(context)).await?;
    let request = Request::post(format!("http://{authority}{CHECK}"))
        .header(CONTENT_TYPE, "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut send) = requests.send_request(request, false)?;
    send.send_data(question(service)?, true)?;
    let response = response.await?;
    let trailers_only = response.headers().get("grpc-status").cloned();
    ensure!(response.status().is_success(), "HTTP {}", response.status());
    let mut body = response.into_body();
    let mut got = Vec::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        got.extend_from_slice(&part);
        ensure!(got.len() < 1024, "an answer without end");
    }
    let trailers = body.trailers().await?;
    let status = trailers.as_ref().and_then(|t| t.get("grpc-status")).cloned().or(trailers_only);
    let status = status.as_ref().and_then(|s| s.to_str().ok()).unwrap_or("none");
    ensure!(status == OK && got == SERVING, "grpc-status {status}, answer {got:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    #[test]
    fn both_ends_understand_each_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::spawn(move || serve(stream.unwrap()));
            }
        });
        let health = Health {
            target: Target { to, timeout_ms: 10_000 },
            count: 3,
            service: "quotes".into(),
            pace_ms: 1,
        };
        assert_eq!(health.run().unwrap(), json!({"serving": 3, "failed": 0, "problem": null}));
    }
}
