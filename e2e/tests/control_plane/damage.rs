//! Damage to a log on disk, as crashes and bad disks do it. The format is the log's own (see docs of its module): a file
//! header of 32 bytes; of each record 24 bytes of header (length, index, offset in its write, checksums) and the payload.

use std::path::{Path, PathBuf};

use rand::{RngExt as _, rngs::StdRng};

const FILE_HEADER: usize = 32;
const RECORD_HEADER: usize = 24;
const SECTOR: usize = 512;

/// The last file of the log in the state folder.
fn last_segment(state: &Path) -> PathBuf {
    let files = std::fs::read_dir(state.join("raft/log")).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "log")).max().expect("the log has a file")
}

/// Where each record begins, and where the last one ends.
fn records(bytes: &[u8]) -> Vec<usize> {
    let mut starts = vec![FILE_HEADER];
    loop {
        let at = *starts.last().unwrap();
        let length = bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()) as usize);
        if length == 0 {
            return starts;
        }
        starts.push(at + RECORD_HEADER + length);
    }
}

/// Leaves at the end what a crash leaves of a write that was not flushed: some of its sectors, or the file's end missing.
pub(crate) fn tear(state: &Path, rng: &mut StdRng) {
    let path = last_segment(state);
    let mut bytes = std::fs::read(&path).unwrap();
    let starts = records(&bytes);
    let end = *starts.last().unwrap();
    let first = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    let index = first + starts.len() as u64 - 1;
    let payload = vec![b'x'; rng.random_range(SECTOR..4 * SECTOR)];
    let mut record = Vec::new();
    record.extend((payload.len() as u32).to_le_bytes());
    record.extend(index.to_le_bytes());
    record.extend(0_u32.to_le_bytes());
    record.extend(crc32c::crc32c(&payload).to_le_bytes());
    record.extend(crc32c::crc32c(&record).to_le_bytes());
    record.extend(payload);
    if end + record.len() > bytes.len() {
        // It would have gone to the next file.
        return;
    }
    let to = end + record.len();
    bytes[end..to].copy_from_slice(&record);
    if rng.random_bool(0.5) {
        bytes.truncate(rng.random_range(end + 1..to));
    } else {
        // One at least is lost.
        let sectors: Vec<usize> = (end / SECTOR..=(to - 1) / SECTOR).collect();
        let lost = sectors[rng.random_range(0..sectors.len())];
        for sector in sectors {
            if sector == lost || rng.random_bool(0.5) {
                bytes[(sector * SECTOR).max(end)..((sector + 1) * SECTOR).min(to)].fill(0);
            }
        }
    }
    std::fs::write(&path, bytes).unwrap();
}

/// Flips a bit of what was flushed, in the log or in a file beside it: what the node must say of it. `None` while there is
/// nothing.
pub(crate) fn flip(state: &Path, rng: &mut StdRng) -> Option<String> {
    let folder = state.join("raft");
    let record = ["vote", "snapshot"][rng.random_range(0..2)];
    let path = folder.join(record);
    if rng.random_bool(0.4) && path.exists() {
        let mut bytes = std::fs::read(&path).unwrap();
        // The first byte is the format's number.
        let at = rng.random_range(1..bytes.len());
        bytes[at] ^= 1 << rng.random_range(0..8);
        std::fs::write(&path, bytes).unwrap();
        return Some(format!("{record} in the store {} is damaged", folder.display()));
    }
    let path = last_segment(state);
    let mut bytes = std::fs::read(&path).unwrap();
    let starts = records(&bytes);
    let end = *starts.last().unwrap();
    if end == FILE_HEADER {
        return None;
    }
    let at = rng.random_range(FILE_HEADER..end);
    bytes[at] ^= 1 << rng.random_range(0..8);
    std::fs::write(&path, bytes).unwrap();
    let begins = starts.iter().rev().find(|start| **start <= at).copied().unwrap();
    Some(format!("{} is damaged at byte {begins}", path.display()))
}
