//! One agent per state folder: an exclusive lock on `<stateDir>/lock`, held as long as anything may write there.
//!
//! The system releases it when the process ends, however it ends, so there is no stale lock and the file stays.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// In the state folder.
const FILE: &str = "lock";

/// Why the folder is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// It is another's.
    #[error("another agent is running with the state folder {0}; stop it, or give this one a stateDir of its own")]
    InUse(PathBuf),
    /// The system refused.
    #[error("lock file {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The lock. Dropping it gives the folder free.
#[derive(Debug)]
pub struct StateLock {
    dir: PathBuf,
    _file: File,
}

impl StateLock {
    /// Takes the folder, which must exist.
    pub fn take(dir: &Path) -> Result<Self, LockError> {
        let path = dir.join(FILE);
        let fail = |source| LockError::Io { path: path.clone(), source };
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { dir: dir.to_owned(), _file: file }),
            Err(TryLockError::WouldBlock) => Err(LockError::InUse(dir.to_owned())),
            Err(TryLockError::Error(source)) => Err(fail(source)),
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net};

    use super::*;
    use crate::local::admin;

    #[test]
    fn a_folder_has_one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateLock::take(dir.path()).unwrap();
        let refused = StateLock::take(dir.path()).unwrap_err();
        assert!(refused.to_string().contains(&dir.path().display().to_string()), "{refused}");
        drop(held);
        StateLock::take(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn the_holder_replaces_a_stale_socket_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let lock = StateLock::take(dir.path()).unwrap();
        let path = dir.path().join(admin::SOCKET);
        drop(net::UnixListener::bind(&path).unwrap());
        drop(admin::bind(&lock).unwrap());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        assert!(admin::bind(&lock).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }
}
