"""The one exception of the emulator."""

from __future__ import annotations


class PtxError(RuntimeError):
    """A bug of the kernel, or PTX that the emulator does not know.

    `kind` is a word for tests and tables: "unsupported", "syntax", "bounds", "alignment", "race",
    "proxy", "uninitialised", "in flight", "deadlock", "barrier", "warp", "launch" or "trap".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind

    def located(self, text: str, line: int, where: str = "") -> PtxError:
        """The same error with the instruction it happened at."""
        error = PtxError(self.kind, str(self).removeprefix(f"{self.kind}: "))
        error.args = (f"{self}\n  at line {line}: {text}{where}",)
        return error
