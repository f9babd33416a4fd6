//! Writes `docs/failure-modes.md`: `weft-failure-modes` in the repository's root.

#![forbid(unsafe_code)]

fn main() -> std::io::Result<()> {
    std::fs::write("docs/failure-modes.md", weft_tests::failure::page())
}
