//! The agent's own program, in the memory of a child.

use rustix::mm::Advice;

/// The size of a page, on x86-64.
const PAGE_BYTES: usize = 4096;

unsafe extern "C" {
    // The linker's: where the program begins, and where its instructions end.
    static __executable_start: u8;
    static etext: u8;
}

/// Maps all of it that is only read. The kernel copies none of these mappings to a child, whose way through the program
/// is one fault after the other otherwise; under shadow page tables, each is two exits of the virtual machine.
pub fn map() {
    let start = &raw const __executable_start as usize / PAGE_BYTES * PAGE_BYTES;
    let length = &raw const etext as usize - start;
    // Where the kernel does not, they come one by one.
    // SAFETY: the advice reads pages of the program and changes nothing.
    let _ = unsafe { rustix::mm::madvise(start as *mut _, length, Advice::LinuxPopulateRead) };
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_program_is_where_the_linker_says() {
        let start = &raw const super::__executable_start as usize;
        let here = super::map as *const () as usize;
        assert!(start < here && here < &raw const super::etext as usize);
        super::map();
    }
}
