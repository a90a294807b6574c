//! The wire side of ABI 0.2.1: statuses, map and buffer types, and serialised pairs.

/// Header or trailer fields in order, as bytes: nothing says they are UTF-8.
pub type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// What a host call returns to the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// No such key, metric, queue or function.
    NotFound = 1,
    /// Not available in this phase, or an argument out of range.
    BadArgument = 2,
    /// A property cannot be serialised.
    SerializationFailure = 3,
    /// A property path cannot be parsed.
    ParseFailure = 4,
    /// A pointer outside linear memory, or the module's allocator failed.
    InvalidMemoryAccess = 6,
    /// The queue holds nothing.
    Empty = 7,
    /// Shared data changed since it was read.
    CasMismatch = 8,
    /// The host could not do it (a call-out that failed at once, for one).
    InternalFailure = 10,
    /// Not supported by the host.
    Unimplemented = 12,
}

/// Level of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LogLevel {
    /// Most verbose.
    Trace = 0,
    /// Per request.
    Debug = 1,
    /// Normal operation; standard output of the module comes at this level.
    Info = 2,
    /// Degraded.
    Warn = 3,
    /// An operator must act; standard error of the module comes at this level.
    Error = 4,
    /// Fatal.
    Critical = 5,
}

impl LogLevel {
    pub(crate) fn from_wire(level: u32) -> Option<Self> {
        [Self::Trace, Self::Debug, Self::Info, Self::Warn, Self::Error, Self::Critical].get(level as usize).copied()
    }
}

/// A header map the module can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum MapType {
    RequestHeaders,
    RequestTrailers,
    ResponseHeaders,
    ResponseTrailers,
    GrpcInitialMetadata,
    GrpcTrailingMetadata,
    CallResponseHeaders,
    CallResponseTrailers,
}

impl MapType {
    pub(crate) fn from_wire(value: u32) -> Option<Self> {
        use MapType::*;
        [
            RequestHeaders,
            RequestTrailers,
            ResponseHeaders,
            ResponseTrailers,
            GrpcInitialMetadata,
            GrpcTrailingMetadata,
            CallResponseHeaders,
            CallResponseTrailers,
        ]
        .get(value as usize)
        .copied()
    }
}

/// A buffer the module can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BufferType {
    RequestBody,
    ResponseBody,
    Downstream,
    Upstream,
    CallResponseBody,
    GrpcReceive,
    VmConfiguration,
    PluginConfiguration,
    CallData,
}

impl BufferType {
    pub(crate) fn from_wire(value: u32) -> Option<Self> {
        use BufferType::*;
        [
            RequestBody,
            ResponseBody,
            Downstream,
            Upstream,
            CallResponseBody,
            GrpcReceive,
            VmConfiguration,
            PluginConfiguration,
            CallData,
        ]
        .get(value as usize)
        .copied()
    }
}

/// Envoy reads no larger buffer of pairs.
const PAIRS_MAX_BYTES: usize = 1024 * 1024;
/// Envoy reads no more pairs than this.
const PAIRS_MAX_COUNT: usize = 1024;

/// Turns anything that iterates over names and values into [`Pairs`].
pub fn pairs<K: AsRef<[u8]>, V: AsRef<[u8]>>(fields: impl IntoIterator<Item = (K, V)>) -> Pairs {
    fields.into_iter().map(|(k, v)| (k.as_ref().to_vec(), v.as_ref().to_vec())).collect()
}

/// The first value of a field, by its lower-case name.
pub fn find_header<'a>(fields: &'a Pairs, name: &str) -> Option<&'a [u8]> {
    fields.iter().find(|(k, _)| k == name.as_bytes()).map(|(_, v)| v.as_slice())
}

/// Shows bytes as text, with escapes for what is none.
pub(crate) fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// Shows fields as text.
pub(crate) fn texts(fields: &Pairs) -> Vec<String> {
    fields.iter().map(|(k, v)| format!("{}: {}", text(k), text(v))).collect()
}

/// Pairs as the module reads them: a count, the sizes, then NUL-terminated names and values.
pub(crate) fn encode_pairs(fields: &Pairs) -> Vec<u8> {
    let bytes: usize = fields.iter().map(|(k, v)| 8 + k.len() + v.len() + 2).sum();
    let mut out = Vec::with_capacity(4 + bytes);
    out.extend_from_slice(&(fields.len() as u32).to_le_bytes());
    for (k, v) in fields {
        out.extend_from_slice(&(k.len() as u32).to_le_bytes());
        out.extend_from_slice(&(v.len() as u32).to_le_bytes());
    }
    for part in fields.iter().flat_map(|(k, v)| [k, v]) {
        out.extend_from_slice(part);
        out.push(0);
    }
    out
}

/// Pairs as the module wrote them. Envoy takes anything malformed or over its limits for no pairs at all.
pub(crate) fn decode_pairs(bytes: &[u8]) -> Pairs {
    try_decode_pairs(bytes).unwrap_or_default()
}

fn try_decode_pairs(bytes: &[u8]) -> Option<Pairs> {
    if bytes.len() > PAIRS_MAX_BYTES {
        return None;
    }
    let (count, mut rest) = take_u32(bytes)?;
    if count > PAIRS_MAX_COUNT {
        return None;
    }
    let mut sizes = Vec::with_capacity(count);
    for _ in 0..count {
        let (name, after) = take_u32(rest)?;
        let (value, after) = take_u32(after)?;
        sizes.push((name, value));
        rest = after;
    }
    let mut out = Vec::with_capacity(count);
    for (name, value) in sizes {
        let (k, after) = take_terminated(rest, name)?;
        let (v, after) = take_terminated(after, value)?;
        out.push((k.to_vec(), v.to_vec()));
        rest = after;
    }
    rest.is_empty().then_some(out)
}

fn take_u32(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*head) as usize, rest))
}

fn take_terminated(bytes: &[u8], len: usize) -> Option<(&[u8], &[u8])> {
    let value = bytes.get(..len)?;
    (*bytes.get(len)? == 0).then(|| (value, &bytes[len + 1..]))
}

impl From<Status> for u32 {
    fn from(status: Status) -> Self {
        status as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_survive_the_wire_with_any_bytes() {
        let fields = pairs([(&b"a"[..], &b"\xff\0\n"[..]), (b"", b"")]);
        assert_eq!(decode_pairs(&encode_pairs(&fields)), fields);
    }

    #[test]
    fn malformed_pairs_read_as_none() {
        let mut bytes = encode_pairs(&pairs([("a", "b")]));
        bytes.pop();
        assert!(decode_pairs(&bytes).is_empty());
        bytes.extend_from_slice(&[0, 0]);
        assert!(decode_pairs(&bytes).is_empty());
        assert!(decode_pairs(&u32::MAX.to_le_bytes()).is_empty());
    }
}
