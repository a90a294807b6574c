//! The block log: which blocks an Envoy sent to which endpoint, for the other Envoys. The events of a log have numbers from
//! 0 on. The leader keeps the log of its Envoy, and the hub one for each Envoy.

use std::collections::VecDeque;

use crate::codec::{Reader, Writer};
use crate::prefix::hash::BlockHash;

/// Overhead of one event in bytes: its place in the queue, and what the allocator adds.
const EVENT_BYTES: usize = 40;

/// Latest block events of one Envoy, oldest first.
#[derive(Debug, Default)]
pub struct BlockLog {
    events: VecDeque<Box<[u8]>>,
    bytes: usize,
    next: u64,
}

impl BlockLog {
    /// Adds an [event](block_event) with the next number.
    pub fn push(&mut self, event: Box<[u8]>) {
        self.bytes = self.bytes.saturating_add(event.len()).saturating_add(EVENT_BYTES);
        self.next = self.next.saturating_add(1);
        self.events.push_back(event);
    }

    /// Forgets the oldest event; `false` where there is none. The numbers of the others stay.
    pub fn forget_oldest(&mut self) -> bool {
        let Some(event) = self.events.pop_front() else { return false };
        self.bytes = self.bytes.saturating_sub(event.len()).saturating_sub(EVENT_BYTES);
        true
    }

    /// Forgets all events. The next one gets the number `next`.
    pub fn restart(&mut self, next: u64) {
        *self = Self { next, ..Self::default() };
    }

    /// Number of the oldest event in the log; the number of the next event where the log is empty.
    #[must_use]
    pub fn oldest(&self) -> u64 {
        self.next.saturating_sub(self.events.len() as u64)
    }

    /// Number that the next event gets.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Bytes of memory of the events that are kept.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The joined events from number `first` on, as many as fit into `room` bytes.
    ///
    /// - A `first` before the oldest event counts as the oldest.
    /// - The first event is returned even if it exceeds a `room` above 0: one event always fits into a message.
    #[must_use]
    pub fn from(&self, first: u64, room: usize) -> Vec<u8> {
        let skip = usize::try_from(first.saturating_sub(self.oldest())).unwrap_or(usize::MAX);
        let mut blocks = Vec::new();
        for event in self.events.iter().skip(skip) {
            let is_first = blocks.is_empty() && room > 0;
            if !is_first && blocks.len().saturating_add(event.len()) > room {
                break;
            }
            blocks.extend_from_slice(event);
        }
        blocks
    }
}

/// Encodes the event that the endpoint with this key got these blocks.
#[must_use]
pub fn block_event(endpoint: u64, blocks: &[BlockHash]) -> Box<[u8]> {
    let mut out = Writer(Vec::with_capacity(blocks.len().saturating_add(2).saturating_mul(8)));
    out.word(endpoint);
    out.word(blocks.len() as u64);
    blocks.iter().for_each(|block| out.word(block.0));
    out.0.into_boxed_slice()
}

/// Splits joined events. It ends at the first malformed one.
pub fn split_events(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    core::iter::from_fn(move || {
        let count = Reader(rest.get(8..)?).word()?;
        let length = usize::try_from(count).ok()?.checked_add(2)?.checked_mul(8)?;
        let (event, behind) = rest.split_at_checked(length)?;
        rest = behind;
        Some(event)
    })
}

/// The endpoint's key and the blocks of one event; `None` where the bytes are no event.
#[must_use]
pub fn read_event(event: &[u8]) -> Option<(u64, Vec<BlockHash>)> {
    let mut rest = Reader(event);
    let (endpoint, count) = (rest.word()?, rest.word()?);
    let blocks: Vec<_> = core::iter::from_fn(|| rest.word().map(BlockHash)).collect();
    (blocks.len() as u64 == count).then_some((endpoint, blocks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn events_are_split_where_they_were_joined(
            events in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u64>(), 0..5)), 0..5),
        ) {
            let hashes = |blocks: Vec<u64>| blocks.into_iter().map(BlockHash).collect::<Vec<_>>();
            let events: Vec<_> = events.into_iter().map(|(endpoint, blocks)| (endpoint, hashes(blocks))).collect();
            let joined: Vec<u8> = events.iter().flat_map(|(endpoint, blocks)| block_event(*endpoint, blocks)).collect();
            let read: Vec<_> = split_events(&joined).filter_map(read_event).collect();
            prop_assert_eq!(read, events);
        }

        #[test]
        fn any_bytes_are_split_without_harm(words in prop::collection::vec(0_u64..7, 0..40), cut in 0_usize..8) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let bytes = &bytes[..bytes.len().saturating_sub(cut)];
            let read: usize = split_events(bytes).map(|event| read_event(event).map_or(0, |_| event.len())).sum();
            prop_assert!(read <= bytes.len());
        }
    }

    #[test]
    fn a_log_keeps_numbers_and_gives_what_fits() {
        let mut log = BlockLog::default();
        for endpoint in 0..5 {
            log.push(block_event(endpoint, &[BlockHash(endpoint)]));
        }
        assert!(log.forget_oldest());
        assert_eq!((log.oldest(), log.next(), log.bytes()), (1, 5, 4 * (24 + EVENT_BYTES)));
        let endpoints = |first, room| -> Vec<u64> {
            split_events(&log.from(first, room)).filter_map(read_event).map(|(endpoint, _)| endpoint).collect()
        };
        assert_eq!(endpoints(0, 1_000), [1, 2, 3, 4]);
        assert_eq!(endpoints(3, 1_000), [3, 4]);
        assert_eq!(endpoints(2, 50), [2, 3]);
        assert_eq!(endpoints(2, 1), [2], "the first one always");
        assert!(endpoints(2, 0).is_empty() && endpoints(9, 1_000).is_empty());
        log.restart(9);
        assert_eq!((log.oldest(), log.next(), log.bytes(), log.forget_oldest()), (9, 9, 0, false));
    }
}
