//! Media in a prompt: images, sounds, videos and documents, as data or by their address.
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

/// Bytes from which a string without any character but those of base64 is a payload.
const MIN_PAYLOAD_BYTES: usize = 1_024;

/// Payloads in a document that is not read as a prompt, under whatever names: long strings of base64, and data URLs of such
/// (SGLang's `image_data`, Ollama's and Cohere's `images`). [`MAX_MEDIA`] at most.
///
/// `json` is valid JSON; of other text nothing useful is found.
#[must_use]
pub fn payloads(json: &[u8]) -> Vec<Media> {
    let mut found = Vec::new();
    let mut index = 0_usize;
    while found.len() < MAX_MEDIA
        && let Some(quote) = json.get(index..).and_then(|rest| memchr::memchr(b'"', rest))
    {
        let start = index.saturating_add(quote).saturating_add(1);
        let Some(end) = string_end(json, start) else { break };
        let payload = json.get(start..end).unwrap_or_default();
        if let Some(kind) = payload_kind(payload) {
            let pixels = (kind == MediaKind::Image).then(|| pixels(payload)).flatten();
            found.push(Media { kind, payload: Span::new(start, end), pixels });
        }
        index = end.saturating_add(1);
    }
    found
}

/// Offset of the quote that ends the string that begins at `start`.
fn string_end(json: &[u8], start: usize) -> Option<usize> {
    let mut index = start;
    loop {
        let found = index.saturating_add(memchr::memchr2(b'"', b'\\', json.get(index..)?)?);
        if json.get(found) == Some(&b'"') {
            return Some(found);
        }
        index = found.saturating_add(2);
    }
}

/// What a string is a payload of; `None` where it is none.
fn payload_kind(text: &[u8]) -> Option<MediaKind> {
    let front = text.get(..MIN_PAYLOAD_BYTES)?;
    let data = match front.strip_prefix(b"data:") {
        Some(url) => url.get(memchr::memchr(b',', url)?.saturating_add(1)..)?,
        None => front,
    };
    let is_base64 = data.iter().all(|byte| *byte == b'\\' || sextet(*byte).is_some());
    is_base64.then(|| kind_of_url(text).unwrap_or(MediaKind::Image))
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
        (0..bytes).try_fold(0_u32, |number, offset| {
            Some(number.wrapping_shl(8) | u32::from(self.byte(index.saturating_add(offset))?))
        })
    }

    fn le(&self, index: usize, bytes: usize) -> Option<u32> {
        (0..bytes).rev().try_fold(0_u32, |number, offset| {
            Some(number.wrapping_shl(8) | u32::from(self.byte(index.saturating_add(offset))?))
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
mod tests;
