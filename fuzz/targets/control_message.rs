//! Messages from the operator: protobuf, the resources in them, and applying them.
#![no_main]

use prost::Message;
use weft_core::MeshState;
use weft_proto::control::{Resource, SubscribeResponse};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // As protobuf, and as the JSON of one resource, which protobuf's lengths would hide from the fuzzer.
    let resource = Resource { json: bytes.to_vec().into() };
    let single = SubscribeResponse { upserted: vec![resource], ..SubscribeResponse::default() };
    let messages = SubscribeResponse::decode(bytes).ok().into_iter().chain([single]);
    let mut state = MeshState::default();
    for message in messages {
        let (delta, rejected) = weft_agent::control::fuzz(&message);
        assert!(
            delta.upserted.len() + delta.removed.len() + rejected
                <= message.upserted.len() + message.removed.len()
        );
        state = state.apply(&delta);
    }
});
