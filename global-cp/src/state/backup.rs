//! Backups of the replicated state: one file, whose head a person can read.
//!
//! ```text
//! isthmus-backup 1
//! {"federation":"isthmus.example","stamp":{"epoch":1,"revision":42},"takenAt":…,"length":…,"sha256":"…"}
//! {…the state, as JSON…}
//! ```
//! In: a state. Out: bytes that are complete or refused. A backup holds no key: those of the CAs are backed up with the
//! nodes' `stateDir/ca`. What a restore makes of it is [`State::restored`]'s.

use std::{collections::BTreeMap, sync::Arc};

use isthmus_identity::tls::sha256;
use isthmus_model::{
    global::GlobalSnapshot,
    ids::{Epoch, Stamp, TrustDomain},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{Rejection, State, trust::holds_all_roots};

const MAGIC: &str = "isthmus-backup ";
const FORMAT: u32 = 1;
/// The longest first and second lines.
const MAX_HEAD: usize = 4096;

/// What a backup is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    /// Whose.
    pub federation: TrustDomain,
    /// Which state.
    pub stamp: Stamp,
    /// When it was taken.
    pub taken_at: Timestamp,
    /// Of the state's JSON, in bytes.
    length: u64,
    sha256: String,
}

/// Why a file is no usable backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// Something else.
    #[error("this is no Isthmus backup: one begins with the line \"isthmus-backup 1\"")]
    Other,
    /// Of a later version.
    #[error(
        "the backup has format {0}, this version reads {FORMAT}: restore it with the version that took it, or a later one"
    )]
    Format(u32),
    /// The second line makes no sense.
    #[error("the backup's second line is damaged: {0}")]
    Head(String),
    /// The end is missing, or something follows it.
    #[error(
        "the backup should have {expected} bytes after its head, and has {found}: it is cut off, or something was appended"
    )]
    Length {
        /// As the head says.
        expected: u64,
        /// As they are.
        found: u64,
    },
    /// Bytes changed.
    #[error("the backup's checksum is wrong: it was damaged after it was taken")]
    Checksum,
    /// The state is not one.
    #[error("the backup's state is not readable: {0}")]
    State(serde_json::Error),
    /// There is nothing in it.
    #[error("the backup is of a control plane that was not founded yet")]
    Empty,
}

/// A backup of `state`, taken at `now`.
pub fn write(state: &State, now: Timestamp) -> Result<Vec<u8>, BackupError> {
    let federation = state.global().ok_or(BackupError::Empty)?.federation.clone();
    let json = serde_json::to_vec(state).map_err(BackupError::State)?;
    let length = u64::try_from(json.len()).unwrap_or(u64::MAX);
    let head = Head { federation, stamp: state.stamp(), taken_at: now, length, sha256: hex::encode(sha256(&json)) };
    let head = serde_json::to_string(&head).map_err(BackupError::State)?;
    let mut bytes = format!("{MAGIC}{FORMAT}\n{head}\n").into_bytes();
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

/// Reads a backup whole, or refuses it.
pub fn read(bytes: &[u8]) -> Result<(Head, State), BackupError> {
    let (first, rest) = line(bytes).ok_or(BackupError::Other)?;
    let format = first.strip_prefix(MAGIC).and_then(|format| format.parse().ok()).ok_or(BackupError::Other)?;
    if format != FORMAT {
        return Err(BackupError::Format(format));
    }
    let (second, json) = line(rest).ok_or_else(|| BackupError::Head("it has no end".to_owned()))?;
    let head: Head = serde_json::from_str(second).map_err(|error| BackupError::Head(error.to_string()))?;
    let found = u64::try_from(json.len()).unwrap_or(u64::MAX);
    if found != head.length {
        return Err(BackupError::Length { expected: head.length, found });
    }
    if hex::encode(sha256(json)) != head.sha256 {
        return Err(BackupError::Checksum);
    }
    let state: State = serde_json::from_slice(json).map_err(BackupError::State)?;
    let global = state.global().ok_or(BackupError::Empty)?;
    if head.stamp != global.stamp || head.federation != global.federation {
        return Err(BackupError::Head("it is not about the state that follows".to_owned()));
    }
    Ok((head, state))
}

fn line(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().take(MAX_HEAD).position(|byte| *byte == b'\n')?;
    Some((std::str::from_utf8(bytes.get(..end)?).ok()?, bytes.get(end + 1..)?))
}

impl State {
    /// This state, of a control plane that nobody has joined, with what `backup` held: members and their exports, indexes,
    /// settings, revocations. Its nodes are those of now; the backup's join tokens are void; a new epoch begins, so that
    /// every member takes it whole.
    pub(super) fn restored(&self, backup: &Self) -> Result<Self, Rejection> {
        let present = self.global.as_ref().ok_or(Rejection::NotFounded)?;
        if !present.clusters.is_empty() {
            return Err(Rejection::NotEmpty { clusters: present.clusters.len() as u64 });
        }
        let held = backup.global.as_ref().ok_or(Rejection::NotFounded)?;
        if held.federation != present.federation {
            return Err(Rejection::OtherFederation {
                stored: present.federation.clone(),
                offered: held.federation.clone(),
            });
        }
        // With the CAs of then the members believe the bundle of then; with others each of them must join again.
        let bundle = match holds_all_roots(&held.federation_bundle, &present.federation_bundle) {
            true => held.federation_bundle.clone(),
            false => present.federation_bundle.clone(),
        };
        let stamp = Stamp {
            epoch: Epoch(held.stamp.epoch.0.max(present.stamp.epoch.0).saturating_add(1)),
            revision: held.stamp.revision.max(present.stamp.revision),
        };
        Ok(Self {
            clock: self.clock.max(backup.clock),
            global: Some(Arc::new(GlobalSnapshot { stamp, federation_bundle: bundle, ..(**held).clone() })),
            tokens: BTreeMap::new(),
            level: self.level.max(backup.level),
            access: Arc::new(backup.access.restored(self.access.version())),
            nodes: self.nodes.clone(),
            remembered: self.remembered.clone(),
            // What was done to this control plane; what was done to that one is in the backup.
            events: self.events.clone(),
            ..backup.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup() -> Vec<u8> {
        write(&crate::state::tests::founded(), Timestamp(7)).unwrap()
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = backup();
        assert!(bytes.starts_with(b"isthmus-backup 1\n{\"federation\":\"isthmus.example\""));
        let (head, state) = read(&bytes).unwrap();
        assert_eq!((head.taken_at, head.stamp), (Timestamp(7), state.stamp()));
        assert_eq!(state, crate::state::tests::founded());
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_refused() {
        let bytes = backup();
        for end in 0..bytes.len() {
            assert!(read(&bytes[..end]).is_err(), "cut at {end}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            // In the head it may make another time of it, on which nothing depends.
            let Ok((head, state)) = read(&damaged) else { continue };
            let untouched = read(&bytes).unwrap();
            assert!(state == untouched.1 && head.taken_at != untouched.0.taken_at, "bit at {at}");
        }
        let mut longer = bytes;
        longer.push(b'\n');
        assert!(matches!(read(&longer), Err(BackupError::Length { .. })));
    }

    #[test]
    fn other_files_and_later_formats_are_told_apart() {
        assert!(matches!(read(b"{}"), Err(BackupError::Other)));
        assert!(matches!(read(b""), Err(BackupError::Other)));
        assert!(matches!(read(b"isthmus-backup 2\n{}\n"), Err(BackupError::Format(2))));
        assert!(matches!(write(&State::default(), Timestamp(0)), Err(BackupError::Empty)));
    }
}
