//! Files that survive a crash: atomic replacement, secrets, and last-known-good state.
//!
//! A reader sees the old content or the new, never a mixture, and after a write returned the new one is on disk even
//! if power fails. All of it blocks: in async code call it at the edges, or on a blocking thread when files are large.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Replaces `path` with `bytes`: temporary file beside it, fsync, rename, fsync of the folder. Mode 0644 (less umask).
///
/// The folder must exist. Errors name the path.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(path, bytes, 0o644).map_err(|error| with_path(&error, "write", path))
}

/// The same for secrets: the file has mode 0600 from its first moment, a missing folder is made with mode 0700.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    make_private_dir(folder_of(path))?;
    replace(path, bytes, 0o600).map_err(|error| with_path(&error, "write", path))
}

/// The last state that was accepted, kept in one checksummed file so that a restart can serve from it.
///
/// Layout, integers big-endian: magic `ISTHMLKG`, format `u32`, payload length `u64`, CRC-32 (IEEE) `u32` over format,
/// length and payload, then the payload. What the payload means is the caller's affair; `format` is the caller's version of it.
#[derive(Debug, Clone)]
pub struct LastKnownGood {
    path: PathBuf,
    format: u32,
}

/// Why a last-known-good file could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum LkgError {
    /// The system refused to read or write.
    #[error("cannot {action} last-known-good state {}; check the folder's permissions and free space", path.display())]
    Io {
        /// What was tried: "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not what was once written.
    #[error(
        "last-known-good state {} is damaged ({what}); it can be deleted: the state will be fetched again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Written by a version with another payload format.
    #[error(
        "last-known-good state {} has format {found}, this version reads {expected}; \
         it can be deleted: the state will be fetched again",
        path.display()
    )]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// The format in the file.
        found: u32,
        /// The format this program reads.
        expected: u32,
    },
    /// More than [`LastKnownGood::MAX_PAYLOAD`] bytes.
    #[error("last-known-good state {} of {size} bytes is over the limit of {} bytes", path.display(), LastKnownGood::MAX_PAYLOAD)]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its payload's size in bytes.
        size: u64,
    },
}

const MAGIC: [u8; 8] = *b"ISTHMLKG";
const HEADER: u64 = 24;

impl LastKnownGood {
    /// The largest payload, in bytes, that is saved or loaded.
    pub const MAX_PAYLOAD: u64 = 512 * 1024 * 1024;

    /// State at `path` with the caller's payload version `format`. Touches nothing yet.
    pub fn new(path: PathBuf, format: u32) -> Self {
        Self { path, format }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the saved state durably; a missing folder is made with mode 0700, the file has mode 0600.
    pub fn save(&self, bytes: &[u8]) -> Result<(), LkgError> {
        let size = bytes.len() as u64;
        if size > Self::MAX_PAYLOAD {
            return Err(LkgError::TooLarge { path: self.path.clone(), size });
        }
        let mut content = Vec::with_capacity(bytes.len() + HEADER as usize);
        content.extend_from_slice(&MAGIC);
        content.extend_from_slice(&self.format.to_be_bytes());
        content.extend_from_slice(&size.to_be_bytes());
        content.extend_from_slice(&checksum(self.format, size, bytes).to_be_bytes());
        content.extend_from_slice(bytes);
        write_secret(&self.path, &content).map_err(|source| self.io("write", source))
    }

    /// The saved state; `None` when none was ever saved. A damaged file is an error, never silently none.
    pub fn load(&self) -> Result<Option<Vec<u8>>, LkgError> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io("read", error)),
        };
        let on_disk = file.metadata().map_err(|error| self.io("read", error))?.len();
        let Some(size) = on_disk.checked_sub(HEADER) else {
            return Err(self.damaged("cut off inside its header"));
        };
        let mut header = Header { magic: [0; 8], format: [0; 4], size: [0; 8], checksum: [0; 4] };
        for field in [&mut header.magic[..], &mut header.format, &mut header.size, &mut header.checksum] {
            file.read_exact(field).map_err(|error| self.io("read", error))?;
        }
        let format = u32::from_be_bytes(header.format);
        if header.magic != MAGIC {
            return Err(self.damaged("it does not begin as such a file does"));
        }
        if format != self.format {
            return Err(LkgError::OtherFormat { path: self.path.clone(), found: format, expected: self.format });
        }
        // Before allocation: the length that the header claims must be the one on disk, and within the limit.
        if u64::from_be_bytes(header.size) != size {
            return Err(self.damaged("its length is not the one in its header"));
        }
        if size > Self::MAX_PAYLOAD {
            return Err(LkgError::TooLarge { path: self.path.clone(), size });
        }
        let mut payload = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        file.take(size).read_to_end(&mut payload).map_err(|error| self.io("read", error))?;
        if checksum(format, size, &payload) != u32::from_be_bytes(header.checksum) {
            return Err(self.damaged("its checksum does not match"));
        }
        Ok(Some(payload))
    }

    fn io(&self, action: &'static str, source: io::Error) -> LkgError {
        LkgError::Io { action, path: self.path.clone(), source }
    }

    fn damaged(&self, what: &'static str) -> LkgError {
        LkgError::Damaged { path: self.path.clone(), what }
    }
}

struct Header {
    magic: [u8; 8],
    format: [u8; 4],
    size: [u8; 8],
    checksum: [u8; 4],
}

fn checksum(format: u32, size: u64, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&format.to_be_bytes());
    hasher.update(&size.to_be_bytes());
    hasher.update(payload);
    hasher.finalize()
}

fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = folder_of(path);
    // Beside the target, so that the rename stays within one file system; removed by its drop if anything fails.
    let mut file =
        tempfile::Builder::new().prefix(".tmp-").permissions(Permissions::from_mode(mode)).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // The rename itself is in the folder: without this a power cut may bring the old file back.
    File::open(folder)?.sync_all()
}

fn make_private_dir(folder: &Path) -> io::Result<()> {
    if fs::metadata(folder).is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| with_path(&error, "create", folder))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn with_path(error: &io::Error, action: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{action} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn saved(payload: &[u8]) -> (tempfile::TempDir, LastKnownGood) {
        let dir = tempfile::tempdir().unwrap();
        let lkg = LastKnownGood::new(dir.path().join("state/snapshot.lkg"), 1);
        lkg.save(payload).unwrap();
        (dir, lkg)
    }

    #[test]
    fn an_atomic_write_replaces_the_content_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zone");
        write_atomic(&path, b"old, and longer").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_write_that_cannot_replace_keeps_the_old_and_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("occupied");
        fs::create_dir(&path).unwrap();
        let error = write_atomic(&path, b"new").unwrap_err();
        assert!(error.to_string().contains("occupied"), "{error}");
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary file is gone");
    }

    #[test]
    fn secrets_are_private_and_so_is_the_folder_made_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/agent.key");
        write_secret(&path, b"key").unwrap();
        assert_eq!(mode_of(&path), 0o600);
        assert_eq!(mode_of(path.parent().unwrap()), 0o700);
    }

    #[test]
    fn a_secret_written_over_a_public_file_becomes_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.key");
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        write_secret(&path, b"new").unwrap();
        assert_eq!((mode_of(&path), fs::read(&path).unwrap()), (0o600, b"new".to_vec()));
    }

    #[test]
    fn saved_state_comes_back() {
        for payload in [&b""[..], b"x", &[7; 100_000]] {
            let (_dir, lkg) = saved(payload);
            assert_eq!(lkg.load().unwrap().as_deref(), Some(payload));
        }
    }

    #[test]
    fn nothing_saved_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(LastKnownGood::new(dir.path().join("none"), 1).load().unwrap().is_none());
    }

    #[test]
    fn any_flipped_byte_is_found_and_the_error_says_what_to_do() {
        let (_dir, lkg) = saved(b"payload");
        let good = fs::read(lkg.path()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            fs::write(lkg.path(), &bad).unwrap();
            let message = lkg.load().unwrap_err().to_string();
            assert!(message.contains("snapshot.lkg") && message.contains("it can be deleted"), "byte {at}: {message}");
        }
    }

    #[test]
    fn a_file_cut_off_or_grown_is_damaged() {
        let (_dir, lkg) = saved(b"payload");
        let good = fs::read(lkg.path()).unwrap();
        for length in 0..good.len() {
            fs::write(lkg.path(), &good[..length]).unwrap();
            assert!(matches!(lkg.load(), Err(LkgError::Damaged { .. })), "{length} bytes");
        }
        fs::write(lkg.path(), [&good[..], b"!"].concat()).unwrap();
        assert!(matches!(lkg.load(), Err(LkgError::Damaged { .. })));
    }

    #[test]
    fn another_format_is_refused_by_number() {
        let (_dir, lkg) = saved(b"payload");
        let newer = LastKnownGood::new(lkg.path().to_owned(), 2);
        assert!(matches!(newer.load(), Err(LkgError::OtherFormat { found: 1, expected: 2, .. })));
    }

    #[test]
    fn state_that_cannot_be_written_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        let lkg = LastKnownGood::new(dir.path().join("file/snapshot.lkg"), 1);
        assert!(lkg.save(b"payload").unwrap_err().to_string().contains("file/snapshot.lkg"));
    }
}
