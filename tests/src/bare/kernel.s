// Carries out a script: steps of 16 bytes, which are a number, an address, a value and a mask. `script.rs` has the
// numbers. A step whose number has bit 8 set counts its address from the registers of the device that was selected.
//
//   esi  the next step        ebp  the selected device's registers

    .pushsection .rodata.sandbox_bare, "a", @progbits
    .balign 16
    .globl sandbox_bare_end

    // The 64-bit entry: rsi has the zero page, whose ramdisk_image is the image. Back to 32 bits, without paging.
    .globl sandbox_bare_start
    .code64
sandbox_bare_start:
    mov esi, [rsi + 0x218]
    mov esp, 0x90000
    sub rsp, 16
    lea rax, [rip + .Lbare_descriptors]
    mov word ptr [rsp], 23
    mov [rsp + 2], rax
    lgdt [rsp]
    push 8
    lea rax, [rip + .Lbare_compatible]
    push rax
    .byte 0x48, 0xcb // a far return of 64-bit words
    .balign 8
.Lbare_descriptors:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
    .code32
.Lbare_compatible:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080 // EFER, without long mode
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    mov esp, 0x90000
    add esi, {offset}
    xor ebp, ebp

.Lbare_next:
    mov eax, [esi]
    mov edi, [esi + 4]
    mov ecx, [esi + 8]
    mov edx, [esi + 12]
    add esi, 16
    test eax, 0x100
    jz .Lbare_absolute
    add edi, ebp
.Lbare_absolute:
    and eax, 0xff
    cmp eax, 1
    je .Lbare_write32
    cmp eax, 2
    je .Lbare_write16
    cmp eax, 3
    je .Lbare_write8
    cmp eax, 4
    je .Lbare_copy
    cmp eax, 5
    je .Lbare_report
    cmp eax, 6
    je .Lbare_wait
    cmp eax, 7
    je .Lbare_say
    cmp eax, 8
    je .Lbare_fill
    cmp eax, 9
    je .Lbare_select
    cmp eax, 10
    je .Lbare_settle
    cmp eax, 11
    je .Lbare_halt
    cmp eax, 12
    je .Lbare_find
    mov dx, 0x501
    mov al, 0x2a
    out dx, al
.Lbare_halt:
    cli
    hlt
    jmp .Lbare_halt

.Lbare_write32:
    mov [edi], ecx
    jmp .Lbare_next

.Lbare_write16:
    mov [edi], cx
    jmp .Lbare_next

.Lbare_write8:
    mov [edi], cl
    jmp .Lbare_next

// The value is the number of bytes, which follow; the mask that of bytes to skip behind them.
.Lbare_copy:
    cld
    rep movsb
    add esi, edx
    jmp .Lbare_next

.Lbare_report:
    mov eax, [edi]
    call .Lbare_put_word
    mov al, 10
    call .Lbare_put
    jmp .Lbare_next

.Lbare_wait:
    mov eax, [edi]
    and eax, edx
    cmp eax, ecx
    je .Lbare_next
    pause
    jmp .Lbare_wait

// The mask is how many times.
.Lbare_say:
    mov ebx, edx
.Lbare_say_again:
    mov al, cl
    call .Lbare_put
    dec ebx
    jnz .Lbare_say_again
    jmp .Lbare_next

// The mask is the number of words.
.Lbare_fill:
    cld
    mov eax, ecx
    mov ecx, edx
    rep stosd
    jmp .Lbare_next

// Looks for the device with this identity, from this address on; the mask is the distance of devices.
.Lbare_select:
    mov ebp, edi
    mov ebx, 32
.Lbare_look:
    cmp [ebp + 8], ecx
    je .Lbare_next
    add ebp, edx
    dec ebx
    jnz .Lbare_look
    mov al, 63
    call .Lbare_put
    jmp .Lbare_next

// Waits until the index of a used ring is no longer the value, and says `u`; or the device wants a reset, and says
// `B`; or it has looked as often as the mask says, and says `-`.
.Lbare_settle:
    mov eax, [edi]
    shr eax, 16
    cmp eax, ecx
    mov al, 117
    jne .Lbare_settled
    mov eax, [ebp + 0x70]
    test al, 0x40
    mov al, 66
    jnz .Lbare_settled
    pause
    dec edx
    jnz .Lbare_settle
    mov al, 45
.Lbare_settled:
    call .Lbare_put
    jmp .Lbare_next

// Reports, from the address on, every two words of which the upper one is from 0x5500 to 0x7fff, as the addresses of a
// program's code, heap, stack and mappings have it. The mask is the number of words.
.Lbare_find:
    mov eax, [edi + 4]
    sub eax, 0x5500
    cmp eax, 0x2b00
    jae .Lbare_find_next
    push edx
    mov eax, edi
    call .Lbare_put_word
    mov al, 32
    call .Lbare_put
    mov eax, [edi + 4]
    call .Lbare_put_word
    mov eax, [edi]
    call .Lbare_put_word
    mov al, 10
    call .Lbare_put
    pop edx
.Lbare_find_next:
    add edi, 4
    dec edx
    jnz .Lbare_find
    jmp .Lbare_next

// Writes the word in eax as 8 digits; changes ebx, ecx and edx.
.Lbare_put_word:
    mov ecx, 8
.Lbare_digit:
    rol eax, 4
    mov ebx, eax
    and eax, 0xf
    add al, 48
    cmp al, 57
    jbe .Lbare_put_digit
    add al, 39
.Lbare_put_digit:
    call .Lbare_put
    mov eax, ebx
    dec ecx
    jnz .Lbare_digit
    ret

// Writes the character in al to the serial port when it is free; changes edx.
.Lbare_put:
    push eax
    mov edx, 0x3fd
.Lbare_busy:
    in al, dx
    test al, 0x20
    jz .Lbare_busy
    pop eax
    mov edx, 0x3f8
    out dx, al
    ret
sandbox_bare_end:
    .code64
    .popsection
