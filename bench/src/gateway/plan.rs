//! How much is measured: everything, or a rough answer in two minutes.

use crate::load::command::Span;

/// Sizes and times of one run.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) rounds: usize,
    pub(super) bulk: Bulk,
    pub(super) exchange: Exchange,
    pub(super) connect: Connect,
    pub(super) memory: Memory,
    pub(super) wan: Wan,
}

#[derive(Clone, Debug)]
pub(super) struct Bulk {
    pub(super) streams: &'static [usize],
    pub(super) span: Span,
}

#[derive(Clone, Debug)]
pub(super) struct Exchange {
    pub(super) connections: Vec<usize>,
    pub(super) closed: Span,
    pub(super) paced: Span,
}

#[derive(Clone, Debug)]
pub(super) struct Connect {
    pub(super) at_once: usize,
    pub(super) span: Span,
}

#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) connections: usize,
    pub(super) rounds: usize,
    pub(super) paced: Span,
}

#[derive(Clone, Debug)]
pub(super) struct Wan {
    pub(super) rtt_ms: u64,
    /// In per cent.
    pub(super) losses: &'static [f64],
    pub(super) connections: usize,
    pub(super) paced: Span,
    pub(super) connect: Span,
    pub(super) streams: &'static [usize],
    pub(super) bulk: Span,
}

/// Of the slowest system's own pace: what all can hold.
pub(super) const SHARE: f64 = 0.4;
/// Faster than this, the clients would be what is measured.
pub(super) const FASTEST: f64 = 20_000.0;

impl Plan {
    /// Three rounds of everything, at `most` connections.
    pub(super) fn full(most: usize) -> Self {
        Self {
            rounds: 3,
            bulk: Bulk { streams: &[1, 8, 64], span: span(0.7, 3.0) },
            exchange: Exchange { connections: vec![100, 1_000, most], closed: span(0.7, 3.0), paced: span(0.7, 5.0) },
            connect: Connect { at_once: 32, span: span(0.3, 3.0) },
            memory: Memory { connections: most, rounds: 3, paced: span(0.5, 3.0) },
            wan: Wan {
                rtt_ms: 40,
                losses: &[0.0, 0.1, 1.0, 3.0],
                connections: 64,
                paced: span(1.0, 8.0),
                connect: span(0.3, 4.0),
                streams: &[1, 8, 64],
                bulk: span(1.5, 4.0),
            },
        }
    }

    /// One round of less.
    pub(super) fn quick(most: usize) -> Self {
        let most = most.min(2_000);
        Self {
            rounds: 1,
            bulk: Bulk { streams: &[1, 8], span: span(0.2, 0.6) },
            exchange: Exchange { connections: vec![100, most], closed: span(0.2, 0.5), paced: span(0.2, 0.8) },
            connect: Connect { at_once: 32, span: span(0.1, 0.5) },
            memory: Memory { connections: most, rounds: 1, paced: span(0.2, 0.6) },
            wan: Wan {
                rtt_ms: 40,
                losses: &[0.0, 1.0],
                connections: 64,
                paced: span(0.3, 1.2),
                connect: span(0.1, 0.6),
                streams: &[8],
                bulk: span(0.5, 0.8),
            },
        }
    }
}

fn span(warm: f64, measure: f64) -> Span {
    Span { warm, measure }
}
