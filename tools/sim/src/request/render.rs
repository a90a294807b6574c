//! What a chat template and a tokeniser would make of a body's prompt.

use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_64;

use crate::api_error::ApiError;
use crate::fields::{Content, Fields, Text, missing, push_compact, wrong_type};

/// Placeholders of one image or sound: some 8 tokens each.
const MEDIA_PLACEHOLDERS: usize = 64;

/// What a chat template would make of tools, system text and messages; `/v1/responses` takes a plain text as well.
pub(crate) fn render_chat(
    fields: &Fields<'_>,
    system: Option<&'static str>,
    messages: &'static str,
) -> Result<Vec<u8>, ApiError> {
    let raw = fields.raw(messages).ok_or_else(|| missing(messages))?;
    let text: Option<Text<'_>> = (messages == "input").then(|| serde_json::from_str(raw.get()).ok()).flatten();
    let list: Vec<Fields<'_>> = match text {
        Some(_) => Vec::new(),
        None => serde_json::from_str(raw.get()).map_err(|_| wrong_type(messages))?,
    };
    if list.is_empty() && text.is_none() {
        return Err(ApiError::bad_field(messages, format!("{messages}: List should have at least 1 item")));
    }
    let mut out = Vec::with_capacity(raw.get().len());
    if let Some(tools) = fields.raw("tools") {
        if !tools.get().starts_with('[') {
            return Err(wrong_type("tools"));
        }
        out.extend_from_slice(b"<|tools|>");
        push_compact(&mut out, tools.get());
        out.push(b'\n');
    }
    if let Some(content) = system.map(|name| fields.borrowed::<Content<'_>>(name)).transpose()?.flatten() {
        out.extend_from_slice(b"<|system|>");
        push_content(&mut out, Some(content))?;
        out.push(b'\n');
    }
    if let Some(text) = text {
        out.extend_from_slice(b"<|user|>");
        out.extend_from_slice(text.0.as_bytes());
        out.push(b'\n');
    }
    for message in &list {
        let role: Text<'_> = message.borrowed("role")?.ok_or_else(|| missing("messages.role"))?;
        out.extend_from_slice(b"<|");
        out.extend_from_slice(role.0.as_bytes());
        out.extend_from_slice(b"|>");
        push_content(&mut out, message.borrowed("content")?)?;
        if let Some(calls) = message.raw("tool_calls") {
            push_compact(&mut out, calls.get());
        }
        out.push(b'\n');
    }
    out.extend_from_slice(b"<|assistant|>");
    Ok(out)
}

fn push_content(out: &mut Vec<u8>, content: Option<Content<'_>>) -> Result<(), ApiError> {
    match content {
        None => Ok(()),
        Some(Content::Text(text)) => {
            out.extend_from_slice(text.as_bytes());
            Ok(())
        }
        Some(Content::Parts(parts)) => parts.iter().try_for_each(|part| push_part(out, part)),
    }
}

fn push_part(out: &mut Vec<u8>, part: &Fields<'_>) -> Result<(), ApiError> {
    let kind: Text<'_> = part.borrowed("type")?.ok_or_else(|| missing("messages.content.type"))?;
    if matches!(&*kind.0, "text" | "input_text" | "output_text") {
        let text: Text<'_> = part.borrowed("text")?.ok_or_else(|| missing("messages.content.text"))?;
        out.extend_from_slice(text.0.as_bytes());
        return Ok(());
    }
    // An image becomes a placeholder that depends on its content.
    let mut compact = Vec::new();
    for (name, value) in &part.0 {
        compact.extend_from_slice(name.0.as_bytes());
        push_compact(&mut compact, value.get());
    }
    let placeholder = format!("<|{}:{:016x}|>", kind.0, xxh3_64(&compact));
    out.extend_from_slice(placeholder.repeat(MEDIA_PLACEHOLDERS).as_bytes());
    Ok(())
}

/// Prompts of a completions request: text, token ids, or a list of either. vLLM's own API takes ids alone.
pub(crate) fn render_prompts(fields: &Fields<'_>, name: &'static str) -> Result<Vec<Vec<u8>>, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Many {
        Ids(Vec<u32>),
        Texts(Vec<String>),
        IdLists(Vec<Vec<u32>>),
    }
    let raw = fields.raw(name).ok_or_else(|| missing(name))?.get();
    let ids = |ids: &[u32]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    if raw.starts_with('"') && name == "prompt" {
        let text: Text<'_> = serde_json::from_str(raw).map_err(|_| wrong_type(name))?;
        return Ok(vec![text.0.into_owned().into_bytes()]);
    }
    let prompts = match serde_json::from_str(raw).map_err(|_| wrong_type(name))? {
        Many::Texts(_) | Many::IdLists(_) if name != "prompt" => return Err(wrong_type(name)),
        Many::Ids(list) if list.is_empty() => Vec::new(),
        Many::Ids(list) => vec![ids(&list)],
        Many::Texts(texts) => texts.into_iter().map(String::into_bytes).collect(),
        Many::IdLists(lists) => lists.iter().map(|list| ids(list)).collect(),
    };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::bad_field(name, "The prompt must not be empty."));
    }
    Ok(prompts)
}
