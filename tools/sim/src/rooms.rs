//! Rooms in which the two legs of a request meet, for engines whose legs name each other beforehand (SGLang, Mooncake).
//!
//! ```text
//! POST /room/KEY   x-engine-id: id, where the protocol names it
//!   200 digest of the prompt   the KV moves; it waits until the prefill leg has computed it
//!   409 reused                 somebody was here before
//!   404                        no such engine here, or nobody came in time
//! ```

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// Path of the side channel below which rooms are.
pub(crate) const ROOM_PATH: &str = "/room/";
/// Path at which Mooncake's bootstrap server answers its engines' ids.
pub(crate) const QUERY_PATH: &str = "/query";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Empty,
    /// The KV of the prompt with this digest is here.
    Offered(u64),
    Taken,
}

/// The rooms of one prefill server.
#[derive(Default)]
pub(crate) struct Rooms {
    table: Mutex<HashMap<String, watch::Sender<Room>>>,
}

impl Rooms {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<Room>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn room(&self, key: &str) -> watch::Sender<Room> {
        self.lock().entry(key.to_owned()).or_insert_with(|| watch::Sender::new(Room::Empty)).clone()
    }

    /// Leaves the KV of a prompt in a room; false if the room has been used.
    pub(crate) fn offer(&self, key: &str, digest: u64) -> bool {
        self.room(key).send_if_modified(|room| {
            let is_free = *room == Room::Empty;
            if is_free {
                *room = Room::Offered(digest);
            }
            is_free
        })
    }

    /// Waits until the KV has been taken; false if nobody came in time.
    pub(crate) async fn until_taken(&self, key: &str, limit: Duration) -> bool {
        let mut room = self.room(key).subscribe();
        tokio::time::timeout(limit, room.wait_for(|room| *room == Room::Taken)).await.is_ok()
    }

    /// Takes the KV, once there is one; `None` if there is none in time, an error if it was taken before.
    pub(crate) async fn take(&self, key: &str, limit: Duration) -> Option<Result<u64, ()>> {
        let room = self.room(key);
        let mut seen = room.subscribe();
        tokio::time::timeout(limit, seen.wait_for(|room| *room != Room::Empty)).await.ok()?.ok()?;
        let mut taken = Err(());
        room.send_if_modified(|room| {
            if let Room::Offered(digest) = *room {
                taken = Ok(digest);
                *room = Room::Taken;
            }
            taken.is_ok()
        });
        Some(taken)
    }
}
