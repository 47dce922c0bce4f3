//! When a certificate is due for renewal: at half of its life, jittered so that a fleet does not renew as one.

use isthmus_model::time::Timestamp;
use rand::RngExt as _;

use crate::svid::Svid;

/// Half life, give or take a tenth of the life. Random: ask once per certificate, then wait for the answer.
pub fn renew_at(svid: &Svid) -> Timestamp {
    let life = svid.not_after().since(svid.not_before());
    svid.not_before() + life.mul_f64(rand::rng().random_range(0.4..0.6))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{DAY, ca, svid};

    #[test]
    fn renewal_is_due_around_half_life_and_spread() {
        let svid = svid(&ca("east.example"), "x", DAY);
        let due: Vec<_> = (0..50).map(|_| renew_at(&svid)).collect();
        assert!(due.iter().all(|t| *t > svid.not_before() + DAY / 3 && *t < svid.not_before() + DAY * 2 / 3));
        assert!(due.iter().any(|t| *t != due[0]), "not jittered");
    }
}
