"""Weakens the synchronisation of a kernel, one instruction at a time, in its PTX.

What a race detector is worth is what it finds. Not every mutant is a bug: a last wait is often
redundant, so a full score is not to be had.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.ptx.emulator import PtxError

Replacement = str | Callable[[re.Match[str]], str]


def _one_more(match: re.Match[str]) -> str:
    """Wait until one group more than before may be pending."""
    return f"{match[1]}{int(match[2]) + 1};"


MUTATIONS: dict[str, tuple[str, Replacement]] = {
    "bar.sync": (r"\bbar\.sync\s+[^;]*;", ""),
    "cp.async.wait_group": (r"(\bcp\.async\.wait_group\s+)(\d+);", _one_more),
    "bulk wait": (r"\bcp\.async\.bulk\.wait_group[.\w]*\s+\d+;", ""),
    "wgmma.wait_group": (r"(\bwgmma\.wait_group\.sync\.aligned\s+)(\d+);", _one_more),
    "wgmma.fence": (r"\bwgmma\.fence\.sync\.aligned;", ""),
    "wgmma.commit_group": (r"\bwgmma\.commit_group\.sync\.aligned;", ""),
    "fence.proxy.async": (r"\bfence\.proxy\.async[\w:.]*;", ""),
    "mbarrier init fence": (r"\bfence\.mbarrier_init[\w:.]*;", ""),
    # The branch back to a try_wait: what it waits for may then not have happened.
    "mbarrier wait": (
        r"(\bmbarrier\.(?:try|test)_wait[^;]*;[^;@]*)@!%?\w+\s+bra(?:\.uni)?\s+[$%\w]+;",
        r"\1",
    ),
    "mbarrier.arrive": (r"(?:@!?%?\w+\s+)?\bmbarrier\.arrive(?!\.expect_tx)[^;]*;", ""),
    "mbarrier expect": (r"(?:@!?%?\w+\s+)?\bmbarrier\.(?:arrive\.)?expect_tx[^;]*;", ""),
}


def mutants(ptx: str) -> Iterator[tuple[str, str]]:
    """What was weakened, and the PTX without it."""
    for name, (pattern, replacement) in MUTATIONS.items():
        for match in re.finditer(pattern, ptx):
            text = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
            yield name, ptx[: match.start()] + text + ptx[match.end() :]


def only_entry(ptx: str, name: str) -> str:
    """Leave out all kernels but one."""
    return re.sub(rf"(?s)(?:\.visible )?\.entry (?!{re.escape(name)}\b).*?\n\}}\n", "", ptx)


@dataclass
class Score:
    """How often each mutation was made, and what came of it: "missed" is a right result."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def made(self) -> int:
        return sum(counter.total() for counter in self.outcomes.values())

    @property
    def found(self) -> int:
        return self.made - sum(counter["missed"] for counter in self.outcomes.values())

    def __str__(self) -> str:
        lines = [f"{'mutation':22s} {'made':>5s} {'found':>5s}  how"]
        for name, counter in self.outcomes.items():
            found = counter.total() - counter["missed"]
            how = ", ".join(f"{kind} {n}" for kind, n in counter.most_common() if kind != "missed")
            lines.append(f"{name:22s} {counter.total():5d} {found:5d}  {how}")
        lines.append(f"{'all':22s} {self.made:5d} {self.found:5d}")
        return "\n".join(lines)


def score(ptx: str, run: Callable[[str], bool]) -> Score:
    """Run every mutant; `run` returns whether the result is right, and raises PtxError."""
    if not run(ptx):
        raise ValueError("the kernel is wrong before anything was changed")
    result = Score()
    for name, mutant in mutants(ptx):
        try:
            outcome = "missed" if run(mutant) else "wrong result"
        except PtxError as error:
            outcome = error.kind
        result.outcomes.setdefault(name, Counter())[outcome] += 1
    return result
