use pd_core::wire::{Engine, Role, State};

use super::*;

fn parse_text(text: &str) -> Result<EndpointList, String> {
    parse(Path::new("e.yaml"), text.as_bytes()).map_err(|error| error.to_string())
}

#[test]
fn every_key_of_an_endpoint_is_read() {
    let text = "
endpoints:
  - address: 10.0.0.1:8000
    rank: 3
    role: decode
    pool: big
    models: [llama, \"adapter\"]
    engine: vllm-nixl
    group: rack-1
    weight: 2
    cache_tokens: 500000
    min_prompt_tokens: 100
    max_prompt_tokens: 2000
    state: draining
  - {address: \"[::1]:80\", role: both}
";
    let full = Endpoint {
        rank: Some(3),
        pool: "big".into(),
        models: vec!["llama".into(), "adapter".into()],
        engine: Some(Engine::VllmNixl),
        group: Some("rack-1".into()),
        weight: 2.0,
        cache_tokens: Some(500_000),
        min_prompt_tokens: Some(100),
        max_prompt_tokens: Some(2_000),
        state: State::Draining,
        ..Endpoint::new("10.0.0.1:8000".parse().unwrap(), Role::Decode)
    };
    let short = Endpoint::new("[::1]:80".parse().unwrap(), Role::Both);
    assert_eq!(parse_text(text).unwrap().as_slice(), [full, short]);
}

#[test]
fn json_is_read_with_tabs_and_escapes() {
    let text = "{\"endpoints\": [\n\t{\"address\": \"10.0.0.1:80\", \"role\": \"bo\\u0074h\", \"weight\": 1e1}\n]}\n";
    assert_eq!(parse_text(text).unwrap().as_slice()[0].weight, 10.0);
}

#[test]
fn json_is_as_strict_as_yaml() {
    let endpoint = r#"{"address": "10.0.0.1:80", "role": "both""#;
    for (text, error) in [
        (format!(r#"{{"endpoints": [{endpoint}, "role": "both"}}]}}"#), "1:59: duplicate mapping key: role"),
        (format!(r#"{{"endpoints": [], "endpoints": [{endpoint}}}]}}"#), "1:19: duplicate mapping key: endpoints"),
        (format!("{{\"endpoints\": [\n{endpoint},\n \"weight\": 0}}]}}"), "3:12: endpoints[0].weight: must be between"),
        (format!(r#"{{"endpoints": [{endpoint}, "x": 1}}]}}"#), "1:59: endpoints[0].x: unknown key"),
        (format!(r#"{{"endpoints": [{endpoint}}}], "x": 1}}"#), "1:61: x: unknown key"),
        (format!(r#"{{"endpoints": [{endpoint}}}"#), "1:15: unclosed bracket '['"),
    ] {
        let refused = parse_text(&text).unwrap_err();
        assert!(refused.starts_with(&format!("e.yaml:{error}")), "{refused}");
    }
}

#[test]
fn json_and_yaml_of_one_list_are_equal() {
    let yaml = "endpoints:\n- {address: 10.0.0.1:80, role: both, weight: 2, models: [a], rank: 1, group: g}\n";
    let list = parse_text(yaml).unwrap();
    let json = serde_json::json!({"endpoints": list.as_slice()}).to_string();
    assert_eq!(parse_text(&json).unwrap(), list);
}

#[test]
fn defaults_may_be_merged_from_an_anchor() {
    let text = "
endpoints:
  - &d {address: 10.0.0.1:80, role: prefill, pool: p}
  - {<<: *d, address: 10.0.0.2:80}
";
    let list = parse_text(text).unwrap();
    assert!(list.as_slice().iter().all(|endpoint| endpoint.pool == "p" && endpoint.role == Role::Prefill));
}

#[test]
fn an_empty_list_has_to_be_written() {
    assert_eq!(parse_text("endpoints: []").unwrap(), EndpointList::default());
    for (text, error) in [
        ("", "e.yaml:1:1: must be a mapping with the key endpoints, not nothing"),
        ("# nothing\n", "e.yaml:2:1: must be a mapping with the key endpoints, not nothing"),
        ("{}", "e.yaml:1:1: endpoints: missing (`endpoints: []` is an empty list)"),
        ("endpoints:\n", "e.yaml:1:10: endpoints: must be a list (`[]` is an empty one), not nothing"),
    ] {
        assert_eq!(parse_text(text), Err(error.to_owned()));
    }
}

#[test]
fn errors_name_line_column_endpoint_and_key() {
    let good = "endpoints:\n- address: 10.0.0.1:80\n  role: prefill\n";
    let second = "- address: 10.0.0.2:80\n  role: prefill\n";
    for (rest, error) in [
        (
            "- address: 10.0.0.2:80\n  role: boss\n",
            "5:9: endpoints[1].role: unknown variant `boss`, expected one of `prefill`, `decode`, `both`",
        ),
        ("- address: 10.0.0.2:80\n", "4:3: endpoints[1]: missing field `role`"),
        (
            "- address: engine:80\n  role: both\n",
            "4:12: endpoints[1].address: \"engine:80\" is not ip:port (host names are not resolved)",
        ),
        ("- address: 8000\n  role: both\n", "4:12: endpoints[1].address: invalid type: integer `8000`"),
        ("- address: 0.0.0.0:80\n  role: both\n", "4:12: endpoints[1].address: must not be the unspecified address"),
        (
            "- address: 10.0.0.1:80\n  role: both\n",
            "4:12: endpoints[1].address: 10.0.0.1:80 is endpoints[0] in line 2 already",
        ),
        ("- 7\n", "4:3: endpoints[1]: must be a mapping of keys, not a single value"),
        ("extra: 1\n", "4:1: extra: unknown key; the only one is endpoints"),
    ] {
        let text = parse_text(&format!("{good}{rest}")).unwrap_err();
        assert!(text.starts_with(&format!("e.yaml:{error}")), "{text}");
    }
    for (rest, error) in [
        ("  weight: 1000\n", "6:11: endpoints[1].weight: must be between 0.01 and 100"),
        ("  weight: heavy\n", "6:11: endpoints[1].weight: invalid type: string \"heavy\", expected f64"),
        ("  weigth: 1\n", "6:3: endpoints[1].weigth: unknown key; known are address, rank, role, pool, models,"),
        ("  rank: -1\n", "6:9: endpoints[1].rank: invalid value: integer `-1`, expected u32"),
        (
            "  models:\n  - a\n  - 1.5\n",
            "8:5: endpoints[1].models[1]: invalid type: floating point `1.5`, expected a string",
        ),
        ("  models:\n  - a\n  - ''\n", "7:5: endpoints[1].models: names must have 1 to 256 bytes"),
        ("  role: decode\n", "6:3: duplicate mapping key: role"),
        ("  pool: [a\n", "6:9: unclosed bracket '['"),
    ] {
        let text = parse_text(&format!("{good}{second}{rest}")).unwrap_err();
        assert!(text.starts_with(&format!("e.yaml:{error}")), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }
}

#[test]
fn bytes_that_are_not_text_are_refused_with_their_place() {
    let error = parse(Path::new("e.yaml"), b"endpoints:\n- \xc3\xa4\xff").unwrap_err();
    assert_eq!(error.to_string(), "e.yaml:2:4: not UTF-8 text");
}

#[test]
fn hostile_text_is_refused_within_bounds() {
    let bomb = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\n\
                    g: &g [*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g]\n";
    assert!(parse_text(bomb).is_err());
    assert!(parse_text(&"[".repeat(100_000)).is_err());
    assert!(parse_text(&"- ".repeat(100_000)).is_err());
}

#[test]
fn as_many_endpoints_as_the_wire_takes_are_read() {
    let line = |n: usize| {
        let [_, a, b, c] = (n as u32).to_be_bytes();
        format!(r#"{{"address": "10.{a}.{b}.{c}:80", "role": "both", "pool": "p", "models": ["m"], "weight": 2}}"#)
    };
    let lines: Vec<_> = (0..=wire::MAX_ENDPOINTS).map(line).collect();
    let short = |line: &String| format!("- {}}}\n", line.split(", \"pool").next().unwrap_or(line));
    let yaml = |count: usize| format!("endpoints:\n{}", lines[..count].iter().map(short).collect::<String>());
    let json = |count: usize| format!("{{\"endpoints\": [{}]}}", lines[..count].join(",\n"));
    assert_eq!(parse_text(&yaml(wire::MAX_ENDPOINTS)).unwrap().as_slice().len(), wire::MAX_ENDPOINTS);
    assert_eq!(parse_text(&json(wire::MAX_ENDPOINTS)).unwrap().as_slice().len(), wire::MAX_ENDPOINTS);
    let error = parse_text(&json(wire::MAX_ENDPOINTS + 1)).unwrap_err();
    assert!(error.contains("more than 100000 endpoints"), "{error}");
}
