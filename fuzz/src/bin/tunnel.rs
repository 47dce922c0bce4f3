//! The tunnel's frames: headers, replies and control frames from a hostile peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| isthmus_gateway::fuzzing::tunnel(data));
