//! Text from a guest, made safe to show.
//!
//! What a guest sends ends up on a user's terminal and in log files, where control characters move cursors,
//! change titles and forge lines.

/// The most characters of one text that is shown.
const MAX_CHARS: usize = 4096;

/// The text with every control character replaced by its escape, and its end cut off where it is too long.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(MAX_CHARS));
    for (count, c) in text.chars().enumerate() {
        if count == MAX_CHARS {
            out.push('…');
            break;
        }
        match c {
            '\t' => out.push(' '),
            c if c.is_control() || is_direction_mark(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// Characters that make a terminal show a line in another order than it is in.
fn is_direction_mark(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn control_characters_lose_their_power() {
        assert_eq!(printable("a\x1b]0;title\x07b\nc"), "a\\u{1b}]0;title\\u{7}b\\u{a}c");
        assert_eq!(printable("\u{202e}txt"), "\\u{202e}txt");
        assert_eq!(printable("plain – ünïcode"), "plain – ünïcode");
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(printable(&"x".repeat(10_000)).chars().count(), 4097);
    }
}
