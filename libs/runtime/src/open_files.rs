//! The limit of open files. Shells and supervisors start programs with a soft limit of 1,024, kept for programs that use
//! `select`; a server with thousands of connections needs the hard one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lifts the soft limit to the hard one. A failure is logged: the service works until it has that many connections.
pub fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => tracing::debug!(from = ?current, to = ?maximum, "limit of open files raised"),
        Err(error) => tracing::warn!(limit = ?current, %error, "cannot raise the limit of open files"),
    }
}

/// How many files this process may have open once the limit is [raised](raise); `None`: as many as it likes.
pub fn limit() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let lower = current.or(maximum).map_or(4096, |limit| limit - 1);
        setrlimit(Resource::Nofile, Rlimit { current: Some(lower), maximum }).unwrap();
        raise();
        assert_eq!(getrlimit(Resource::Nofile), Rlimit { current: maximum, maximum });
    }
}
