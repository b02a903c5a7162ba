//! Frames: a 32-bit little-endian length, then that many bytes of JSON.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection ended or failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The length is over the limit; nothing was allocated for it.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// What the peer announced, or what was to be sent.
        length: u64,
        /// The limit of this direction.
        limit: u32,
    },
    /// The bytes are not the JSON that was expected.
    #[error("a frame is not what was expected: {0}")]
    Json(#[from] serde_json::Error),
}

/// Reads one frame of at most `limit` bytes. `None` is the end of the connection between two frames.
pub fn read<T: DeserializeOwned>(from: &mut impl Read, limit: u32) -> Result<Option<T>, FrameError> {
    let mut header = [0; 4];
    let mut have = 0;
    while have < header.len() {
        match from.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let length = u32::from_le_bytes(header);
    if length > limit {
        return Err(FrameError::TooLong { length: length.into(), limit });
    }
    // Grows as bytes arrive: a length that is announced but never sent costs nothing.
    let mut body = Vec::new();
    from.take(length.into()).read_to_end(&mut body)?;
    if body.len() as u64 != u64::from(length) {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Some(serde_json::from_slice(&body)?))
}

/// How many bytes of a frame of at most `limit` bytes are known to be missing still, of which these have come.
pub fn missing(come: &[u8], limit: u32) -> Result<usize, FrameError> {
    let Some((header, body)) = come.split_first_chunk::<4>() else { return Ok(4 - come.len()) };
    let length = u32::from_le_bytes(*header);
    match length > limit {
        true => Err(FrameError::TooLong { length: length.into(), limit }),
        false => Ok((length as usize).saturating_sub(body.len())),
    }
}

/// Writes one frame of at most `limit` bytes, in one `write` where the stream takes it.
pub fn write<T: Serialize>(to: &mut impl Write, value: &T, limit: u32) -> Result<(), FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, value)?;
    let length = bytes.len() as u64 - 4;
    let short =
        u32::try_from(length).ok().filter(|l| *l <= limit).ok_or(FrameError::TooLong { length, limit })?;
    bytes[..4].copy_from_slice(&short.to_le_bytes());
    to.write_all(&bytes)?;
    Ok(to.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_went() {
        let mut bytes = Vec::new();
        write(&mut bytes, &vec!["a", "b"], 100).unwrap();
        let back: Option<Vec<String>> = read(&mut bytes.as_slice(), 100).unwrap();
        assert_eq!(back.unwrap(), ["a", "b"]);
    }

    #[test]
    fn the_end_between_frames_is_none_and_within_one_is_an_error() {
        assert!(read::<u8>(&mut [].as_slice(), 10).unwrap().is_none());
        for cut in [&[1u8, 0][..], &[2, 0, 0, 0, b'1']] {
            assert!(matches!(read::<u8>(&mut &cut[..], 10), Err(FrameError::Io(_))));
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_both_ways() {
        let announced = u32::MAX.to_le_bytes();
        assert!(matches!(read::<u8>(&mut announced.as_slice(), 10), Err(FrameError::TooLong { .. })));
        assert!(matches!(write(&mut Vec::new(), &"long", 3), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn what_is_missing_is_known_from_what_has_come() {
        for (come, expected) in [(&[][..], 4), (&[3, 0, 0], 1), (&[3, 0, 0, 0], 3), (&[3, 0, 0, 0, b'1'], 2)]
        {
            assert_eq!(missing(come, 10).unwrap(), expected);
        }
        assert_eq!(missing(&[0, 0, 0, 0], 10).unwrap(), 0);
        assert!(matches!(missing(&u32::MAX.to_le_bytes(), 10), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn garbage_is_an_error_not_a_panic() {
        assert!(matches!(read::<u8>(&mut [1, 0, 0, 0, b'{'].as_slice(), 10), Err(FrameError::Json(_))));
    }
}
