//! What Envoys and `pd-control` tell each other: words of 8 bytes, little endian, no padding.
//!
//! ```text
//! Told    version from hub state wants known:[gateway next]* records:[Record]*
//! Record  gateway replaces turn epoch loads:[endpoint Totals]* oldest first blocks:bytes report:bytes
//! Heard   version hub state have:[gateway next]* gateways exchanging has_loads loads:[endpoint Totals]*
//!         batches:[gateway epoch first blocks:bytes]*
//! blocks  [endpoint count hash*]*
//! Totals  work tokens requests
//! ```
//! A list stands behind its length, bytes stand behind theirs. An endpoint is its [key](crate::endpoints::endpoint_state::Slot::key). A
//! reader takes a message whole or not at all; words behind what it knows are a newer writer's and are left alone.

use crate::codec::{Reader, Writer};
use crate::endpoints::elsewhere::Totals;

/// Path of `pd-control`'s answer to [`Told`].
pub const EXCHANGE_PATH: &str = "/v1/exchange";
/// Version of these messages.
pub const EXCHANGE_VERSION: u64 = 1;
/// Bytes of a message at most.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Bytes of blocks in one message at most, so that reading it takes a worker no more than a few milliseconds.
pub const MAX_BLOCKS_BYTES: usize = 256 << 10;

/// A question to `pd-control`, with what the asker has to tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Who asks: a gateway, or another `pd-control`.
    pub from: u64,
    /// [`Heard::hub`] and [`Heard::state`] of the last answer.
    pub at: (u64, u64),
    /// Whether the answer shall have loads and blocks.
    pub wants: bool,
    /// Per gateway the number of the first block event that the asker does not have yet; in the order of the gateways.
    pub known: Vec<(u64, u64)>,
    /// What there is to tell: a gateway's own, or those of the gateways that a `pd-control` hears from.
    pub records: Vec<Record>,
}

/// What one gateway (all workers of an Envoy) does and knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Random number of one worker's time as the gateway's voice.
    pub gateway: u64,
    /// The voice before it, whose loads are these; 0: none.
    pub replaces: u64,
    /// Counts up: a record with a smaller one is old.
    pub turn: u64,
    /// What block hashes depend on besides the prompt; those of another epoch are of no use.
    pub epoch: u64,
    /// What is in flight from here, per endpoint; all of it.
    pub loads: Vec<(u64, Totals)>,
    /// Number of the oldest block event that the gateway still has.
    pub oldest: u64,
    /// Number of the first block event in `blocks`.
    pub first: u64,
    /// [Block events](super::blocks), at most [`MAX_BLOCKS_BYTES`] of them.
    pub blocks: Vec<u8>,
    /// A [`Report`](super::report::Report) in JSON; empty: as before.
    pub report: Vec<u8>,
}

impl Record {
    /// Bytes of this record in a message.
    pub(super) fn byte_len(&self) -> usize {
        let words = self.loads.len().saturating_mul(4).saturating_add(9);
        words.saturating_mul(8).saturating_add(self.blocks.len()).saturating_add(self.report.len())
    }
}

/// `pd-control`'s answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Random number of one run of one `pd-control`.
    pub hub: u64,
    /// Counts changes of the loads of others.
    pub state: u64,
    /// Per gateway that told something the number of its next block event.
    pub have: Vec<(u64, u64)>,
    /// Envoys that there are.
    pub gateways: u64,
    /// Those of them that exchange, the asker included.
    pub exchanging: u64,
    /// Sums over the other gateways, per endpoint with something in flight; `None`: as before.
    pub loads: Option<Vec<(u64, Totals)>>,
    /// What the asker does not have yet.
    pub batches: Vec<Batch>,
}

/// Block events of one gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Whose.
    pub gateway: u64,
    /// [`Record::epoch`].
    pub epoch: u64,
    /// Number of the first one.
    pub first: u64,
    /// As in [`Record::blocks`].
    pub blocks: Vec<u8>,
}

impl Told {
    /// The bytes that go over the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer::default();
        let head = [EXCHANGE_VERSION, self.from, self.at.0, self.at.1, u64::from(self.wants)];
        head.into_iter().for_each(|word| out.word(word));
        write_pairs(&mut out, &self.known);
        out.list(&self.records, |out, record| {
            let head = [record.gateway, record.replaces, record.turn, record.epoch];
            head.into_iter().for_each(|word| out.word(word));
            write_loads(out, &record.loads);
            out.word(record.oldest);
            out.word(record.first);
            out.bytes(&record.blocks);
            out.bytes(&record.report);
        });
        out.0
    }

    /// Reads a message; `None` when it is none of [`EXCHANGE_VERSION`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = &mut begin(bytes)?;
        let (from, at, wants) = (rest.word()?, (rest.word()?, rest.word()?), rest.word()? != 0);
        let mut known = read_pairs(rest)?;
        known.sort_unstable();
        Some(Self {
            from,
            at,
            wants,
            known,
            records: rest.list(|rest| {
                Some(Record {
                    gateway: rest.word()?,
                    replaces: rest.word()?,
                    turn: rest.word()?,
                    epoch: rest.word()?,
                    loads: read_loads(rest)?,
                    oldest: rest.word()?,
                    first: rest.word()?,
                    blocks: read_blocks(rest)?,
                    report: rest.bytes()?,
                })
            })?,
        })
    }
}

impl Heard {
    /// The bytes that go over the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer::default();
        [EXCHANGE_VERSION, self.hub, self.state].into_iter().for_each(|word| out.word(word));
        write_pairs(&mut out, &self.have);
        [self.gateways, self.exchanging, u64::from(self.loads.is_some())].into_iter().for_each(|word| out.word(word));
        write_loads(&mut out, self.loads.as_deref().unwrap_or_default());
        out.list(&self.batches, |out, batch| {
            [batch.gateway, batch.epoch, batch.first].into_iter().for_each(|word| out.word(word));
            out.bytes(&batch.blocks);
        });
        out.0
    }

    /// Reads a message; `None` when it is none of [`EXCHANGE_VERSION`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = &mut begin(bytes)?;
        let (hub, state) = (rest.word()?, rest.word()?);
        let have = read_pairs(rest)?;
        let (gateways, exchanging, has_loads) = (rest.word()?, rest.word()?, rest.word()? != 0);
        let loads = read_loads(rest)?;
        let batches = rest.list(|rest| {
            Some(Batch { gateway: rest.word()?, epoch: rest.word()?, first: rest.word()?, blocks: read_blocks(rest)? })
        })?;
        Some(Self { hub, state, have, gateways, exchanging, loads: has_loads.then_some(loads), batches })
    }
}

/// What stands behind the version, where it is ours.
fn begin(bytes: &[u8]) -> Option<Reader<'_>> {
    let mut rest = Reader(bytes);
    (rest.word()? == EXCHANGE_VERSION).then_some(rest)
}

fn write_pairs(out: &mut Writer, pairs: &[(u64, u64)]) {
    out.list(pairs, |out, (gateway, next)| {
        out.word(*gateway);
        out.word(*next);
    });
}

fn write_loads(out: &mut Writer, loads: &[(u64, Totals)]) {
    out.list(loads, |out, (endpoint, totals)| {
        out.word(*endpoint);
        totals.write(out);
    });
}

fn read_pairs(rest: &mut Reader<'_>) -> Option<Vec<(u64, u64)>> {
    rest.list(|rest| Some((rest.word()?, rest.word()?)))
}

fn read_loads(rest: &mut Reader<'_>) -> Option<Vec<(u64, Totals)>> {
    rest.list(|rest| Some((rest.word()?, Totals::read(rest)?)))
}

fn read_blocks(rest: &mut Reader<'_>) -> Option<Vec<u8>> {
    rest.bytes().filter(|blocks| blocks.len() <= MAX_BLOCKS_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn totals() -> impl Strategy<Value = Totals> {
        any::<(u64, u64, u64)>().prop_map(|(work, tokens, requests)| Totals { work, tokens, requests })
    }

    fn pairs() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec(any::<(u64, u64)>(), 0..4)
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..20)
    }

    fn record() -> impl Strategy<Value = Record> {
        let loads = prop::collection::vec((any::<u64>(), totals()), 0..4);
        (any::<[u64; 6]>(), loads, bytes(), bytes()).prop_map(|(words, loads, blocks, report)| {
            let [gateway, replaces, turn, epoch, oldest, first] = words;
            Record { gateway, replaces, turn, epoch, loads, oldest, first, blocks, report }
        })
    }

    #[test]
    fn a_message_has_no_more_blocks_than_a_reader_has_time_for() {
        for over in [0, 1] {
            let blocks = vec![0; MAX_BLOCKS_BYTES + over];
            let told =
                Told { records: vec![Record { blocks: blocks.clone(), ..Record::default() }], ..Told::default() };
            assert_eq!(Told::from_bytes(&told.to_bytes()).is_some(), over == 0);
            let heard = Heard { batches: vec![Batch { blocks, ..Batch::default() }], ..Heard::default() };
            assert_eq!(Heard::from_bytes(&heard.to_bytes()).is_some(), over == 0);
        }
    }

    proptest! {
        #[test]
        fn what_is_told_is_heard(
            from: u64, at: (u64, u64), wants: bool, known in pairs(), records in prop::collection::vec(record(), 0..3),
        ) {
            let mut known = known;
            known.sort_unstable();
            let told = Told { from, at, wants, known, records };
            let head = Told { records: Vec::new(), ..told.clone() }.to_bytes().len();
            let length = told.records.iter().map(Record::byte_len).sum::<usize>();
            prop_assert_eq!(told.to_bytes().len(), head + length);
            prop_assert_eq!(Told::from_bytes(&told.to_bytes()), Some(told));
        }

        #[test]
        fn what_is_answered_is_heard(
            words: [u64; 4], have in pairs(),
            loads in prop::option::of(prop::collection::vec((any::<u64>(), totals()), 0..4)),
            batches in prop::collection::vec((any::<[u64; 3]>(), bytes()), 0..3),
        ) {
            let [hub, state, gateways, exchanging] = words;
            let batch = |([gateway, epoch, first], blocks): ([u64; 3], Vec<u8>)| Batch { gateway, epoch, first, blocks };
            let batches = batches.into_iter().map(batch).collect();
            let heard = Heard { hub, state, have, gateways, exchanging, loads, batches };
            prop_assert_eq!(Heard::from_bytes(&heard.to_bytes()), Some(heard));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), words: [u64; 20]) {
            let _ = (Told::from_bytes(&bytes), Heard::from_bytes(&bytes));
            let mut near = vec![1_u64];
            near.extend(words.map(|word| word % 7));
            let near: Vec<u8> = near.iter().flat_map(|word| word.to_le_bytes()).collect();
            let _ = (Told::from_bytes(&near), Heard::from_bytes(&near));
        }
    }
}
