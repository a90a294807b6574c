//! Prompts with media: they count by themselves, and not as text.

use super::*;

/// A PNG of 560 by 700 pixels, 500 tokens, and then bytes of that kind.
fn image(bytes: usize, fill: char) -> String {
    let head = "iVBORw0KGgoAAAANSUhEUgAAAjAAAAK8CAIAAAAA";
    format!("data:image/png;base64,{head}{}", fill.to_string().repeat(bytes))
}

fn with_image(image: &str, text: &str) -> String {
    format!(
        r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"{image}"}}}},{{"type":"text","text":"{text}"}}]}}],"max_tokens":8}}"#
    )
}

fn prompt_tokens(t: &Fixture) -> i64 {
    t.worker.counts.pending(Metric::PromptTokens)
}

#[test]
fn a_large_image_counts_by_its_size_and_is_not_shed() {
    let limits = CONFIG.replacen('{', r#"{"pools":{"default":{"max_tokens":2000}},"#, 1);
    for bytes in [4_000, 4_000_000] {
        let mut t = configured(&limits);
        // Something is in flight, so that the limit counts.
        t.headers(&[]);
        t.body(r#"{"model":"m","messages":[],"max_tokens":8}"#);
        let mut other = Request::default();
        core::mem::swap(&mut t.request, &mut other);
        t.headers(&[("x-pd-deadline-ms", "100")]);
        let body = with_image(&image(bytes, 'A'), "What is this?");
        let before = prompt_tokens(&t);
        let outcome = t.body(&body);
        assert!(t.request.is_prefilling(), "{bytes}: {outcome:?}");
        let tokens = prompt_tokens(&t) - before;
        assert!((500..600).contains(&tokens), "{tokens}");
        let outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        assert_eq!(edited(&outcome, &body).len(), body.len() + PARAMS.len() + r#""kv_transfer_params":,"#.len());
        t.done();
        other.done(&mut t.worker, t.now);
        assert!(t.is_idle());
    }
}

#[test]
fn images_do_not_move_the_bytes_per_token_and_their_tokens_are_learnt() {
    let mut t = fixture();
    let bytes_per_token = |t: &Fixture| t.worker.state.table.bytes_per_token("default").unwrap();
    for n in 0..100 {
        t.request = Request::default();
        t.headers(&[]);
        t.body(&with_image(&format!("{}{n}", image(200_000, 'B')), "What is this?"));
        t.answer(200, &format!(r#"{{"usage":{{"prompt_tokens":1060}},"kv_transfer_params":{PARAMS}}}"#));
        t.done();
    }
    assert_eq!(bytes_per_token(&t), 4.0);
    let before = prompt_tokens(&t);
    t.request = Request::default();
    t.headers(&[]);
    t.body(&with_image(&image(200_000, 'C'), "And this?"));
    let tokens = prompt_tokens(&t) - before;
    assert!((900..1_100).contains(&tokens), "{tokens}");
}

#[test]
fn an_image_that_was_seen_is_matched_and_another_is_not() {
    let mut t = fixture();
    let mut ask = |image: &str, text: &str| {
        t.request = Request::default();
        t.headers(&[]);
        let mut outcome = t.body(&with_image(image, text));
        if t.request.is_prefilling() {
            outcome = t.answer(200, &format!(r#"{{"kv_transfer_params":{PARAMS}}}"#));
        }
        t.done();
        (state(&outcome, REASON).to_owned(), state(&outcome, MATCHED_TOKENS).parse::<u64>().unwrap())
    };
    assert_eq!(ask(&image(9_000, 'D'), "What is this?"), ("prefilled".to_owned(), 0));
    let (reason, matched) = ask(&image(9_000, 'D'), "Tell me more.");
    assert!(reason == "cached" && matched > 400, "{reason} {matched}");
    // Of another image the text before it is the same.
    let (reason, matched) = ask(&image(9_000, 'E'), "What is this?");
    assert!(reason == "prefilled" && matched < 200, "{reason} {matched}");
    let remote = "https://images/a.png";
    assert_eq!(ask(remote, "What is this?").0, "prefilled");
    assert_eq!(ask(remote, "What is that?").0, "cached");
}

#[test]
fn media_in_other_requests_do_not_fill_limits() {
    let limits = CONFIG.replacen('{', r#"{"pools":{"default":{"max_tokens":8000}},"#, 1);
    let mut t = configured(&limits);
    let mut requests = Vec::new();
    let image = image(1_000_000, 'A');
    let base64 = image.split_once(',').unwrap().1;
    let chat = with_image(&image, "a");
    for (path, body) in [
        ("/v1/embeddings", chat.clone()),
        ("/tokenize", chat.clone()),
        ("/v1/messages/count_tokens", chat),
        // SGLang, Ollama, Cohere, Jina: other names, and lists.
        ("/generate", format!(r#"{{"model":"m","text":"a","image_data":"{base64}"}}"#)),
        ("/generate", format!(r#"{{"model":"m","text":"a","image_data":["{base64}","{image}"]}}"#)),
        ("/api/chat", format!(r#"{{"model":"m","messages":[{{"role":"user","content":"a","images":["{base64}"]}}]}}"#)),
        ("/v2/embed", format!(r#"{{"model":"m","images":["{image}"]}}"#)),
        (
            "/rerank",
            format!(
                r#"{{"model":"m","query":"a","documents":[{{"content":[{{"type":"image_url","image_url":{{"url":"{image}"}}}}]}}]}}"#
            ),
        ),
    ] {
        let headers = Headers::from_pairs([(":method", "POST"), (":path", path), (":authority", "a")]);
        let mut request = Request::default();
        request.headers(&mut t.worker, headers, false, t.now);
        let outcome = request.body(&mut t.worker, body.as_bytes(), t.now);
        assert_eq!(state(&outcome, DECISION), "passed", "{path}: {:?}", outcome.effects.last());
        requests.push(request);
    }
    requests.iter_mut().for_each(|request| request.done(&mut t.worker, t.now));
}
