//! Random lists, configurations and bodies.

use super::checks::Listed;
use crate::gateway::*;

/// Limit of filter and Envoy alike: a body may reach it, and a splice take it past.
pub(super) const LIMIT_BYTES: usize = 6_000;

/// Xorshift: the same numbers for the same seed.
pub struct Random(pub(super) u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 16) % bound.max(1) as u64).unwrap()
    }

    pub(super) fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

pub(super) const ADDRESSES: &[&str] =
    &[P1, P2, D1, D2, "10.0.2.1:8000", "10.0.2.2:8000", "[2001:db8::1]:8000", "10.0.2.4:8000"];

/// One to all of the addresses, with any roles.
pub(super) fn endpoints(random: &mut Random) -> Vec<(&'static str, &'static str)> {
    let mut chosen: Vec<_> = ADDRESSES.iter().filter(|_| !random.one_in(3)).copied().collect();
    if chosen.is_empty() {
        chosen.push(P1);
    }
    chosen
        .into_iter()
        .map(|address| (address, *random.pick(&["prefill", "decode", "both", "prefill", "decode"])))
        .collect()
}

/// A good configuration. Its endpoints are added to the set.
pub(super) fn configuration(random: &mut Random, configured: &mut Listed) -> String {
    let endpoints = endpoints(random);
    for (address, role) in &endpoints {
        configured.entry((*address).to_owned()).or_default().insert((*role).to_owned());
    }
    let authority = *random.pick(&["a", "a", "a", "b"]);
    let control = format!(r#""control":{{"cluster":"pd-control","authority":"{authority}"}}"#);
    let limit = format!(r#""max_body_bytes":{LIMIT_BYTES}"#);
    let trusted = *random.pick(&[r#""revision":"x""#, r#""trusted_headers":["x-pd-phase","x-prefiller-host-port"]"#]);
    let pool = *random.pick(&[
        "",
        r#""split":{"mode":"always"}"#,
        r#""split":{"mode":"never"}"#,
        r#""split":{"mode":"always"},"on_prefill_failure":"fail","prefill_attempts":1"#,
        r#""split":{"uncached_tokens":10},"prefill_attempts":8,"alternates":0"#,
        r#""engine":"vllm-shared","prefill_timeout_ms":1000"#,
    ]);
    config(&[control.as_str(), &limit, trusted], &endpoints, pool)
}

/// A body: a request with members in any order, some of them a client's parameters; now and then damaged.
pub(super) fn body(random: &mut Random, prompts: &mut u64) -> Vec<u8> {
    *prompts += 1;
    let id = if random.one_in(3) { 1 + *prompts / 2 } else { *prompts };
    let prompt = format!("prompt {id} \\\"é ").repeat(1 + random.below(260));
    let mut members = vec![
        format!(r#""model":"{}""#, random.pick(&["m", "m", "m", "\\u006d"])),
        format!(r#""messages":[{{"role":"user","content":"{prompt}"}}]"#),
    ];
    for _ in 0..random.below(7) {
        members.push(
            random
                .pick(&[
                    r#""kv_transfer_params":{"evil":"203.0.113.9:1"}"#,
                    r#""kv_tr\u0061nsfer_params" : {"do_remote_prefill":true,"a":["203.0.113.9:1"]}"#,
                    r#""bootstrap_room":"203.0.113.9:1""#,
                    r#" "nested":{"kv_transfer_params":{"b":"203.0.113.9:1"}}"#,
                    r#""stream":true"#,
                    r#""n":1"#,
                    r#""max_tokens":7"#,
                    r#""stop":["}"]"#,
                    r#""seed":18446744073709551617"#,
                    r#""prompt":[1,2,[3]]"#,
                    "\"\":\t[ ]",
                ])
                .to_string(),
        );
    }
    for index in (1..members.len()).rev() {
        members.swap(index, random.below(index + 1));
    }
    let mut body = format!("{{{}}}", members.join(",")).into_bytes();
    match random.below(20) {
        0 => body.truncate(random.below(body.len())),
        1 => {
            for _ in 0..=random.below(3) {
                let index = random.below(body.len());
                body[index] = *random.pick(b"\"\\{}[],:0\xff\x00 ");
            }
        }
        2 => body = body.repeat(2),
        3 => body.extend_from_slice(b" \n\t"),
        4 => body.resize(LIMIT_BYTES + random.below(3) - 1, b' '),
        5 => body.clear(),
        _ => {}
    }
    body
}
