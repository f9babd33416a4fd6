//! Flows of one namespace: what a caller asks for is narrowed before agents are asked, and what they answer is looked at
//! again, so that no filter widens it.

use weft_proto::{
    flow::FlowFilter,
    observer::{GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes},
};

/// The request, held to flows of which one end is in the namespace; `None` where no flow can be asked for and be that.
pub(super) fn narrow(request: GetFlowsRequest, namespace: &str) -> Option<GetFlowsRequest> {
    let any = [FlowFilter::default()];
    let given = if request.whitelist.is_empty() { any.as_slice() } else { &request.whitelist };
    let ends = |filter: &FlowFilter| {
        let source = pods(&filter.source_pod, namespace);
        let destination = pods(&filter.destination_pod, namespace);
        [
            source.map(|source_pod| FlowFilter { source_pod, ..filter.clone() }),
            destination.map(|destination_pod| FlowFilter { destination_pod, ..filter.clone() }),
        ]
    };
    let whitelist: Vec<_> = given.iter().flat_map(ends).flatten().collect();
    // An empty list would let everything through.
    (!whitelist.is_empty()).then_some(GetFlowsRequest { whitelist, ..request })
}

/// Of the Pods of a filter (`[namespace/]prefix`; none is any) those that may be in the namespace.
fn pods(wanted: &[String], namespace: &str) -> Option<Vec<String>> {
    if wanted.is_empty() {
        return Some(vec![format!("{namespace}/")]);
    }
    let own: Vec<_> = wanted
        .iter()
        .filter_map(|pod| match pod.split_once('/') {
            Some((other, _)) if !other.is_empty() => (other == namespace).then(|| pod.clone()),
            Some((_, prefix)) => Some(format!("{namespace}/{prefix}")),
            None => Some(format!("{namespace}/{pod}")),
        })
        .collect();
    (!own.is_empty()).then_some(own)
}

/// Whether an answer may be shown to who sees only that namespace; what is no flow may.
pub(super) fn visible(answer: &GetFlowsResponse, namespace: &str) -> bool {
    let Some(ResponseTypes::Flow(flow)) = &answer.response_types else { return true };
    [&flow.source, &flow.destination].into_iter().flatten().any(|end| end.namespace == namespace)
}

#[cfg(test)]
mod tests {
    use weft_proto::flow::{Endpoint, Flow};

    use super::*;

    fn filter(source: &[&str], destination: &[&str]) -> FlowFilter {
        let list = |pods: &[&str]| pods.iter().map(|p| (*p).to_owned()).collect();
        FlowFilter { source_pod: list(source), destination_pod: list(destination), ..FlowFilter::default() }
    }

    fn narrowed(whitelist: Vec<FlowFilter>) -> Option<Vec<FlowFilter>> {
        let request = GetFlowsRequest { whitelist, number: 7, ..GetFlowsRequest::default() };
        let narrow = narrow(request, "shop")?;
        assert_eq!(narrow.number, 7);
        Some(narrow.whitelist)
    }

    #[test]
    fn one_end_is_always_in_the_namespace() {
        let either = vec![filter(&["shop/"], &[]), filter(&[], &["shop/"])];
        assert_eq!(narrowed(vec![]), Some(either.clone()));
        assert_eq!(narrowed(vec![FlowFilter::default()]), Some(either));
        // Of other namespaces only what talks with it.
        assert_eq!(
            narrowed(vec![filter(&["bank/vault"], &[])]),
            Some(vec![filter(&["bank/vault"], &["shop/"])])
        );
        assert_eq!(
            narrowed(vec![filter(&["web", "/api", "bank/x"], &["bank/y"])]),
            Some(vec![filter(&["shop/web", "shop/api"], &["bank/y"])])
        );
        // Between others: nothing, which is not everything.
        assert_eq!(narrowed(vec![filter(&["bank/a"], &["bank/b", "shop2/c"])]), None);
        let other = FlowFilter { protocol: vec!["tcp".into()], ..FlowFilter::default() };
        let all = narrowed(vec![other.clone(), filter(&["bank/a"], &["bank/b"])]).unwrap();
        assert_eq!(all.len(), 2);
        assert!(all.iter().all(|f| f.protocol == other.protocol));
    }

    #[test]
    fn a_flow_between_others_is_not_shown() {
        let end = |namespace: &str| Some(Endpoint { namespace: namespace.into(), ..Endpoint::default() });
        let shown = |source: &str, destination: &str| {
            let flow = Flow { source: end(source), destination: end(destination), ..Flow::default() };
            let response_types = Some(ResponseTypes::Flow(flow));
            visible(&GetFlowsResponse { response_types, ..GetFlowsResponse::default() }, "shop")
        };
        assert!(shown("shop", "bank") && shown("bank", "shop"));
        assert!(!shown("bank", "bank") && !shown("", "") && !shown("shop2", "bank"));
        let nameless = Some(ResponseTypes::Flow(Flow::default()));
        assert!(!visible(
            &GetFlowsResponse { response_types: nameless, ..GetFlowsResponse::default() },
            "shop"
        ));
    }
}
