//! Removes from a prompt, before it is hashed, the parts that do not reach the model: marks, and Claude Code's own
//! line.
//!
//! - A mark says how far a provider should cache a prompt. It is a member `cache_control` (Anthropic's API, LiteLLM on
//!   every API) or `prompt_cache_breakpoint` (OpenAI's API), and stands at another place in each request of a
//!   conversation. Engines ignore marks, so an engine's prefix cache does not tell apart two prompts that differ only
//!   in their marks.
//! - A mark must stand in a content part. Agents therefore write a text with a mark as a list of one part, and the same
//!   text as a plain string in the next request.
//! - Claude Code puts a line of its own into the system text, with a hash of the request. vLLM leaves this line out
//!   (`vllm#36829`).

use std::borrow::Cow;

use memchr::memmem;

use super::json::{CACHE_MARKERS, elements, members, string};
use super::{Api, Key};

/// Begin of the text that Claude Code adds to the system text.
const BILLING: &str = "x-anthropic-billing-header";

/// A part of a prompt as the engine's prefix cache sees it: a text to hash, not to send.
///
/// - `value` does not change if it has no mark, or if the engine may put such members into the prompt, as it does with tools
///   of OpenAI's APIs.
/// - In a part with a mark, the text lacks the marks of tools, system text, messages, items of an input and their content.
///   A content of one text becomes that text.
/// - Members of the same names deeper inside, such as arguments of a tool, stay.
///
/// - `has_marker`: the body may have a mark, so the value is searched.
/// - `drops_billing`: the engine leaves out Claude Code's own line.
#[must_use]
pub fn without_markers(api: Api, key: Key, value: &[u8], has_marker: bool, drops_billing: bool) -> Cow<'_, [u8]> {
    let has = |text: &str| memmem::find(value, text.as_bytes()).is_some();
    let drops_billing = drops_billing && key == Key::System && has(BILLING);
    let is_read = match key {
        Key::System | Key::Tools => api == Api::Messages,
        Key::Messages => matches!(api, Api::Messages | Api::Chat),
        Key::Input => api == Api::Responses,
        _ => false,
    };
    if !is_read || value.first() != Some(&b'[') || !(drops_billing || has_marker && CACHE_MARKERS.into_iter().any(has))
    {
        return Cow::Borrowed(value);
    }
    let mut out = Vec::with_capacity(value.len());
    match key {
        Key::System => content(&mut out, value, drops_billing, 0),
        Key::Messages | Key::Input => list(&mut out, elements(value), |out, message| {
            object(out, message, |out, name, value| {
                // The output of a tool is an item of an input by itself.
                let is_content = name == "content" || name == "output" && key == Key::Input;
                if is_content { content(out, value, false, 0) } else { out.extend_from_slice(value) }
            })
        }),
        _ => {
            list(&mut out, elements(value), |out, tool| object(out, tool, |out, _, value| out.extend_from_slice(value)))
        }
    }
    Cow::Owned(out)
}

/// Depth of nested contents: a content may hold a tool's result, which holds a content.
const MAX_DEPTH: u32 = 2;

/// A text, or a list of content parts.
fn content(out: &mut Vec<u8>, value: &[u8], drops_billing: bool, depth: u32) {
    if value.first() != Some(&b'[') || depth >= MAX_DEPTH {
        out.extend_from_slice(value);
        return;
    }
    let is_kept = |part: &&[u8]| !(drops_billing && only_text(part).is_some_and(is_billing));
    let mut parts = elements(value).filter(is_kept);
    if let (Some(text), None) = (parts.next().and_then(only_text), parts.next()) {
        out.extend_from_slice(text);
        return;
    }
    list(out, elements(value).filter(is_kept), |out, part| {
        object(out, part, |out, key, value| {
            if key == "content" {
                content(out, value, false, depth.saturating_add(1))
            } else {
                out.extend_from_slice(value)
            }
        });
    });
}

/// The text of a part that has a text, a type and perhaps a mark, and nothing else.
fn only_text(part: &[u8]) -> Option<&[u8]> {
    let (mut text, mut is_text) = (None, false);
    for (key, value) in members(part) {
        match &*key {
            "type" => is_text = matches!(value, b"\"text\"" | b"\"input_text\""),
            "text" if value.first() == Some(&b'"') => text = Some(value),
            name if CACHE_MARKERS.contains(&name) => {}
            _ => return None,
        }
    }
    text.filter(|_| is_text)
}

fn is_billing(text: &[u8]) -> bool {
    string(text).is_some_and(|text| text.starts_with(BILLING))
}

fn list<'a>(out: &mut Vec<u8>, items: impl Iterator<Item = &'a [u8]>, write: impl Fn(&mut Vec<u8>, &'a [u8])) {
    out.push(b'[');
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write(out, item);
    }
    out.push(b']');
}

/// An object without a mark. What is no object stays.
fn object(out: &mut Vec<u8>, value: &[u8], write: impl Fn(&mut Vec<u8>, &str, &[u8])) {
    if value.first() != Some(&b'{') {
        out.extend_from_slice(value);
        return;
    }
    out.push(b'{');
    for (key, value) in members(value).filter(|(key, _)| !CACHE_MARKERS.contains(&&**key)) {
        out.push(b'"');
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(b"\":");
        write(out, &key, value);
        out.push(b',');
    }
    out.push(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::scan;

    fn seen(api: Api, key: Key, value: &str) -> String {
        let body = format!(r#"{{"a":{value}}}"#);
        let has_marker = scan(body.as_bytes()).map_or(true, |scan| scan.has_cache_marker);
        String::from_utf8(without_markers(api, key, value.as_bytes(), has_marker, true).into_owned()).unwrap()
    }

    #[test]
    fn only_the_name_of_a_member_inside_a_value_is_a_marker() {
        let has = |body: &str| scan(body.as_bytes()).unwrap().has_cache_marker;
        for name in CACHE_MARKERS {
            assert!(has(&format!(r#"{{"messages":[{{"content":[{{"{name}":null}}]}}],"model":"m"}}"#)));
            assert!(has(&format!(r#"{{"tools":[{{"a":1,"{name}":{{}}}}]}}"#)));
            assert!(!has(&format!(r#"{{"{name}":1,"messages":["{name}",{{"content":"\"{name}\":1","{name}s":1}}]}}"#)));
        }
    }

    #[test]
    fn marks_that_move_leave_no_trace() {
        const MARK: &str = r#","cache_control":{"type":"ephemeral","ttl":"1h"}"#;
        const BREAKPOINT: &str = r#","prompt_cache_breakpoint":{"mode":"explicit"}"#;
        for (api, key, text) in [
            (Api::Messages, Key::Tools, r#"[{"name":"a","input_schema":{"type":"object"}~},{"name":"b"~}]"#),
            (Api::Messages, Key::System, r#"[{"type":"text","text":"one"~},{"type":"text","text":"two"~}]"#),
            (
                Api::Messages,
                Key::Messages,
                r#"[{"role":"user","content":[{"type":"text","text":"a"~},{"type":"image","source":{"type":"url"}~}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":[{"type":"text","text":"b"~},{"type":"text","text":"c"~}]~}]}]"#,
            ),
            (
                Api::Chat,
                Key::Messages,
                r#"[{"role":"system","content":[{"type":"text","text":"a"~},{"type":"text","text":"b"~}]},{"role":"user","content":"c"~}]"#,
            ),
            (
                Api::Responses,
                Key::Input,
                r#"[{"role":"user","content":[{"type":"input_text","text":"a"~},{"type":"input_image","image_url":"u"~}]},{"type":"function_call_output","call_id":"c","output":[{"type":"input_text","text":"b"~},{"type":"input_text","text":"c"~}]~}]"#,
            ),
        ] {
            let places = text.matches('~').count();
            let marked = |mark: &str, places: &[usize]| {
                let pieces: Vec<_> = text.split('~').collect();
                let mark = |i: usize| if places.contains(&i) { mark } else { "" };
                pieces.iter().enumerate().map(|(i, piece)| format!("{piece}{}", mark(i))).collect::<String>()
            };
            let first = seen(api, key, &marked(MARK, &[0]));
            assert!(!first.contains("cache_control"));
            for place in 0..places {
                for mark in [MARK, BREAKPOINT] {
                    assert_eq!(seen(api, key, &marked(mark, &[place])), first);
                    assert_eq!(seen(api, key, &marked(mark, &[0, place])), first);
                }
            }
        }
    }

    #[test]
    fn a_text_is_the_same_as_a_string_and_as_a_marked_part() {
        let turn = |first: &str, last: &str| {
            format!(
                r#"[{{"role":"user","content":{first}}},{{"role":"assistant","content":"x"}},{{"role":"user","content":{last}}}]"#
            )
        };
        let marked =
            |text: &str| format!(r#"[{{"type":"text","text":"{text}","cache_control":{{"type":"ephemeral"}}}}]"#);
        for api in [Api::Messages, Api::Chat] {
            let one = seen(api, Key::Messages, &turn(&marked("a"), r#""b""#));
            assert_eq!(seen(api, Key::Messages, &turn(r#""a""#, &marked("b"))), one);
            assert_eq!(seen(api, Key::Messages, &turn(r#"[{"type":"text","text":"a"}]"#, &marked("b"))), one);
            assert_ne!(seen(api, Key::Messages, &turn(r#""z""#, &marked("b"))), one);
        }
    }

    #[test]
    fn what_may_reach_the_model_stays() {
        for (api, key, value) in [
            (Api::Chat, Key::Tools, r#"[{"type":"function","cache_control":1}]"#),
            (Api::Responses, Key::Tools, r#"[{"type":"function","cache_control":1}]"#),
            (Api::Responses, Key::Input, r#""cache_control""#),
            (Api::Completions, Key::Prompt, r#""cache_control""#),
            (Api::Messages, Key::Messages, r#""cache_control""#),
            (Api::Messages, Key::Messages, r#"[{"role": "user", "content": "no mark"}]"#),
        ] {
            assert_eq!(seen(api, key, value), value);
        }
        let tool =
            r#"[{"role":"assistant","content":[{"type":"tool_use","input":{"cache_control":1},"cache_control":{}}]}]"#;
        assert!(seen(Api::Messages, Key::Messages, tool).contains(r#""input":{"cache_control":1}"#));
    }

    #[test]
    fn claude_codes_own_line_is_left_out_where_the_engine_leaves_it_out() {
        let system = |hash: &str| {
            format!(
                r#"[{{"type":"text","text":"x-anthropic-billing-header: cch={hash};"}},{{"type":"text","text":"You"}}]"#
            )
        };
        assert_eq!(seen(Api::Messages, Key::System, &system("1")), seen(Api::Messages, Key::System, &system("2")));
        let kept =
            |hash: &str| without_markers(Api::Messages, Key::System, system(hash).as_bytes(), true, false).into_owned();
        assert_ne!(kept("1"), kept("2"));
    }

    #[test]
    fn hostile_parts_are_read_without_end() {
        let deep = format!(r#"[{{"content":{}"cache_control"{}}}]"#, r#"[{"content":"#.repeat(100), "}]".repeat(100));
        for value in [&deep, "[cache_control", "[{\"cache_control", "[[[]],{},1,null,\"cache_control\"]"] {
            let _ = seen(Api::Messages, Key::Messages, value);
            let _ = seen(Api::Messages, Key::System, value);
        }
    }
}
