"""Rules that a kernel's resources have to obey. Each returns sentences, none where all is well.

A rule that a GPU would have enforced late, or never: a kernel that spills or serialises its tensor
cores is right and slow.
"""

from __future__ import annotations

from tests.ptx.resources import SHARED_LIMIT, Resources

STACK_LIMIT = 16  # bytes per thread
DRIFT = 1.1


def fits(record: Resources) -> list[str]:
    found = []
    limit = SHARED_LIMIT[record.arch]
    if record.shared_bytes > limit:
        found.append(f"{record.shared_bytes} bytes of shared memory, sm_{record.arch} has {limit}")
    elif record.blocks_per_sm < 1:
        found.append(f"no block fits into a multiprocessor, for its {record.limited_by}")
    return found


def does_not_spill(record: Resources) -> list[str]:
    found = []
    if record.hot.get("spills"):
        found.append(f"{record.hot['spills']} spills (LDL, STL) in the hot loop")
    if record.stack_bytes > STACK_LIMIT:
        found.append(f"{record.stack_bytes} bytes of stack per thread, at most {STACK_LIMIT}")
    return found


def no_warnings(record: Resources) -> list[str]:
    """C7510 among them: ptxas runs wgmma one after the other, each with a wait."""
    return [f"ptxas warns: {warning}" for warning in record.warnings]


def uses_tensor_cores(record: Resources) -> list[str]:
    wanted = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}[record.arch]
    if record.counts.get(wanted):
        return []
    others = {name: record.counts.get(name, 0) for name in ("UTCMMA", "HGMMA", "HMMA", "FFMA")}
    return [f"no {wanted}, but {others}"]


def copies_asynchronously(record: Resources) -> list[str]:
    if record.counts.get("TMA load") or record.counts.get("LDGSTS"):
        return []
    return [f"neither TMA nor LDGSTS, but {record.counts.get('LDG', 0)} LDG"]


def wide_accesses(record: Resources, share: float = 0.9) -> list[str]:
    """For kernels that memory bounds: most bytes move in instructions of 16."""
    total = sum(width * count for width, count in record.accesses.items())
    wide = 16 * record.accesses.get(16, 0)
    if total and wide >= share * total:
        return []
    return [f"{wide} of {total} bytes in accesses of 16 bytes ({record.accesses})"]


def no_redundant_matrix_work(record: Resources, useful_flops: int) -> list[str]:
    """`useful_flops` are those of one block in one turn of the hot loop."""
    if record.matrix_flops <= 1.01 * useful_flops:
        return []
    ratio = record.matrix_flops / useful_flops
    return [f"{ratio:.2f} times the matrix products that are needed in a turn of the hot loop"]


def has_not_drifted(record: Resources, golden: dict) -> list[str]:
    """Against the entry of a golden file."""
    found = []
    for what in ("registers", "instructions"):
        now, before = getattr(record, what), golden[what]
        if now > DRIFT * before:
            found.append(f"{what}: {now}, were {before}")
    if record.blocks_per_sm < golden["blocks_per_sm"]:
        found.append(
            f"blocks per multiprocessor: {record.blocks_per_sm} for their {record.limited_by},"
            f" were {golden['blocks_per_sm']}"
        )
    return found


ALWAYS = (fits, does_not_spill, no_warnings)
