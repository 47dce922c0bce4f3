//! The bytes of a segment file: a header, then records until the end or until zeros. Pure functions; no IO.
//!
//! What holds: a flipped bit is found, and never read as something else; what a crash has left of a write that was not
//! flushed is told from damage to what was. Disks write sectors whole (512 bytes), in any order, and a segment's unwritten
//! rest is zeros, so that a torn record has a part of a sector that is all zeros, or goes beyond the end of the file. And
//! each record says where the write that brought it began: what lies before that had been flushed.

/// Of a segment file, all little-endian: magic (8), format (4), zero (4), index of the first record (8), CRC-32C of these
/// 24 bytes (4), zero (4).
pub(super) const FILE_HEADER: usize = 32;
/// Of a record: length of its payload (4), index (8), bytes since the write that it came with began (4), CRC-32C of the
/// payload (4), CRC-32C of these 20 bytes (4).
pub(super) const RECORD_HEADER: usize = 24;

const MAGIC: &[u8; 8] = b"ISTHMLOG";
const FORMAT: u32 = 1;
const SECTOR: usize = 512;

/// The header of a segment whose first record has this index.
pub(super) fn file_header(first: u64) -> [u8; FILE_HEADER] {
    let mut header = [0; FILE_HEADER];
    let mut fields = Vec::with_capacity(FILE_HEADER);
    fields.extend_from_slice(MAGIC);
    fields.extend_from_slice(&FORMAT.to_le_bytes());
    fields.extend_from_slice(&[0; 4]);
    fields.extend_from_slice(&first.to_le_bytes());
    fields.extend_from_slice(&crc32c::crc32c(&fields).to_le_bytes());
    for (to, from) in header.iter_mut().zip(fields) {
        *to = from;
    }
    header
}

/// What a file header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FileHeader {
    /// The index of the first record.
    First(u64),
    /// Of a format that this version does not know.
    Format(u32),
    /// None at all.
    Damaged,
}

/// Reads what [`file_header`] wrote.
pub(super) fn read_file_header(bytes: &[u8]) -> FileHeader {
    let parse = || {
        let (fields, rest) = bytes.split_at_checked(24)?;
        let crc = u32_at(rest, 0)?;
        (fields.starts_with(MAGIC) && crc == crc32c::crc32c(fields)).then_some(())?;
        Some((u32_at(fields, 8)?, u64_at(fields, 16)?))
    };
    match parse() {
        Some((FORMAT, first)) => FileHeader::First(first),
        Some((other, _)) => FileHeader::Format(other),
        None => FileHeader::Damaged,
    }
}

/// Adds a record to `write`, which is what one write brings from its first record on.
pub(super) fn encode(index: u64, payload: &[u8], write: &mut Vec<u8>) -> Result<(), TooLong> {
    let length = u32::try_from(payload.len()).map_err(|_| TooLong)?;
    let since = u32::try_from(write.len()).map_err(|_| TooLong)?;
    let at = write.len();
    write.extend_from_slice(&length.to_le_bytes());
    write.extend_from_slice(&index.to_le_bytes());
    write.extend_from_slice(&since.to_le_bytes());
    write.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    let crc = crc32c::crc32c(write.get(at..).unwrap_or_default());
    write.extend_from_slice(&crc.to_le_bytes());
    write.extend_from_slice(payload);
    Ok(())
}

/// A write of 4 GiB or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the entries of one write are too long")]
pub(super) struct TooLong;

/// A record's header, whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    length: usize,
    index: u64,
    since: usize,
    crc: u32,
}

fn header_at(file: &[u8], at: usize) -> Option<Header> {
    let header = file.get(at..at.checked_add(RECORD_HEADER)?)?;
    let (fields, crc) = header.split_at_checked(20)?;
    (u32_at(crc, 0)? == crc32c::crc32c(fields)).then_some(())?;
    Some(Header {
        length: usize::try_from(u32_at(fields, 0)?).ok()?,
        index: u64_at(fields, 4)?,
        since: usize::try_from(u32_at(fields, 12)?).ok()?,
        crc: u32_at(fields, 16)?,
    })
}

/// What stands at an offset of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A whole record; its payload ends where the next one begins.
    Record {
        /// Its place in the log.
        index: u64,
        /// Where the payload begins.
        payload: usize,
        /// And ends.
        end: usize,
    },
    /// Nothing was written here.
    End,
    /// Some of a write that was never flushed. Nobody was told that it is kept.
    Torn,
    /// Something that was flushed is not what was written.
    Damaged,
}

/// What stands at `at` of the whole `file`.
pub(super) fn find(file: &[u8], at: usize) -> Found {
    let rest = file.get(at..).unwrap_or_default();
    if rest.iter().all(|byte| *byte == 0) {
        return Found::End;
    }
    let whole = |header: &Header| {
        let payload = at + RECORD_HEADER;
        let end = payload.checked_add(header.length)?;
        (crc32c::crc32c(file.get(payload..end)?) == header.crc).then_some(Found::Record {
            index: header.index,
            payload,
            end,
        })
    };
    let header = header_at(file, at);
    if let Some(record) = header.as_ref().and_then(whole) {
        return record;
    }
    let length = header.map_or(RECORD_HEADER, |header| RECORD_HEADER.saturating_add(header.length));
    let end = at.saturating_add(length);
    let torn = end > file.len() || has_empty_sector(file, at, end);
    if torn && !was_flushed(file, at) { Found::Torn } else { Found::Damaged }
}

/// Whether the part of some sector that lies between `at` and `end` is all zeros.
fn has_empty_sector(file: &[u8], at: usize, end: usize) -> bool {
    let mut from = at;
    while from < end {
        let to = ((from / SECTOR + 1) * SECTOR).min(end);
        if file.get(from..to).is_some_and(|part| part.iter().all(|byte| *byte == 0)) {
            return true;
        }
        from = to;
    }
    false
}

/// Whether a later write follows what stands at `at`: it began after that one was flushed.
fn was_flushed(file: &[u8], at: usize) -> bool {
    let later = |offset: usize| header_at(file, offset).is_some_and(|h| h.since <= offset && offset - h.since > at);
    (at + 1..file.len().saturating_sub(RECORD_HEADER - 1)).any(later)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of so many bytes with these writes, each of records of these lengths; and where each write ends.
    fn file(writes: &[Vec<usize>], size: usize) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = file_header(1).to_vec();
        let (mut index, mut ends) = (1, Vec::new());
        for lengths in writes {
            let mut write = Vec::new();
            for length in lengths {
                // Payloads are text, without zeros.
                encode(index, &vec![b'a' + (index % 26) as u8; *length], &mut write).unwrap();
                index += 1;
            }
            bytes.extend(write);
            ends.push(bytes.len());
        }
        bytes.resize(size.max(bytes.len()), 0);
        (bytes, ends)
    }

    /// The indexes of all whole records, and what follows them.
    fn read(bytes: &[u8]) -> (Vec<u64>, usize, Found) {
        let (mut at, mut indexes) = (FILE_HEADER, Vec::new());
        loop {
            match find(bytes, at) {
                Found::Record { index, end, .. } => {
                    indexes.push(index);
                    at = end;
                }
                other => return (indexes, at, other),
            }
        }
    }

    fn writes() -> impl Strategy<Value = Vec<Vec<usize>>> {
        prop::collection::vec(prop::collection::vec(1..900_usize, 1..6), 1..6)
    }

    fn count(writes: &[Vec<usize>]) -> u64 {
        writes.iter().map(|lengths| lengths.len() as u64).sum()
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(writes in writes(), spare in 0..5_000_usize) {
            let (bytes, ends) = file(&writes, 0);
            let (padded, _) = file(&writes, bytes.len() + spare);
            let all: Vec<u64> = (1..=count(&writes)).collect();
            prop_assert_eq!(read(&padded), (all, *ends.last().unwrap(), Found::End));
            prop_assert_eq!(read_file_header(&padded), FileHeader::First(1));
        }

        #[test]
        fn a_cut_file_has_all_records_before_the_cut(writes in writes(), cut in 0.0..1.0_f64) {
            let (bytes, _) = file(&writes, 0);
            let cut = FILE_HEADER + ((bytes.len() - FILE_HEADER) as f64 * cut) as usize;
            let (indexes, at, found) = read(&bytes[..cut]);
            prop_assert!(matches!(found, Found::End | Found::Torn), "{found:?}");
            prop_assert!(at <= cut);
            prop_assert_eq!(&indexes, &(1..=indexes.len() as u64).collect::<Vec<_>>());
        }

        #[test]
        fn a_flipped_bit_is_never_read_and_in_what_was_flushed_is_damage(
            writes in writes(), at in 0.0..1.0_f64, bit in 0..8_u32,
        ) {
            let (whole, ends) = file(&writes, 20_000);
            let end = *ends.last().unwrap();
            let at = FILE_HEADER + ((end - FILE_HEADER) as f64 * at) as usize;
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            let (indexes, stopped, found) = read(&bytes);
            prop_assert_eq!(&indexes, &(1..=indexes.len() as u64).collect::<Vec<_>>());
            prop_assert!(stopped <= at, "the record with the flipped bit is not read");
            let before_the_last_write = ends.len() > 1 && at < ends[ends.len() - 2];
            if before_the_last_write {
                prop_assert_eq!(found, Found::Damaged);
            } else {
                prop_assert!(found != Found::End, "{found:?}");
            }
        }

        #[test]
        fn a_write_of_which_some_sectors_are_missing_is_torn(writes in writes(), missing in prop::collection::vec(any::<bool>(), 64)) {
            let (mut bytes, ends) = file(&writes, 20_000);
            let from = if ends.len() > 1 { ends[ends.len() - 2] } else { FILE_HEADER };
            let end = *ends.last().unwrap();
            let whole = read(&bytes).0.len();
            let mut lost = false;
            for (nth, sector) in (from / SECTOR..=end / SECTOR).enumerate() {
                let (a, b) = ((sector * SECTOR).max(from), ((sector + 1) * SECTOR).min(end));
                if missing[nth % 64] && a < b {
                    bytes[a..b].fill(0);
                    lost = true;
                }
            }
            let (indexes, stopped, found) = read(&bytes);
            prop_assert!(stopped >= from, "what was flushed before is read");
            prop_assert_eq!(&indexes, &(1..=indexes.len() as u64).collect::<Vec<_>>());
            if lost {
                prop_assert!(matches!(found, Found::End | Found::Torn), "{found:?}");
                prop_assert!(indexes.len() < whole);
            }
        }

        #[test]
        fn garbage_is_never_a_record(bytes in prop::collection::vec(any::<u8>(), 0..4_000)) {
            prop_assert_eq!(read_file_header(&bytes), FileHeader::Damaged);
            let found = find(&bytes, 0);
            prop_assert!(!matches!(found, Found::Record { .. }), "{found:?}");
        }
    }

    #[test]
    fn a_later_format_says_so() {
        let mut header = file_header(7);
        header[8] = 2;
        let crc = crc32c::crc32c(&header[..24]);
        header[24..28].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(read_file_header(&header), FileHeader::Format(2));
    }
}
