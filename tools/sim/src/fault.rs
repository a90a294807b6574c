//! Faults on demand: the list of faults, their syntax, and the requests that each fault affects.
//!
//! ```text
//! [role:]kind[=arg][:probability][*count][@path]     role: prefill, decode, both, or handover: legs that fetch a KV cache
//! 500                   every generation request is answered 500
//! prefill:503:0.1       one in ten on prefill servers, or of prefill legs elsewhere
//! die=3*1@/v1/completions   the next stream there dies after three tokens
//! ```
//! Several stand separated by commas.

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use crate::role::Role;
use crate::tokens::splitmix;

/// Request header that carries faults for that one request, on top of the server's own.
pub const FAULT_HEADER: &str = "x-sim-fault";

/// How the `kv_transfer_params` of a prefill answer are spoilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The key is absent.
    Missing,
    /// `null`.
    Null,
    /// A string instead of an object.
    String,
    /// An object without `remote_request_id`.
    NoRequestId,
    /// `remote_block_ids` is `null`.
    NullBlocks,
    /// The answer ends in the middle of the object, with a matching `content-length`.
    Truncated,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The answer comes this much later.
    Delay(Duration),
    /// The server closes its listener and idle connections for this long, and resets the request's connection.
    Refuse(Duration),
    /// The connection ends by TCP RST once the request has been read.
    Reset,
    /// An answer with this status; 503 and 429 carry `Retry-After`.
    Status(u16),
    /// No answer until the client goes.
    Hang,
    /// The connection closes after so many tokens of a stream, without the final chunk; in the middle of the body
    /// where the answer is no stream.
    Die(u64),
    /// After so many tokens of a stream: an error event, then `[DONE]`. 500 where the answer is no stream.
    ErrorEvent(u64),
    /// A prefill answer's `kv_transfer_params` are spoilt; other requests are served as usual.
    MalformedParams(Malformed),
    /// The KV cache does not come, and the server computes the prompt itself (`kv_load_failure_policy: recompute`).
    Recompute,
    /// The server stands still for this long before it fetches the KV cache: it neither fetches nor renews its lease.
    Stall(Duration),
    /// The process exits; in-process, the server stops and says it has crashed.
    Exit,
}

impl FaultKind {
    /// The key under which `/stats` counts it.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Delay(_) => "delay".to_owned(),
            Self::Refuse(_) => "refuse".to_owned(),
            Self::Reset => "reset".to_owned(),
            Self::Status(code) => code.to_string(),
            Self::Hang => "hang".to_owned(),
            Self::Die(_) => "die".to_owned(),
            Self::ErrorEvent(_) => "error_event".to_owned(),
            Self::MalformedParams(_) => "malformed_params".to_owned(),
            Self::Recompute => "recompute".to_owned(),
            Self::Stall(_) => "stall".to_owned(),
            Self::Exit => "exit".to_owned(),
        }
    }
}

/// One fault and the requests it hits.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// What happens.
    pub kind: FaultKind,
    /// Only servers of this role, or legs of this kind wherever they go.
    pub role: Option<Role>,
    /// Only legs that fetch a KV cache.
    pub is_handover: bool,
    /// Share of the matching requests, 0 to 1.
    pub probability: f64,
    /// How many more requests; absent: any number.
    pub count: Option<u64>,
    /// Only this path; absent: the generation endpoints, `*`: every path but the simulator's own.
    pub path: Option<String>,
}

/// Which half of a split request a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// A whole request, or one whose leg the server cannot know.
    Plain,
    /// `do_remote_decode`.
    Prefill,
    /// `do_remote_prefill`.
    Decode,
}

impl Fault {
    fn matches(&self, role: Role, leg: Leg, path: &str, generates: bool) -> bool {
        let path_matches = match self.path.as_deref() {
            None => generates,
            Some("*") => true,
            Some(own) => own == path,
        };
        let role_matches = match self.role {
            None => true,
            Some(Role::Prefill) => role == Role::Prefill || leg == Leg::Prefill,
            Some(Role::Decode) => role == Role::Decode || leg == Leg::Decode,
            Some(Role::Both) => role == Role::Both,
        };
        path_matches && role_matches && (!self.is_handover || leg == Leg::Decode)
    }
}

/// Reads a comma-separated list of faults; blank is none.
///
/// # Errors
/// [`BadFault`] quotes the one that is wrong.
pub fn parse_list(text: &str) -> Result<Vec<Fault>, BadFault> {
    text.split([',', '\n']).map(str::trim).filter(|spec| !spec.is_empty()).map(str::parse).collect()
}

impl FromStr for Fault {
    type Err = BadFault;

    fn from_str(spec: &str) -> Result<Self, BadFault> {
        let bad = |why| BadFault { spec: spec.to_owned(), why };
        let (rest, path) = match spec.split_once('@') {
            Some((rest, path)) => (rest, Some(path.to_owned())),
            None => (spec, None),
        };
        let (rest, count) = match rest.split_once('*') {
            Some((rest, count)) => (rest, Some(count.parse().map_err(|_| bad("the count is no number"))?)),
            None => (rest, None),
        };
        let (is_handover, rest) = match rest.strip_prefix("handover:") {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let (role, rest) = match rest.split_once(':') {
            Some(("prefill", rest)) => (Some(Role::Prefill), rest),
            Some(("decode", rest)) => (Some(Role::Decode), rest),
            Some(("both", rest)) => (Some(Role::Both), rest),
            _ => (None, rest),
        };
        let (rest, probability) = match rest.split_once(':') {
            Some((rest, share)) => (rest, share.parse().map_err(|_| bad("the probability is no number"))?),
            None => (rest, 1.0),
        };
        if !(0.0..=1.0).contains(&probability) {
            return Err(bad("the probability must be between 0 and 1"));
        }
        let (name, arg) = match rest.split_once('=') {
            Some((name, arg)) => (name, Some(arg)),
            None => (rest, None),
        };
        let number = || arg.unwrap_or_default().parse::<u64>().map_err(|_| bad("needs =number"));
        let kind = match name {
            "delay" => FaultKind::Delay(Duration::from_millis(number()?)),
            "refuse" => FaultKind::Refuse(Duration::from_millis(number()?)),
            "stall" => FaultKind::Stall(Duration::from_millis(number()?)),
            "die" => FaultKind::Die(number()?),
            "error_event" => FaultKind::ErrorEvent(number()?),
            "malformed_params" => FaultKind::MalformedParams(match arg {
                Some("missing") => Malformed::Missing,
                Some("null") => Malformed::Null,
                Some("string") => Malformed::String,
                Some("no_request_id") => Malformed::NoRequestId,
                Some("null_blocks") => Malformed::NullBlocks,
                Some("truncated") => Malformed::Truncated,
                _ => return Err(bad("needs =missing|null|string|no_request_id|null_blocks|truncated")),
            }),
            _ if arg.is_some() => return Err(bad("no such kind, or it takes no argument")),
            "reset" => FaultKind::Reset,
            "hang" => FaultKind::Hang,
            "recompute" => FaultKind::Recompute,
            "exit" => FaultKind::Exit,
            code => match code.parse() {
                Ok(code @ 400..=599) => FaultKind::Status(code),
                _ => return Err(bad("no such kind")),
            },
        };
        Ok(Self { kind, role, is_handover, probability, count, path })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_handover {
            f.write_str("handover:")?;
        }
        if let Some(role) = self.role {
            write!(f, "{}:", role.name())?;
        }
        match self.kind {
            FaultKind::Delay(time) | FaultKind::Refuse(time) | FaultKind::Stall(time) => {
                write!(f, "{}={}", self.kind.name(), time.as_millis())?
            }
            FaultKind::Die(tokens) | FaultKind::ErrorEvent(tokens) => write!(f, "{}={tokens}", self.kind.name())?,
            FaultKind::MalformedParams(how) => {
                let how = match how {
                    Malformed::Missing => "missing",
                    Malformed::Null => "null",
                    Malformed::String => "string",
                    Malformed::NoRequestId => "no_request_id",
                    Malformed::NullBlocks => "null_blocks",
                    Malformed::Truncated => "truncated",
                };
                write!(f, "malformed_params={how}")?;
            }
            _ => f.write_str(&self.kind.name())?,
        }
        if self.probability < 1.0 {
            write!(f, ":{}", self.probability)?;
        }
        if let Some(count) = self.count {
            write!(f, "*{count}")?;
        }
        if let Some(path) = &self.path {
            write!(f, "@{path}")?;
        }
        Ok(())
    }
}

/// A fault that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFault {
    spec: String,
    why: &'static str,
}

impl fmt::Display for BadFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fault {:?}: {} (expected [role:]kind[=arg][:probability][*count][@path])", self.spec, self.why)
    }
}

impl std::error::Error for BadFault {}

/// The faults in force at a server.
pub(crate) struct Faults {
    state: Mutex<(Vec<Fault>, u64)>,
}

impl Faults {
    pub(crate) fn new(faults: Vec<Fault>, seed: u64) -> Self {
        Self { state: Mutex::new((faults, seed)) }
    }

    pub(crate) fn set(&self, faults: Vec<Fault>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = faults;
    }

    pub(crate) fn list(&self) -> Vec<Fault> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Faults that hit this request, those of its header first.
    pub(crate) fn hit(&self, header: Vec<Fault>, role: Role, leg: Leg, path: &str, generates: bool) -> Vec<FaultKind> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.is_empty() && header.is_empty() {
            return Vec::new();
        }
        let (faults, random) = &mut *state;
        let mut hits = Vec::new();
        let mut header = header;
        for fault in header.iter_mut().chain(faults.iter_mut()) {
            if fault.count == Some(0) || !fault.matches(role, leg, path, generates) {
                continue;
            }
            *random = random.wrapping_add(1);
            // 53 random bits make a float in [0, 1).
            let draw = (splitmix(*random) >> 11) as f64 / (1_u64 << 53) as f64;
            if draw < fault.probability {
                fault.count = fault.count.map(|count| count - 1);
                hits.push(fault.kind);
            }
        }
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_reads_back_as_it_was_written() {
        for spec in [
            "delay=5",
            "refuse=100",
            "reset",
            "500",
            "503:0.25",
            "prefill:400",
            "decode:hang*2",
            "die=3@/v1/completions",
            "both:error_event=0:0.5*7@*",
            "handover:500*2",
            "handover:recompute",
            "stall=3000",
            "malformed_params=missing",
            "malformed_params=null",
            "malformed_params=string",
            "malformed_params=no_request_id",
            "malformed_params=null_blocks",
            "malformed_params=truncated",
            "exit",
        ] {
            assert_eq!(spec.parse::<Fault>().unwrap().to_string(), spec);
        }
        assert_eq!(parse_list(" 500 , prefill:hang,\n").unwrap().len(), 2);
    }

    #[test]
    fn bad_faults_are_refused() {
        for spec in ["x", "200", "delay", "delay=x", "500:2", "500:x", "500*x", "malformed_params=odd", "hang=1"] {
            assert!(spec.parse::<Fault>().is_err(), "{spec}");
        }
    }

    #[test]
    fn role_path_count_and_probability_select_requests() {
        let hits = |spec: &str, role, leg, path: &str| {
            Faults::new(parse_list(spec).unwrap(), 1).hit(vec![], role, leg, path, path == "/gen").len()
        };
        assert_eq!(hits("500", Role::Both, Leg::Plain, "/gen"), 1);
        assert_eq!(hits("500", Role::Both, Leg::Plain, "/health"), 0);
        assert_eq!(hits("500@/health", Role::Both, Leg::Plain, "/health"), 1);
        assert_eq!(hits("500@*", Role::Both, Leg::Plain, "/odd"), 1);
        assert_eq!(hits("prefill:500", Role::Decode, Leg::Decode, "/gen"), 0);
        assert_eq!(hits("prefill:500", Role::Prefill, Leg::Plain, "/gen"), 1);
        assert_eq!(hits("prefill:500", Role::Both, Leg::Prefill, "/gen"), 1);
        assert_eq!(hits("handover:500", Role::Decode, Leg::Plain, "/gen"), 0);
        assert_eq!(hits("handover:500", Role::Decode, Leg::Decode, "/gen"), 1);
        assert_eq!(hits("500:0", Role::Both, Leg::Plain, "/gen"), 0);
        let faults = Faults::new(parse_list("500*2").unwrap(), 1);
        let hit = || faults.hit(vec![], Role::Both, Leg::Plain, "/gen", true).len();
        assert_eq!((hit(), hit(), hit()), (1, 1, 0));
        let faults = Faults::new(parse_list("500:0.5").unwrap(), 1);
        let hit = |_| faults.hit(vec![], Role::Both, Leg::Plain, "/gen", true).len();
        assert!((400..600).contains(&(0..1_000).map(hit).sum::<usize>()));
    }
}
