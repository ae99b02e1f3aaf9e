"""The native kernel: C++ compiled when the package is installed, called with ctypes; absent without a compiler.

experts.h experts.cpp    the C interface
run.h run.cpp wave.h wave.cpp    a run of experts as phases of independent items
product.cpp routed.cpp   products with matrices of one kind; a router's decision
attention.h attention.inc attention.cpp    decode attention
ffi.cpp ffi_routed.cpp ffi_attention.cpp   handlers for jitted programs; in Python: ffi.py routed.py attention.py
ffi_pace.cpp             programs that last as long as they are told (a paced device); in Python: pace.py
rows.h rows.cpp          what both share: items, activations made ready
layout.h layout.cpp      where packed weights lie
kernels.inc isa_*.cpp    all arithmetic, written once and compiled for each instruction set:
  vectors.inc plain*.inc silu.inc probes.inc   vectors, plain weights, the activation, loops of the probes
  lanes.inc packed*.inc  packed weights
probe.cpp                what the machine can do at most
team.h team.cpp          persistent helper threads
library.py kernel.py     loading it; the `HostKernel`
"""
