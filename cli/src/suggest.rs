//! Names near a mistyped one.

/// At most three of `known`, nearest first, that are close enough to `wanted` to be what was meant. A name that
/// matches but for its namespace counts as near.
pub(crate) fn near(wanted: &str, known: impl IntoIterator<Item = String>) -> Vec<String> {
    let allowed = (wanted.chars().count() / 3).clamp(1, 4);
    let mut scored: Vec<(usize, String)> = known
        .into_iter()
        .filter_map(|name| {
            let same_last = name.rsplit('/').next() == wanted.rsplit('/').next();
            let distance = if same_last { 1 } else { distance(wanted, &name) };
            (distance <= allowed).then_some((distance, name))
        })
        .collect();
    scored.sort();
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut next = Vec::with_capacity(row.len());
        next.push(i + 1);
        for (to, pair) in b.iter().zip(row.windows(2)) {
            let &[above_left, above] = pair else { continue };
            let left = next.last().copied().unwrap_or(i + 1);
            next.push((above_left + usize::from(from != *to)).min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<String> {
        ["shop/cart", "shop/catalog", "shop/orders", "pay/card"].map(str::to_owned).to_vec()
    }

    #[test]
    fn typing_errors_find_what_was_meant() {
        assert_eq!(near("shop/crat", known()), ["shop/cart"]);
        assert_eq!(near("shop/order", known()), ["shop/orders"]);
        assert_eq!(near("shpo/cart", known()), ["shop/cart"]);
    }

    #[test]
    fn a_wrong_namespace_finds_the_right_one() {
        assert_eq!(near("default/orders", known()), ["shop/orders"]);
    }

    #[test]
    fn something_else_entirely_suggests_nothing() {
        assert!(near("billing/invoices", known()).is_empty());
    }

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("same", "same"), 0);
    }
}
