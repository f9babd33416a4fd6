//! A wire to the API server that a test can cut.

use std::sync::Arc;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::AbortHandle,
};
use weft_runtime::Tasks;

/// The wire; its task ends with the value.
pub(crate) struct Wire {
    /// Where it begins.
    pub(crate) port: u16,
    whole: Arc<watch::Sender<bool>>,
    task: AbortHandle,
}

impl Wire {
    /// To a port of the loopback.
    pub(crate) async fn to(target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let whole = Arc::new(watch::Sender::new(true));
        let state = Arc::clone(&whole);
        let tasks = Tasks::new();
        let connections = tasks.clone();
        let task = tasks.spawn("wire", async move {
            loop {
                let Ok((mut near, _)) = listener.accept().await else { return };
                let mut state = state.subscribe();
                if !*state.borrow() {
                    continue;
                }
                connections.spawn("connection", async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", target)).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        _ = state.wait_for(|whole| !whole) => {}
                    }
                });
            }
        });
        Self { port, whole, task }
    }

    /// Ends every connection, and takes no other.
    pub(crate) fn cut(&self) {
        self.whole.send_replace(false);
    }

    /// Works again.
    pub(crate) fn mend(&self) {
        self.whole.send_replace(true);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.whole.send_replace(false);
        self.task.abort();
    }
}
