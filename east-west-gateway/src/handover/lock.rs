//! One gateway per state folder: an exclusive lock on `<stateDir>/lock`, held as long as anything may write there.
//!
//! The lock belongs to the open file, not to a process (flock(2)). A gateway that hands over gives its successor a
//! descriptor of that file, as it gives its sockets, so that both hold the one lock, and it is free only when the last of
//! them has ended: at no moment could a third gateway come in between. The system releases it however a process ends, so
//! there is no stale lock and the file stays.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

/// In the state folder.
const FILE: &str = "lock";

/// Why the folder is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// It is another gateway's, and this one was not told to take over.
    #[error(
        "stateDir: another gateway is running with {}: start this one with --take-over, which takes its place without \
         cutting connections, or give it a stateDir of its own", .0.display()
    )]
    InUse(PathBuf),
    /// It is another gateway's that gives nothing.
    #[error(
        "stateDir: another gateway is running with {} and does not offer its sockets, as while it starts or drains: wait \
         until it has ended, or end it (SIGTERM)", .0.display()
    )]
    NotOffered(PathBuf),
    /// The system refused.
    #[error("stateDir: {}: check that the folder may be written to", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The lock. The last of its descriptors, in whatever process, gives the folder free.
#[derive(Debug)]
pub(crate) struct StateLock {
    file: File,
}

impl StateLock {
    /// Makes the folder if need be.
    pub(crate) fn make_dir(dir: &Path) -> Result<(), LockError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| LockError::Io { path: dir.to_owned(), source })
    }

    /// Takes the folder, which must exist. `asked`: whoever runs there was asked to hand over, and nobody answered.
    pub(crate) fn take(dir: &Path, asked: bool) -> Result<Self, LockError> {
        let path = dir.join(FILE);
        let fail = |source| LockError::Io { path: path.clone(), source };
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { file }),
            Err(TryLockError::WouldBlock) if asked => Err(LockError::NotOffered(dir.to_owned())),
            Err(TryLockError::WouldBlock) => Err(LockError::InUse(dir.to_owned())),
            Err(TryLockError::Error(source)) => Err(fail(source)),
        }
    }

    /// The predecessor's, of which this is a descriptor.
    pub(crate) fn share(given: OwnedFd) -> Self {
        Self { file: given.into() }
    }
}

impl AsFd for StateLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_gateway_and_its_successor() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateLock::take(dir.path(), false).unwrap();
        let refused = |asked| StateLock::take(dir.path(), asked).unwrap_err().to_string();
        assert!(refused(false).contains("--take-over") && refused(false).contains(&dir.path().display().to_string()));
        assert!(refused(true).contains("does not offer its sockets"));
        let successor = StateLock::share(held.as_fd().try_clone_to_owned().unwrap());
        drop(held);
        assert!(matches!(StateLock::take(dir.path(), false), Err(LockError::InUse(_))), "the successor holds it on");
        drop(successor);
        StateLock::take(dir.path(), false).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = StateLock::make_dir(Path::new("/proc/nowhere/gateway-1")).unwrap_err();
        assert!(error.to_string().contains("/proc/nowhere/gateway-1"), "{error}");
    }
}
