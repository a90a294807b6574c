use super::*;

fn refused(text: &str) -> String {
    Config::parse(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn nothing_at_all_is_a_valid_configuration() {
    let config = Config::parse(b"").unwrap();
    assert_eq!(config, Config::parse(b"{}").unwrap());
    assert_eq!(config.cluster, "engines");
    assert!(!config.trusts(PHASE_HEADER) && !config.trusts(PREFILLER_HEADER));
    assert_eq!(config.pool("any").split, Split::Threshold { uncached_tokens: 256 });
}

#[test]
fn an_unnamed_pool_has_the_default_pools_policy() {
    let config = Config::parse(br#"{"pools":{"default":{"split":{"mode":"always"}},"x":{"alternates":0}}}"#).unwrap();
    assert_eq!(config.pool("other").split, Split::Always);
    assert_eq!(config.pool("x").alternates, 0);
    assert_eq!(config.pool("x").split, Split::Threshold { uncached_tokens: 256 });
}

#[test]
fn what_is_refused_names_its_key() {
    for (text, key) in [
        (r#"{"clutser":"x"}"#, "clutser"),
        (r#"{"cluster":""}"#, "cluster"),
        (r#"{"cluster":1}"#, "line 1 column"),
        (r#"{"pools":{"default":{"splt":{}}}}"#, "splt"),
        (r#"{"pools":{"a":{"prefill_attempts":0}}}"#, "pools.a.prefill_attempts"),
        (r#"{"pools":{"a":{"engine":"sglong"}}}"#, "sglong"),
        (r#"{"pools":{"a":{"bootstrap_port":0}}}"#, "pools.a.bootstrap_port"),
        (r#"{"models":{"a":{"targets":[]}}}"#, "models.a"),
        (r#"{"models":{"a":{"targets":[{"model":"x","weight":0}]}}}"#, "models.a"),
        (r#"{"models":{"a":{"targets":[{"model":""}]}}}"#, "models.a"),
        (r#"{"models":{"a":{"targets":[{"modle":"x"}]}}}"#, "modle"),
        (r#"{"pools":{"a":{"cached_tokens":"both"}}}"#, "`both`"),
        (r#"{"pools":{"a":{"queue":{"lead_ms":0}}}}"#, "pools.a.queue.lead_ms"),
        (r#"{"pools":{"a":{"queue":{"batch_tokens":1048577}}}}"#, "pools.a.queue.batch_tokens"),
        (r#"{"pools":{"a":{"queue":{"max_wait_ms":3600001}}}}"#, "pools.a.queue.max_wait_ms"),
        (r#"{"pools":{"a":{"queue":{"max_requests":0}}}}"#, "pools.a.queue.max_requests"),
        (r#"{"pools":{"a":{"queue":{"leed_ms":20}}}}"#, "leed_ms"),
        (r#"{"bootstrap_cluster":""}"#, "bootstrap_cluster"),
        (r#"{"control":{}}"#, "cluster"),
        (r#"{"control":{"cluster":"c","wait_ms":1}}"#, "control.wait_ms"),
        (r#"{"endpoints":[{"address":"10.0.0.1:1","role":"both","wieght":1}]}"#, "endpoints[0].wieght"),
        (r#"{"endpoints":[{"address":"10.0.0.1:1","role":"both","weight":-1}]}"#, "weight"),
        (r#"{"trusted_headers":["host"]}"#, "trusted_headers"),
        (r#"{"destination_header":"X Y"}"#, "destination_header"),
        (r#"{"session_headers":["x-session_id","X-Session"]}"#, "session_headers[1]"),
        (r#"{"session_cookies":["a b"]}"#, "session_cookies[0]"),
        (r#"{"session_cookies":["sid","a="]}"#, "session_cookies[1]"),
        (r#"{"prefix":{"block_bytes":1}}"#, "prefix.block_bytes"),
        ("[]", "plugin configuration"),
        ("{", "plugin configuration"),
    ] {
        let message = refused(text);
        assert!(message.contains(key), "{text}: {message}");
    }
}

#[test]
fn prefill_seconds_follow_the_formula() {
    let cost = Config::parse(b"{}").unwrap().pool("default").cost;
    let seconds = cost.seconds(8_000.0, 2_000.0);
    assert!((seconds - (0.015 + 25e-6 * 6_000.0 + 5.24e-10 * 60e6)).abs() < 1e-9);
    assert_eq!(cost.seconds(100.0, 500.0), cost.a);
}
