//! Scan and splice against `serde_json`. The input is a body; which edit is tried depends on all of its bytes.
#![no_main]

#[path = "../oracle.rs"]
mod oracle;

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    // FNV-1a.
    let choice = body
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    oracle::check_body(body, choice);
});
