//! What pods of llm-d, of AIBrix and with annotations mean.

use serde_json::{Value, json};

use super::*;

fn pod(labels: Value, annotations: Value) -> Pod {
    read(json!({
        "metadata": {"name": "p", "namespace": "n", "labels": labels, "annotations": annotations},
        "spec": {"containers": [{"name": "engine", "ports": [{"containerPort": 8100}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }))
    .unwrap()
}

fn read(value: Value) -> Result<Pod, String> {
    Pod::read(serde_json::from_value(value).unwrap())
}

fn classify(pod: &Pod) -> PodClass {
    super::classify(pod, None, &Defaults { by_labels: true, ..Defaults::default() })
}

fn one(pod: &Pod) -> Endpoint {
    match classify(pod) {
        PodClass::Endpoints(endpoints) if endpoints.len() == 1 => endpoints.into_iter().next().unwrap(),
        other => panic!("{other:?}"),
    }
}

fn refusal(pod: &Pod) -> String {
    match classify(pod) {
        PodClass::Refused(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn llmd_labels_say_role_and_engine() {
    for (role, expected) in [
        ("prefill", Role::Prefill),
        ("decode", Role::Decode),
        ("both", Role::Both),
        ("prefill-decode", Role::Both),
        ("encode-prefill-decode", Role::Both),
    ] {
        let endpoint = one(&pod(json!({"llm-d.ai/role": role, "llm-d.ai/engine-type": "vllm"}), json!({})));
        assert_eq!((endpoint.role, endpoint.engine), (expected, None), "{role}");
    }
    let sglang = one(&pod(json!({"llm-d.ai/role": "decode", "llm-d.ai/engine-type": "sglang"}), json!({})));
    assert_eq!(sglang.engine, Some(Engine::Sglang));
    let aggregated = one(&pod(json!({"llm-d.ai/inferenceServing": "true"}), json!({})));
    assert_eq!((aggregated.role, aggregated.address), (Role::Both, "10.0.0.1:8100".parse().unwrap()));
    assert_eq!(classify(&pod(json!({"llm-d.ai/role": "encode"}), json!({}))), PodClass::Other);
    assert_eq!(refusal(&pod(json!({"llm-d.ai/role": "boss"}), json!({}))), "llm-d.ai/role: \"boss\" is no role");
}

#[test]
fn aibrix_labels_say_all_of_an_endpoint() {
    let labels = json!({
        "role-name": "prefill",
        "model.aibrix.ai/name": "llama",
        "model.aibrix.ai/port": "9000",
        "model.aibrix.ai/engine": "vllm",
        "model.aibrix.ai/kv-connector-type": "nixl",
        "roleset-name": "set-1",
    });
    let expected = Endpoint {
        models: vec!["llama".into()],
        engine: Some(Engine::Neuron),
        group: Some("set-1".into()),
        ..Endpoint::new("10.0.0.1:9000".parse().unwrap(), Role::Prefill)
    };
    assert_eq!(one(&pod(labels.clone(), json!({}))), expected);
    let moved = one(&pod(labels, json!({"model.aibrix.ai/port": "9001"})));
    assert_eq!(moved.address.port(), 9_001, "the annotation wins");
    assert_eq!(one(&pod(json!({"model.aibrix.ai/name": "m"}), json!({}))).role, Role::Both);
    assert_eq!(classify(&pod(json!({"role-name": "router"}), json!({}))), PodClass::Other);
    let second = json!({"role-name": "decode", "stormservice.orchestration.aibrix.ai/pod-group-index": "1"});
    assert_eq!(classify(&pod(second, json!({}))), PodClass::Other, "the first of a group serves for all");
}

#[test]
fn a_revision_comes_from_the_set_or_from_a_named_label() {
    let labels = json!({
        "llm-d.ai/role": "decode",
        "disaggregatedset.x-k8s.io/revision": "set",
        "pod-template-hash": "abc",
        "app.kubernetes.io/version": "",
    });
    let revision = |annotations: Value, source: Option<&str>| {
        let revision = source.map(|label| Source::Label(label.to_owned(), [("abc".into(), "v1".into())].into()));
        let defaults = Defaults { by_labels: true, revision, ..Defaults::default() };
        match super::classify(&pod(labels.clone(), annotations), None, &defaults) {
            PodClass::Endpoints(endpoints) => Ok(endpoints[0].revision.clone()),
            PodClass::Refused(why) => Err(why),
            other => panic!("{other:?}"),
        }
    };
    let none = json!({});
    assert_eq!(revision(none.clone(), None).unwrap().as_deref(), Some("set"));
    assert_eq!(revision(none.clone(), Some("pod-template-hash")).unwrap().as_deref(), Some("v1"));
    assert_eq!(revision(none.clone(), Some("absent")).unwrap(), None, "no other label in its place");
    assert_eq!(revision(json!({"envoy-pd/revision": "r"}), None).unwrap().as_deref(), Some("r"));
    assert!(revision(none, Some("app.kubernetes.io/version")).unwrap_err().contains("revision"), "an empty one");
}

#[test]
fn annotations_win_over_labels() {
    let labels = json!({"llm-d.ai/role": "both", "llm-d.ai/engine-type": "sglang", "roleset-name": "x"});
    let annotations = json!({
        "envoy-pd/role": "decode",
        "envoy-pd/pool": "big",
        "envoy-pd/models": "a, b",
        "envoy-pd/models-closed": "true",
        "envoy-pd/port": "1234",
        "envoy-pd/engine": "vllm-shared",
        "envoy-pd/group": "g",
        "envoy-pd/revision": "v2",
        "envoy-pd/weight": "2.5",
        "envoy-pd/cache-tokens": "1000",
        "envoy-pd/bootstrap-port": "77",
        "envoy-pd/min-prompt-tokens": "2000",
        "envoy-pd/max-prompt-tokens": "8000",
        "envoy-pd/state": "draining",
    });
    let expected = Endpoint {
        rank: None,
        pool: "big".into(),
        models: vec!["a".into(), "b".into()],
        models_closed: true,
        engine: Some(Engine::VllmShared),
        group: Some("g".into()),
        revision: Some("v2".into()),
        weight: 2.5,
        cache_tokens: Some(1_000),
        bootstrap_port: Some(77),
        min_prompt_tokens: Some(2_000),
        max_prompt_tokens: Some(8_000),
        state: State::Draining,
        ..Endpoint::new("10.0.0.1:1234".parse().unwrap(), Role::Decode)
    };
    assert_eq!(one(&pod(labels, annotations)), expected);
}

#[test]
fn what_is_wrong_is_named_and_refuses_the_pod() {
    for (name, text, why) in [
        ("role", "boss", "envoy-pd/role: unknown variant `boss`"),
        ("weight", "heavy", "envoy-pd/weight: \"heavy\" is no such number"),
        ("weight", "0", "endpoint 10.0.0.1:8100: weight: must be between 0.01 and 100"),
        ("weight", "NaN", "endpoint 10.0.0.1:8100: weight: must be"),
        ("port", "70000", "envoy-pd/port: \"70000\" is no such number"),
        ("port", "0", "endpoint 10.0.0.1:0: address: port must not be 0"),
        ("models", "a,,b", "endpoint 10.0.0.1:8100: models: names must have"),
        ("models-closed", "yes", "envoy-pd/models-closed: \"yes\" is neither true nor false"),
        ("ranks", "0", "envoy-pd/ranks: must be between 1 and 256"),
        ("cache_tokens", "1", "envoy-pd/cache_tokens: no such annotation"),
        ("engine", "x", "envoy-pd/engine: unknown variant `x`"),
        ("max-prompt-tokens", "-1", "envoy-pd/max-prompt-tokens: \"-1\" is no such number"),
    ] {
        let reason = refusal(&pod(json!({"llm-d.ai/role": "both"}), json!({ format!("envoy-pd/{name}"): text })));
        assert!(reason.starts_with(why), "{reason}");
    }
    let connector = json!({"role-name": "decode", "model.aibrix.ai/kv-connector-type": "carrier-pigeon"});
    assert!(refusal(&pod(connector, json!({}))).starts_with(aibrix::CONNECTOR));
}

#[test]
fn ranks_are_endpoints_of_their_own() {
    let labelled = pod(json!({"llm-d.ai/role": "both"}), json!({"envoy-pd/ranks": "3"}));
    let PodClass::Endpoints(endpoints) = classify(&labelled) else { panic!() };
    let ranks: Vec<_> = endpoints.iter().map(|endpoint| endpoint.rank).collect();
    assert_eq!(ranks, [Some(0), Some(1), Some(2)]);
}

#[test]
fn readiness_and_deletion_make_the_state() {
    let state = |deletion: Option<&str>, ready: &str, annotation: Option<&str>| {
        let annotations = annotation.map_or(json!({}), |text| json!({"envoy-pd/state": text}));
        let pod = read(json!({
            "metadata": {"name": "p", "deletionTimestamp": deletion, "annotations": annotations,
                         "labels": {"llm-d.ai/role": "both"}},
            "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": ready}]},
        }));
        one(&pod.unwrap()).state
    };
    let deleted = Some("2026-01-01T00:00:00Z");
    assert_eq!(state(None, "True", None), State::Ready);
    assert_eq!(state(None, "False", None), State::Down);
    assert_eq!(state(None, "Unknown", None), State::Down);
    assert_eq!(state(deleted, "True", None), State::Draining);
    assert_eq!(state(deleted, "False", None), State::Draining);
    assert_eq!(state(None, "True", Some("draining")), State::Draining);
    assert_eq!(state(None, "True", Some("down")), State::Down);
    assert_eq!(state(None, "False", Some("ready")), State::Down, "nobody is woken");
    assert_eq!(state(deleted, "True", Some("ready")), State::Draining);
}

#[test]
fn pods_without_an_address_or_at_their_end_are_no_endpoints() {
    let labels = json!({"llm-d.ai/role": "both"});
    let pending = read(json!({"metadata": {"name": "p", "labels": labels}, "status": {"podIP": ""}})).unwrap();
    assert_eq!(classify(&pending), PodClass::Pending);
    for phase in ["Succeeded", "Failed"] {
        let finished = json!({"metadata": {"name": "p", "labels": labels},
                              "status": {"podIP": "10.0.0.1", "phase": phase}});
        assert_eq!(classify(&read(finished).unwrap()), PodClass::Other);
    }
    let other = json!({"metadata": {"name": "p", "labels": {"app": "web"}}, "status": {"podIP": "10.0.0.1"}});
    assert_eq!(classify(&read(other).unwrap()), PodClass::Other);
    assert!(read(json!({"metadata": {"name": "p"}, "status": {"podIP": "pod"}})).is_err());
    assert!(read(json!({"metadata": {"name": "p"}, "spec": {"containers": 3}})).is_err());
}

#[test]
fn the_port_named_http_is_taken_before_the_first_one() {
    let value = json!({
        "metadata": {"name": "p", "labels": {"llm-d.ai/role": "both"}},
        "spec": {"containers": [
            {"ports": [{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 5557, "name": "zmq"}]},
            {"ports": [{"containerPort": 8200, "name": "http"}]},
        ]},
        "status": {"podIP": "10.0.0.1"},
    });
    assert_eq!(one(&read(value).unwrap()).address.port(), 8_200);
    let bare = json!({"metadata": {"name": "p", "labels": {"llm-d.ai/role": "both"}}, "status": {"podIP": "10.0.0.1"}});
    assert_eq!(one(&read(bare).unwrap()).address.port(), DEFAULT_PORT);
}

/// As llm-d's chart makes them: the engine on 8200, in front of it the sidecar, which passes on what names no prefill server.
#[test]
fn a_pod_with_a_routing_sidecar_serves_at_the_sidecars_port() {
    let with = |init: Value, beside: Value| {
        json!({
            "metadata": {"name": "p", "labels": {"llm-d.ai/role": "decode"}},
            "spec": {
                "initContainers": [{"name": "prepare", "ports": [{"containerPort": 1}]}, init],
                "containers": [{"name": "vllm", "args": ["--port", "8200"], "ports": [{"containerPort": 8200}]}, beside],
            },
            "status": {"podIP": "10.0.0.1"},
        })
    };
    let port = |init: &Value, beside: &Value| one(&read(with(init.clone(), beside.clone())).unwrap()).address.port();
    let (ports, none) = (json!([{"containerPort": 8000}]), json!({"name": "none"}));
    let sidecar =
        |args: Value| json!({"name": "routing-proxy", "restartPolicy": "Always", "args": args, "ports": ports});
    // The flag counts where the declared port differs.
    for (args, expected) in [
        (json!(["--port=8000", "--vllm-port=8200", "--connector=nixlv2"]), 8_000),
        (json!(["--port", "8080", "--vllm-port", "8200"]), 8_080),
        (json!(["--model-server-port=8200"]), 8_000),
    ] {
        assert_eq!(port(&sidecar(args.clone()), &none), expected, "{args}");
        assert_eq!(port(&none, &sidecar(args.clone())), expected, "{args}: as one more container");
    }
    let mut annotated = with(sidecar(json!(["--vllm-port=8200"])), none.clone());
    annotated["metadata"]["annotations"] = json!({"envoy-pd/port": "8200"});
    assert_eq!(one(&read(annotated).unwrap()).address.port(), 8_200);
    assert_eq!(port(&sidecar(json!(["--port=15001"])), &none), 8_200, "a sidecar of another kind");
    let first = json!({"name": "once", "args": ["--vllm-port=8200"], "ports": ports});
    assert_eq!(port(&first, &none), 8_200, "a container that ends before the engine starts");
}

#[test]
fn addresses_that_are_no_engines_are_refused() {
    let value =
        |ip: &str| json!({"metadata": {"name": "p", "labels": {"llm-d.ai/role": "both"}}, "status": {"podIP": ip}});
    for ip in ["127.0.0.1", "169.254.169.254", "::1"] {
        assert!(refusal(&read(value(ip)).unwrap()).starts_with(ip), "{ip}");
    }
}

#[test]
fn prompt_lengths_that_cross_are_refused() {
    let crossed = json!({"envoy-pd/min-prompt-tokens": "9", "envoy-pd/max-prompt-tokens": "8"});
    let reason = refusal(&pod(json!({"model.aibrix.ai/name": "m"}), crossed));
    assert!(reason.contains("max_prompt_tokens: must not be below"), "{reason}");
    let named = json!({"model.aibrix.ai/config": r#"{"profiles": {"default": {"promptLenBucketMaxLength": 9}}}"#});
    assert_eq!(one(&pod(json!({"model.aibrix.ai/name": "m"}), named)).max_prompt_tokens, Some(9));
}

#[test]
fn a_worker_of_a_group_is_an_endpoint_where_it_serves() {
    let role = json!({"llm-d.ai/role": "decode", "leaderworkerset.sigs.k8s.io/worker-index": "1"});
    let with_ports = |labels: &Value, ports: Value| {
        read(json!({
            "metadata": {"name": "p", "namespace": "n", "labels": labels},
            "spec": {"containers": [{"name": "engine", "ports": ports}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
        }))
        .unwrap()
    };
    assert_eq!(classify(&with_ports(&role, json!([]))), PodClass::Other);
    assert_eq!(one(&with_ports(&role, json!([{"containerPort": 8000}]))).address.port(), 8_000);
    let leader = json!({"llm-d.ai/role": "decode", "leaderworkerset.sigs.k8s.io/worker-index": "0"});
    assert_eq!(one(&with_ports(&leader, json!([]))).address.port(), 8_000);
}

#[test]
fn an_endpoint_names_the_containers_that_serve_its_port() {
    let of = |annotations: Value, engine: Value, sidecar: &str| {
        let pod = json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"llm-d.ai/role": "decode"}, "annotations": annotations},
            "spec": {"containers": [
                {"name": "sidecar", "ports": [{"containerPort": 9000}]},
                {"name": "engine", "ports": [{"containerPort": 8100}]},
            ]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [
                {"name": "engine", "containerID": engine, "state": {"running": {}}},
                {"name": "sidecar", "containerID": sidecar, "state": {"running": {}}},
            ]},
        });
        one(&read(pod).unwrap()).container
    };
    let serving = |engine: &str, sidecar: &str| of(json!({"envoy-pd/port": "8100"}), engine.into(), sidecar);
    let first = serving("containerd://a", "containerd://s");
    assert!(first.is_some());
    assert_eq!(first, serving("containerd://a", "containerd://t"), "another container's restart is not the engine's");
    assert_ne!(first, serving("containerd://b", "containerd://s"));
    // A port that no container names may be any container's.
    let unnamed = |sidecar: &str| of(json!({"envoy-pd/port": "7000"}), "containerd://a".into(), sidecar);
    assert_ne!(unnamed("containerd://s"), unnamed("containerd://t"));
    // Without an id, the number of starts names the container that runs.
    let started = |id: Value, restarts: u64, state: Value| {
        let pod = json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"llm-d.ai/role": "decode"}},
            "spec": {"containers": [{"name": "engine", "ports": [{"containerPort": 8000}]}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [
                {"name": "engine", "containerID": id, "restartCount": restarts, "state": state},
            ]},
        });
        one(&read(pod).unwrap()).container
    };
    let running = json!({"running": {}});
    for none in [Value::Null, json!("")] {
        let first = started(none.clone(), 0, running.clone());
        assert!(first.is_some());
        assert_eq!(first, started(none.clone(), 0, running.clone()));
        assert_ne!(first, started(none.clone(), 1, running.clone()));
        // One that does not run yet is not known.
        assert_eq!(started(none, 1, json!({"waiting": {}})), None);
    }
    let with_id = |restarts| started(json!("containerd://a"), restarts, running.clone());
    assert_eq!(with_id(0), with_id(1), "the id says all");
    assert_eq!(one(&pod(json!({"llm-d.ai/role": "decode"}), json!({}))).container, None);
}
