//! A recorded history of concurrent operations on one list, and whether it can be explained by one list at all.
//!
//! Writers append names, readers see the last name and its place. The places in the final list are the order in which the
//! appends took effect; the history is linearizable exactly if that order contradicts no clock: what ended before
//! something else began lies before it. (A list of unique elements that is read whole at the end leaves no other order to
//! search for.)

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

/// What an operation came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// An append that was acknowledged.
    Appended(String),
    /// One that failed or was not answered: it may have happened, or still happen.
    Unknown(String),
    /// The last element and its place; none: the list was empty.
    Read(Option<(u64, String)>),
}

/// One operation of a client.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) seen: Seen,
}

/// All that contradicts `list`, the elements with their places as read at the very end.
pub(crate) fn contradictions(history: &[Operation], list: &[(u64, String)]) -> Vec<String> {
    let mut found = Vec::new();
    let mut places: BTreeMap<&str, u64> = BTreeMap::new();
    for (place, name) in list {
        if places.insert(name, *place).is_some() {
            found.push(format!("{name} is in the list twice"));
        }
    }
    let by_place: BTreeMap<u64, &str> = list.iter().map(|(place, name)| (*place, name.as_str())).collect();
    let asked: BTreeSet<&str> = history
        .iter()
        .filter_map(|op| match &op.seen {
            Seen::Appended(name) | Seen::Unknown(name) => Some(name.as_str()),
            Seen::Read(_) => None,
        })
        .collect();
    found.extend(places.keys().filter(|name| !asked.contains(*name)).map(|name| format!("nobody appended {name}")));

    // Each operation as what it says of the order: an append took effect at its place, a read between two.
    let mut timed: Vec<(Instant, Instant, Point)> = Vec::new();
    for op in history {
        let point = match &op.seen {
            Seen::Appended(name) => match places.get(name.as_str()) {
                Some(place) => Point::Append(*place),
                None => {
                    found.push(format!("{name} was acknowledged and is lost"));
                    continue;
                }
            },
            // If it is there it took effect after it began, at any time.
            Seen::Unknown(name) => match places.get(name.as_str()) {
                Some(place) => Point::Late(*place),
                None => continue,
            },
            Seen::Read(None) => Point::Read(0),
            Seen::Read(Some((place, name))) => {
                if by_place.get(place) != Some(&name.as_str()) {
                    found.push(format!("a read saw {name} at {place}, where the list has {:?}", by_place.get(place)));
                }
                Point::Read(*place)
            }
        };
        timed.push((op.began, op.ended, point));
    }
    found.extend(out_of_order(&timed));
    found
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    Append(u64),
    /// An append without an acknowledgement.
    Late(u64),
    /// It saw everything up to and with this place.
    Read(u64),
}

/// Whatever began after something had ended, and does not lie after it.
fn out_of_order(timed: &[(Instant, Instant, Point)]) -> Vec<String> {
    let mut begins: Vec<&(Instant, Instant, Point)> = timed.iter().collect();
    begins.sort_by_key(|(began, _, _)| *began);
    let mut ends: Vec<&(Instant, Instant, Point)> =
        timed.iter().filter(|(_, _, point)| !matches!(point, Point::Late(_))).collect();
    ends.sort_by_key(|(_, ended, _)| *ended);
    let mut ends = ends.into_iter().peekable();
    let mut found = Vec::new();
    // The latest place that anything that has ended by now took effect at, or saw.
    let mut reached = 0;
    for (began, _, point) in begins {
        while let Some((_, _, past)) = ends.next_if(|(_, ended, _)| ended < began) {
            let (Point::Append(place) | Point::Late(place) | Point::Read(place)) = past;
            reached = reached.max(*place);
        }
        match point {
            Point::Append(place) | Point::Late(place) if *place <= reached => {
                found.push(format!("place {place} was taken although {reached} had been before it began"));
            }
            Point::Read(place) if *place < reached => {
                found.push(format!("a read saw up to {place} although {reached} had been before it began"));
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn op(began: u64, ended: u64, seen: Seen) -> Operation {
        // One origin for all.
        static ORIGIN: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        let at = |ms| *ORIGIN + Duration::from_millis(ms);
        Operation { began: at(began), ended: at(ended), seen }
    }

    fn appended(name: &str) -> Seen {
        Seen::Appended(name.to_owned())
    }

    fn read(place: u64, name: &str) -> Seen {
        Seen::Read(Some((place, name.to_owned())))
    }

    fn list(names: &[&str]) -> Vec<(u64, String)> {
        (1..).zip(names.iter().map(|name| (*name).to_owned())).collect()
    }

    #[test]
    fn what_one_list_explains_is_accepted() {
        let history = [
            op(0, 10, appended("a")),
            op(5, 15, appended("b")),
            op(6, 12, read(1, "a")),
            op(16, 17, read(2, "b")),
            op(16, 30, Seen::Unknown("c".to_owned())),
            op(40, 41, Seen::Unknown("never".to_owned())),
            op(50, 51, read(3, "c")),
        ];
        assert_eq!(contradictions(&history, &list(&["a", "b", "c"])), Vec::<String>::new());
        // While they overlap, either order will do.
        assert_eq!(contradictions(&history[..2], &list(&["b", "a"])), Vec::<String>::new());
    }

    /// Each is a bug as a control plane might have it.
    #[test]
    fn planted_bugs_are_found() {
        let acknowledged = [op(0, 10, appended("a")), op(20, 30, appended("b"))];
        for (bug, history, list, expected) in [
            ("an acknowledged write is lost", acknowledged.to_vec(), list(&["a"]), "b was acknowledged and is lost"),
            ("a write applied twice", acknowledged.to_vec(), list(&["a", "b", "a"]), "a is in the list twice"),
            ("writes swapped", acknowledged.to_vec(), list(&["b", "a"]), "place 1 was taken although 2"),
            (
                "a stale read",
                [&acknowledged[..], &[op(40, 41, read(1, "a"))]].concat(),
                list(&["a", "b"]),
                "a read saw up to 1 although 2",
            ),
            (
                "reads that go back",
                vec![op(0, 90, appended("a")), op(10, 11, read(1, "a")), op(20, 21, Seen::Read(None))],
                list(&["a"]),
                "a read saw up to 0 although 1",
            ),
            (
                "a forked history",
                [&acknowledged[..], &[op(40, 41, read(2, "c"))]].concat(),
                list(&["a", "b"]),
                "a read saw c at 2",
            ),
            ("a write of nobody", acknowledged.to_vec(), list(&["a", "b", "x"]), "nobody appended x"),
        ] {
            let found = contradictions(&history, &list);
            assert!(found.iter().any(|f| f.contains(expected)), "{bug}: {found:?}");
        }
    }
}
