//! Events as bytes in shared data. Workers of two releases read each other's.

use std::borrow::Cow;

use super::{Event, MAX_EVENT_BLOCKS};
use crate::codec::{Reader, Writer};
use crate::endpoints::elsewhere::{Fleet, Totals};
use crate::endpoints::health::Cause;
use crate::endpoints::outliers::{ErrorClass, Leg};
use crate::prefix::hash::BlockHash;
use crate::workers::waiting::{HeldByKey, WaitingRequest};

impl Event<'_> {
    /// Appends the event, little endian: its length in bytes (4), its kind (1), the key (8), and the fields of the kind.
    pub(crate) fn write(&self, endpoint: u64, into: &mut Vec<u8>) {
        let start = into.len();
        let mut out = Writer(core::mem::take(into));
        out.0.extend_from_slice(&[0; 4]);
        out.0.push(self.kind());
        out.word(endpoint);
        self.write_fields(&mut out);
        *into = out.0;
        let length = u32::try_from(into.len().saturating_sub(start)).unwrap_or(u32::MAX);
        if let Some(place) = into.get_mut(start..).and_then(|event| event.first_chunk_mut()) {
            *place = length.to_le_bytes();
        }
    }

    /// Number of the event's kind. A number is never given to another kind.
    const fn kind(&self) -> u8 {
        match self {
            Self::PrefillStarted { .. } => 1,
            Self::PrefillEnded { .. } => 2,
            Self::PrefillAbandoned { .. } => 3,
            Self::DecodeStarted { .. } => 4,
            Self::DecodeEnded { .. } => 5,
            Self::Holds { .. } => 6,
            Self::Failed { .. } => 7,
            Self::Healed => 8,
            Self::Admitted { .. } => 9,
            Self::Released { .. } => 10,
            Self::BusyElsewhere { .. } => 11,
            Self::HoldsByOthers { .. } => 12,
            Self::FleetIs { .. } => 13,
            Self::Answered { .. } => 14,
            Self::Waits { .. } => 15,
            Self::HeldChanged { .. } => 16,
            Self::Bound { .. } => 17,
            Self::WaitEnded { .. } => 18,
            Self::Forgot => 19,
            Self::Lacks { .. } => 20,
            Self::Doubted { .. } => 21,
        }
    }

    fn write_fields(&self, out: &mut Writer) {
        match self {
            Self::PrefillStarted { leg, seconds, at, expires } => {
                out.word(*leg);
                out.word(seconds.to_bits());
                out.time(*at);
                out.time(*expires);
            }
            Self::PrefillEnded { leg, at, answered } => {
                out.word(*leg);
                out.time(*at);
                out.0.push(u8::from(*answered));
            }
            Self::PrefillAbandoned { leg, at } => {
                out.word(*leg);
                out.time(*at);
            }
            Self::DecodeStarted { tokens } | Self::DecodeEnded { tokens } => out.word(*tokens),
            Self::Holds { blocks } | Self::HoldsByOthers { blocks } | Self::Lacks { blocks } => {
                blocks.iter().take(MAX_EVENT_BLOCKS).for_each(|block| out.word(block.0));
            }
            Self::Failed { at, cause } => {
                out.time(*at);
                out.0.push(cause.code());
            }
            Self::Healed | Self::Forgot => {}
            Self::Doubted { doubt, touches } => {
                out.0.push(*doubt);
                out.word(*touches);
            }
            Self::Admitted { fairness, tokens } | Self::Released { fairness, tokens } => {
                out.word(*fairness);
                out.word(*tokens);
            }
            Self::BusyElsewhere { by } => by.write(out),
            Self::FleetIs { fleet } => fleet.write(out),
            Self::Answered { leg, error } => {
                out.0.push(u8::from(*leg == Leg::Prefill));
                out.0.push(error.map_or(0, ErrorClass::code));
            }
            Self::Waits { request } => request.write(out),
            Self::HeldChanged { id, held } => {
                out.word(*id);
                held.write(out);
            }
            Self::Bound { id, seconds } => {
                out.word(*id);
                out.word(seconds.to_bits());
            }
            Self::WaitEnded { id } => out.word(*id),
        }
    }

    /// The first encoded event and the bytes behind it; `None` where `bytes` has no whole event.
    pub(crate) fn split_first(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let length = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
        bytes.split_at_checked(length).filter(|(event, _)| !event.is_empty())
    }

    /// The events in `bytes`, each with its key. Kinds that only a newer filter knows are left out.
    pub(crate) fn read(bytes: &[u8]) -> impl Iterator<Item = (u64, Self)> {
        let mut rest = bytes;
        core::iter::from_fn(move || {
            loop {
                let (event, behind) = Self::split_first(rest)?;
                rest = behind;
                if let Some(event) = event.get(4..).and_then(Self::from_bytes) {
                    return Some(event);
                }
            }
        })
    }

    fn from_bytes(bytes: &[u8]) -> Option<(u64, Self)> {
        let (kind, rest) = bytes.split_first()?;
        let mut rest = Reader(rest);
        let endpoint = rest.word()?;
        let event = match kind {
            1 => {
                let (leg, seconds) = (rest.word()?, f64::from_bits(rest.word()?));
                Self::PrefillStarted { leg, seconds, at: rest.time()?, expires: rest.time()? }
            }
            // An older filter does not write whether the endpoint answered.
            2 => Self::PrefillEnded { leg: rest.word()?, at: rest.time()?, answered: rest.byte() == Some(1) },
            3 => Self::PrefillAbandoned { leg: rest.word()?, at: rest.time()? },
            4 => Self::DecodeStarted { tokens: rest.word()? },
            5 => Self::DecodeEnded { tokens: rest.word()? },
            6 => Self::Holds { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
            // An older filter writes no cause.
            7 => Self::Failed { at: rest.time()?, cause: Cause::of_code(rest.byte().unwrap_or_default()) },
            8 => Self::Healed,
            19 => Self::Forgot,
            9 => Self::Admitted { fairness: rest.word()?, tokens: rest.word()? },
            10 => Self::Released { fairness: rest.word()?, tokens: rest.word()? },
            11 => Self::BusyElsewhere { by: Totals::read(&mut rest)? },
            12 => Self::HoldsByOthers { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
            13 => Self::FleetIs { fleet: Fleet::read(&mut rest)? },
            14 => {
                let leg = if rest.byte()? == 1 { Leg::Prefill } else { Leg::Decode };
                Self::Answered { leg, error: ErrorClass::of_code(rest.byte()?) }
            }
            15 => Self::Waits { request: Cow::Owned(WaitingRequest::read(&mut rest)?) },
            16 => Self::HeldChanged { id: rest.word()?, held: Cow::Owned(HeldByKey::read(&mut rest)?) },
            17 => Self::Bound { id: rest.word()?, seconds: f64::from_bits(rest.word()?) },
            18 => Self::WaitEnded { id: rest.word()? },
            21 => Self::Doubted { doubt: rest.byte()?, touches: rest.word()? },
            20 => Self::Lacks { blocks: core::iter::from_fn(|| rest.word().map(BlockHash)).collect() },
            _ => return None,
        };
        Some((endpoint, event))
    }
}
