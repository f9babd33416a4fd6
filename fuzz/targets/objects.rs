//! Files of the operator's folder: several documents, some of them broken.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    for document in weft_operator::objects::parse(text) {
        match document {
            Ok(document) => assert!(weft_operator::objects::is_object_name(&document.key.name)),
            Err(bad) => assert!(!bad.message.is_empty() && bad.line >= 1),
        }
    }
});
