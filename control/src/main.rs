//! Control.
fn main() {}
