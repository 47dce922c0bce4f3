//! The sample app, the federation on one machine, and the scenario that `make demo` plays.
//!
//! `shop` is the app; `federation` starts and kills the real processes; `samples` reads what the load saw; `scenario`
//! is the story with its checks; `intruder` tries what must not work. Nothing here is part of a deployed Isthmus.

pub mod federation;
pub mod intruder;
pub mod samples;
pub mod scenario;
pub mod shop;
