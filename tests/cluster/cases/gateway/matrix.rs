//! Policies and filters of Envoy Gateway on the route of split requests: each works, or `pd-control check` refuses it and says
//! why.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;
use http::{HeaderValue, Request};
use pd_support::body::words;
use pd_support::client::{Answer, Client, Http};
use pd_support::places;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::cluster::{Cluster, OURS, kubectl, until};
use crate::listener::{self, Listener};
use crate::texts::{
    BACKENDS, BUFFER, COMPRESSOR, ENDLESS, EXPLAIN, FILTER, FILTERS, GATEWAY, HEADER, LAST, POLICIES, ROUTES, SET,
    TRIGGERS,
};

/// Requests that have to be split.
const REQUESTS: u64 = 5;

/// A token of `alice` that lasts until 2100, and the key that it was signed with.
const TOKEN: &str = "eyJhbGciOiJSUzI1NiIsImtpZCI6InRlc3QifQ.eyJpc3MiOiJ0ZXN0cyIsInN1YiI6ImFsaWNlIiwiZXhwIjo0MTAyNDQ0O\
    DAwfQ.uqdqTn8IUCj_nDp9JmrMEfZNHWnQo_n7o-7-H9r1DH-95z7fzjIkWrwpyOL4JyLfXgVWZpQ6ww9-PxpBGwmX4B2h8S\
    j_heXd-K6oRaCIYkBVDY1fjzANBvMc7UQd2Hcmuk1RD9FoA-AwCZ8oitWx15dwZCY4nDtC7Oq2H89ZlAKUz0UGGbKnIAVEL3\
    wRFDPhZZ8TQOQQUXtsqzW1FZm97w3qtVGoY3BpHaG1Z-QrHvoTgU8RzP63rX-3bmyzpAcP6mYMDoMZE5vHRWDDBAVpPSir2P\
    JmFnBu4x4KZARe6o6JtAU4qfc6lvdftM75wVNtygc8yNbIN33vsLCruNUImA";
const KEYS: &str = r#"{"keys":[{"kty":"RSA","alg":"RS256","use":"sig","kid":"test","e":"AQAB","n":"wFtfjXuDv5VXASg7KTrUhUaEyjJAJ1EHawtnHXEAc3UlFBs4NR7sd639N61RHEWHteK74C0STzib1KPHirQSVYPFEYO7_5sEjwZDs0H6Jdo82Hre67cH6vKAG-PY-AYu69l3hfiKLNVjzCcZ7gmBHfOez8927ajxD25pcezgYspDGkz0K3qlaAl3jOn9t7e5tjU47PGBj2S35-HAJp7xDYf_cFNtxPPVdX2a4HxW6MJ1GKuCztTKsPUPcROcyyfK0p8jbX9cTgrBBfzGbbG89mxOXrYZ5WQHB-JuSpOmNBv-P8AkdIy3pLBSM4717wTsexO8F_0sTQMSuYZwyRdwFQ"}]}"#;

/// Every way by which a `SecurityPolicy` asks for credentials, and CORS.
fn security() -> String {
    format!(
        "---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: SecurityPolicy
metadata: {{name: test-clients, namespace: llm}}
spec:
  targetRefs:
  - {{group: gateway.networking.k8s.io, kind: HTTPRoute, name: pd}}
  cors: {{allowOrigins: ['https://app.example'], allowMethods: [POST], allowHeaders: [x-api-key]}}
  apiKeyAuth:
    credentialRefs: [{{name: test-keys}}]
    extractFrom: [{{headers: [x-api-key]}}]
    forwardClientIDHeader: x-client-id
    sanitize: true
  jwt:
    providers:
    - name: tests
      issuer: tests
      localJWKS: {{type: Inline, inline: '{KEYS}'}}
      claimToHeaders: [{{header: x-user, claim: sub}}]
      extractFrom: {{headers: [{{name: x-token}}]}}
  extAuth:
    headersToExtAuth: [x-api-key]
    bodyToExtAuth: {{maxRequestBytes: 16777216}}
    http:
      backendRefs: [{{name: {}, port: 80}}]
      pathOverride: /auth
      headersToBackend: [x-auth-user]
---
apiVersion: v1
kind: Secret
metadata: {{name: test-keys, namespace: llm}}
stringData: {{client-a: good}}
",
        listener::NAME
    )
}

const CREDENTIAL: &str = "---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: HTTPRouteFilter
metadata: {name: test-credential, namespace: llm}
spec:
  credentialInjection:
    header: x-engine-key
    credential: {valueRef: {name: test-credential}}
---
apiVersion: v1
kind: Secret
metadata: {name: test-credential, namespace: llm}
stringData: {credential: engines-secret}
";

impl Cluster {
    /// Puts a text in behind another one, which stands in the file once.
    fn put(&self, file: &str, behind: &str, text: &str) {
        self.edit(file, behind, &format!("{behind}{text}"));
    }

    /// What `pd-control check` says of the manifests: whether it takes them, and its faults and warnings.
    pub async fn checked(&self) -> (bool, String) {
        let overlay = self.overlay().display().to_string();
        let kubectl = std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".to_owned());
        let rendered = Command::new(kubectl).args(["kustomize", &overlay]).output().await.expect("kubectl");
        assert!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
        let mut check = Command::new(places::control());
        check.args(["check", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut check = check.spawn().expect("pd-control");
        check.stdin.take().expect("stdin").write_all(&rendered.stdout).await.expect("written");
        let done = check.wait_with_output().await.expect("pd-control");
        (done.status.success(), String::from_utf8_lossy(&done.stderr).into_owned())
    }

    /// Applies what `pd-control check` must take.
    async fn apply_checked(&self) {
        let (is_good, faults) = self.checked().await;
        assert!(is_good, "{faults}");
        self.apply().await;
    }

    /// Prefill legs, decode legs, and what went wrong at any engine.
    async fn legs(&self) -> [u64; 3] {
        let mut wrong = 0;
        for label in ["app=prefill", "app=decode"] {
            wrong += self.sum(label, |stats| stats.wrong_text + stats.failed_pulls + stats.local_prefills).await;
        }
        let prefill = self.sum("app=prefill", |stats| stats.prefill_legs).await;
        [prefill, self.sum("app=decode", |stats| stats.decode_legs).await, wrong]
    }

    /// Requests are split exactly, with these headers.
    async fn splits(&self, path: &str, headers: &[(&str, &[u8])]) {
        let mut client = Client::connect(self.address, Http::One).await;
        let before = self.legs().await;
        for _ in 0..REQUESTS {
            let answer = ask(&mut client, path, "sim", 2, headers).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        let after = self.legs().await;
        let done: Vec<_> = after.iter().zip(before).map(|(after, before)| after - before).collect();
        assert_eq!(done, [REQUESTS, REQUESTS, 0], "prefill legs, decode legs, faults at engines");
    }

    /// The last requests that engines with a label got.
    pub async fn recorded(&self, label: &str) -> Vec<Value> {
        let mut all = Vec::new();
        for pod in self.pod_names(OURS, label).await {
            let path = format!("/api/v1/namespaces/{OURS}/pods/{pod}:8000/proxy/requests");
            let request = Request::get(path).body(Vec::new()).expect("a request");
            let requests = self.client.request::<Value>(request).await.expect("requests");
            all.extend(requests.as_array().cloned().unwrap_or_default());
        }
        all
    }

    /// Both legs of some request had a header with this value.
    async fn is_on_both_legs(&self, name: &str, value: &str) {
        for label in ["app=prefill", "app=decode"] {
            let recorded = self.recorded(label).await;
            let has = |request: &Value| {
                let headers = request["headers"].to_string().to_ascii_lowercase();
                headers.contains(&format!("\"{name}\"")) && headers.contains(value)
            };
            assert!(recorded.iter().any(has), "{name}: {value} at {label}: {:?}", recorded.last());
        }
    }

    /// Engines keep the requests that they get.
    fn record(&self) {
        let path = self.manifests().join("overlays/sim/engines.yaml");
        let text = std::fs::read_to_string(&path).expect("engines.yaml");
        std::fs::write(path, text.replace("--speed, '0.1'", "--speed, '0.1', --record, '16'")).expect("engines.yaml");
    }
}

async fn ask(client: &mut Client, path: &str, model: &str, tokens: u32, headers: &[(&str, &[u8])]) -> Answer {
    let prompt = words(&format!("{:?}", std::time::SystemTime::now()), 4_000);
    let body = format!(r#"{{"model":"{model}","max_tokens":{tokens},"ignore_eos":true,"prompt":"{prompt}"}}"#);
    client.send(client.json(path, body, headers)).await
}

const COMPLETIONS: &str = "/v1/completions";

async fn delete(kind: &str, names: &[&str]) {
    let arguments = [&["delete", "--namespace", OURS, "--ignore-not-found", kind][..], names].concat();
    kubectl(&arguments).await.expect("deleted");
}

/// JWT, API keys, external authorization that reads the body, and a credential that the route adds: what they add to a request
/// is on both legs, and what they refuse is not computed.
#[tokio::test]
async fn credentials_are_checked_and_reach_both_legs() {
    let mut cluster = Cluster::new("sim").await;
    cluster.record();
    cluster.up().await;
    let listener = Listener::start().await;
    cluster.put(POLICIES, LAST, &(security() + &listener.manifest() + CREDENTIAL));
    let extension = "    - type: ExtensionRef\n      extensionRef: {group: gateway.envoyproxy.io, kind: HTTPRouteFilter, name: \
                     test-credential}\n";
    cluster.edit(ROUTES, FILTERS, &format!("    filters:\n{extension}    - type: RequestHeaderModifier\n"));
    cluster.apply_checked().await;

    let key: (&str, &[u8]) = ("x-api-key", b"good");
    let token: (&str, &[u8]) = ("x-token", TOKEN.as_bytes());
    let mut client = Client::connect(cluster.address, Http::One).await;
    until("a token is asked for", async || {
        let without = ask(&mut client, COMPLETIONS, "sim", 1, &[key]).await.status;
        let with = ask(&mut client, COMPLETIONS, "sim", 1, &[key, token]).await.status;
        (without == 401 && with == 200).then_some(())
    })
    .await;
    let before = cluster.legs().await;
    for headers in [&[][..], &[token], &[key, ("x-token", b"forged")]] {
        assert_eq!(ask(&mut client, COMPLETIONS, "sim", 1, headers).await.status, 401, "{headers:?}");
    }
    assert_eq!(cluster.legs().await, before, "nothing was computed");
    cluster.splits(COMPLETIONS, &[key, token]).await;
    for (name, value) in
        [("x-user", "alice"), ("x-client-id", "client-a"), ("x-auth-user", "bob"), ("x-engine-key", "engines-secret")]
    {
        cluster.is_on_both_legs(name, value).await;
    }
    let asked = listener.requests();
    assert!(
        asked.iter().any(|request| request.starts_with("POST /auth") && request.contains("max_tokens")),
        "{asked:?}"
    );

    let mut preflight = client.request("OPTIONS", COMPLETIONS);
    for (name, value) in [("origin", "https://app.example"), ("access-control-request-method", "POST")] {
        preflight.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    let answer = client.send(preflight).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, Some("https://app.example")));
    let of_browser = ask(&mut client, COMPLETIONS, "sim", 1, &[key, token, ("origin", b"https://app.example")]).await;
    assert_eq!(of_browser.header("access-control-allow-origin"), Some("https://app.example"));

    delete("securitypolicy", &["test-clients"]).await;
    delete("secret", &["test-keys", "test-credential"]).await;
    delete("service", &[listener::NAME]).await;
    delete("endpointslice", &[listener::NAME]).await;
    Cluster::ready().await;
    delete("httproutefilter", &["test-credential"]).await;
}

/// Answers are compressed after the filter has read and changed them. Headers that a policy adds reach both legs where it adds
/// them early; those of the route reach the decode leg, which `pd-control check` warns of.
#[tokio::test]
async fn compression_and_changes_of_headers_work() {
    let mut cluster = Cluster::new("sim").await;
    cluster.record();
    cluster.put(POLICIES, BUFFER, "  compression: [{type: Gzip}]\n");
    cluster.put(POLICIES, LAST, "      add: [{name: x-tenant, value: early}]\n");
    cluster.put(FILTER, HEADER, "      models: {other: {targets: [{model: sim}], answer: asked}}\n");
    cluster.edit(ROUTES, SET, &SET.replace("set:\n", "set:\n        - {name: x-late, value: of-the-route}\n"));
    cluster.edit(ROUTES, EXPLAIN, &format!("        - {{name: x-served-by, value: pd}}\n{EXPLAIN}"));
    cluster.pin(&std::fs::read(places::wasm()).expect("the module")).await;
    let (is_good, warnings) = cluster.checked().await;
    assert!(is_good && warnings.contains("sets header x-late, which prefill legs lack"), "{warnings}");
    cluster.up().await;

    let mut client = Client::connect(cluster.address, Http::One).await;
    let compressed = until("answers are compressed", async || {
        let answer = ask(&mut client, COMPLETIONS, "other", 20, &[("accept-encoding", b"gzip")]).await;
        (answer.status == 200 && answer.header("content-encoding") == Some("gzip")).then_some(answer)
    })
    .await;
    let mut text = String::new();
    GzDecoder::new(&compressed.body[..]).read_to_string(&mut text).expect("gzip");
    let answer: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(answer["model"], "other", "the filter has replaced the name before: {text}");
    assert_eq!(compressed.header("x-served-by"), Some("pd"));
    cluster.splits(COMPLETIONS, &[("accept-encoding", b"gzip")]).await;
    cluster.is_on_both_legs("x-tenant", "early").await;
    let late = |request: &Value| request["headers"].to_string().contains("of-the-route");
    assert!(cluster.recorded("app=decode").await.iter().any(late));
    assert!(!cluster.recorded("app=prefill").await.iter().any(late));
    Cluster::ready().await;
}

/// The route removes a prefix from the path, and the filter's configuration names the prefix.
#[tokio::test]
async fn paths_that_the_route_rewrites_are_split() {
    let cluster = Cluster::ready().await;
    let rule = "  - matches: [{path: {type: PathPrefix, value: /team/v1}}]
    timeouts: {request: 0s}
    filters:
    - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /v1}}}
    - type: RequestHeaderModifier
      requestHeaderModifier:
        set:
        - {name: x-pd-destination, value: '%FILTER_STATE(wasm.pd.destination:PLAIN)%'}
    backendRefs: [{name: engines, port: 8000}]
";
    cluster.put(ROUTES, BACKENDS, rule);
    let (is_good, faults) = cluster.checked().await;
    assert!(!is_good && faults.contains("takes /team off the path"), "{faults}");
    cluster.put(FILTER, HEADER, "      path_prefixes: [/team]\n");
    cluster.apply_checked().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    until("the prefix is known", async || {
        (ask(&mut client, "/team/v1/completions", "sim", 1, &[]).await.status == 200).then_some(())
    })
    .await;
    cluster.splits("/team/v1/completions", &[]).await;
    cluster.splits(COMPLETIONS, &[]).await;
    Cluster::ready().await;
}

/// `pd-control check` finds settings that would send KV parameters twice or to the wrong engine, and protocols that an
/// engine does not speak.
#[tokio::test]
async fn what_does_not_work_is_refused_by_check() {
    const SESSION: &str = "    sessionPersistence: {type: Cookie, sessionName: s}\n";
    let image = Cluster::new("sim").await.pin(&std::fs::read(places::wasm()).expect("the module")).await;
    for (file, from, to, why) in [
        (ROUTES, BACKENDS, format!("{BACKENDS}{SESSION}"), "takes the endpoint of the session"),
        (POLICIES, BUFFER, format!("{BUFFER}  useClientProtocol: true\n"), "which uvicorn does not speak"),
        (POLICIES, TRIGGERS, TRIGGERS.replace("refused-stream", "5xx"), "5xx: must be [connect-failure"),
        (POLICIES, TRIGGERS, String::new(), "retries 503 and other answers"),
        (GATEWAY, COMPRESSOR, String::new(), "reads no compressed ones"),
    ] {
        let cluster = Cluster::new("sim").await;
        cluster.pin_name(&image);
        let (is_good, said) = cluster.checked().await;
        assert!(is_good, "{said}");
        cluster.edit(file, from, &to);
        let (is_good, said) = cluster.checked().await;
        assert!(!is_good && said.contains(why), "{why}: {said}");
    }
}

/// The copy that a mirror gets has the KV parameters, so a second engine would take the KV cache.
#[tokio::test]
async fn a_mirror_would_get_kv_parameters_and_is_refused_by_check() {
    let cluster = Cluster::ready().await;
    let listener = Listener::start().await;
    cluster.put(POLICIES, LAST, &listener.manifest());
    let mirror = format!(
        "    - {{type: RequestMirror, requestMirror: {{backendRef: {{name: {}, port: 80}}}}}}\n",
        listener::NAME
    );
    cluster.edit(ROUTES, FILTERS, &format!("    filters:\n{mirror}    - type: RequestHeaderModifier\n"));
    let (is_good, faults) = cluster.checked().await;
    assert!(!is_good && faults.contains("the copy has the KV parameters"), "{faults}");
    cluster.apply().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    until("a copy comes", async || {
        // 500 while Envoy Gateway does not know the mirror's Service.
        ask(&mut client, COMPLETIONS, "sim", 1, &[]).await;
        let copies = listener.requests();
        copies.iter().any(|copy| copy.contains("do_remote_prefill")).then_some(())
    })
    .await;
    delete("service", &[listener::NAME]).await;
    delete("endpointslice", &[listener::NAME]).await;
    Cluster::ready().await;
}

/// Envoy Gateway knows no endpoints of an `InferencePool`.
#[tokio::test]
async fn an_inference_pool_as_backend_answers_500_and_is_refused_by_check() {
    const POOL: &str = "    - {group: inference.networking.k8s.io, kind: InferencePool, name: engines}\n";
    let cluster = Cluster::ready().await;
    cluster.edit(ROUTES, BACKENDS, POOL);
    let (is_good, faults) = cluster.checked().await;
    assert!(!is_good && faults.contains("an InferencePool has no endpoints for Envoy Gateway (500)"), "{faults}");
    cluster.apply().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    until("the route answers 500", async || {
        (ask(&mut client, COMPLETIONS, "sim", 1, &[]).await.status == 500).then_some(())
    })
    .await;
    Cluster::ready().await;
}

/// A limit for requests cuts answers off, which `pd-control check` warns of.
#[tokio::test]
async fn a_limit_for_requests_cuts_answers_off() {
    let cluster = Cluster::ready().await;
    cluster.edit(ROUTES, ENDLESS, "    timeouts: {request: 1s}\n");
    let (is_good, said) = cluster.checked().await;
    assert!(is_good && said.contains("is 1s: an answer that takes longer is cut off"), "{said}");
    cluster.apply().await;
    let mut client = Client::connect(cluster.address, Http::One).await;
    until("a long answer is cut off", async || {
        let begun = Instant::now();
        let answer = ask(&mut client, COMPLETIONS, "sim", 2_000, &[]).await;
        (answer.status == 504 && begun.elapsed() < Duration::from_secs(3)).then_some(())
    })
    .await;
    cluster.splits(COMPLETIONS, &[]).await;
    Cluster::ready().await;
}
