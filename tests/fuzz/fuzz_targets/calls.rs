#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| unembedded::fuzzed::calls::run(bytes));
