// Which sources this library was made of.
#include "gemcut.h"

GEMCUT_EXPORT const char* gemcut_fingerprint() { return GEMCUT_FINGERPRINT; }
