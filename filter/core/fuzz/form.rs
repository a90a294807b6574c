//! What a plain parser finds in forms before and after the filter's edit, and what must hold of them. The property tests and the
//! fuzzer share this file; every check panics on a difference.

use pd_core::body::form::{Encoding, Form};
use pd_core::body::{FORBIDDEN, Key, is_content};

use super::oracle::{Json, without_forbidden};

/// A field as a plain parser sees it: its name, its value, and whether it is a file.
type Field = (String, Vec<u8>, bool);

/// The first byte chooses how the form is written; the rest is the form. The boundary is `B`.
pub fn run(input: &[u8]) {
    let Some((choice, body)) = input.split_first() else { return };
    let encoding = if choice % 2 == 0 { Encoding::Multipart(b"B".to_vec()) } else { Encoding::Url };
    for model in [None, Some("another model")] {
        check(&encoding, body, model);
    }
}

/// Checks the edit of one form, if it is accepted: nothing forbidden is left, the model is the new one, and all else is as it
/// was.
fn check(encoding: &Encoding, body: &[u8], model: Option<&str>) {
    let Ok(form) = Form::read(body, encoding.clone()) else { return };
    let Ok(edited) = form.edited(body, model) else { return };
    let sent = edited.as_deref().unwrap_or(body);
    let shown = String::from_utf8_lossy(sent);
    let again = Form::read(sent, encoding.clone()).unwrap_or_else(|error| panic!("{error}: {shown:?}"));
    assert_eq!(again.edited(sent, None), Ok(None), "something is left: {shown:?}");
    if let (Some(model), true) = (model, form.text(body, "model").is_some()) {
        assert_eq!(again.text(sent, "model").as_deref(), Some(model), "{shown:?}");
    }
    let expected = fields(encoding, body).into_iter().filter(|(name, ..)| !is_forbidden(name));
    let expected: Vec<Field> = expected.map(|field| freed(field, model)).collect();
    let got: Vec<Field> = fields(encoding, sent).into_iter().map(|field| freed(field, model)).collect();
    assert_eq!(got, expected, "{shown:?}");
    for (name, value, is_file) in fields(encoding, sent) {
        assert!(!is_forbidden(&name), "{shown:?}");
        if !is_file && !is_content(&name) {
            let mut gone = 0;
            let _ = Json::parse(&value).map(|json| without_forbidden(&json, &mut gone));
            assert_eq!(gone, 0, "{name}: {shown:?}");
        }
    }
}

fn is_forbidden(name: &str) -> bool {
    Key::of_name(name).is_some_and(|key| FORBIDDEN.contains(key))
}

/// A field as it should be sent. Values that are JSON are compared as such, for an edit leaves no trace of commas.
fn freed((name, value, is_file): Field, model: Option<&str>) -> Field {
    let value = match (model, Json::parse(&value)) {
        _ if is_file => value,
        (Some(model), _) if name == "model" => model.as_bytes().to_vec(),
        (_, Ok(json @ (Json::Object(_) | Json::Array(_)))) if !is_content(&name) => {
            format!("{:?}", without_forbidden(&json, &mut 0)).into_bytes()
        }
        _ => value,
    };
    (name, value, is_file)
}

fn fields(encoding: &Encoding, body: &[u8]) -> Vec<Field> {
    match encoding {
        Encoding::Multipart(boundary) => parts(body, boundary),
        Encoding::Url => pairs(body),
    }
}

/// The parts between delimiters at the beginning of a line.
fn parts(body: &[u8], boundary: &[u8]) -> Vec<Field> {
    let delimiter = [b"\r\n--", boundary].concat();
    let whole = [b"\r\n", body].concat();
    let mut found = Vec::new();
    let mut rest = &whole[..];
    while let Some(index) = rest.windows(delimiter.len()).position(|window| window == delimiter) {
        rest = &rest[index + delimiter.len()..];
        if rest.starts_with(b"--") {
            break;
        }
        let end = rest.windows(delimiter.len()).position(|window| window == delimiter).unwrap_or(rest.len());
        let part = &rest[..end];
        let Some(blank) = part.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&part[..blank]).into_owned();
        let (mut name, mut is_file) = (String::new(), false);
        for (key, value) in head.lines().filter(|line| is_disposition(line)).flat_map(parameters) {
            match key.as_str() {
                "name" => name = value,
                "filename" | "filename*" => is_file = true,
                _ => {}
            }
        }
        found.push((name, part[blank + 4..].to_vec(), is_file));
    }
    found
}

fn is_disposition(line: &str) -> bool {
    line.split(':').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("content-disposition"))
}

/// Parameters of a header, split at `;` outside of quotes.
fn parameters(line: &str) -> Vec<(String, String)> {
    let (mut pieces, mut is_quoted) = (vec![String::new()], false);
    for c in line.chars() {
        match c {
            '"' => is_quoted = !is_quoted,
            ';' if !is_quoted => pieces.push(String::new()),
            _ => {
                if let Some(last) = pieces.last_mut() {
                    last.push(c);
                }
            }
        }
    }
    let split = |piece: String| {
        let (key, value) = piece.split_once('=')?;
        Some((key.trim().to_ascii_lowercase(), value.trim().to_owned()))
    };
    pieces.into_iter().filter_map(split).collect()
}

/// The pairs of a URL-encoded form, without empty ones.
fn pairs(body: &[u8]) -> Vec<Field> {
    let pair = |pair: &[u8]| {
        let index = pair.iter().position(|byte| *byte == b'=').unwrap_or(pair.len());
        let (name, value) = pair.split_at(index);
        let name = String::from_utf8_lossy(&decoded(name)).into_owned();
        (name, decoded(value.get(1..).unwrap_or_default()), false)
    };
    let all = body.split(|byte| matches!(byte, b'&' | b';')).map(pair);
    all.filter(|(name, value, _)| !(name.is_empty() && value.is_empty())).collect()
}

fn decoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut index = 0;
    while index < text.len() {
        let hex =
            text.get(index + 1..index + 3).and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        let is_hex = text.get(index + 1).is_some_and(u8::is_ascii_hexdigit);
        match (text[index], hex.filter(|_| is_hex)) {
            (b'%', Some(byte)) => {
                out.push(byte);
                index += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        index += 1;
    }
    out
}
