//! Any order of events leaves the worker sane: see `events.rs`.
#![no_main]

#[path = "../events.rs"]
mod events;

libfuzzer_sys::fuzz_target!(|input: &[u8]| events::run(input));
