// Says that this instruction set was compiled into the library.
#include "gemcut.h"

GEMCUT_ENTRY(int, variant)() { return 1; }
