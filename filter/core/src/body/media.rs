//! Media in a prompt: images, sounds, films and documents, as data or by their address.
//!
//! A model reads them as tokens of another kind than text: an image of 4 MB may be 1,000 tokens. The scan notes where such
//! payloads are, so that their bytes count neither as text nor as blocks of text.
//!
//! Sources: OpenAI's chat and responses APIs (`image_url`, `input_audio`, `file_data`), Anthropic's (`source`), vLLM's
//! additions (`audio_url`, `video_url`, `image_embeds`, `audio_embeds`).

use std::borrow::Cow;

use super::json::{Mark, MediaKey, Scanner, Span, members, string};

pub use super::json::{MAX_MEDIA, MediaKind};

/// Bytes of base64 in which an image's size is looked for: behind 48 kB of metadata it is not found.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// A payload in a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Media {
    /// What it is.
    pub kind: MediaKind,
    /// The payload between its quotes: base64, a data URL or an address.
    pub payload: Span,
    /// Pixels of an image, where its data says.
    pub pixels: Option<u64>,
}

impl Mark {
    /// Where the value behind a mark ends, and its payload; none where the value is none of media.
    pub(super) fn read(self, body: &[u8]) -> (u32, Option<Media>) {
        let rest = body.get(self.value as usize..).unwrap_or_default();
        let span = Scanner::new(rest).and_then(|mut scanner| scanner.value(0)).unwrap_or_default();
        (self.value.saturating_add(span.end), self.media(body, span.get(rest)))
    }

    fn media(self, body: &[u8], value: &[u8]) -> Option<Media> {
        let (kind, payload) = match self.key {
            MediaKey::Url(kind) => {
                (kind, Some(member(value, "url")).filter(|_| is_object(value)).unwrap_or(Some(value))?)
            }
            MediaKey::Data(kind) => (kind, member(value, "data")?),
            MediaKey::FileData => (MediaKind::File, value),
            MediaKey::Source => source(value)?,
            MediaKey::Tensors(kind) if is_object(value) => {
                (kind, members(value).map(|(_, tensor)| tensor).max_by_key(|tensor| tensor.len())?)
            }
            MediaKey::Tensors(kind) => (kind, value),
        };
        let [b'"', payload @ .., b'"'] = payload else { return None };
        let is_url = payload.starts_with(b"http") || payload.starts_with(b"data:");
        if matches!(self.key, MediaKey::Url(_)) && !is_url || payload.is_empty() {
            return None;
        }
        // Offsets of slices of one body.
        let start = (payload.as_ptr() as usize).wrapping_sub(body.as_ptr() as usize);
        let span = Span::new(start, start.saturating_add(payload.len()));
        let kind = kind_of_url(payload).unwrap_or(kind);
        let is_data = kind == MediaKind::Image && !matches!(self.key, MediaKey::Tensors(_));
        Some(Media { kind, payload: span, pixels: is_data.then(|| pixels(payload)).flatten() })
    }
}

fn is_object(value: &[u8]) -> bool {
    value.starts_with(b"{")
}

fn member<'a>(object: &'a [u8], name: &str) -> Option<&'a [u8]> {
    members(object).filter(|(key, _)| key == name).last().map(|(_, value)| value)
}

/// Anthropic's source of an image or a document.
fn source(value: &[u8]) -> Option<(MediaKind, &[u8])> {
    let kind = string(member(value, "type")?)?;
    let media_type = member(value, "media_type").and_then(string).unwrap_or(Cow::Borrowed("image/"));
    let kind_of_type = kind_of_type(media_type.as_bytes()).unwrap_or(MediaKind::File);
    match &*kind {
        "base64" => Some((kind_of_type, member(value, "data")?)),
        "url" => Some((kind_of_type, member(value, "url")?)),
        _ => None,
    }
}

/// The kind that a data URL names.
fn kind_of_url(url: &[u8]) -> Option<MediaKind> {
    kind_of_type(url.strip_prefix(b"data:")?)
}

/// The kind of a media type. A slash may be escaped.
fn kind_of_type(media_type: &[u8]) -> Option<MediaKind> {
    let is_of = |name: &[u8]| {
        let rest = media_type.strip_prefix(name).unwrap_or_default();
        rest.starts_with(b"/") || rest.starts_with(b"\\/")
    };
    let kinds: [(&[u8], MediaKind); 4] = [
        (b"image", MediaKind::Image),
        (b"audio", MediaKind::Audio),
        (b"video", MediaKind::Video),
        (b"application", MediaKind::File),
    ];
    kinds.into_iter().find(|(name, _)| is_of(name)).map(|(_, kind)| kind)
}

/// Pixels of an image in base64, with or without a data URL's front.
fn pixels(payload: &[u8]) -> Option<u64> {
    let front = payload.get(..MAX_HEADER_BYTES).unwrap_or(payload);
    let base64 = match front.strip_prefix(b"data:") {
        Some(url) => url.get(memchr::memchr(b',', url)?.saturating_add(1)..)?,
        None => front,
    };
    // Some serialisers write `\/`.
    let plain: Cow<'_, [u8]> = match memchr::memchr(b'\\', base64) {
        Some(_) => base64.iter().copied().filter(|byte| *byte != b'\\').collect(),
        None => Cow::Borrowed(base64),
    };
    let (width, height) = Image(&plain).size()?;
    Some(u64::from(width).saturating_mul(u64::from(height))).filter(|pixels| *pixels > 0)
}

/// The front of an image, in base64.
struct Image<'a>(&'a [u8]);

impl Image<'_> {
    fn byte(&self, index: usize) -> Option<u8> {
        let first = index.checked_div(3)?.checked_mul(4)?;
        let quad = self.0.get(first..first.checked_add(4)?)?;
        let bits = quad.iter().try_fold(0_u32, |bits, digit| Some(bits.wrapping_shl(6) | sextet(*digit)?))?;
        let [_, bytes @ ..] = bits.to_be_bytes();
        bytes.get(index.checked_rem(3)?).copied()
    }

    fn be(&self, index: usize, bytes: usize) -> Option<u32> {
        (0..bytes).try_fold(0_u32, |number, at| {
            Some(number.wrapping_shl(8) | u32::from(self.byte(index.saturating_add(at))?))
        })
    }

    fn le(&self, index: usize, bytes: usize) -> Option<u32> {
        (0..bytes).rev().try_fold(0_u32, |number, at| {
            Some(number.wrapping_shl(8) | u32::from(self.byte(index.saturating_add(at))?))
        })
    }

    /// Width and height of a PNG, JPEG, GIF or WebP; `None` for anything else.
    fn size(&self) -> Option<(u32, u32)> {
        const RIFF: u32 = 0x5249_4646;
        match self.be(0, 4)? {
            0x8950_4e47 => Some((self.be(16, 4)?, self.be(20, 4)?)),
            0x4749_4638 => Some((self.le(6, 2)?, self.le(8, 2)?)),
            RIFF if self.be(8, 4)? == 0x5745_4250 => self.webp_size(),
            front if front >> 8 == 0x00ff_d8ff => self.jpeg_size(),
            _ => None,
        }
    }

    fn webp_size(&self) -> Option<(u32, u32)> {
        match self.byte(15)? {
            b' ' => Some((self.le(26, 2)? & 0x3fff, self.le(28, 2)? & 0x3fff)),
            b'L' => {
                let bits = self.le(21, 4)?;
                Some(((bits & 0x3fff).saturating_add(1), (bits >> 14 & 0x3fff).saturating_add(1)))
            }
            b'X' => Some((self.le(24, 3)?.saturating_add(1), self.le(27, 3)?.saturating_add(1))),
            _ => None,
        }
    }

    /// Looks for the frame's header, over the segments before it.
    fn jpeg_size(&self) -> Option<(u32, u32)> {
        let mut index = 2_usize;
        loop {
            if self.byte(index)? != 0xff {
                return None;
            }
            match self.byte(index.saturating_add(1))? {
                0xff => index = index.saturating_add(1),
                // Tables that look like frames: DHT, JPG, DAC.
                0xc0..=0xcf if !matches!(self.byte(index.saturating_add(1))?, 0xc4 | 0xc8 | 0xcc) => {
                    let (height, width) = (index.saturating_add(5), index.saturating_add(7));
                    return Some((self.be(width, 2)?, self.be(height, 2)?));
                }
                _ => {
                    index =
                        index.saturating_add(2).saturating_add((self.be(index.saturating_add(2), 2)?).max(2) as usize)
                }
            }
        }
    }
}

/// The six bits of a digit of base64, in either alphabet; the padding counts as 0.
fn sextet(digit: u8) -> Option<u32> {
    let value = match digit {
        b'A'..=b'Z' => digit.wrapping_sub(b'A'),
        b'a'..=b'z' => digit.wrapping_sub(b'a').wrapping_add(26),
        b'0'..=b'9' => digit.wrapping_sub(b'0').wrapping_add(52),
        b'+' | b'-' => 62,
        b'/' | b'_' => 63,
        b'=' => 0,
        _ => return None,
    };
    Some(u32::from(value))
}

#[cfg(test)]
mod tests {
    use super::super::{Api, scan};
    use super::*;

    fn base64(bytes: &[u8]) -> String {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut out = String::new();
        for chunk in bytes.chunks(3) {
            let bits = (0..3).fold(0_u32, |bits, at| bits << 8 | u32::from(chunk.get(at).copied().unwrap_or(0)));
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
            (
                r#"{"type":"input_file","file_url":"https://a/b.pdf"}"#.to_owned(),
                MediaKind::File,
                "https://a/b.pdf",
                None,
            ),
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
}
