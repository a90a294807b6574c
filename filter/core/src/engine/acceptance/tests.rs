use super::*;
use crate::body::scan;

fn refusable(api: Api, members: &str) -> bool {
    let body = format!("{{{members}}}");
    is_refusable(api, body.as_bytes(), &scan(body.as_bytes()).unwrap())
}

const ACCEPTED: &[(Api, &[&str])] = &[
    (
        Api::Chat,
        &[
            "",
            r#""max_tokens":1,"min_tokens":1"#,
            r#""max_tokens":4,"max_completion_tokens":8,"min_tokens":8"#,
            r#""max_tokens":null,"max_completion_tokens":null,"stop":null,"stop_token_ids":null,"n":null"#,
            r#""stop":"a","stop_token_ids":[0,1]"#,
            r#""stop":["a","b","c","d"],"stop_token_ids":[]"#,
            r#""stop":[]"#,
            r#""stream":true,"stream_options":{"include_usage":true,"other":5}"#,
            r#""stream":false,"stream_options":{}"#,
            r#""stream":null,"stream_options":null"#,
            r#""n":2,"temperature":0.5"#,
            r#""n":2,"temperature":0,"use_beam_search":true"#,
            r#""n":1,"temperature":0"#,
            r#""logprobs":true,"top_logprobs":20,"logprob_token_ids":[1,2]"#,
            r#""logprobs":false,"top_logprobs":0"#,
            r#""logprobs":null,"top_logprobs":null"#,
            r#""max_tokens":"x","max_tokens":5"#,
            r#""max_output_tokens":"of another API""#,
        ],
    ),
    (
        Api::Completions,
        &[
            r#""max_tokens":1"#,
            r#""min_tokens":16"#,
            r#""echo":true"#,
            r#""logprobs":5"#,
            r#""logprobs":0,"logprob_token_ids":[3]"#,
            r#""n":2,"best_of":3"#,
        ],
    ),
    (
        Api::Responses,
        &[
            "",
            r#""max_output_tokens":1,"store":true,"background":false"#,
            r#""top_logprobs":3,"stop":["a"],"truncation":"auto""#,
        ],
    ),
    (
        Api::Messages,
        &[
            r#""max_tokens":1"#,
            r#""max_tokens":9,"stop_sequences":["a"],"thinking":{"type":"disabled"}"#,
            r#""max_tokens":2000,"thinking":{"type":"enabled","budget_tokens":1024}"#,
        ],
    ),
    (
        Api::Generate,
        &[
            r#""sampling_params":{}"#,
            r#""sampling_params":{"max_tokens":5,"min_tokens":5,"stop":["a"],"logprobs":1,"detokenize":true}"#,
            r#""sampling_params":{"max_tokens":null},"max_tokens":"not read here""#,
        ],
    ),
];

const REFUSABLE: &[(Api, &[&str])] = &[
    (
        Api::Chat,
        &[
            r#""max_tokens":0"#,
            r#""max_tokens":-1"#,
            r#""max_tokens":"x""#,
            r#""max_tokens":1.5"#,
            r#""max_tokens":1e3"#,
            r#""max_tokens":true"#,
            r#""max_tokens":[5]"#,
            r#""max_tokens":18446744073709551616"#,
            r#""max_tokens":5,"max_tokens":"x""#,
            r#""max_completion_tokens":0,"max_tokens":5"#,
            r#""min_tokens":"x""#,
            r#""min_tokens":null"#,
            r#""min_tokens":-1"#,
            r#""max_tokens":1,"min_tokens":2"#,
            r#""max_tokens":9,"max_completion_tokens":1,"min_tokens":2"#,
            r#""stop":5"#,
            r#""stop":"""#,
            r#""stop":["a",""]"#,
            r#""stop":["a",5]"#,
            r#""stop":{"a":"b"}"#,
            r#""stop":["a","b","c","d","e"]"#,
            r#""stop_token_ids":["a"]"#,
            r#""stop_token_ids":5"#,
            r#""stop_token_ids":[1.5]"#,
            r#""stream":"yes""#,
            r#""stream":1"#,
            r#""stream_options":{"include_usage":true}"#,
            r#""stream":false,"stream_options":{"include_usage":true}"#,
            r#""stream":true,"stream_options":5"#,
            r#""stream":true,"stream_options":[]"#,
            r#""stream":true,"stream_options":{"include_usage":"x"}"#,
            r#""n":0"#,
            r#""n":"2""#,
            r#""n":99999"#,
            r#""n":2,"temperature":0"#,
            r#""best_of":"x""#,
            r#""n":3,"best_of":2"#,
            r#""use_beam_search":null"#,
            r#""use_beam_search":1"#,
            r#""echo":"x""#,
            r#""logprobs":5"#,
            r#""top_logprobs":5"#,
            r#""logprobs":true,"top_logprobs":21"#,
            r#""logprobs":true,"top_logprobs":-1"#,
            r#""logprobs":true,"top_logprobs":"x""#,
            r#""logprob_token_ids":[1]"#,
        ],
    ),
    (
        Api::Completions,
        &[
            r#""max_tokens":0"#,
            r#""min_tokens":17"#,
            r#""max_tokens":null,"min_tokens":17"#,
            r#""n":null"#,
            r#""logprobs":true"#,
            r#""logprobs":21"#,
            r#""logprob_token_ids":[1]"#,
            r#""logprobs":1,"logprob_token_ids":[1],"use_beam_search":true"#,
        ],
    ),
    (
        Api::Responses,
        &[
            r#""max_output_tokens":0"#,
            r#""max_output_tokens":"x""#,
            r#""background":true"#,
            r#""background":"x""#,
            r#""previous_response_id":5"#,
            r#""store":5"#,
            r#""top_logprobs":"x""#,
        ],
    ),
    (
        Api::Messages,
        &[
            "",
            r#""max_tokens":null"#,
            r#""max_tokens":0"#,
            r#""max_tokens":"x""#,
            r#""max_tokens":9,"stop_sequences":"a""#,
            r#""max_tokens":9,"stop_sequences":[""]"#,
            r#""max_tokens":1024,"thinking":{"type":"enabled","budget_tokens":1024}"#,
            r#""max_tokens":1024,"thinking":{"type":"enabled"}"#,
        ],
    ),
    (
        Api::Generate,
        &[
            "",
            r#""max_tokens":5"#,
            r#""sampling_params":null"#,
            r#""sampling_params":[]"#,
            r#""sampling_params":{"max_tokens":0}"#,
            r#""sampling_params":{"max_tokens":"x"}"#,
            r#""sampling_params":{"max_tokens":1,"min_tokens":2}"#,
            r#""sampling_params":{"stop":["a"],"detokenize":false}"#,
            r#""sampling_params":{"n":null}"#,
            r#""sampling_params":{},"stream":"x""#,
        ],
    ),
];

#[test]
fn what_every_engine_takes_is_accepted_and_all_else_is_refusable() {
    for (expected, cases) in [(false, ACCEPTED), (true, REFUSABLE)] {
        for (api, bodies) in cases {
            for body in *bodies {
                assert_eq!(refusable(*api, body), expected, "{api:?} {body}");
            }
        }
    }
}

#[test]
fn a_prompt_that_a_leg_would_cut_otherwise_is_not_split() {
    assert!(refusable(Api::Completions, r#""truncate_prompt_tokens":-1"#));
    assert!(refusable(Api::Chat, r#""truncate_prompt_tokens":5"#));
    assert!(refusable(Api::Responses, r#""truncation":"never""#));
    assert!(!refusable(Api::Chat, r#""truncation":"auto","truncate_prompt_tokens":null"#));
    for (api, body, expected) in [
        (Api::Responses, r#"{"truncation":"auto"}"#, true),
        (Api::Responses, r#"{"truncation":"disabled"}"#, false),
        (Api::Chat, r#"{"truncation":"auto"}"#, false),
    ] {
        assert_eq!(cuts_prompt(api, body.as_bytes(), &scan(body.as_bytes()).unwrap()), expected, "{body}");
    }
}

#[test]
fn the_limit_of_tokens_is_the_one_that_the_engine_reads() {
    for (api, body, expected) in [
        (Api::Chat, r#"{"max_tokens":4,"max_completion_tokens":8}"#, Some(8)),
        (Api::Chat, r#"{"max_tokens":4,"max_completion_tokens":null}"#, Some(4)),
        (Api::Chat, "{}", None),
        (Api::Completions, "{}", Some(16)),
        (Api::Completions, r#"{"max_tokens":5}"#, Some(5)),
        (Api::Responses, r#"{"max_output_tokens":7,"max_tokens":5}"#, Some(7)),
        (Api::Messages, r#"{"max_tokens":9}"#, Some(9)),
        (Api::Generate, r#"{"max_tokens":1,"sampling_params":{"max_tokens":3}}"#, Some(3)),
        (Api::Chat, r#"{"max_tokens":-4}"#, None),
        (Api::Chat, r#"{"max_tokens":"x"}"#, None),
    ] {
        assert_eq!(asked_tokens(api, body.as_bytes(), &scan(body.as_bytes()).unwrap()), expected, "{api:?} {body}");
    }
}

#[test]
fn an_answer_that_describes_the_prompt_is_found() {
    for (api, body, expected) in [
        (Api::Chat, r#"{"prompt_logprobs":0}"#, true),
        (Api::Chat, r#"{"prompt_logprobs":null}"#, false),
        (Api::Chat, r#"{"logprobs":true,"top_logprobs":5}"#, false),
        (Api::Chat, r#"{"echo":true}"#, true),
        (Api::Chat, r#"{"echo":false,"return_hidden_states":"last"}"#, true),
        (Api::Chat, r#"{"return_routed_experts":true}"#, true),
        (Api::Completions, r#"{"echo":true}"#, false),
        (Api::Completions, r#"{"echo":true,"logprobs":0}"#, true),
        (Api::Completions, r#"{"echo":false,"logprobs":1}"#, false),
        (Api::Completions, r#"{"echo":true,"logprobs":null}"#, false),
        (Api::Completions, r#"{"prompt_logprobs":-1}"#, true),
        (Api::Generate, r#"{"sampling_params":{"prompt_logprobs":1}}"#, true),
        (Api::Generate, r#"{"sampling_params":{"prompt_logprob_token_ids":[[1]]}}"#, true),
        (Api::Generate, r#"{"sampling_params":{"prompt_logprobs":null,"logprobs":1}}"#, false),
        (Api::Completions, r#"{"sampling_params":{"prompt_logprobs":1}}"#, false),
    ] {
        assert_eq!(describes_prompt(api, body.as_bytes(), &scan(body.as_bytes()).unwrap()), expected, "{api:?} {body}");
    }
}

#[test]
fn a_thinking_budget_is_found_where_one_is_asked_for() {
    for (api, body, expected) in [
        (Api::Messages, r#"{"thinking":{"type":"enabled","budget_tokens":1024}}"#, true),
        (Api::Messages, r#"{"thinking":{"budget_tokens":"x","type":"enabl\u0065d"}}"#, true),
        (Api::Messages, r#"{"thinking":{"type":"adaptive"}}"#, false),
        (Api::Messages, r#"{"thinking":5}"#, false),
        (Api::Messages, "{}", false),
        (Api::Chat, r#"{"thinking":{"type":"enabled","budget_tokens":1024}}"#, false),
    ] {
        assert_eq!(has_thinking_budget(api, body.as_bytes(), &scan(body.as_bytes()).unwrap()), expected, "{body}");
    }
}
