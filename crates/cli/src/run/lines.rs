//! Lines of one rank: whatever pieces a pipe delivers, only whole lines come out, each with the rank in front.

/// A line longer than this is cut, so that a rank that never ends its line costs no unbounded memory.
pub(super) const MAX_LINE_BYTES: usize = 1 << 20;

/// Collects the output of one rank on one stream. Bytes pass through unchanged, UTF-8 or not.
#[derive(Debug)]
pub(super) struct Lines {
    prefix: Vec<u8>,
    /// The beginning of a line whose end has not come yet.
    pending: Vec<u8>,
}

impl Lines {
    pub(super) const fn new(prefix: Vec<u8>) -> Self {
        Self { prefix, pending: Vec::new() }
    }

    /// Takes `bytes` and appends the lines that they complete to `out`.
    pub(super) fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end + 1);
            self.emit(line, out);
            bytes = rest;
        }
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= MAX_LINE_BYTES {
            self.emit(b"\n", out);
        }
    }

    /// Appends what is left when the stream ends, as a line.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.emit(b"\n", out);
        }
    }

    fn emit(&mut self, end_of_line: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        out.append(&mut self.pending);
        out.extend_from_slice(end_of_line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Lines {
        Lines::new(b"[3] ".to_vec())
    }

    #[test]
    fn however_the_bytes_are_cut_the_lines_are_the_same() {
        let text = b"one\n\ntwo \xff\xfe\r\nthree";
        let expected = b"[3] one\n[3] \n[3] two \xff\xfe\r\n[3] three\n";
        for piece in 1..=text.len() {
            let (mut lines, mut out) = (lines(), Vec::new());
            for bytes in text.chunks(piece) {
                lines.push(bytes, &mut out);
                assert!(out.is_empty() || out.ends_with(b"\n"), "no partial line comes out");
            }
            lines.finish(&mut out);
            lines.finish(&mut out);
            assert_eq!(out, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn nothing_in_nothing_out() {
        let (mut lines, mut out) = (lines(), Vec::new());
        lines.push(b"", &mut out);
        lines.finish(&mut out);
        assert_eq!(out, b"");
    }

    #[test]
    fn an_endless_line_is_cut_and_loses_no_byte() {
        let (mut lines, mut out) = (lines(), Vec::new());
        let piece = [b'x'; 4096];
        for _ in 0..3 * MAX_LINE_BYTES / piece.len() {
            lines.push(&piece, &mut out);
            assert!(lines.pending.len() < MAX_LINE_BYTES);
        }
        lines.finish(&mut out);
        assert_eq!(out.iter().filter(|byte| **byte == b'x').count(), 3 * MAX_LINE_BYTES);
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 3);
    }
}
