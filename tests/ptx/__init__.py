"""Runs the machine code of the GPU kernels (PTX) on a CPU, and finds what only a GPU would show.

Read in this order: `program.py` (text to instructions), `machine.py` (which thread runs what), `operands.py` (registers),
then the instructions: `integers.py`, `floats.py`, `conversions.py`, `memory_access.py`, `warps.py`, `atomics.py`.
`ordering.py` finds races. `triton_driver.py` and `cuda_launcher.py` launch kernels, `plugin.py` runs the tests on them.
"""
