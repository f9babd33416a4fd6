//! Who may see flows: of all namespaces who may make a token of the ServiceAccount `weft-viewer` in Weft's namespace, of
//! one namespace whose ServiceAccount may `get flows.weft.mesh` there.

use std::fmt;

use futures_util::future::BoxFuture;

use crate::auth::Refused;

/// For whom viewers' tokens are.
pub const AUDIENCE: &str = "weft-observer";
/// The ServiceAccount that they are made of.
pub const ACCOUNT: &str = "weft-viewer";
/// The header of a call that asks for flows of one namespace.
pub const NAMESPACE: &str = "weft-namespace";

/// What a caller may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// Flows of which one end is in this namespace.
    Namespace(String),
}

/// Says what the bearer of a token may see.
pub trait Viewers: Send + Sync + fmt::Debug {
    /// Lets the bearer see the flows of a namespace, or everything where none is asked for; or not.
    ///
    /// # Errors
    /// When it may not, or that cannot be told now.
    fn see<'a>(&'a self, token: &'a str, namespace: Option<&'a str>)
    -> BoxFuture<'a, Result<Scope, Refused>>;
}

/// Nobody: without an API server there is nothing that proves a person.
#[derive(Debug, Clone, Copy)]
pub struct Nobody;

impl Viewers for Nobody {
    fn see<'a>(&'a self, _: &'a str, _: Option<&'a str>) -> BoxFuture<'a, Result<Scope, Refused>> {
        let refused = Refused::NoAgent(
            "this operator reads a folder and knows no persons; ask the agents at their sockets",
        );
        Box::pin(async move { Err(refused) })
    }
}
