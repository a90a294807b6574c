//! The file source: notices an edit within milliseconds and never takes half a file.
//!
//! The kernel reports changes in the file's directory (so that a rename over the file, an editor's way of saving and the
//! link swap of a mounted ConfigMap are all seen). A finished change (a rename, a closed file) is read at once; an
//! unfinished one (written to, not closed) is left to settle, because the half that is there may parse. Where the kernel
//! reports nothing, such as on network file systems, a slow poll notices.

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

/// How long a file that is being written, or that vanished, gets before it is read as it stands.
const SETTLE: Duration = Duration::from_secs(1);
/// How long a file that was refused gets to be corrected by its next write before anyone is told: saving in two steps
/// is no operator's mistake.
const REFUSAL_SETTLE: Duration = Duration::from_millis(100);

/// One endpoints file.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    poll: Duration,
    /// What the publisher knows of.
    reported: Arc<Reading>,
    stamp: Option<Stamp>,
}

/// What was in the file.
#[derive(Debug, PartialEq)]
enum Reading {
    Bytes(Vec<u8>),
    Unreadable(FileError),
}

/// Tells that a file is not the one that was read, without reading it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

/// What became of the file since it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Same,
    /// Another file stands in its place, or none. Whoever renames or links one there has finished it.
    Replaced,
    /// The same file holds something else; its writer may not have finished.
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
    /// Reads the file for the first time. `poll` is how often to look where the kernel reports nothing.
    ///
    /// # Errors
    /// [`FileError`] when there is no good list in it.
    pub fn open(path: PathBuf, poll: Duration) -> Result<(Self, EndpointList), FileError> {
        // Taken before reading: a change in between then counts as one.
        let stamp = Stamp::of(&path);
        let bytes = yaml::read(&path)?;
        let list = endpoints::parse(&path, &bytes)?;
        Ok((Self { path, poll, reported: Arc::new(Reading::Bytes(bytes)), stamp }, list))
    }

    /// The file as the operator named it.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Follows the file until the publisher is gone.
    pub async fn run(mut self, updates: Updates) {
        let reports = Arc::new(Reports::default());
        let mut watches = Watches::new(&reports)
            .inspect_err(|error| tracing::warn!("the kernel reports no file changes ({error}), polling instead"))
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
                        // Nobody says whether it is finished.
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

    /// Reads the file and reports it if it holds anything new; a refusal is reported only when confirmed.
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
            tracing::error!("reading {} failed inside pd-control", self.path.display());
            return Ok(());
        };
        self.stamp = stamp;
        let Some(list) = list.filter(|_| reading != self.reported) else { return Ok(()) };
        if list.is_err() && !is_confirmed {
            return Err(Unconfirmed);
        }
        self.reported = reading;
        // Fails only when the publisher is gone, which ends the loop.
        let _ = updates.send(list.map_err(|error| error.to_string()).into()).await;
        Ok(())
    }
}

/// The file is bad, but may only be half written.
struct Unconfirmed;

async fn sleep_until_some(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}
