//! Which paths of an engine a client may reach.
//!
//! An engine serves its administration beside its APIs (vLLM `/reset_prefix_cache`, `/sleep`, `/collective_rpc`, SGLang
//! `/flush_cache`, `/update_weights_from_disk`), so a path is refused unless it is one of an inference API, or the
//! configuration allows it.

/// Paths of inference APIs; one that ends in `/*` is all below it. Sources: the routes of vLLM 0.33, SGLang 0.5.23 and
/// TensorRT-LLM that compute something for a client, and what such clients ask to find a server.
pub const INFERENCE: &[&str] = &[
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/completions",
    "/v1/completions/render",
    "/v1/responses",
    "/v1/responses/*",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/messages/render",
    "/inference/v1/generate",
    "/generate",
    "/generative_scoring",
    "/v1/decisions",
    "/v1/systemone",
    "/v1/embeddings",
    "/embeddings",
    "/encode",
    "/pooling",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/classify",
    "/v1/classify",
    "/v2/chat",
    "/cohere/v2/chat",
    "/cohere/v2/chat/render",
    "/v2/embed",
    "/tokenize",
    "/detokenize",
    "/v1/tokenize",
    "/v1/detokenize",
    "/v1/audio/*",
    "/v1/images/*",
    "/v1/videos",
    "/v1/videos/*",
    "/v1/realtime",
    "/v1/models",
    "/v1/models/*",
    "/api/chat",
    "/api/generate",
    "/api/show",
    "/api/tags",
    "/invocations",
    "/vertex_generate",
    "/health",
    "/ping",
    "/version",
];

/// The path that an engine knows: without a prefix that the gateway's route takes away later, and without a slash at its
/// end. Of several prefixes the longest counts.
///
/// `path` has its percent-encoding undone and no query. A prefix stands for whole segments: `/team` is none of `/teams/v1`.
#[must_use]
pub fn engines_path<'a>(path: &'a [u8], prefixes: &[String]) -> &'a [u8] {
    let without = |prefix: &String| path.strip_prefix(prefix.as_bytes()).filter(|rest| rest.first() == Some(&b'/'));
    let path = prefixes.iter().filter_map(without).min_by_key(|rest| rest.len()).unwrap_or(path);
    match path {
        [rest @ .., b'/'] if !rest.is_empty() => rest,
        path => path,
    }
}

/// Whether a path, percent-encoding undone and without a query, is one of an inference API.
#[must_use]
pub fn is_inference(path: &[u8]) -> bool {
    INFERENCE.iter().any(|pattern| matches(pattern, path))
}

/// Whether a path is the one that the pattern names or, where the pattern ends in `/*`, lies below it.
#[must_use]
pub fn matches(pattern: &str, path: &[u8]) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => {
            let below = path.strip_prefix(prefix.as_bytes());
            // A server may resolve dots: what leaves the folder is not below it.
            below.is_some_and(|below| !below.is_empty() && below.split(|byte| *byte == b'/').all(|part| part != b".."))
        }
        None => pattern.as_bytes() == path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_routes_and_a_slash_at_the_end_are_seen_through() {
        let prefixes = ["/team".to_owned(), "/team/a".to_owned(), "/openai".to_owned()];
        for (path, expected) in [
            ("/team/v1/chat/completions", "/v1/chat/completions"),
            ("/team/a/v1/chat/completions/", "/v1/chat/completions"),
            ("/openai/v1/models", "/v1/models"),
            ("/teams/v1/models", "/teams/v1/models"),
            ("/team", "/team"),
            ("/v1/team/a", "/v1/team/a"),
            ("/team/", "/"),
            ("/", "/"),
            ("", ""),
        ] {
            assert_eq!(engines_path(path.as_bytes(), &prefixes), expected.as_bytes(), "{path}");
        }
    }

    #[test]
    fn inference_paths_are_known_and_administration_is_not() {
        for path in ["/v1/chat/completions", "/v1/responses/resp_1/cancel", "/v1/audio/transcriptions", "/tokenize"] {
            assert!(is_inference(path.as_bytes()), "{path}");
        }
        for path in [
            "/reset_prefix_cache",
            "/server_info",
            "/scale_elastic_ep",
            "/sleep",
            "/wake_up",
            "/collective_rpc",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/start_profile",
            "/flush_cache",
            "/update_weights_from_disk",
            "/metrics",
            "/docs",
            "/",
            "",
            "/v1/audio/",
            "/v1/audio/../load_lora_adapter",
            "/v1/responses/../../sleep",
            "/v1/chat/completions/../../../sleep",
            "/V1/CHAT/COMPLETIONS",
        ] {
            assert!(!is_inference(path.as_bytes()), "{path}");
        }
    }
}
