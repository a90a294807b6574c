//! Waking the workers of this Envoy, by one shared queue of the host for each worker slot.
//!
//! The host runs the callback of the root context that registered the queue last, on that context's thread. An item has no
//! content: the woken worker looks for turns itself.

use std::collections::BTreeMap;

use crate::host;

/// Bytes of an item. The host copies them, so they are few.
const ITEM: &[u8] = b"w";

/// The queues of the worker slots.
#[derive(Default)]
pub struct WakeQueues {
    vm_id: Option<Vec<u8>>,
    /// This worker's slot, and the token of its queue.
    own: Option<(usize, u32)>,
    /// Tokens of the other slots' queues. A slot keeps its queue when another worker takes the slot.
    tokens: BTreeMap<usize, u32>,
}

impl WakeQueues {
    /// Sets the slot of this worker. From now on items of the slot's queue wake this root context.
    pub fn hold(&mut self, slot: Option<usize>) {
        if self.own.map(|(slot, _)| slot) != slot {
            self.own = slot.and_then(|slot| Some((slot, host::register_queue(&name(slot)).ok()?)));
        }
    }

    /// Wakes the worker in a slot. `false`: the host cannot.
    pub fn wake(&mut self, slot: usize) -> bool {
        self.token(slot).is_some_and(|token| host::enqueue(token, ITEM).is_ok())
    }

    /// Wakes this worker, after this callback. `false`: the host cannot.
    pub fn wake_self(&mut self) -> bool {
        self.own.is_some_and(|(slot, _)| self.wake(slot))
    }

    /// Empties this worker's queue. `false`: it was empty, because an earlier callback took all items.
    pub fn take_all(&mut self, token: u32) -> bool {
        let mut has_any = false;
        while host::dequeue(token).is_ok() {
            has_any = true;
        }
        has_any
    }

    fn token(&mut self, slot: usize) -> Option<u32> {
        if let Some((_, token)) = self.own.filter(|(own, _)| *own == slot) {
            return Some(token);
        }
        if let Some(token) = self.tokens.get(&slot) {
            return Some(*token);
        }
        let vm_id = self.vm_id.get_or_insert_with(|| host::property("plugin_vm_id").unwrap_or_default());
        let token = host::resolve_queue(vm_id, &name(slot)).ok()?;
        self.tokens.insert(slot, token);
        Some(token)
    }
}

/// Name of a slot's queue. Workers of two releases share it.
fn name(slot: usize) -> String {
    format!("pd/1/wake/{slot}")
}
