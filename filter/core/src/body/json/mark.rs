//! Marks: the places of members whose names are names of media. [`media`](crate::body::media) then reads their values.

/// Most payloads of one body; those behind count as text.
pub const MAX_MEDIA: usize = 1_024;

/// What a payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaKind {
    /// An image.
    Image,
    /// Sound.
    Audio,
    /// A video.
    Video,
    /// A document.
    File,
}

/// A member whose value may have a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(in crate::body) key: MediaKey,
    /// Offset of the value.
    pub(in crate::body) value: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::body) enum MediaKey {
    /// A URL, or an object with one.
    Url(MediaKind),
    /// An object with base64 `data`.
    Data(MediaKind),
    /// A file as a data URL or base64.
    FileData,
    /// Anthropic's: base64 `data` with a `media_type`, or a `url`.
    Source,
    /// Tensors as base64, or an object of such.
    Tensors(MediaKind),
}

/// Members that say how far a provider should cache a prompt; what they are is said in `body/markers.rs`.
pub(in crate::body) const CACHE_MARKERS: [&str; 2] = ["cache_control", "prompt_cache_breakpoint"];

/// Whether a key, as it stands between its quotes, is one of [`CACHE_MARKERS`].
pub(super) fn is_cache_marker(key: &[u8]) -> bool {
    CACHE_MARKERS.iter().any(|name| name.as_bytes() == key)
}

impl Mark {
    /// The mark of a member, by the key as it stands between its quotes.
    pub(super) fn of_key(key: &[u8], value: usize) -> Option<Self> {
        let key = match key {
            b"image_url" | b"image" => MediaKey::Url(MediaKind::Image),
            b"audio_url" | b"audio" => MediaKey::Url(MediaKind::Audio),
            b"video_url" | b"video" => MediaKey::Url(MediaKind::Video),
            b"file_url" => MediaKey::Url(MediaKind::File),
            b"input_audio" => MediaKey::Data(MediaKind::Audio),
            b"file_data" => MediaKey::FileData,
            b"source" => MediaKey::Source,
            b"image_embeds" => MediaKey::Tensors(MediaKind::Image),
            b"audio_embeds" => MediaKey::Tensors(MediaKind::Audio),
            _ => return None,
        };
        Some(Self { key, value: u32::try_from(value).ok()? })
    }
}
