//! When a certificate is due for renewal: at half of its life, jittered so that a fleet does not renew as one.

use isthmus_model::time::Timestamp;
use rand::RngExt as _;

use crate::{ca::BACKDATE, svid::Svid};

/// Half life, give or take a tenth of the life. Random: ask once per certificate, then wait for the answer.
pub fn renew_at(svid: &Svid) -> Timestamp {
    // From when it was issued: a short life's half would lie before that if the backdating counted.
    let issued = svid.not_before() + BACKDATE;
    issued + svid.not_after().since(issued).mul_f64(rand::rng().random_range(0.4..0.6))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testkit::{DAY, ca, svid};

    #[test]
    fn renewal_is_due_around_half_life_and_spread() {
        let svid = svid(&ca("east.example"), "x", DAY);
        let due: Vec<_> = (0..50).map(|_| renew_at(&svid)).collect();
        assert!(due.iter().all(|t| *t > svid.not_before() + DAY / 3 && *t < svid.not_before() + DAY * 2 / 3));
        assert!(due.iter().any(|t| *t != due[0]), "not jittered");
    }

    #[test]
    fn a_short_lived_certificate_is_not_due_at_once() {
        let now = Timestamp(isthmus_runtime::now());
        let svid = svid(&ca("east.example"), "x", Duration::from_secs(10));
        assert!(renew_at(&svid) > now + Duration::from_secs(2));
    }
}
