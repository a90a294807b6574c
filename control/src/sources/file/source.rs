//! The file source: notices an edit within milliseconds and never publishes half a file.
//!
//! The kernel reports changes in the file's directory, so pd-control sees a rename over the file, the way an editor
//! saves, and the link swap of a mounted ConfigMap. It reads a finished change (a rename, a closed file) at once. It
//! waits for an unfinished one (written, not closed) to settle, because half a file may parse. Where the kernel reports
//! nothing, as on network file systems, pd-control polls.

use std::fs::Metadata;
use std::future::pending;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::list::EndpointList;
use crate::publish::updates::Updates;
use crate::sources::file::endpoints;
use crate::sources::file::watch::{Progress, Reports, Seen, Watches};
use crate::sources::yaml::{self, FileError};

/// Time after which pd-control reads a file that is being written or that vanished.
const SETTLE: Duration = Duration::from_secs(1);
/// Time for the next write after which pd-control reports a refused file: some programs save in two steps.
const REFUSAL_SETTLE: Duration = Duration::from_millis(100);

/// One endpoints file.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    poll: Duration,
    /// The content that the publisher has.
    reported: Arc<Reading>,
    stamp: Option<Stamp>,
}

/// The content of the file.
#[derive(Debug, PartialEq)]
enum Reading {
    Bytes(Vec<u8>),
    Unreadable(FileError),
}

/// Identity, length and time of a file, to notice a change without reading it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

/// How the file differs from the one that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Same,
    /// Another file is in its place, or none. A file that was renamed or linked there is finished.
    Replaced,
    /// The same file has other content. Its writer may not have finished.
    Rewritten,
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        let (device, inode) = (metadata.dev(), metadata.ino());
        Self { device, inode, len: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }

    fn of(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().map(|metadata| Self::new(&metadata))
    }
}

impl FileSource {
    /// Reads the file for the first time. `poll` is the interval of polling where the kernel reports nothing.
    ///
    /// # Errors
    /// [`FileError`] when the file has no valid list.
    pub fn open(path: PathBuf, poll: Duration) -> Result<(Self, EndpointList), FileError> {
        // Taken before reading, so that a change in between is noticed.
        let stamp = Stamp::of(&path);
        let bytes = yaml::read(&path)?;
        let list = endpoints::parse(&path, &bytes)?;
        Ok((Self { path, poll, reported: Arc::new(Reading::Bytes(bytes)), stamp }, list))
    }

    /// Path of the file, as the operator wrote it.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Follows the file until the publisher has ended.
    pub async fn run(mut self, updates: Updates) {
        let reports = Arc::new(Reports::default());
        let mut watches = Watches::new(&reports)
            .inspect_err(|error| tracing::warn!("cannot watch files, polling instead: {error}"))
            .ok();
        let mut poll = interval(self.poll);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due: Option<Instant> = None;
        loop {
            let is_confirmed = tokio::select! {
                () = updates.closed() => return,
                seen = reports.next() => match seen {
                    Seen { file: Some(Progress::Finished), .. } => false,
                    Seen { file: Some(Progress::Unfinished), .. } => {
                        due = Some(Instant::now() + SETTLE);
                        continue;
                    }
                    Seen { file: None, .. } => match self.compare() {
                        Change::Same => continue,
                        Change::Replaced => false,
                        Change::Rewritten => {
                            due = due.or(Some(Instant::now() + SETTLE));
                            continue;
                        }
                    },
                },
                () = sleep_until_some(due) => true,
                _ = poll.tick() => {
                    if let Some(watches) = &mut watches {
                        watches.follow(&self.path);
                    }
                    if self.compare() != Change::Same {
                        // The writer may not have finished.
                        due = due.or(Some(Instant::now() + SETTLE));
                    }
                    continue;
                }
            };
            due = match self.read(is_confirmed, &updates).await {
                Ok(()) => None,
                Err(Unconfirmed) => Some(Instant::now() + REFUSAL_SETTLE),
            };
            if let Some(watches) = &mut watches {
                watches.follow(&self.path);
            }
        }
    }

    fn compare(&self) -> Change {
        let identity = |stamp: Option<Stamp>| stamp.map(|stamp| (stamp.device, stamp.inode));
        match Stamp::of(&self.path) {
            now if now == self.stamp => Change::Same,
            now if identity(now) == identity(self.stamp) => Change::Rewritten,
            _ => Change::Replaced,
        }
    }

    /// Reads the file and sends new content to the publisher. A refusal is sent only when `is_confirmed`.
    async fn read(&mut self, is_confirmed: bool, updates: &Updates) -> Result<(), Unconfirmed> {
        let path = self.path.clone();
        let reported = Arc::clone(&self.reported);
        let outcome = tokio::task::spawn_blocking(move || {
            let stamp = Stamp::of(&path);
            let (reading, list) = match yaml::read(&path) {
                Ok(bytes) if matches!(&*reported, Reading::Bytes(known) if *known == bytes) => (reported, None),
                Ok(bytes) => {
                    let list = endpoints::parse(&path, &bytes);
                    (Arc::new(Reading::Bytes(bytes)), Some(list))
                }
                Err(error) => (Arc::new(Reading::Unreadable(error.clone())), Some(Err(error))),
            };
            (stamp, reading, list)
        });
        let Ok((stamp, reading, list)) = outcome.await else {
            tracing::error!("the thread that reads {} panicked", self.path.display());
            return Ok(());
        };
        self.stamp = stamp;
        let Some(list) = list.filter(|_| reading != self.reported) else { return Ok(()) };
        if list.is_err() && !is_confirmed {
            return Err(Unconfirmed);
        }
        self.reported = reading;
        // Fails only when the publisher has ended, which ends the loop.
        let _ = updates.send(list.map_err(|error| error.to_string()).into()).await;
        Ok(())
    }
}

/// The file is refused, but may be half written.
struct Unconfirmed;

async fn sleep_until_some(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}
