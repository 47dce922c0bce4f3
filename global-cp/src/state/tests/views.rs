//! What members are sent, by what they hold.

use super::*;

#[test]
fn a_member_ahead_of_this_node_is_told_so() {
    let view = View::new(Arc::new(joined()));
    let here = view.state().stamp();
    let ahead = Stamp { revision: isthmus_model::ids::Revision(here.revision.0 + 1), ..here };
    assert!(matches!(view.since(known(ahead)), Update::Ahead { here: h } if h == here));
    assert!(matches!(view.since(known(here)), Update::UpToDate));
    assert!(matches!(view.since(None), Update::Snapshot(_)));
    assert!(matches!(view.since(known(Stamp::default())), Update::Snapshot(_)), "an earlier epoch");
}

#[test]
fn a_member_gets_a_delta_only_from_a_state_that_was_here() {
    let mut state = joined();
    let mut view = View::new(Arc::new(state.clone()));
    let held = global(&state).clone();
    let mut other = held.clone();
    other.clusters.clear();
    let claim = |of: &GlobalSnapshot| {
        Some(Held { stamp: of.stamp, content: Content::Digest(isthmus_api::convert::snapshot_digest(of)) })
    };
    let vague = Some(Held { stamp: held.stamp, content: Content::Unknown });
    assert!(matches!(view.since(claim(&held)), Update::UpToDate));
    assert!(matches!(view.since(claim(&other)), Update::Diverged));
    assert!(matches!(view.since(vague), Update::UpToDate));

    view.remember();
    let (_, change) = state.apply(&Command::Revoke { cluster: cluster("us-west") });
    view.advance(Arc::new(state), change);
    assert!(matches!(view.since(claim(&held)), Update::Delta(_)));
    assert!(matches!(view.since(claim(&other)), Update::Snapshot(_)));
    assert!(matches!(view.since(vague), Update::Snapshot(_)));
}

#[test]
fn a_new_epoch_keeps_everything_but_the_epoch_and_reaches_everyone() {
    let mut state = joined();
    accept(&mut state, Command::Revoke { cluster: cluster("us-west") });
    let mut view = View::new(Arc::new(state.clone()));
    let before = global(&state).clone();
    let (_, change) = state.apply(&Command::StartEpoch);
    view.advance(Arc::new(state.clone()), change);
    let stamp = Stamp {
        epoch: isthmus_model::ids::Epoch(before.stamp.epoch.0 + 1),
        revision: isthmus_model::ids::Revision(before.stamp.revision.0 + 1),
    };
    assert_eq!(*global(&state), GlobalSnapshot { stamp, ..before.clone() });
    let far = Stamp { revision: isthmus_model::ids::Revision(u64::MAX), ..before.stamp };
    assert!(matches!(view.since(known(far)), Update::Snapshot(_)));
    assert_eq!(refuse(&mut State::default(), Command::StartEpoch), Rejection::NotFounded);
}

#[test]
fn a_member_behind_the_window_gets_a_snapshot() {
    let mut state = joined();
    let mut view = View::new(Arc::new(state.clone()));
    let start = state.stamp();
    for i in 0..1100_u64 {
        let hold_down = Duration::from_millis(i + 1);
        let failover = FailoverPolicy { hold_down, ..FailoverPolicy::default() };
        let settings = Settings { failover, ..Settings::default() };
        let (_, change) = state.apply(&Command::SetSettings { settings });
        view.advance(Arc::new(state.clone()), change);
    }
    assert!(matches!(view.since(known(start)), Update::Snapshot(_)));
    let recent = Stamp { revision: isthmus_model::ids::Revision(state.stamp().revision.0 - 1024), ..start };
    assert!(
        matches!(view.since(known(recent)), Update::Delta(delta) if delta.from == recent && delta.settings.is_some())
    );
}
