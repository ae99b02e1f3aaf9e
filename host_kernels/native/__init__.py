"""The native kernel: C++ compiled when the package is installed, called with ctypes; absent where there was no compiler.

experts.h experts.cpp    the C interface; a run of experts as phases of independent items
layout.h layout.cpp      where packed weights lie
kernels.inc isa_*.cpp    the arithmetic of plain weights, written once and compiled for each instruction set
lanes.inc packed.inc     the same of packed weights
probe.cpp                what the machine can do at most
team.h team.cpp          persistent helper threads
library.py kernel.py     loading it; the `HostKernel`
"""
