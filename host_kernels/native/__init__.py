"""The native kernel: C++ compiled when the package is installed, called with ctypes; absent where there was no compiler.

experts.h experts.cpp    the C interface; a run of experts as phases of independent items
kernels.inc isa_*.cpp    the arithmetic, written once and compiled for each instruction set
team.h team.cpp          persistent helper threads
library.py kernel.py     loading it; the `HostKernel`
"""
