//! The form of an answer: text, JSON of a schema that was asked for, or a call of a tool that was forced.

use serde_json::Value;

use crate::fields::Fields;
use crate::rules::Api;

/// What the tokens of an answer are wrapped in. The wrapping is the same whole and as a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Shape {
    #[default]
    Text,
    /// `{"said":"…"}`, whatever the schema.
    Json,
    /// A call of the tool of that name with the arguments `{"said":"…"}`.
    Tool(String),
}

/// Id of the only tool call of an answer.
pub(crate) const CALL_ID: &str = "call_0";
const OPEN: &str = r#"{"said":""#;
const CLOSE: &str = r#""}"#;

impl Shape {
    /// What a request asks for. A choice of tools that is left to the model gives text.
    pub(crate) fn of(api: Api, fields: &Fields<'_>) -> Self {
        let value = |name: &str| -> Value {
            fields.raw(name).and_then(|raw| serde_json::from_str(raw.get()).ok()).unwrap_or_default()
        };
        let name = |tool: &Value| {
            let name = if api == Api::Chat { &tool["function"]["name"] } else { &tool["name"] };
            name.as_str().map(str::to_owned)
        };
        let choice = value("tool_choice");
        let is_any = choice == "required" || choice["type"] == "any";
        let tool = if is_any { name(&value("tools")[0]) } else { name(&choice) };
        if let Some(tool) = tool {
            return Self::Tool(tool);
        }
        let kind = match api {
            Api::Chat => value("response_format")["type"].clone(),
            Api::Responses => value("text")["format"]["type"].clone(),
            Api::Messages => value("output_config")["format"]["type"].clone(),
            Api::Completions | Api::Generate => Value::Null,
        };
        if matches!(kind.as_str(), Some("json_schema" | "json_object")) { Self::Json } else { Self::Text }
    }

    /// A whole text.
    pub(crate) fn whole(&self, text: &str) -> String {
        self.piece(text, true, true)
    }

    /// A piece of a text: its first, its last, both or neither.
    pub(crate) fn piece(&self, text: &str, is_first: bool, is_last: bool) -> String {
        if *self == Self::Text {
            return text.to_owned();
        }
        let quoted = serde_json::to_string(text).unwrap_or_default();
        let inner = quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or_default();
        [if is_first { OPEN } else { "" }, inner, if is_last { CLOSE } else { "" }].concat()
    }

    /// The tool that is called.
    pub(crate) fn tool(&self) -> Option<&str> {
        if let Self::Tool(name) = self { Some(name) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_found() {
        for (api, body, expected) in [
            (Api::Chat, r#"{"tools":[{"function":{"name":"a"}}]}"#, Shape::Text),
            (Api::Chat, r#"{"tools":[{"function":{"name":"a"}}],"tool_choice":"auto"}"#, Shape::Text),
            (Api::Chat, r#"{"tools":[{"function":{"name":"a"}}],"tool_choice":"required"}"#, Shape::Tool("a".into())),
            (Api::Chat, r#"{"tool_choice":{"type":"function","function":{"name":"b"}}}"#, Shape::Tool("b".into())),
            (Api::Messages, r#"{"tools":[{"name":"a"}],"tool_choice":{"type":"any"}}"#, Shape::Tool("a".into())),
            (Api::Messages, r#"{"tool_choice":{"type":"tool","name":"b"}}"#, Shape::Tool("b".into())),
            (Api::Responses, r#"{"tool_choice":{"type":"function","name":"b"}}"#, Shape::Tool("b".into())),
            (Api::Chat, r#"{"response_format":{"type":"json_schema"}}"#, Shape::Json),
            (Api::Responses, r#"{"text":{"format":{"type":"json_schema"}}}"#, Shape::Json),
            (Api::Chat, r#"{"response_format":{"type":"text"},"tool_choice":5}"#, Shape::Text),
        ] {
            assert_eq!(Shape::of(api, &Fields::parse(body.as_bytes()).unwrap()), expected, "{body}");
        }
    }

    #[test]
    fn pieces_make_the_whole() {
        for shape in [Shape::Text, Shape::Json, Shape::Tool("t".into())] {
            let pieces =
                [shape.piece("a\"", true, false), shape.piece("\nb", false, false), shape.piece("c", false, true)];
            assert_eq!(pieces.concat(), shape.whole("a\"\nbc"));
        }
        assert_eq!(Shape::Json.whole("a\""), r#"{"said":"a\""}"#);
    }
}
