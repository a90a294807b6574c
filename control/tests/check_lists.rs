//! `pd-control check` on lists of endpoints and on configurations: faults by line, and warnings.

use crate::process::{run, text, write};
use crate::support::*;

#[test]
fn check_knows_other_configurations_by_their_keys() {
    let directory = tempfile::tempdir().unwrap();
    let kubernetes = write(directory.path(), "k.yaml", "namespaces: [a]\nselectors: []\n");
    let plugin = write(directory.path(), "p.json", r#"{"revision": "1", "endpoints": []}"#);
    let output = run(&["check", &kubernetes, &plugin]);
    let expected = format!(
        "{kubernetes}: ok, Kubernetes configuration with 0 selectors and 0 InferencePools\n\
         {plugin}: ok, plugin configuration with 0 endpoints\n"
    );
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
    let wrong = write(directory.path(), "w.json", r#"{"revision": "1", "pool": {}}"#);
    assert!(text(&run(&["check", &wrong]).stderr).contains("w.json:1:19: pool: unknown field `pool`"), "it is named");
    let wrong = write(directory.path(), "w.yaml", "namespaces: [a]\nselector: []\n");
    assert!(text(&run(&["check", &wrong]).stderr).contains("w.yaml:2:1: unknown field `selector`"));
}

#[test]
fn check_says_whether_a_file_would_be_taken() {
    let directory = tempfile::tempdir().unwrap();
    let good = write(directory.path(), "good.yaml", &four(1.0));
    let bad = write(directory.path(), "bad.yaml", &four(0.0));
    let output = run(&["check", &good]);
    assert!(output.status.success());
    assert_eq!(text(&output.stdout), format!("{good}: ok, 4 endpoints (4 both)\n"));
    let output = run(&["check", &good, &bad]);
    assert_eq!(output.status.code(), Some(1));
    let error = format!("pd-control: {bad}:2:46: endpoints[0].weight: must be between 0.01 and 100\n");
    assert_eq!(text(&output.stderr), error);
}

/// Other checks stop at the first fault (apollographql/router#2180, koding/multiconfig#73). BerriAI/litellm#34877 and #18624:
/// misspelt keys, values that are none and entries that are there twice showed at the first request.
#[test]
fn check_names_every_fault_of_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let faults = |name: &str, content: &str| {
        let path = write(directory.path(), name, content);
        let output = run(&["check", &path]);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
        text(&output.stderr).replace(&format!("pd-control: {path}"), "").lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let expect = |found: Vec<String>, expected: &[&str]| {
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found} is not {expected}");
        }
    };
    let list = "endpoints:\n\
                - {address: 10.0.0.1:80, role: boss, weight: 1000, weigth: 1}\n\
                - {address: 10.0.0.2:80, role: both, models: [a, 1.5], rank: -1}\n\
                - {address: gpu:80, role: both, bootstrap_port: 0}\n\
                - 7\n\
                - {role: both}\n\
                - {address: 10.0.0.2:80, role: both}\n\
                extra: 1\n";
    expect(
        faults("list.yaml", list),
        &[
            ":2:32: endpoints[0].role: unknown variant `boss`",
            ":2:46: endpoints[0].weight: must be between 0.01 and 100",
            ":2:52: endpoints[0].weigth: unknown key",
            ":3:50: endpoints[1].models[1]: invalid type",
            ":3:62: endpoints[1].rank: invalid value",
            ":4:13: endpoints[2].address: \"gpu:80\" is not ip:port",
            ":4:49: endpoints[2].bootstrap_port: must not be 0",
            ":5:3: endpoints[3]: must be a mapping",
            ":6:3: endpoints[4]: missing field `address`",
            ":7:13: endpoints[5].address: 10.0.0.2:80 is endpoints[1] in line 3 already",
            ":8:1: extra: unknown key",
        ],
    );
    let kubernetes = "namespaces: [a, a]\n\
                      label: true\n\
                      selectors:\n\
                      - {match: {matchLabels: {app: x}}, role: boss, weight: 1000}\n\
                      - {match: {matchLabels: {app: y}}, rol: both}\n\
                      - {match: {}}\n";
    expect(
        faults("k.yaml", kubernetes),
        &[
            ":1:13: namespaces: a is listed twice",
            ":2:1: unknown field `label`",
            ":4:42: selectors[0].role: \"boss\" is no role",
            ":4:56: selectors[0].weight: must be between",
            ":5:36: unknown field `rol`",
            ":6:11: selectors[2].match: selects every pod",
        ],
    );
    let plugin = r#"{"max_body_bytes": 6, "pool": {}, "pools": {"a.b": {"splt": 1, "split": {"uncached_tokens": "x"}}},
        "session_headers": ["X"], "endpoints": [{"address": "10.0.0.1:80", "role": "boss"}]}"#;
    expect(
        faults("p.json", plugin),
        &[
            ":1:20: max_body_bytes: must be between",
            ":1:23: pool: unknown field `pool`",
            ":1:53: pools.a.b.splt: unknown field `splt`",
            ":1:93: pools.a.b.split.uncached_tokens: invalid type",
            ":2:29: session_headers[0]: must be a header name",
            ":2:49: endpoints[0]: unknown variant `boss`",
        ],
    );
}

#[test]
fn check_bounds_the_faults_that_it_names() {
    let directory = tempfile::tempdir().unwrap();
    let line = "- {address: 10.0.0.1:80, role: boss}\n";
    let path = write(directory.path(), "many.yaml", &format!("endpoints:\n{}", line.repeat(1_000)));
    let output = run(&["check", &path]);
    let lines = text(&output.stderr);
    assert_eq!(lines.lines().count(), 101, "{lines}");
    assert!(lines.ends_with(&format!("pd-control: {path}: there are more faults than these 100\n")), "{lines}");
}

/// sgl-project/sglang#2796: an empty list. ai-dynamo/dynamo#13756: a role without a worker. llm-d/llm-d-router#2427: prompts were
/// computed by decode servers, because no prefill server was there.
#[test]
fn check_warns_of_lists_that_cannot_serve() {
    let directory = tempfile::tempdir().unwrap();
    let warnings = |content: &str| {
        let path = write(directory.path(), "e.yaml", content);
        let output = run(&["check", &path]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stderr).replace(&format!("pd-control: warning: {path}: "), "").trim_end().to_owned()
    };
    let list = |endpoints: &[&str]| {
        let line = |(n, rest): (usize, &&str)| format!("- {{address: 10.0.0.{n}:80, {rest}}}\n");
        warnings(&format!(
            "endpoints:\n{}",
            endpoints.iter().enumerate().map(|(n, it)| line((n + 1, it))).collect::<String>()
        ))
    };
    assert_eq!(warnings("endpoints: []"), "the list has no endpoint: every request gets 503");
    assert_eq!(list(&["role: prefill", "role: decode"]), "");
    assert_eq!(
        list(&["role: prefill", "role: prefill"]),
        "pool \"default\" has prefill endpoints only: nothing generates, every request gets 503"
    );
    assert_eq!(list(&["role: decode, engine: vllm-nixl"]), "", "vLLM computes a prompt at a decode endpoint, too");
    assert_eq!(
        list(&["role: decode, engine: sglang"]),
        "pool \"default\" has decode endpoints only, and sglang's serve no request without a prefill endpoint"
    );
    assert_eq!(
        list(&["role: prefill, pool: a", "role: decode, pool: b, engine: sglang"]),
        "pool \"a\" has prefill endpoints only: nothing generates, every request gets 503\n\
         pool \"b\" has decode endpoints only, and sglang's serve no request without a prefill endpoint"
    );
    assert_eq!(
        list(&["role: prefill, group: a", "role: decode, group: b"]),
        "pool \"default\": group \"a\" has no decode endpoint, so prefill endpoint 10.0.0.1:80 is never used\n\
         pool \"default\": group \"b\" has no prefill endpoint, so decode endpoint 10.0.0.2:80 takes no prompt over"
    );
    assert_eq!(
        list(&["role: prefill, group: a", "role: decode, group: a", "role: decode"]),
        "pool \"default\": every prefill endpoint has a group, so decode endpoint 10.0.0.3:80, which has none, takes no \
         prompt over"
    );
    assert_eq!(
        list(&[
            "role: prefill, revision: a",
            "role: decode, revision: a",
            "role: decode, revision: b",
            "role: prefill"
        ]),
        "pool \"default\": revision \"b\" has no prefill endpoint, so decode endpoint 10.0.0.3:80 takes no prompt over\n\
         pool \"default\": the rest without a revision has no decode endpoint, so prefill endpoint 10.0.0.4:80 is never used"
    );
    assert_eq!(
        list(&["role: prefill", "role: both"]),
        "pool \"default\": there is no decode endpoint, so prefill endpoint 10.0.0.1:80 is never used"
    );
    assert_eq!(
        list(&["role: decode, engine: sglang", "role: both"]),
        "pool \"default\": there is no prefill endpoint, so decode endpoint 10.0.0.1:80 is never used"
    );
    assert_eq!(list(&["role: prefill", "role: decode, group: b"]), "", "one without a group pairs with any");
    assert_eq!(
        list(&["role: prefill, engine: vllm-nixl", "role: decode, engine: sglang"]),
        "pool \"default\": prefill endpoint 10.0.0.1:80 speaks vllm-nixl, which no decode endpoint speaks: nothing takes its prompts over\n\
         pool \"default\": decode endpoint 10.0.0.2:80 speaks sglang, which no prefill endpoint speaks: it takes no \
             prompt over"
    );
    assert_eq!(
        list(&["role: prefill, models: [m]", "role: decode, models: [o]"]),
        "pool \"default\": model \"m\" has prefill endpoints only: nothing generates, its requests get 503"
    );
    assert_eq!(list(&["role: prefill, models: [m]", "role: both, models: [o]", "role: decode"]), "");
    assert_eq!(
        list(&["role: both, state: draining", "role: both, state: down"]),
        "no endpoint is ready: every request gets 503"
    );
    let plugin = write(
        directory.path(),
        "p.json",
        r#"{"endpoints": [{"address": "10.0.0.1:80", "role": "decode"}],
        "pools": {"default": {"engine": "sglang"}}}"#,
    );
    let output = run(&["check", &plugin]);
    assert!(text(&output.stderr).contains("decode endpoints only, and sglang's serve"), "{}", text(&output.stderr));
}
