//! What must hold of the gateway's decoders for any bytes at all. Compiled for tests and for the crate `fuzz` only.
//!
//! In: bytes from a fuzzer, or a seed from `fuzz/corpus/`. Out: nothing, or a panic that says what does not hold. Each
//! target reads how to cut its input from the input's own front ([`Input`]), so that a fuzzer decides that too. Not a part
//! of the gateway's interface.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a finding is a panic")]
#![allow(missing_docs, reason = "no interface")]

mod availability;
mod hello;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;
mod tunnel;

pub use self::{availability::availability, hello::hello, tunnel::tunnel};

#[cfg(test)]
type Target = fn(&[u8]);

/// All targets, by the name of their corpus.
#[cfg(test)]
const TARGETS: [(&str, Target); 3] = [("tunnel", tunnel), ("hello", hello), ("availability", availability)];

/// Reads an input from its front; what is missing reads as zero.
#[derive(Clone, Copy, Debug)]
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// How to cut: a count (at most 15), and so many sizes from 1 to 256, used in turn. Without any, nothing is cut.
    fn cuts(&mut self) -> Cuts<'a> {
        let n = usize::from(self.byte() % 16).min(self.0.len());
        let (sizes, rest) = self.0.split_at(n);
        self.0 = rest;
        Cuts(sizes)
    }
}

/// Sizes of segments.
#[derive(Clone, Copy, Debug)]
struct Cuts<'a>(&'a [u8]);

impl<'a> Cuts<'a> {
    fn sizes(self) -> impl Iterator<Item = usize> + use<'a> {
        let whole = self.0.is_empty().then_some(usize::MAX);
        whole.into_iter().cycle().chain(self.0.iter().cycle().map(|size| usize::from(*size) + 1))
    }

    /// `bytes` in segments.
    fn segments<'b>(self, mut bytes: &'b [u8]) -> impl Iterator<Item = &'b [u8]> + use<'a, 'b> {
        self.sizes().map_while(move |size| {
            let (segment, rest) = bytes.split_at(size.min(bytes.len()));
            bytes = rest;
            (!segment.is_empty()).then_some(segment)
        })
    }
}
