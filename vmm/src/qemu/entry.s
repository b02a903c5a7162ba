// Takes the first processor from where a multiboot program is entered (32-bit protected mode without paging) to where
// a kernel is: long mode, with the page tables and the zero page that lie in its memory.

    .pushsection .rodata.sandbox_qemu_entry, "a", @progbits
    .balign 16
    .code32
    .globl sandbox_qemu_entry_start
sandbox_qemu_entry_start:
    // The multiboot header, which says where the program goes: it is not ELF (3.1.3).
    .long 0x1badb002, 0x10000, 0 - 0x1badb002 - 0x10000
    .long {place}, {place}, {place} + sandbox_qemu_entry_end - sandbox_qemu_entry_start, 0
    .long {place} + .Lbegin - sandbox_qemu_entry_start
    // Where the kernel is entered: the file that is made of this has the address here.
    .globl sandbox_qemu_entry_kernel
sandbox_qemu_entry_kernel:
    .quad 0
    // The segments: none, none, 64-bit code, data, each flat, present and accessed; and where they are.
    .quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff
    .short 31
    .long {segments}
.Lbegin:
    cli
    lgdt [{segments} + 32]
    mov eax, {page_tables}
    mov cr3, eax
    mov eax, 0x20 // CR4.PAE
    mov cr4, eax
    mov ecx, 0xc0000080 // EFER, with long mode enabled
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000011 // CR0 with paging and protection
    mov cr0, eax
    .byte 0xea // a far jump
    .long {place} + .Llong - sandbox_qemu_entry_start
    .short 0x10
    .code64
.Llong:
    mov eax, 0x18
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esi, {zero_page}
    mov rax, [rip + sandbox_qemu_entry_kernel]
    jmp rax
    .globl sandbox_qemu_entry_end
sandbox_qemu_entry_end:
    .code64
    .popsection
