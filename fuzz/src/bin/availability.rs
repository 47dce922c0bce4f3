//! The availability feed: from one gateway's table, or a hostile peer, to another's.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| isthmus_gateway::fuzzing::availability(data));
