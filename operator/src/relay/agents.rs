//! The agents' end of the relay.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weft_proto::weft_relay::{self as proto, Answer, Question, answer::Answer as Body};
use weft_runtime::{DrainWatcher, Tasks};

use super::{Joined, Relay};
use crate::{auth::Authenticator, grpc::caller, metrics::Metrics};

/// How long an agent has to say hello.
const HELLO: Duration = Duration::from_secs(10);

/// The service.
#[derive(Debug, Clone)]
pub struct RelayService {
    /// Where agents are put.
    pub relay: Relay,
    /// Who is an agent.
    pub callers: Arc<dyn Authenticator>,
    /// What is counted.
    pub metrics: Metrics,
    /// Where streams run.
    pub tasks: Tasks,
    /// When they end.
    pub drain: DrainWatcher,
}

#[tonic::async_trait]
impl proto::relay_server::Relay for RelayService {
    type ServeStream = ReceiverStream<Result<Question, Status>>;

    async fn serve(
        &self,
        request: Request<Streaming<Answer>>,
    ) -> Result<Response<Self::ServeStream>, Status> {
        let node = caller(&*self.callers, &self.metrics, &request).await?;
        let mut incoming = request.into_inner();
        let first = timeout(HELLO, incoming.message()).await;
        match first.map_err(|_| Status::deadline_exceeded("no hello came"))?? {
            Some(Answer { answer: Some(Body::Hello(_)), .. }) => {}
            _ => return Err(Status::invalid_argument("the first message must be hello")),
        }
        let (joined, questions) = self.relay.join(&node);
        let drain = self.drain.clone();
        self.tasks.spawn("relay stream", async move {
            let outcome = tokio::select! {
                outcome = follow(&joined, incoming) => outcome,
                () = joined.agent.broken.notified() => {
                    Err(Status::resource_exhausted("the agent does not read its questions"))
                }
                () = drain.draining() => Err(Status::unavailable("the operator stops; try again")),
            };
            if let Err(status) = outcome {
                tracing::debug!(node, code = ?status.code(), "a relay stream ended: {}", status.message());
                let _ = joined.agent.questions.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(questions)))
    }
}

async fn follow(joined: &Joined, mut incoming: Streaming<Answer>) -> Result<(), Status> {
    while let Some(answer) = incoming.message().await? {
        joined.agent.answered(answer)?;
    }
    Ok(())
}
