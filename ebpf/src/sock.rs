//! Socket storage, from any kind of context.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
};
use weft_ebpf_common::SkMeta;

use crate::maps::SK_META;

/// What is known of the socket; null where nothing is.
///
/// # Safety
/// `sk` is a socket that the verifier knows not to be null.
#[inline(always)]
pub(crate) unsafe fn meta(sk: *mut bpf_sock) -> *mut SkMeta {
    // SAFETY: the map is a socket storage of SkMeta; the caller vouches for the socket.
    unsafe { bpf_sk_storage_get((&raw const SK_META).cast_mut().cast(), sk.cast(), ptr::null_mut(), 0) }
        .cast()
}

/// Notes what is known of a socket that nothing was known of; false where there was no memory.
///
/// # Safety
/// As [`meta`].
#[inline(always)]
pub(crate) unsafe fn set_meta(sk: *mut bpf_sock, value: &mut SkMeta) -> bool {
    // SAFETY: as above; the kernel copies `value` into the entry that it creates.
    let entry = unsafe {
        bpf_sk_storage_get(
            (&raw const SK_META).cast_mut().cast(),
            sk.cast(),
            ptr::from_mut(value).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    };
    !entry.is_null()
}

/// Forgets the socket.
///
/// # Safety
/// As [`meta`].
#[inline(always)]
pub(crate) unsafe fn forget(sk: *mut bpf_sock) {
    // SAFETY: as above. The only error is that there is nothing to delete.
    unsafe { bpf_sk_storage_delete((&raw const SK_META).cast_mut().cast(), sk.cast()) };
}
