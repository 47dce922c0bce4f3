//! The feature level rises when all nodes support a higher one, and then keeps older programs out.

use super::*;
use crate::state::{AdmitNode, MintNodeToken, SetNode};

fn set_node(id: u64, supports: u32) -> Command {
    let node = format!("cp-{id}").parse().unwrap();
    Command::SetNode(SetNode { id, node, address: "127.0.0.1:1".to_owned(), supports, now: Timestamp(1) })
}

/// A further node, with the token of this number.
fn admit(state: &mut State, token: u8, supports: u32) -> Response {
    let node = format!("cp-{token}").parse().unwrap();
    let (hash, now) = (hash(token), Timestamp(1));
    let mint = MintNodeToken { hash, node, expires_at: Timestamp(1000), now };
    let admit = AdmitNode {
        hash,
        root: KeyHash([token; 32]),
        node: mint.node.clone(),
        address: "127.0.0.1:2".to_owned(),
        bundle: bundle("isthmus"),
        supports,
        now,
    };
    accept(state, Command::MintNodeToken(mint));
    state.apply(&Command::AdmitNode(admit)).0
}

#[test]
fn the_level_rises_only_when_every_node_supports_it_and_never_falls() {
    let mut state = founded();
    accept(&mut state, set_node(1, 2));
    assert!(matches!(admit(&mut state, 2, 1), Response::Accepted(_)));
    assert_eq!((state.level(), state.attainable_level()), (1, None));
    let refused = refuse(&mut state, Command::RaiseLevel { to: 2 });
    assert_eq!(refused.code(), "not_supported");
    assert!(refused.to_string().contains("node cp-2"), "{refused}");

    accept(&mut state, set_node(2, 3));
    assert_eq!(state.attainable_level(), Some(2), "what the oldest supports");
    assert!(accept(&mut state, Command::RaiseLevel { to: 2 }).changed);
    assert!(!accept(&mut state, Command::RaiseLevel { to: 1 }).changed);
    assert_eq!((state.level(), state.attainable_level()), (2, None));
}

#[test]
fn a_node_with_an_older_program_is_not_admitted_any_more() {
    let mut state = founded();
    accept(&mut state, set_node(1, 2));
    accept(&mut state, Command::RaiseLevel { to: 2 });
    let Response::Rejected(refused) = admit(&mut state, 2, 1) else { panic!("admitted") };
    assert!(refused.to_string().contains("supports feature level 1, but level 2 is needed"), "{refused}");
    assert!(matches!(admit(&mut state, 3, 2), Response::Accepted(_)));
}
