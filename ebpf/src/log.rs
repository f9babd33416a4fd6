//! Debug lines, off unless the loader says otherwise: with the global at 0 the verifier removes them.

use aya_ebpf::Global;

/// 1: debug lines on. A constant to the verifier.
#[unsafe(no_mangle)]
static WEFT_LOG: Global<u8> = Global::new(0);

/// True where debug lines are wanted.
#[inline(always)]
pub(crate) fn enabled() -> bool {
    WEFT_LOG.load() != 0
}

/// A debug line through `aya-log`; free while they are off.
macro_rules! trace_line {
    ($ctx:expr, $($arg:tt)*) => {
        if $crate::log::enabled() {
            aya_log_ebpf::debug!($ctx, $($arg)*);
        }
    };
}

pub(crate) use trace_line;
