//! Where objects come from.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use weft_api::authorization::TargetRef;
use weft_runtime::DrainWatcher;

use crate::objects::{Document, ObjectKey};

pub mod dir;
pub mod kubernetes;

/// What became of one object.
#[derive(Debug, Clone)]
pub enum Change {
    /// It is new or different.
    Apply(Document),
    /// It cannot be understood; its last good form goes on.
    Bad {
        /// Which object.
        key: ObjectKey,
        /// A number made of its content.
        generation: i64,
        /// The field, what is wrong with it, and what to do.
        message: String,
        /// The targets of an AuthorizationPolicy, where they could be read whole.
        target_refs: Option<Box<[TargetRef]>>,
    },
    /// It is gone.
    Remove(ObjectKey),
}

impl Change {
    /// Which object.
    pub fn key(&self) -> &ObjectKey {
        match self {
            Self::Apply(document) => &document.key,
            Self::Bad { key, .. } | Self::Remove(key) => key,
        }
    }
}

/// Changes that belong together.
#[derive(Debug, Clone)]
pub struct Batch {
    /// When the source noticed the first of them.
    pub noticed: Instant,
    /// The changes, each with the file (or other place) that it comes from.
    pub changes: Vec<(Arc<str>, Change)>,
    /// Places with text that names no object: the place, and what is wrong. Replaces the batch's before.
    pub unreadable: BTreeMap<Arc<str>, String>,
}

/// Sends batches until the process drains. The first batch holds everything that there is.
pub trait Source: Send + 'static {
    /// What a person calls it.
    fn name(&self) -> String;

    /// Runs.
    fn run(
        self: Box<Self>,
        out: mpsc::Sender<Batch>,
        drain: DrainWatcher,
    ) -> BoxFuture<'static, Result<(), Box<dyn std::error::Error + Send + Sync>>>;
}
