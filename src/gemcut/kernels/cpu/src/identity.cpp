// Computes: which sources this library was made of
// Shapes: a string of 16 hexadecimal digits
// Runs: gemcut/kernels/cpu/library.py, once when the library is loaded
// Schedule: none: it returns a constant
// Invariants: equals gemcut.kernels.cpu.build.fingerprint() of the sources, comments included
#include "gemcut.h"

GEMCUT_EXPORT const char* gemcut_fingerprint() { return GEMCUT_FINGERPRINT; }
