//! Tables as text: columns as wide as their widest cell, two spaces between, nothing wrapped, no trailing blanks.

/// Rows under a header.
pub(crate) struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row. Missing cells stay empty; what stands in for nothing is "-".
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into_iter().map(clean).collect());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Each line starts with `indent` spaces and ends with a newline.
    pub(crate) fn render(&self, indent: usize) -> String {
        let header: Vec<String> = self.header.iter().map(|h| (*h).to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&header).chain(&self.rows).collect();
        let width = |column: usize| lines.iter().filter_map(|l| l.get(column)).map(|c| columns(c)).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let mut text = String::new();
        for line in lines {
            let mut row = " ".repeat(indent);
            for (cell, width) in line.iter().zip(&widths) {
                row.push_str(cell);
                row.push_str(&" ".repeat(width.saturating_sub(columns(cell)) + 2));
            }
            text.push_str(row.trim_end());
            text.push('\n');
        }
        text
    }
}

/// One line, whatever came in; empty becomes "-". Control characters could take over a terminal.
fn clean(cell: String) -> String {
    if cell.is_empty() {
        return "-".to_owned();
    }
    if cell.chars().any(char::is_control) {
        return cell.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    }
    cell
}

fn columns(cell: &str) -> usize {
    cell.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_nothing_trails() {
        let mut table = Table::new(&["NAME", "STATE", "NOTE"]);
        table.row(["us-east".to_owned(), "active".to_owned(), String::new()]);
        table.row(["eu".to_owned(), "revoked".to_owned(), "gone".to_owned()]);
        let want = "  NAME     STATE    NOTE\n  us-east  active   -\n  eu       revoked  gone\n";
        assert_eq!(table.render(2), want);
    }

    #[test]
    fn a_cell_stays_on_its_line() {
        let mut table = Table::new(&["MESSAGE"]);
        table.row(["two\nlines\u{1b}[31m".to_owned()]);
        assert_eq!(table.render(0), "MESSAGE\ntwo lines [31m\n");
    }

    #[test]
    fn width_counts_characters_not_bytes() {
        let mut table = Table::new(&["A", "B"]);
        table.row(["é".repeat(3), "x".to_owned()]);
        assert_eq!(table.render(0), "A    B\nééé  x\n");
    }
}
