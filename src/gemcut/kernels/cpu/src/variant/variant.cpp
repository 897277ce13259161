// Computes: a mark that this instruction set was compiled into the library
// Shapes: no arguments; the result is 1
// Runs: gemcut/kernels/cpu/library.py, once when the library is loaded
// Schedule: none: it returns a constant
// Invariants: the symbol exists only where the variant was built
#include "gemcut.h"

GEMCUT_ENTRY(int, variant)() { return 1; }
