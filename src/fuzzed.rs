//! Bodies that take any bytes: what the kernel and guests may hand in. Fuzz targets run them
//! (`tests/fuzz`, feature `fuzz`), and so do ordinary tests, for some seconds. No API to build on.

pub mod calls;
pub mod datagram;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 20 } else { 20_000 },
            ..crate::regressions("tests/proptest-regressions/fuzzed.txt")
        })]

        #[test]
        fn the_datagram_codec_takes_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::datagram::run(&bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 1500,
            ..crate::regressions("tests/proptest-regressions/fuzzed.txt")
        })]

        #[test]
        fn guests_may_call_in_any_sequence(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            super::calls::run(&bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 150,
            ..crate::regressions("tests/proptest-regressions/fuzzed.txt")
        })]

        /// Kills, under ThreadSanitizer: what threads share without a lock or an order.
        #[test]
        fn guests_of_several_threads_may_call_at_once(
            lives in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 8)
        ) {
            super::calls::run_at_once(lives);
        }
    }
}
