//! The peek into a ClientHello: any bytes, cut anywhere.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| isthmus_gateway::fuzzing::hello(data));
