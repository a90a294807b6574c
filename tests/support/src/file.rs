//! Files that somebody watches.

use std::io;
use std::path::{Path, PathBuf};

/// Replaces a file at once: a reader finds the old text or the new one, and a watcher of its directory gets an event.
///
/// # Errors
/// When the directory cannot be written.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let aside = PathBuf::from(format!("{}.aside", path.display()));
    std::fs::write(&aside, text)?;
    std::fs::rename(&aside, path)
}
