"""Runs the machine code of the GPU kernels (PTX) on a CPU, and finds what only a GPU would show.

Read in this order: `program.py` (text to instructions), `operands.py` (registers), `machine.py` (a kernel and its launches),
`schedule.py` (which thread runs what), then the instructions: `integers.py`, `floats.py`, `conversions.py`, `memory_access.py`,
`warps.py`, `atomics.py`. `ordering.py` finds races. `triton_driver.py` and `cuda_launcher.py` launch kernels, and `plugin.py`
runs the tests on them.
"""
