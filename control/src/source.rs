//! What a source of endpoint lists tells the publisher.
//!
//! A source is a task that owns the sending half: it sends a list whenever it has one, and why it has none when it
//! cannot get one. It never decides what is in force.

use tokio::sync::mpsc;

use crate::registry::EndpointList;

/// A whole list, or one line saying why there is none (the list in force stays).
pub type Update = Result<EndpointList, String>;

/// Where a source sends its lists. It waits while the publisher is busy.
pub type Updates = mpsc::Sender<Update>;
