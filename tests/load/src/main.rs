//! Replay and benches.
fn main() {}
