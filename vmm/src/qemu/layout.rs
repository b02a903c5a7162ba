//! Where things lie in the memory of QEMU's `microvm`.
//!
//! ```text
//! 0                        low memory                          at most 3.5 GiB
//! ├────────────────────────┬──────────────┬───────────────────┤
//! │ kernel, free memory    │ panic log    │ guest image       │  the rest above 4 GiB
//! ```
//!
//! QEMU puts the guest image at the very top of low memory, so the panic log lies right below it.

use sandbox_vmm_api::PANIC_LOG_BYTES;

/// The end of low memory where there is more memory than that (`MICROVM_MAX_BELOW_4G`).
const LOW_MEMORY_MAX: u64 = 0xe000_0000;

/// What the addresses are multiples of: large enough for any page that the kernel may map it with.
const ALIGNMENT: u64 = 64 * 1024;

/// Guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Where the panic log begins. As guest memory is one file, this is its offset there too.
    pub panic_log: u64,
}

impl Layout {
    /// The layout for this much memory and an image of this size; none if they do not fit together.
    pub fn new(memory_bytes: u64, image_bytes: u64) -> Option<Self> {
        let low = memory_bytes.min(LOW_MEMORY_MAX);
        // QEMU rounds the image down to a page; the alignment below covers that.
        let image = low.checked_sub(image_bytes)?.checked_sub(ALIGNMENT)?;
        let panic_log = image.checked_sub(PANIC_LOG_BYTES)? / ALIGNMENT * ALIGNMENT;
        Some(Self { panic_log })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sandbox_vmm_api::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};

    use super::*;

    proptest! {
        /// The log ends below the image, which QEMU puts at the top, whatever sizes they have; or there is no layout.
        #[test]
        fn the_panic_log_ends_below_the_image(
            mib in MIN_MEMORY_MIB..=MAX_MEMORY_MIB,
            image in prop_oneof![0u64..64 << 20, any::<u64>()],
        ) {
            let memory = u64::from(mib) << 20;
            let low = memory.min(LOW_MEMORY_MAX);
            match Layout::new(memory, image) {
                Some(layout) => {
                    prop_assert!(layout.panic_log + PANIC_LOG_BYTES <= (low - image) / 4096 * 4096);
                    prop_assert_eq!(layout.panic_log % ALIGNMENT, 0);
                }
                None => prop_assert!(image > low - 3 * ALIGNMENT),
            }
        }
    }

    #[test]
    fn an_image_larger_than_memory_has_no_layout() {
        assert_eq!(Layout::new(48 << 20, 48 << 20), None);
    }
}
