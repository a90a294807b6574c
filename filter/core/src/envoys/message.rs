//! The messages of the exchange, in the format of [`codec`](crate::codec).
//!
//! ```text
//! ExchangeRequest   version from hub state wants known:[gateway next]* records:[Record]* origins:[word]* legs:[bytes]*
//! Record            gateway replaces turn hash_scheme loads:[endpoint Totals]* oldest first blocks:bytes report:bytes
//! ExchangeResponse  version hub state have:[gateway next]* gateways exchanging has_loads loads:[endpoint Totals]*
//!                   batches:[gateway hash_scheme first blocks:bytes]* legs:bytes
//! blocks            [endpoint count hash*]*
//! Totals            work tokens requests
//! ```
//! An endpoint is its [key](crate::endpoints::endpoint_state::EndpointState::key). A gateway is an Envoy, named by the
//! number of its leader; in `known` and in batches, by the public name that the hub gives it.
//!
//! `legs` has two bytes, little endian, for each `Totals` before it, in the same order: [`Totals::legs`], at most 65,535.
//! Two bytes, because a message of the most endpoints would exceed [`MAX_MESSAGE_BYTES`] with a word each. A message of an
//! earlier build ends before `legs`: its loads have no legs. In any other message `legs` is mandatory.
//!
//! A reader takes a message whole or not at all. It ignores bytes behind those that it knows: a newer writer may add some.

use crate::codec::{Reader, Writer};
use crate::endpoints::elsewhere::Totals;

/// Path at `pd-control` that takes an [`ExchangeRequest`] by POST and answers with an [`ExchangeResponse`].
pub const EXCHANGE_PATH: &str = "/v1/exchange";
/// Version of these messages. A hub and a leader of different versions do not read each other's messages.
pub const EXCHANGE_VERSION: u64 = 1;
/// Most bytes of a message. A larger message is refused whole.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Most bytes of blocks in one message: a worker reads them in a few milliseconds. Larger messages are refused.
pub const MAX_BLOCKS_BYTES: usize = 256 << 10;

/// Most Envoys that a request may know. A leader remembers fewer, and the request stays in memory while it waits.
const MAX_KNOWN: usize = 4_096;
/// Most records of a request. A hub knows fewer Envoys.
const MAX_RECORDS: usize = 4_096;

/// A request of a leader to the hub, or of a hub to another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExchangeRequest {
    /// Number of the sender: a leader or a hub.
    pub from: u64,
    /// [`ExchangeResponse::hub`] and [`ExchangeResponse::state`] of the last answer with loads; `(0, 0)`: none.
    pub known_state: (u64, u64),
    /// Whether the sender wants loads and blocks in the answer.
    pub wants: bool,
    /// For each [`Batch::gateway`] the number of the first block event that the sender does not have, sorted by gateway.
    pub known: Vec<(u64, u64)>,
    /// The leader's own record, or the records of the leaders that called the hub.
    pub records: Vec<Record>,
    /// In a request of a hub, for each record a number of the host that its Envoy sends from; 0: unknown. Empty in a
    /// leader's request and in one of an earlier release.
    pub origins: Vec<u64>,
}

/// What one Envoy has in flight and which blocks it sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Random number of the leader, above 0. A worker that becomes the leader again has another one.
    pub gateway: u64,
    /// The leader before, whose loads are in this record now; 0: none.
    pub replaces: u64,
    /// Number of the record, from 1 on. A record with a smaller one than the last is old.
    pub turn: u64,
    /// Hash scheme of the blocks. Envoys with another scheme ignore them.
    pub hash_scheme: u64,
    /// Everything that the Envoy has in flight, by endpoint.
    pub loads: Vec<(u64, Totals)>,
    /// Number of the oldest block event that the Envoy still has.
    pub oldest: u64,
    /// Number of the first block event in `blocks`.
    pub first: u64,
    /// [Block events](crate::prefix::block_log), at most [`MAX_BLOCKS_BYTES`].
    pub blocks: Vec<u8>,
    /// A [`Report`](super::report::Report) in JSON; empty: the last one stands.
    pub report: Vec<u8>,
}

impl Record {
    /// Bytes of this record in a message.
    pub(super) fn byte_len(&self) -> usize {
        let words = self.loads.len().saturating_mul(4).saturating_add(10);
        let legs = self.loads.len().saturating_mul(2);
        words.saturating_mul(8).saturating_add(legs).saturating_add(self.blocks.len()).saturating_add(self.report.len())
    }
}

/// The hub's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExchangeResponse {
    /// Random number of one run of a hub.
    pub hub: u64,
    /// Number of changes of the loads of other Envoys, for [`ExchangeRequest::known_state`].
    pub state: u64,
    /// For each record of the request the gateway, and the number of the block event that the hub expects next.
    pub have: Vec<(u64, u64)>,
    /// Number of Envoys that there are.
    pub gateways: u64,
    /// Number of Envoys that exchange, the sender included.
    pub exchanging: u64,
    /// Sums over all other Envoys, by endpoint, without endpoints that have nothing in flight; `None`: the last ones stand.
    pub loads: Option<Vec<(u64, Totals)>>,
    /// Block events that the sender does not have.
    pub batches: Vec<Batch>,
}

/// Block events of one Envoy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The Envoy's public name; see [`Hub::with_public_names`](super::hub::Hub::with_public_names).
    pub gateway: u64,
    /// [`Record::hash_scheme`].
    pub hash_scheme: u64,
    /// Number of the first event; the others follow without a gap.
    pub first: u64,
    /// As in [`Record::blocks`].
    pub blocks: Vec<u8>,
}

impl ExchangeRequest {
    /// The bytes that go over the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer::default();
        let head = [EXCHANGE_VERSION, self.from, self.known_state.0, self.known_state.1, u64::from(self.wants)];
        head.into_iter().for_each(|word| out.word(word));
        write_pairs(&mut out, &self.known);
        out.list(&self.records, |out, record| {
            let head = [record.gateway, record.replaces, record.turn, record.hash_scheme];
            head.into_iter().for_each(|word| out.word(word));
            write_loads(out, &record.loads);
            out.word(record.oldest);
            out.word(record.first);
            out.bytes(&record.blocks);
            out.bytes(&record.report);
        });
        out.list(&self.origins, |out, origin| out.word(*origin));
        out.list(&self.records, |out, record| out.bytes(&legs(&record.loads)));
        out.0
    }

    /// Reads a message; `None` where it has another version than [`EXCHANGE_VERSION`], is cut short, has too many blocks or
    /// names too many Envoys.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = &mut begin(bytes)?;
        let (from, known_state, wants) = (rest.word()?, (rest.word()?, rest.word()?), rest.word()? != 0);
        let mut known = read_pairs(rest).filter(|known| known.len() <= MAX_KNOWN)?;
        known.sort_unstable();
        let mut records = rest.list_of_most(MAX_RECORDS, |rest| {
            Some(Record {
                gateway: rest.word()?,
                replaces: rest.word()?,
                turn: rest.word()?,
                hash_scheme: rest.word()?,
                loads: read_loads(rest)?,
                oldest: rest.word()?,
                first: rest.word()?,
                blocks: read_blocks(rest)?,
                report: rest.bytes()?,
            })
        })?;
        let origins = rest.list(Reader::word).unwrap_or_default();
        if !rest.0.is_empty() {
            let legs = rest.list_of_most(MAX_RECORDS, Reader::bytes).filter(|legs| legs.len() == records.len())?;
            records.iter_mut().zip(&legs).try_for_each(|(record, legs)| set_legs(&mut record.loads, legs))?;
        }
        Some(Self { from, known_state, wants, known, records, origins })
    }
}

impl ExchangeResponse {
    /// The bytes that go over the wire.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer::default();
        [EXCHANGE_VERSION, self.hub, self.state].into_iter().for_each(|word| out.word(word));
        write_pairs(&mut out, &self.have);
        [self.gateways, self.exchanging, u64::from(self.loads.is_some())].into_iter().for_each(|word| out.word(word));
        write_loads(&mut out, self.loads.as_deref().unwrap_or_default());
        out.list(&self.batches, |out, batch| {
            [batch.gateway, batch.hash_scheme, batch.first].into_iter().for_each(|word| out.word(word));
            out.bytes(&batch.blocks);
        });
        out.bytes(&legs(self.loads.as_deref().unwrap_or_default()));
        out.0
    }

    /// Reads a message; `None` where it has another version than [`EXCHANGE_VERSION`], is cut short or has too many blocks.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = &mut begin(bytes)?;
        let (hub, state) = (rest.word()?, rest.word()?);
        let have = read_pairs(rest)?;
        let (gateways, exchanging, has_loads) = (rest.word()?, rest.word()?, rest.word()? != 0);
        let mut loads = read_loads(rest)?;
        let batches = rest.list(|rest| {
            Some(Batch {
                gateway: rest.word()?,
                hash_scheme: rest.word()?,
                first: rest.word()?,
                blocks: read_blocks(rest)?,
            })
        })?;
        if !rest.0.is_empty() {
            set_legs(&mut loads, &rest.bytes()?)?;
        }
        Some(Self { hub, state, have, gateways, exchanging, loads: has_loads.then_some(loads), batches })
    }
}

/// What follows the version; `None` where the version is another one.
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
        [*endpoint, totals.work, totals.tokens, totals.requests].into_iter().for_each(|word| out.word(word));
    });
}

/// The legs of loads, two bytes each. A sum below zero counts as 0.
fn legs(loads: &[(u64, Totals)]) -> Vec<u8> {
    let legs = |legs: u64| u16::try_from(legs.cast_signed().max(0)).unwrap_or(u16::MAX);
    loads.iter().flat_map(|(_, totals)| legs(totals.legs).to_le_bytes()).collect()
}

fn read_pairs(rest: &mut Reader<'_>) -> Option<Vec<(u64, u64)>> {
    rest.list(|rest| Some((rest.word()?, rest.word()?)))
}

fn read_loads(rest: &mut Reader<'_>) -> Option<Vec<(u64, Totals)>> {
    let totals = |rest: &mut Reader<'_>| {
        Some(Totals { work: rest.word()?, tokens: rest.word()?, requests: rest.word()?, legs: 0 })
    };
    rest.list(|rest| Some((rest.word()?, totals(rest)?)))
}

/// Sets the legs of loads; `None` where there are more or fewer than loads.
fn set_legs(loads: &mut [(u64, Totals)], legs: &[u8]) -> Option<()> {
    let (legs, rest) = legs.as_chunks::<2>();
    if loads.len() != legs.len() || !rest.is_empty() {
        return None;
    }
    loads.iter_mut().zip(legs).for_each(|((_, totals), legs)| totals.legs = u64::from(u16::from_le_bytes(*legs)));
    Some(())
}

fn read_blocks(rest: &mut Reader<'_>) -> Option<Vec<u8>> {
    rest.bytes().filter(|blocks| blocks.len() <= MAX_BLOCKS_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn totals() -> impl Strategy<Value = Totals> {
        any::<([u64; 3], u16)>().prop_map(|([work, tokens, requests], legs)| Totals {
            work,
            tokens,
            requests,
            legs: u64::from(legs),
        })
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
            let [gateway, replaces, turn, hash_scheme, oldest, first] = words;
            Record { gateway, replaces, turn, hash_scheme, loads, oldest, first, blocks, report }
        })
    }

    #[test]
    fn a_message_has_no_more_blocks_than_a_reader_has_time_for() {
        for over in [0, 1] {
            let blocks = vec![0; MAX_BLOCKS_BYTES + over];
            let request = ExchangeRequest {
                records: vec![Record { blocks: blocks.clone(), ..Record::default() }],
                ..ExchangeRequest::default()
            };
            assert_eq!(ExchangeRequest::from_bytes(&request.to_bytes()).is_some(), over == 0);
            let response =
                ExchangeResponse { batches: vec![Batch { blocks, ..Batch::default() }], ..ExchangeResponse::default() };
            assert_eq!(ExchangeResponse::from_bytes(&response.to_bytes()).is_some(), over == 0);
        }
    }

    /// A request and an answer with the same two loads, and how to read these.
    struct Loads {
        request: Vec<u8>,
        response: Vec<u8>,
    }

    impl Loads {
        fn new(loads: Vec<(u64, Totals)>) -> Self {
            let records = vec![Record { gateway: 1, loads: loads.clone(), ..Record::default() }];
            Self {
                request: ExchangeRequest { records, ..ExchangeRequest::default() }.to_bytes(),
                response: ExchangeResponse { loads: Some(loads), ..ExchangeResponse::default() }.to_bytes(),
            }
        }

        fn of_request(bytes: &[u8]) -> Option<Vec<(u64, Totals)>> {
            Some(ExchangeRequest::from_bytes(bytes)?.records.remove(0).loads)
        }

        fn of_response(bytes: &[u8]) -> Option<Vec<(u64, Totals)>> {
            ExchangeResponse::from_bytes(bytes)?.loads
        }
    }

    const ONE: Totals = Totals { work: 1, tokens: 2, requests: 3, legs: 4 };

    #[test]
    fn a_message_of_an_earlier_build_is_read_without_legs() {
        let Loads { request, response } = Loads::new(vec![(5, ONE), (6, ONE)]);
        let without = Some(vec![(5, Totals { legs: 0, ..ONE }), (6, Totals { legs: 0, ..ONE })]);
        // Behind the records: the number of origins, of lists of legs, and of bytes of the one list, then its four bytes.
        for (cut, is_earlier) in [(1, false), (4, false), (12, false), (20, true), (28, true)] {
            let read = Loads::of_request(&request[..request.len() - cut]);
            assert_eq!(read, without.clone().filter(|_| is_earlier), "{cut}");
        }
        // Behind the batches: the number of bytes, and four bytes.
        for (cut, is_earlier) in [(1, false), (4, false), (12, true)] {
            let read = Loads::of_response(&response[..response.len() - cut]);
            assert_eq!(read, without.clone().filter(|_| is_earlier), "{cut}");
        }
    }

    #[test]
    fn a_message_with_legs_for_other_loads_is_refused() {
        let Loads { request, response } = Loads::new(vec![(5, ONE), (6, ONE)]);
        for (length, is_good) in [(0_u64, false), (2, false), (3, false), (4, true), (5, false), (6, false)] {
            let of_length = |bytes: &[u8]| {
                let (head, legs) = bytes.split_at(bytes.len() - 4);
                [&head[..head.len() - 8], &length.to_le_bytes(), legs, &[0; 2]].concat()
            };
            assert_eq!(Loads::of_request(&of_length(&request)).is_some(), is_good, "{length}");
            assert_eq!(Loads::of_response(&of_length(&response)).is_some(), is_good, "{length}");
        }
        let of_no_record = [&request[..request.len() - 20], &0_u64.to_le_bytes()].concat();
        assert_eq!(Loads::of_request(&of_no_record), None);
    }

    #[test]
    fn legs_beyond_two_bytes_are_as_many_as_these_can_say() {
        let read = |legs: u64| {
            let Loads { request, response } = Loads::new(vec![(5, Totals { legs, ..ONE })]);
            let read = [Loads::of_request(&request), Loads::of_response(&response)];
            read.map(|loads| loads.unwrap()[0].1.legs)
        };
        let below_zero = 0_u64.wrapping_sub(3);
        for (legs, expected) in [(0, 0), (65_535, 65_535), (65_536, 65_535), (i64::MAX as u64, 65_535), (below_zero, 0)]
        {
            assert_eq!(read(legs), [expected; 2], "{legs}");
        }
    }

    proptest! {
        #[test]
        fn a_request_is_read_as_it_was_written(
            from: u64, known_state: (u64, u64), wants: bool, known in pairs(), records in prop::collection::vec(record(), 0..3),
            origins in prop::collection::vec(any::<u64>(), 0..3),
        ) {
            let mut known = known;
            known.sort_unstable();
            let request = ExchangeRequest { from, known_state, wants, known, records, origins };
            let head = ExchangeRequest { records: Vec::new(), ..request.clone() }.to_bytes().len();
            let length = request.records.iter().map(Record::byte_len).sum::<usize>();
            prop_assert_eq!(request.to_bytes().len(), head + length);
            prop_assert_eq!(ExchangeRequest::from_bytes(&request.to_bytes()), Some(request));
        }

        #[test]
        fn a_response_is_read_as_it_was_written(
            words: [u64; 4], have in pairs(),
            loads in prop::option::of(prop::collection::vec((any::<u64>(), totals()), 0..4)),
            batches in prop::collection::vec((any::<[u64; 3]>(), bytes()), 0..3),
        ) {
            let [hub, state, gateways, exchanging] = words;
            let batch = |([gateway, hash_scheme, first], blocks): ([u64; 3], Vec<u8>)| Batch { gateway, hash_scheme, first, blocks };
            let batches = batches.into_iter().map(batch).collect();
            let response = ExchangeResponse { hub, state, have, gateways, exchanging, loads, batches };
            prop_assert_eq!(ExchangeResponse::from_bytes(&response.to_bytes()), Some(response));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), words: [u64; 20]) {
            let _ = (ExchangeRequest::from_bytes(&bytes), ExchangeResponse::from_bytes(&bytes));
            let mut near = vec![1_u64];
            near.extend(words.map(|word| word % 7));
            let near: Vec<u8> = near.iter().flat_map(|word| word.to_le_bytes()).collect();
            let _ = (ExchangeRequest::from_bytes(&near), ExchangeResponse::from_bytes(&near));
        }
    }
}
