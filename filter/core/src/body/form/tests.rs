use super::*;

const BOUNDARY: &str = "x-b";

fn part(name: &str, value: &str) -> String {
    format!("--{BOUNDARY}\r\nContent-Disposition: form-data; {name}\r\n\r\n{value}\r\n")
}

fn form(parts: &[String]) -> String {
    format!("{}--{BOUNDARY}--\r\n", parts.concat())
}

fn edited(body: &str) -> Result<Option<String>, FormError> {
    let encoding = Encoding::Multipart(BOUNDARY.into());
    let form = Form::read(body.as_bytes(), encoding)?;
    Ok(form.edited(body.as_bytes(), None)?.map(|body| String::from_utf8(body).unwrap()))
}

#[test]
fn forbidden_fields_and_members_go_and_the_rest_stays() {
    let file = part(r#"name="file"; filename="a.wav""#, "RIFF\r\n--x-\r\n\0{\"kv_transfer_params\":0}");
    let model = part(r#"name="model""#, "whisper");
    let args = |value: &str| part(r#"name="vllm_xargs""#, value);
    let kept = form(&[file.clone(), model.clone(), args(r#"{"a": 1}"#)]);
    assert_eq!(edited(&kept), Ok(None));
    let dirty =
        form(&[file, part(r#"name="kv_transfer_params""#, "0"), model, args(r#"{"kv_transfer_params":0,"a": 1}"#)]);
    assert_eq!(edited(&dirty), Ok(Some(kept)));
    let binary = form(&[part("name=model\r\nContent-Transfer-Encoding: BINARY", "whisper")]);
    assert_eq!(edited(&binary), Ok(None));
    let prompt = form(&[part("name=prompt", "{not json, but a prompt")]);
    assert_eq!(edited(&prompt), Ok(None));
}

#[test]
fn a_form_that_two_parsers_could_read_differently_is_refused() {
    for part in [
        part(r#"name*=utf-8''vllm%5Fxargs"#, "{}"),
        part(r#"name="a"; name="vllm_xargs""#, "{}"),
        part(r#"filename="a\"; name="vllm_xargs""#, "{}"),
        part("filename=a", "{}"),
        part("name=\"a\"\r\nContent-Disposition: form-data; name=\"vllm_xargs\"", "{}"),
        part("name=\"a\"\r\n folded: 1", "{}"),
        part("name=vllm_xargs\r\nContent-Transfer-Encoding: base64", "eyJrdl90cmFuc2Zlcl9wYXJhbXMiOjB9"),
        part(r#"name="vllm_xargs""#, r#"{"kv_transfer_params":NaN}"#).replace("form-data", "attachment"),
        "--x-b--no\r\n".to_owned(),
        "preamble\r\n--x-b\r\n".to_owned(),
        // One parser ends the part at the delimiter, another takes the line for a header.
        part("name=\"a\"\r\n--x-b: 1", "{}"),
        "--x-b\r\n--x-b:\r\nContent-Disposition: form-data; name=\"vllm_xargs\"\r\n\r\n{}\r\n".to_owned(),
        part("name=\"a\"\r\n: no name", "{}"),
        part("name=\"a\"\r\nContent-Disposition : form-data; name=\"vllm_xargs\"", "{}"),
        // The form ends here for one parser; what follows is a part for another.
        format!("\n--x-b--more\r\n{}", part("name=\"vllm_xargs\"", r#"{"kv_transfer_params":0}"#)),
        format!("--x-b--\r\n{}", part("name=\"vllm_xargs\"", r#"{"kv_transfer_params":0}"#)),
        format!("\n{}", part("name=\"a\"", "1")),
        // A value that begins as a delimiter is a part to parsers that look for delimiters first.
        format!(
            "--x-b\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\n{}",
            part("name=n", r#"[{"ec_transfer_params":1}]"#)
        ),
        "--x-b\nContent-Disposition: form-data; name=\"vllm_xargs\"\n\n{}\n".to_owned(),
    ] {
        let body = form(std::slice::from_ref(&part));
        let outcome = edited(&body);
        assert_eq!(outcome, Err(FormError::Malformed), "{part}");
    }
    assert_eq!(edited(&form(&[part("name=vllm_xargs", r#"{"a":NaN}"#)])), Err(FormError::FieldNotJson));
    for accepted in ["\r\n--x-b--\r\n".to_owned(), format!("\r\n\r\n{} \r\n\t", form(&[part("name=a", "1")]))] {
        assert_eq!(edited(&accepted), Ok(None), "{accepted}");
    }
    let open = form(&[part("name=a", "1")]).replace("--x-b--", "");
    assert_eq!(edited(&open), Err(FormError::Malformed));
}

#[test]
fn content_types_name_one_boundary() {
    let of = |text: &str| Encoding::of(text.as_bytes());
    let multipart = |boundary: &str| Ok(Some(Encoding::Multipart(boundary.into())));
    assert_eq!(of("multipart/form-data; boundary=abc"), multipart("abc"));
    assert_eq!(of("Multipart/Form-Data;charset=UTF-8; Boundary=\"a b\""), multipart("a b"));
    assert_eq!(of("application/x-www-form-urlencoded"), Ok(Some(Encoding::Url)));
    for other in ["application/json", "", "text/plain; boundary=a", "\u{fc}"] {
        assert_eq!(of(other), Ok(None), "{other}");
    }
    for bad in [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary*=utf-8''a",
        "multipart/form-data; boundary=a; charset=utf-16",
        "multipart/mixed; boundary=a",
        "application/x-www-form-urlencoded; charset=utf-7",
    ] {
        assert_eq!(of(bad), Err(FormError::ContentType), "{bad}");
    }
}

#[test]
fn url_encoded_fields_are_decoded_and_written_back() {
    let edited = |body: &str| {
        let form = Form::read(body.as_bytes(), Encoding::Url)?;
        Ok(form.edited(body.as_bytes(), Some("m 2"))?.map(|body| String::from_utf8(body).unwrap()))
    };
    assert_eq!(edited("a=1&b=%7B%7D"), Ok(None));
    assert_eq!(edited("model=m&kv%5ftransfer_params=0&a=1"), Ok(Some("model=m%202&a=1".to_owned())));
    let args = "vllm_xargs=%7B%22a%22%3A1,%22kv_transfer_params%22%3A%5B%5D%7D";
    assert_eq!(edited(args), Ok(Some("vllm_xargs=%7B%22a%22%3A1%7D".to_owned())));
    assert_eq!(edited("vllm_xargs=%7Bx"), Err(FormError::FieldNotJson));
    assert_eq!(edited("a;kv_transfer_params"), Ok(Some("a;".to_owned())));
}

#[test]
fn fields_are_found_by_name() {
    let body = form(&[part("name=model", "whisper"), part("name=\"file\"; filename=\"x\"", "1")]);
    let read = Form::read(body.as_bytes(), Encoding::Multipart(BOUNDARY.into())).unwrap();
    assert_eq!(read.text(body.as_bytes(), "model").as_deref(), Some("whisper"));
    assert_eq!(read.text(body.as_bytes(), "file"), None);
    let renamed = read.edited(body.as_bytes(), Some("other")).unwrap().unwrap();
    assert_eq!(String::from_utf8(renamed).unwrap(), body.replace("whisper", "other"));
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(body: Vec<u8>, text in "(--x-b|\r\n|[a-z;:=\" ]{0,9}|\\{|\"|name=|Content-Disposition: form-data; )*") {
        for body in [body.as_slice(), text.as_bytes()] {
            for encoding in [Encoding::Multipart(BOUNDARY.into()), Encoding::Url] {
                if let Ok(form) = Form::read(body, encoding) {
                    let _ = form.edited(body, Some("m"));
                }
            }
            let _ = Encoding::of(body);
        }
    }
}
