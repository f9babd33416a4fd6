//! Who may see flows: who may make a token of the ServiceAccount `weft-viewer`.

use std::fmt;

use futures_util::future::BoxFuture;

use crate::auth::Refused;

/// For whom viewers' tokens are.
pub const AUDIENCE: &str = "weft-observer";
/// The ServiceAccount that they are made of.
pub const ACCOUNT: &str = "weft-viewer";

/// Says whether the bearer of a token may see flows.
pub trait Viewers: Send + Sync + fmt::Debug {
    /// Lets the bearer in, or not.
    ///
    /// # Errors
    /// When it may not, or that cannot be told now.
    fn check<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<(), Refused>>;
}

/// Nobody: without an API server there is nothing that proves a person.
#[derive(Debug, Clone, Copy)]
pub struct Nobody;

impl Viewers for Nobody {
    fn check<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<(), Refused>> {
        let refused = Refused::NoAgent(
            "this operator reads a folder and knows no persons; ask the agents at their sockets",
        );
        Box::pin(async move { Err(refused) })
    }
}
