"""In the lab: from starting the VMM to agent-ready, sandbox-vmm and QEMU's microvm on KVM by turns."""

import sys

import figures
import machines

rounds = int(sys.argv[1])
ours, theirs = [], []
# The first start of each reads its files into the page cache.
for turn in range(rounds + 1):
    figures.note(f"start {turn} of {rounds}")
    milliseconds, hello = machines.sandbox_vmm()
    other, other_hello = machines.qemu(cid=100 + turn)
    figures.note(f"sandbox-vmm {milliseconds:.0f} ms (kernel {hello['kernel_micros'] / 1000:.0f} ms), "
                 f"QEMU {other:.0f} ms (kernel {other_hello['kernel_micros'] / 1000:.0f} ms)")
    if turn > 0:
        ours.append(milliseconds)
        theirs.append(other)
figures.report_ratio("VMM start to agent-ready, to QEMU microvm on KVM", ours, theirs, 0.6)
