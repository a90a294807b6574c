//! Headers of any bytes, missing, many or huge.

use pd_host::{Pairs, Request};

use crate::gateway::*;

#[test]
fn header_values_that_are_not_text_reach_both_legs_untouched() {
    let gateway = Gateway::new(&two_and_two());
    let any: Vec<u8> = (1..=255).filter(|byte| !matches!(byte, b'\r' | b'\n')).collect();
    let stream = long_chat(1).header("x-any", &any).header("x-any", b"\xc3\x28").header("x-empty", "").send(&gateway);
    let call = leg(&gateway);
    answer_leg(&gateway);
    let values = |fields: &Pairs| -> Vec<Vec<u8>> {
        fields
            .iter()
            .filter(|(name, _)| name == b"x-any" || name == b"x-empty")
            .map(|(_, value)| value.clone())
            .collect()
    };
    let sent = vec![any, b"\xc3\x28".to_vec(), Vec::new()];
    assert_eq!(values(&call.headers), sent);
    assert_eq!(values(&forwarded(&stream).headers), sent);
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn fields_the_filter_reads_may_be_any_bytes() {
    let gateway =
        Gateway::new(&config(&[r#""trusted_headers":["x-prefiller-host-port","x-pd-phase"]"#], TWO_AND_TWO, ""));
    let any = b"\xff\xfe\x80";
    for name in [
        "content-type",
        "content-length",
        "content-encoding",
        "x-pd-phase",
        "x-prefiller-host-port",
        "x-pd-destination",
        "x-pd-\u{e9}",
        ":path",
        ":method",
        ":authority",
        ":scheme",
    ] {
        for request in [long_chat(1), Request::get("/v1/models")] {
            let mut request = request;
            request.headers.retain(|(other, _)| other != name.as_bytes());
            let stream = request.header(name, any).send(&gateway);
            for call in legs(&gateway) {
                gateway.answer(call.token, [(":status", "200")], prefilled()).unwrap();
            }
            assert!(stream.forwarded().is_some() || stream.client().complete, "{name}");
            if !stream.is_ended() {
                stream.reset();
            }
        }
    }
    gateway.assert_idle();
}

#[test]
fn headers_that_are_missing_stop_nothing() {
    let gateway = Gateway::new(&two_and_two());
    for missing in [":method", ":authority", ":scheme", "content-type", "content-length"] {
        let mut request = long_chat(1);
        request.headers.retain(|(name, _)| name != missing.as_bytes());
        let stream = request.send(&gateway);
        for call in legs(&gateway) {
            gateway.answer(call.token, [(":status", "200")], prefilled()).unwrap();
        }
        assert_eq!(forwarded(&stream).header(missing).is_some(), missing == "content-length", "{missing}");
        respond(&stream);
    }
    // A path that is not known is not passed on.
    let stream = gateway.stream();
    stream.request_headers([("", ""); 0], true);
    assert_eq!(stream.client().status(), Some(404));
    gateway.assert_idle();
}

#[test]
fn many_headers_reach_both_legs() {
    let gateway = Gateway::new(&two_and_two());
    let request = (0..1_000).fold(long_chat(1), |request, i| request.header(&format!("x-{i}"), i.to_string()));
    let stream = request.send(&gateway);
    let call = leg(&gateway);
    assert_eq!(call.header("x-999"), Some(&b"999"[..]));
    answer_leg(&gateway);
    assert_eq!(forwarded(&stream).header("x-999"), Some(&b"999"[..]));
    respond(&stream);
    gateway.assert_idle();
}

#[test]
fn more_headers_than_a_call_out_can_carry_go_to_decode_alone() {
    // Envoy's ABI carries 1,024 pairs and 1 MiB of them; a listener lets 100 and 60 kB through by default.
    let many = (0..5_000).fold(long_chat(1), |request, i| request.header(&format!("x-{i}"), i.to_string()));
    let huge = long_chat(1).header("x-huge", "v".repeat(2 << 20));
    for request in [many, huge] {
        let gateway = Gateway::new(&two_and_two());
        let stream = request.send(&gateway);
        let sent = forwarded(&stream);
        assert_eq!(sent.headers.len(), request.headers.len() + 1);
        assert_eq!(sent.body, chat(1, 3_000).as_bytes());
        assert_eq!(decision(&stream), ("decode_only".into(), "prefill_failed".into()));
        respond(&stream);
        gateway.assert_idle();
    }
}

#[test]
fn huge_header_values_reach_both_legs() {
    let gateway = Gateway::new(&two_and_two());
    let huge = "v".repeat(512 << 10);
    let stream = long_chat(1).header("x-huge", &huge).header("x-pd-huge", &huge).send(&gateway);
    assert_eq!(leg(&gateway).header("x-huge"), Some(huge.as_bytes()));
    assert_eq!(leg(&gateway).header("x-pd-huge"), None);
    answer_leg(&gateway);
    assert_eq!(forwarded(&stream).header("x-huge"), Some(huge.as_bytes()));
    respond(&stream);
    gateway.assert_idle();
}
