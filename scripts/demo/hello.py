"""What the demo runs inside its virtual machine."""

import os
import platform


def primes(below):
    sieve = bytearray([1]) * below
    sieve[:2] = b"\0\0"
    for number in range(2, int(below**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, below, number)))
    return sum(sieve)


def pretty_name():
    with open("/etc/os-release") as lines:
        return next(line.split('"')[1] for line in lines if line.startswith("PRETTY_NAME="))


system = os.uname()
print(f"Hello from {pretty_name()} on {system.sysname} {system.release} in a virtual machine of its own.")
print(f"Python {platform.python_version()} counted {primes(100_000)} primes below 100,000.")
