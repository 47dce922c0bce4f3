//! Judging trust bundles inside `apply`: parsing and signature checks are functions of their input alone, so every node
//! comes to the same answer.

use isthmus_identity::bundle::{BundleDocument, verify_successor};
use isthmus_model::service::TrustBundle;
use isthmus_runtime::tasks::chain;

/// A trust domain's first bundle: it must parse, and hold at least one root, and none that names another domain.
pub(crate) fn check_first_bundle(bundle: &TrustBundle) -> Result<(), String> {
    let document = BundleDocument::parse(&bundle.document).map_err(|error| chain(&error))?;
    if document.x509_roots.is_empty() {
        return Err("it holds no x509-svid key, so nothing of that trust domain could be verified".to_owned());
    }
    require_own_roots(bundle, &document)
}

/// A bundle that replaces `stored`: the same content, or signed by one of its keys with a larger sequence; and no root
/// in it may name another domain.
pub(super) fn check_successor(stored: &TrustBundle, next: &TrustBundle) -> Result<(), String> {
    verify_successor(stored, next).map_err(|error| chain(&error))?;
    let document = BundleDocument::parse(&next.document).map_err(|error| chain(&error))?;
    require_own_roots(next, &document)
}

/// Whether every root of `part` is one of `whole`'s.
pub(super) fn holds_all_roots(whole: &TrustBundle, part: &TrustBundle) -> bool {
    let roots = |bundle: &TrustBundle| BundleDocument::parse(&bundle.document).map(|document| document.x509_roots);
    match (roots(whole), roots(part)) {
        (Ok(whole), Ok(part)) => part.iter().all(|root| whole.contains(root)),
        _ => false,
    }
}

fn require_own_roots(bundle: &TrustBundle, document: &BundleDocument) -> Result<(), String> {
    document.require_domain(&bundle.trust_domain).map_err(|error| chain(&error))
}
