//! Changes of a file, and of the directories on the way to it, that the kernel reports.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use notify::event::{AccessKind, AccessMode, CreateKind, EventKind, ModifyKind, RenameMode};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

/// Reports since the last look, shared with the thread of the watcher.
#[derive(Debug, Default)]
pub struct Reports {
    seen: Mutex<Seen>,
    arrived: Notify,
}

/// The reports of one look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// The last change of the file itself.
    pub file: Option<Progress>,
    /// Whether another entry of a directory on the way to the file changed, such as a link.
    pub beside: bool,
}

/// Whether the writer of the file has finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It may write more.
    Unfinished,
    /// It has closed the file or moved it into place.
    Finished,
}

/// The watched directories and their watcher.
pub struct Watches {
    watcher: RecommendedWatcher,
    reports: Arc<Reports>,
    targets: Arc<Mutex<BTreeSet<Target>>>,
}

/// A directory entry that the file's content depends on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    directory: PathBuf,
    /// Identity of the directory: another one may take its name.
    device_inode: (u64, u64),
    name: OsString,
}

impl Reports {
    /// Waits for reports and takes them.
    pub async fn next(&self) -> Seen {
        loop {
            let seen = std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
            if seen.file.is_some() || seen.beside {
                return seen;
            }
            self.arrived.notified().await;
        }
    }

    fn file(&self, progress: Progress) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).file = Some(progress);
        self.arrived.notify_one();
    }

    fn beside(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).beside = true;
        self.arrived.notify_one();
    }

    /// Takes one report of the kernel.
    fn take(&self, event: &notify::Event, targets: &BTreeSet<Target>) {
        if event.need_rescan() {
            return self.beside();
        }
        let is_ours = |path: &PathBuf| {
            targets.iter().any(|target| {
                path.parent() == Some(&target.directory) && path.file_name() == Some(target.name.as_os_str())
            })
        };
        // The kernel reports a rename as two halves and as a whole. The halves say which end is the file's.
        let moved_from = EventKind::Modify(ModifyKind::Name(RenameMode::From));
        let moved_to = EventKind::Modify(ModifyKind::Name(RenameMode::To));
        let is_link = || event.paths.first().is_some_and(|path| path.is_symlink());
        let is_file = event.paths.iter().any(is_ours);
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) if is_file => self.file(Progress::Finished),
            EventKind::Access(_) | EventKind::Modify(ModifyKind::Name(RenameMode::Both)) => {}
            kind if kind == moved_to && is_file => self.file(Progress::Finished),
            EventKind::Create(CreateKind::File | CreateKind::Any) if is_file && is_link() => {
                self.file(Progress::Finished);
            }
            _ if is_file => self.file(Progress::Unfinished),
            EventKind::Create(_) | EventKind::Remove(_) => self.beside(),
            kind if kind == moved_to || kind == moved_from => self.beside(),
            _ => {}
        }
    }
}

impl Watches {
    /// A watcher without directories.
    ///
    /// # Errors
    /// When the kernel gives no more watches.
    pub fn new(reports: &Arc<Reports>) -> notify::Result<Self> {
        let targets = Arc::new(Mutex::new(BTreeSet::new()));
        let (for_thread, known) = (Arc::clone(reports), Arc::clone(&targets));
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| match event {
            Ok(event) => for_thread.take(&event, &known.lock().unwrap_or_else(PoisonError::into_inner)),
            Err(_) => for_thread.beside(),
        })?;
        Ok(Self { watcher, reports: Arc::clone(reports), targets })
    }

    /// Watches the directory of the file and, where the file is a link into another one, that one too.
    pub fn follow(&mut self, path: &Path) {
        let wanted: BTreeSet<Target> =
            [Some(path.to_owned()), path.canonicalize().ok()].into_iter().flatten().filter_map(Target::new).collect();
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted == *targets {
            return;
        }
        let before = std::mem::replace(&mut *targets, wanted.clone());
        // Released first: the watcher's thread locks it, too.
        drop(targets);
        for gone in before.difference(&wanted) {
            // Fails when the directory was removed, which needs no handling.
            let _ = self.watcher.unwatch(&gone.directory);
        }
        for target in &wanted {
            if let Err(error) = self.watcher.watch(&target.directory, RecursiveMode::NonRecursive) {
                tracing::warn!("cannot watch {}, polling it instead: {error}", target.directory.display());
            }
        }
        // Changes before the new watches were set up were not reported.
        self.reports.beside();
    }
}

impl Target {
    fn new(path: PathBuf) -> Option<Self> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = parent.canonicalize().ok()?;
        let metadata = directory.metadata().ok()?;
        Some(Self { device_inode: (metadata.dev(), metadata.ino()), name: path.file_name()?.to_owned(), directory })
    }
}
