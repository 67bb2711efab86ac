//! Just enough of Rust's grammar to tell code from what only talks about it.
//!
//! [`code_only`] replaces comments and the insides of literals by blanks, line by line as they were, so that a rule
//! about code does not stumble over a sentence in a comment.

/// `source` with comments, strings and characters blanked. Every line keeps its number.
pub(crate) fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    let mut previous = ' ';
    while let Some(first) = rest.chars().next() {
        let length = blank_length(rest, previous).unwrap_or(0);
        if length == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..length].chars().map(|letter| if letter == '\n' { '\n' } else { ' ' }));
            rest = &rest[length..];
        }
        previous = first;
    }
    code
}

/// The length of the comment or literal that `rest` begins with.
fn blank_length(rest: &str, previous: char) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(block_comment_length(rest));
    }
    if rest.starts_with('"') {
        return Some(string_length(rest));
    }
    if let Some(after) = rest.strip_prefix('r').filter(|_| !is_word(previous) || previous == 'b') {
        let hashes = after.len() - after.trim_start_matches('#').len();
        let body = after[hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(hashes));
        let length = body.find(&end).map_or(body.len(), |at| at + end.len());
        return Some(rest.len() - body.len() + length);
    }
    let after = rest.strip_prefix('\'')?;
    let first = after.chars().next()?;
    if first == '\\' {
        let closing = after.char_indices().skip(2).find(|(_, letter)| *letter == '\'')?.0;
        return Some(closing + 2);
    }
    // 'a' is a character, 'a without a closing quote is a lifetime.
    after[first.len_utf8()..].starts_with('\'').then(|| first.len_utf8() + 2)
}

fn block_comment_length(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        let here = &rest[at..];
        if here.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += here.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn string_length(rest: &str) -> usize {
    let mut escaped = false;
    for (at, letter) in rest.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Whether `letter` can be part of a name.
pub(crate) fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

/// The names and keywords in `line`.
pub(crate) fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|letter| !is_word(letter)).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squeezed(source: &str) -> String {
        code_only(source).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_and_literals_are_blanked() {
        assert_eq!(squeezed("let a = 1; // let b\nlet c;"), "let a = 1; let c;");
        assert_eq!(squeezed("a /* b /* c */ d */ e"), "a e");
        assert_eq!(squeezed(r#"f("x \" y", z)"#), "f( , z)");
        assert_eq!(squeezed("f(r#\"x \" y\"#, br\"\\\", z)"), "f( , b , z)");
        assert_eq!(squeezed(r"f('a', '\'', '\u{41}', z)"), "f( , , , z)");
    }

    #[test]
    fn lifetimes_and_names_stay() {
        assert_eq!(squeezed("fn f<'a>(x: &'a str, r: u8) -> &'static str"), {
            "fn f<'a>(x: &'a str, r: u8) -> &'static str"
        });
        assert_eq!(squeezed("bar\"x\" y"), "bar y");
    }

    #[test]
    fn lines_keep_their_numbers() {
        let source = "a\n/* b\nc */ d\n\"e\nf\" g\n";
        assert_eq!(code_only(source).lines().count(), source.lines().count());
        assert_eq!(code_only(source).lines().nth(4).unwrap().trim(), "g");
    }
}
