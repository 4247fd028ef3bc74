//! One target of `watari_fuzz` under libFuzzer; WATARI_FUZZ_TARGET names it (`make fuzz` walks over all).
#![no_main]

use std::sync::LazyLock;

use watari_fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("WATARI_FUZZ_TARGET").unwrap_or_default();
    let known: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
    *TARGETS.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("WATARI_FUZZ_TARGET: found {name:?}, expected one of {known:?}"))
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (TARGET.feed)(bytes));
