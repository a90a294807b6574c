//! Forms before and after the filter's edit.
#![no_main]

#[path = "../form.rs"]
mod form;
#[path = "../oracle.rs"]
#[allow(dead_code)]
mod oracle;

libfuzzer_sys::fuzz_target!(|input: &[u8]| form::run(input));
