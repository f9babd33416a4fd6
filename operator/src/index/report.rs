//! What an object says by itself.

use std::{collections::BTreeMap, sync::Arc};

use weft_api::convert::traffic;

use super::{Entry, Finding, Good, Report, mesh, policies};
use crate::objects::{Kind, ObjectKey};

/// The report of an object, before anything is known of what it refers to.
pub(super) fn of(key: &ObjectKey, entry: &Entry) -> Report {
    let accepted = match (&entry.problem, &entry.good) {
        (None, Some(Good::Mesh(_, set))) => Finding::ok("Accepted", mesh::message(set)),
        (None, _) => Finding::ok("Accepted", ""),
        (Some(problem), Some(_)) => {
            Finding::bad("Invalid", format!("{problem} (the last good form goes on)"))
        }
        (Some(problem), None) if key.kind == Kind::AuthorizationPolicy => {
            Finding::bad("Invalid", format!("{problem} ({})", policies::guard_message(key, entry)))
        }
        (Some(problem), None) => Finding::bad("Invalid", problem.as_str()),
    };
    let programmable = match key.kind {
        Kind::AuthorizationPolicy | Kind::HttpRoute | Kind::MeshConfig => {
            Some(match (&entry.problem, &entry.good) {
                (None, _) => Ok(()),
                (Some(_), Some(_)) => {
                    Err(Finding::bad("Invalid", "this form is not accepted; the last good one is enforced"))
                }
                (Some(_), None) if key.kind == Kind::AuthorizationPolicy => {
                    Err(Finding::bad("Invalid", policies::guard_message(key, entry)))
                }
                (Some(_), None) => Err(Finding::bad("Invalid", "not accepted, so nothing is enforced")),
            })
        }
        Kind::TrafficPolicy => Some(Err(Finding::bad("NotSupportedYet", traffic::NOT_SUPPORTED))),
        _ => None,
    };
    Report {
        origin: Arc::clone(&entry.origin),
        generation: entry.generation,
        accepted,
        resolved: None,
        programmable,
        parents: BTreeMap::new(),
    }
}
