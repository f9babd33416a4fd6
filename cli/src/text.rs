//! Text for a terminal: colours where wanted, and nothing that could steer it.

use std::{
    borrow::Cow,
    env,
    io::{IsTerminal as _, Write as _},
};

/// Writes to stdout. Whoever reads it and has seen enough may leave.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Whether stdout wants colours: a terminal, and NO_COLOR (no-color.org) not set.
pub(crate) fn colours() -> bool {
    std::io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Colours that mean something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colour {
    Good,
    Bad,
    Warn,
    Dim,
}

/// `text` in a colour, or as it is.
pub(crate) fn paint(on: bool, colour: Colour, text: &str) -> String {
    let code = match colour {
        Colour::Good => "32",
        Colour::Bad => "31",
        Colour::Warn => "33",
        Colour::Dim => "2",
    };
    if on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
}

/// `text` with control characters written out: what a peer sent never reaches the terminal as a command.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    let steers = |c: char| {
        c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c)
    };
    if text.contains(steers) {
        text.chars().map(|c| if steers(c) { c.escape_unicode().to_string() } else { c.to_string() }).collect()
    } else {
        Cow::Borrowed(text)
    }
}

/// Rows as aligned columns, two spaces between, the last one unpadded. `styled` paints a cell after padding.
pub(crate) fn columns(rows: &[Vec<String>], widths: &[usize]) -> Vec<String> {
    rows.iter()
        .map(|row| {
            let mut line = String::new();
            for (i, cell) in row.iter().enumerate() {
                line.push_str(cell);
                if i + 1 < row.len() {
                    let width = widths.get(i).copied().unwrap_or_default();
                    let have = cell.chars().count();
                    line.extend(std::iter::repeat_n(' ', width.saturating_sub(have) + 2));
                }
            }
            line.truncate(line.trim_end().len());
            line
        })
        .collect()
}

/// The width of each column.
pub(crate) fn widths(rows: &[Vec<String>]) -> Vec<usize> {
    let mut widths = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    widths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_written_out() {
        assert_eq!(clean("/a\x1b[2Jb\r\n"), "/a\\u{1b}[2Jb\\u{d}\\u{a}");
        assert_eq!(clean("/caf\u{e9}"), "/caf\u{e9}");
        assert_eq!(clean("a\u{202e}b"), "a\\u{202e}b");
    }

    #[test]
    fn columns_align() {
        let rows = vec![
            vec!["a".to_owned(), "bb".into(), "c".into()],
            vec!["aaa".into(), "b".into(), String::new()],
        ];
        assert_eq!(columns(&rows, &widths(&rows)), ["a    bb  c", "aaa  b"]);
    }
}
