"""Executes PTX, as Triton and nvcc emit it, on a CPU, and finds the bugs that a GPU would hide.

    module = Module(ptx_text)
    x = module.upload(array, "x")
    module.launch("kernel", grid=(4,), threads=128, arguments=[x, 3, 1.0])
    array = module.download(x)

ptx.py parses, forms.py and instructions/ hold what each instruction does, block.py runs one thread
block as one vector, grid.py lets the blocks of a launch take turns, memory.py, shared_races.py and
global_races.py watch every access. What is not known raises PtxError with the instruction and its
line.
"""

from tests.ptx.emulator.errors import PtxError
from tests.ptx.emulator.grid import Module, TensorMap

__all__ = ["Module", "PtxError", "TensorMap"]
