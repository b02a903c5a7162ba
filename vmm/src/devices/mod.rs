//! The devices of the `kvm` machine that serve the guest from what the host gives them: disks, network
//! interfaces, and the balloon by which it gives memory back.
//!
//! Each is a [`VirtioDevice`](crate::virtio::VirtioDevice) and takes its requests as checked chains (see
//! [`crate::virtio::chain`]). What a device needs of the host it opens when it is made, before the process
//! gives up its view of the host.

pub mod balloon;
pub mod blk;
pub mod net;

/// Reads a configuration space of these bytes; what lies past its end is zero.
fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or(&[]);
    data.fill(0);
    for (to, byte) in data.iter_mut().zip(from) {
        *to = *byte;
    }
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests {
    use super::read_config_space;

    #[test]
    fn a_configuration_space_ends_in_zeroes() {
        for (offset, expected) in [(0, [1, 2]), (2, [3, 0]), (3, [0, 0]), (u64::MAX, [0, 0])] {
            let mut data = [0xff; 2];
            read_config_space(&[1, 2, 3], offset, &mut data);
            assert_eq!(data, expected, "{offset}");
        }
    }
}
