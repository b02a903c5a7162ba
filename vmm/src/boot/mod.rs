//! Everything that lies in guest memory before its first instruction, and the state of the first vCPU.
//!
//! The kernel is entered by the 64-bit boot protocol of Linux (its `Documentation/arch/x86/boot.rst`): long mode
//! with paging, `rsi` pointing at the zero page, at the entry of its ELF image. On KVM that is where the first vCPU
//! starts; on QEMU a program of ours takes it there from where the firmware leaves it.
//!
//! On KVM:
//!
//! ```text
//!  0        MP floating pointer
//!  0x500    segment descriptors
//!  0x7000   zero page
//!  0x8000   page tables
//!  0x20000  command line
//!  0xf0000  MP table
//!  1 MiB    kernel, at the addresses of its ELF segments
//!  ...
//!           initramfs, at the upper end of low memory
//!           the kernel's last words
//! ```
//!
//! On QEMU, firmware has the memory below 1 MiB and writes the MP table. The zero page, the page tables and the
//! command line lie as far above 1 MiB as here above 0, and kernels above 2 MiB on either.

mod check;
pub mod cmdline;
mod elf;
mod kernel;
pub mod linux;
mod mptable;
mod plan;
pub mod registers;

pub use kernel::KERNELS_START;
pub use plan::Plan;

use std::fs::File;
use std::path::PathBuf;

use vm_memory::GuestAddress;

use crate::memory::{Extent, Layout};
use crate::virtio::GuestMemory;

/// Where the tables for the kernel begin on KVM.
const TABLES: u64 = 0;

/// What goes wrong while a guest is put into its memory.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened.
    #[error(
        "cannot open the guest {what} {path}: {why}; give another with {variable}, or build it with `make`"
    )]
    Open {
        /// `kernel` or `image`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        why: std::io::Error,
        /// The environment variable that names another.
        variable: &'static str,
    },
    /// The kernel file is something else.
    #[error("{path} is not a guest kernel: {why}; an uncompressed x86-64 ELF image (vmlinux) is needed")]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it is not.
        why: String,
    },
    /// The kernel has no PVH entry.
    #[error("the guest kernel {0} has no PVH entry: build it with CONFIG_PVH=y")]
    NoPvhEntry(PathBuf),
    /// The kernel could not be loaded.
    #[error("cannot load the guest kernel {path} into {memory_mib} MiB of memory: {why}")]
    LoadKernel {
        /// The file.
        path: PathBuf,
        /// The guest's memory.
        memory_mib: u64,
        /// Why.
        why: String,
    },
    /// The image is empty or not an initramfs.
    #[error("{path} is not a guest image: {why}")]
    NotAnImage {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The kernel or the image could not be read.
    #[error("cannot read the guest file {path}: {why}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Kernel and image leave no room.
    #[error(
        "{memory_mib} MiB of memory are too little for the guest kernel and image, which end at \
         {kernel_end_mib} MiB and take {image_mib} MiB: give the guest at least {needed_mib} MiB"
    )]
    TooLittleMemory {
        /// The guest's memory.
        memory_mib: u64,
        /// Where the kernel ends.
        kernel_end_mib: u64,
        /// The image's size.
        image_mib: u64,
        /// What would do.
        needed_mib: u64,
    },
    /// A table does not fit where it belongs: a mistake of the layout.
    #[error("cannot write the {0} into guest memory")]
    Table(&'static str),
}

/// A file of the guest, open, with its path for messages.
#[derive(Debug)]
pub struct GuestFile {
    file: File,
    path: PathBuf,
}

impl GuestFile {
    /// Opens the kernel.
    pub fn kernel(path: &std::path::Path) -> Result<Self, BootError> {
        Self::open("kernel", "SANDBOX_KERNEL", path)
    }

    /// Opens the image.
    pub fn image(path: &std::path::Path) -> Result<Self, BootError> {
        Self::open("image", "SANDBOX_IMAGE", path)
    }

    fn open(what: &'static str, variable: &'static str, path: &std::path::Path) -> Result<Self, BootError> {
        let file =
            File::open(path).map_err(|why| BootError::Open { what, path: path.to_owned(), why, variable })?;
        Ok(Self { file, path: path.to_owned() })
    }

    fn is_no_kernel(&self, why: impl Into<String>) -> BootError {
        BootError::NotAKernel { path: self.path.clone(), why: why.into() }
    }
}

/// Checks that the kernel and the image are such, which either machine would find out late or in other words.
pub fn check_files(kernel: &std::path::Path, image: &std::path::Path) -> Result<(), BootError> {
    check::check_kernel(&GuestFile::kernel(kernel)?)?;
    check::check_image(&GuestFile::image(image)?).map(drop)
}

/// What a guest is told about its machine.
#[derive(Clone, Copy, Debug)]
pub struct Description<'a> {
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// How many vCPUs there are.
    pub vcpus: u8,
    /// The interrupt lines of its devices.
    pub lines: &'a [u8],
}

/// A guest whose kernel and image are in its memory.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    entry: GuestAddress,
    initramfs: Extent,
}

impl Guest {
    /// Where its kernel is entered.
    pub fn entry(self) -> GuestAddress {
        self.entry
    }

    /// Tells the guest of its memory and its command line, by tables from this address on: what it has to know of a
    /// machine whose firmware tells it of processors and interrupts.
    pub fn describe_memory(
        self,
        memory: &GuestMemory,
        layout: Layout,
        tables: u64,
        cmdline: &str,
    ) -> Result<(), BootError> {
        linux::write(memory, layout, tables, self.initramfs, cmdline)
    }

    /// Tells the guest about its machine, which has no firmware, and returns where its kernel is entered.
    pub fn describe(
        self,
        memory: &GuestMemory,
        layout: Layout,
        machine: &Description<'_>,
    ) -> Result<Entry, BootError> {
        mptable::write(memory, machine.vcpus, machine.lines)?;
        self.describe_memory(memory, layout, TABLES, machine.cmdline)?;
        registers::write_segments(memory)?;
        Ok(Entry {
            instruction: self.entry,
            zero_page: GuestAddress(linux::zero_page(TABLES)),
            page_tables: GuestAddress(linux::page_tables(TABLES)),
        })
    }
}

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its first instruction.
    pub instruction: GuestAddress,
    /// What `rsi` holds.
    pub zero_page: GuestAddress,
    /// What `cr3` holds.
    pub page_tables: GuestAddress,
}
