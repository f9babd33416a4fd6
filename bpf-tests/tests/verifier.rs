//! Every program passes the verifier, at a price that is written down in `verifier-budget.toml`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests are tests"
)]

use std::{collections::BTreeMap, fs, path::Path};

use weft_bpf_tests::load_all;
use weft_ebpf_common::codes::program;

/// `name = number` lines; anything else but a comment is an error.
fn budget() -> BTreeMap<String, u32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("verifier-budget.toml");
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, number) =
                line.split_once(" = ").unwrap_or_else(|| panic!("not `name = number`: {line}"));
            (name.to_owned(), number.replace('_', "").parse().unwrap())
        })
        .collect()
}

#[test]
fn every_program_loads_within_its_budget() {
    let bpf = load_all().unwrap();
    let budget = budget();
    assert_eq!(
        budget.keys().map(String::as_str).collect::<Vec<_>>(),
        {
            let mut all = program::ALL.to_vec();
            all.sort_unstable();
            all
        },
        "the budget and the object name the same programs"
    );
    let mut over = Vec::new();
    for (name, limit) in budget {
        let info = bpf.program(&name).unwrap().info().unwrap();
        let seen = info.verified_instruction_count().expect("this kernel does not tell; 5.16 and later do");
        println!("{name} = {seen}");
        if u64::from(seen) * 10 > u64::from(limit) * 11 {
            over.push(format!("{name}: {seen} instructions, budget {limit}"));
        }
    }
    assert!(
        over.is_empty(),
        "over budget by more than a tenth; simplify, or raise verifier-budget.toml: {over:#?}"
    );
}

#[test]
fn debug_lines_load_where_they_are_wanted() {
    let object = weft_bpf_tests::object().unwrap();
    let mut bpf = aya::EbpfLoader::new()
        .override_global(weft_ebpf_common::codes::LOG_GLOBAL, &1_u8, true)
        .load(&object)
        .unwrap();
    for name in program::ALL {
        weft_bpf_tests::load_program(&mut bpf, name).unwrap();
    }
}
