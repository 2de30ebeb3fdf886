"""A coarse model of a memory-bound launch: how long it takes to stream its bytes with what is in flight at once.
It ranks configurations before anything runs; its figures are never reported as times. Chips by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

# Between asking DRAM for bytes and having them, and between two dependent launches of a graph: rules of thumb.
LATENCY = 0.8e-6
NEXT_LAUNCH = 2e-6
# L2 is taken to be this many times faster than DRAM: re-reads and partial results mostly stay there.
L2_SPEED = 3.0
# What one unit can draw, in equal shares of DRAM: a launch on few units leaves bandwidth unused.
UNIT_SPEED = 2.0
# Registers of a program before a compiler has said how many.
GUESSED_REGISTERS = 128


@dataclass(frozen=True)
class Chip:
    """Streaming multiprocessors (compute units), DRAM bytes/s, and what one of them has for programs: bytes of shared
    memory, registers (32 bit) and warps (waves)."""

    name: str
    units: int
    bandwidth: float
    shared: int
    registers: int
    warps: int
    warp_size: int


# The chip each family's defaults are chosen for.
CHIPS = {
    "sm80": Chip("A100 80GB", 108, 2.0e12, 167_936, 65_536, 64, 32),
    "sm90": Chip("H200", 132, 4.8e12, 233_472, 65_536, 64, 32),
    "sm100": Chip("B200", 148, 8.0e12, 233_472, 65_536, 64, 32),
    "gfx942": Chip("MI300X", 304, 5.3e12, 65_536, 131_072, 32, 64),
}


@dataclass(frozen=True)
class Work:
    """What a launch has to do. `traffic` are bytes from DRAM in all, `cached` bytes that L2 serves, `flight` the bytes
    one program keeps in flight, `launches` kernels one after the other."""

    traffic: int
    cached: int
    programs: int
    flight: int
    launches: int = 1


def resident_programs(chip: Chip, shared: int, registers: int, num_warps: int) -> int:
    """How many programs one unit holds at a time; at least 1."""
    by_shared = chip.shared // (shared + 1024)
    by_registers = chip.registers // max(registers * chip.warp_size * num_warps, 1)
    return max(min(by_shared, by_registers, chip.warps // num_warps, 32), 1)


def estimate(family: str, work: Work, shared: int, num_warps: int, registers: int = GUESSED_REGISTERS) -> float:
    """Seconds by the model.

    Args:
        family: "sm80", "sm90", "sm100" or "gfx942".
        work: what the launch does.
        shared: bytes of shared memory of a program.
        num_warps: warps of a program.
        registers: of a thread.
    """
    chip = CHIPS[family]
    at_once = chip.units * resident_programs(chip, shared, registers, num_warps)
    full, rest = divmod(work.programs, at_once)
    seconds = 0.0
    for rounds, programs in ((full, at_once), (1, rest)):
        if rounds and programs:
            in_flight = programs * work.flight / (chip.bandwidth * LATENCY)
            share = min(1.0, in_flight, UNIT_SPEED * programs / chip.units)
            moved = work.traffic * programs / work.programs
            seconds += rounds * (moved / (chip.bandwidth * share) + LATENCY)
    return seconds + work.cached / (L2_SPEED * chip.bandwidth) + (work.launches - 1) * NEXT_LAUNCH
