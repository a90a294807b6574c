use super::super::{Api, scan};
use super::*;

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, index| bits << 8 | u32::from(chunk.get(index).copied().unwrap_or(0)));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place) & 63) as usize];
            out.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

fn png(width: u32, height: u32) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    png.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
    png.extend([8, 2, 0, 0, 0]);
    png
}

fn jpeg(width: u16, height: u16, metadata: usize) -> Vec<u8> {
    let mut jpeg = b"\xff\xd8\xff\xe1".to_vec();
    jpeg.extend((metadata as u16 + 2).to_be_bytes());
    jpeg.extend(vec![0xd8; metadata]);
    jpeg.extend(b"\xff\xc4\0\x04\0\0\xff\xff\xc2\0\x11\x08");
    jpeg.extend([height.to_be_bytes(), width.to_be_bytes()].concat());
    jpeg.extend([3; 20]);
    jpeg
}

#[test]
fn the_size_of_an_image_is_read() {
    let gif = [b"GIF89a".as_slice(), &[0x2c, 1, 0x90, 1], &[0; 9]].concat();
    let webp = |kind: &[u8], rest: &[u8]| [b"RIFF\0\0\0\0WEBPVP8".as_slice(), kind, rest, &[0; 9]].concat();
    let lossy = webp(b" ", &[0, 0, 0, 0, 0, 0, 0, 0x9d, 1, 0x2a, 0x2c, 1, 0x90, 1]);
    let lossless = webp(b"L", &[0, 0, 0, 0, 0x2f, 0x2b, 0xc1, 0x63, 0]);
    let extended = webp(b"X", &[0, 0, 0, 0, 0, 0, 0, 0, 0x2b, 1, 0, 0x8f, 1, 0]);
    for (image, expected) in [
        (png(640, 480), Some(640 * 480)),
        (png(0, 480), None),
        (png(640, 480)[..20].to_vec(), None),
        (jpeg(300, 400, 0), Some(120_000)),
        (jpeg(300, 400, 40_000), Some(120_000)),
        (jpeg(300, 400, 60_000), None),
        (gif, Some(120_000)),
        (lossy, Some(120_000)),
        (lossless, Some(120_000)),
        (extended, Some(120_000)),
        (b"BM and something".to_vec(), None),
        (Vec::new(), None),
    ] {
        let encoded = base64(&image);
        assert_eq!(pixels(encoded.as_bytes()), expected, "{encoded:.60}");
        assert_eq!(pixels(format!("data:image/png;base64,{encoded}").as_bytes()), expected);
        assert_eq!(pixels(encoded.replace('/', "\\/").as_bytes()), expected);
    }
    for hostile in ["data:image/png;base64", "data:,", "====", "/9j/4AAQ", "/9j/", "iVBORw0KGgo=\u{e9}"] {
        assert_eq!(pixels(hostile.as_bytes()), None, "{hostile}");
    }
}

/// Kinds and payloads of what a body has.
fn found(body: &str) -> Vec<(MediaKind, String, Option<u64>)> {
    let scan = scan(body.as_bytes()).unwrap();
    let text = |media: &Media| String::from_utf8(media.payload.get(body.as_bytes()).to_vec()).unwrap();
    scan.media().iter().map(|media| (media.kind, text(media), media.pixels)).collect()
}

#[test]
fn payloads_are_found_in_the_form_of_each_api() {
    let image = base64(&png(30, 40));
    let url = format!("data:image/png;base64,{image}");
    let content = |parts: &str| format!(r#"{{"messages":[{{"role":"user","content":[{parts}]}}],"model":"m"}}"#);
    for (part, kind, payload, pixels) in [
        (
            format!(r#"{{"type":"image_url","image_url":{{"detail":"low", "url" : "{url}"}}}}"#),
            MediaKind::Image,
            &*url,
            Some(1_200),
        ),
        (format!(r#"{{"type":"image_url","image_url":"{url}"}}"#), MediaKind::Image, &url, Some(1_200)),
        (
            r#"{"type":"image_url","image_url":{"url":"https://a/b.png"}}"#.to_owned(),
            MediaKind::Image,
            "https://a/b.png",
            None,
        ),
        (
            r#"{"type":"input_audio","input_audio":{"data":"UklGRg==","format":"wav"}}"#.to_owned(),
            MediaKind::Audio,
            "UklGRg==",
            None,
        ),
        (
            r#"{"audio_url":{"url":"data:audio/wav;base64,UklGRg=="}}"#.to_owned(),
            MediaKind::Audio,
            "data:audio/wav;base64,UklGRg==",
            None,
        ),
        (
            r#"{"type":"video_url","video_url":{"url":"http://a/v.mp4"}}"#.to_owned(),
            MediaKind::Video,
            "http://a/v.mp4",
            None,
        ),
        (
            r#"{"type":"file","file":{"filename":"a.pdf","file_data":"data:application/pdf;base64,JVBERi0="}}"#
                .to_owned(),
            MediaKind::File,
            "data:application/pdf;base64,JVBERi0=",
            None,
        ),
        (r#"{"type":"input_file","file_url":"https://a/b.pdf"}"#.to_owned(), MediaKind::File, "https://a/b.pdf", None),
        (
            format!(r#"{{"type":"image","source":{{"type":"base64","media_type":"image/png","data":"{image}"}}}}"#),
            MediaKind::Image,
            &image,
            Some(1_200),
        ),
        (
            r#"{"type":"image","source":{"type":"url","url":"https://a/b"}}"#.to_owned(),
            MediaKind::Image,
            "https://a/b",
            None,
        ),
        (
            r#"{"type":"document","source":{"type":"base64","media_type":"application/pdf","data":"JVBERi0="}}"#
                .to_owned(),
            MediaKind::File,
            "JVBERi0=",
            None,
        ),
        (
            format!(
                r#"{{"type":"tool_result","content":[{{"type":"image","source":{{"data":"{image}","type":"base64","media_type":"image\/png"}}}}]}}"#
            ),
            MediaKind::Image,
            &image,
            Some(1_200),
        ),
        (
            r#"{"type":"image_embeds","image_embeds":{"image_embeds":"AAAA","grid":"AA"}}"#.to_owned(),
            MediaKind::Image,
            "AAAA",
            None,
        ),
        (
            r#"{"type":"image_url","image_url":{"url":"data:video\/mp4;base64,AAAA"}}"#.to_owned(),
            MediaKind::Video,
            r"data:video\/mp4;base64,AAAA",
            None,
        ),
    ] {
        assert_eq!(found(&content(&part)), [(kind, payload.to_owned(), pixels)], "{part}");
    }
    let responses = format!(
        r#"{{"input":[{{"role":"user","content":[{{"type":"input_image","image_url":"{url}"}},{{"type":"input_text","text":"a"}},{{"type":"input_image","image_url":"https://a"}}]}}]}}"#
    );
    assert_eq!(found(&responses).len(), 2);
    assert_eq!(Api::Responses.path(), "/v1/responses");
}

#[test]
fn what_only_looks_like_media_is_text() {
    let content = |parts: &str| format!(r#"{{"messages":[{{"role":"user","content":[{parts}]}}]}}"#);
    for part in [
        r#"{"type":"text","text":"\"image_url\":{\"url\":\"data:image/png;base64,AAAA\"}"}"#,
        r#"{"type":"tool_use","input":{"source":"SELECT 1","image":"a cat","file_data":{"x":1}}}"#,
        r#"{"type":"document","source":{"type":"text","media_type":"text/plain","data":"plain"}}"#,
        r#"{"image_url":{"url":5}}"#,
        r#"{"image_url":null,"input_audio":[],"source":{},"video_url":"","audio_url":"relative"}"#,
        r#"{"source":{"type":"base64"}}"#,
    ] {
        assert_eq!(found(&content(part)), [], "{part}");
    }
    let tools =
        r#"{"tools":[{"function":{"parameters":{"properties":{"image_url":{"url":"https://a"}}}}}],"messages":[]}"#;
    assert_eq!(found(tools), []);
}

#[test]
fn no_value_is_read_again_inside_another() {
    let deep = format!(r#"{{"messages":[{}"https://a"{}]}}"#, r#"{"image_url":"#.repeat(100), "}".repeat(100));
    assert_eq!(found(&deep), []);
}

#[test]
fn what_is_beyond_the_bound_is_text() {
    let part = r#"{"image_url":"https://a"},"#.repeat(MAX_MEDIA + 5);
    let body = format!(r#"{{"messages":[{part}0]}}"#);
    assert_eq!(found(&body).len(), MAX_MEDIA);
}

#[test]
fn media_inside_a_source_of_content_parts_are_found() {
    let image = base64(&png(30, 40));
    let inner = format!(r#"{{"type":"image","source":{{"type":"base64","media_type":"image/png","data":"{image}"}}}}"#);
    let content = format!(r#"{{"type":"document","source":{{"type":"content","content":[{inner},{inner}]}}}}"#);
    let body = format!(r#"{{"messages":[{{"role":"user","content":[{content},{inner}]}}]}}"#);
    assert_eq!(found(&body), vec![(MediaKind::Image, image, Some(1_200)); 3]);
    // A chain of sources is not read again and again.
    let depth = 60;
    let text = "x".repeat(50_000);
    let chain = format!("{}\"{text}\"{}", r#"{"source":"#.repeat(depth), "}".repeat(depth));
    assert_eq!(found(&format!(r#"{{"messages":[{chain}]}}"#)), vec![]);
}

#[test]
fn payloads_are_found_whatever_their_name_is_where_no_prompt_is_read() {
    let image = base64(&[png(30, 40), vec![7; 3_000]].concat());
    let data = format!("data:audio/wav;base64,{image}");
    let text = "word ".repeat(1_000);
    let dense = "字".repeat(1_000);
    let body = format!(
        r#"{{"image_data":["{image}"],"a\"b":"{text}","images":"{}","c":"{dense}","d":"{}","e":"{data}","f":"{text}"}}"#,
        image.replace('/', "\\/"),
        "a".repeat(1_023),
    );
    let found: Vec<_> = payloads(body.as_bytes()).into_iter().map(|media| (media.kind, media.pixels)).collect();
    assert_eq!(found, [(MediaKind::Image, Some(1_200)), (MediaKind::Image, Some(1_200)), (MediaKind::Audio, None)]);
    for hostile in ["", "\"", "\"\\", "\\\"", "{\"a\":\"data:\"}", &format!("\"data:{}", "a".repeat(4_000))] {
        assert_eq!(payloads(hostile.as_bytes()), [], "{hostile:.20}");
    }
}
