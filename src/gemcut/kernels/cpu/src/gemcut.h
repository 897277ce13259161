// Computes: nothing: what every file of this library may use, and its rules. Read this first
// Shapes: bf16 is uint16_t; sizes are int64_t; strides count elements
// Runs: included by every file here
// Schedule: src/*.cpp is compiled once, src/variant/*.cpp once per instruction set; entry points are plain C functions
// Invariants: results do not depend on the number of threads; no entry point allocates a result or fails
//
// Layout
//   src/*.cpp          compiled once, for any processor of the architecture.
//   src/variant/*.cpp  compiled once per instruction set ("variant": amx, avx512bf16, avx512, avx2 on x86-64; bf16,
//                      dotprod, neon on Arm). The compiler's own macros (__AVX512BF16__, __AMX_BF16__, ...) say which
//                      one is being made. A new file is picked up by the build without being named anywhere.
//
// Rules of a variant file
//   * Everything is `static` or in an unnamed namespace, except entry points. No standard library templates or inline
//     functions of shared headers that are not `static`: the linker keeps one copy of such a function, and it may be
//     the one with instructions that this processor lacks.
//   * An entry point is a plain C function named by GEMCUT_ENTRY: `GEMCUT_ENTRY(void, linear)(const Plan*, ...)` makes
//     `gemcut_linear_avx2`, ...; Python finds it with `library().function("linear")`.
//
// Calling convention of entry points
//   * Pointers to memory that the caller keeps alive until the return; sizes int64_t; strides in elements; nothing is
//     kept. They never allocate results and never fail: what can be refused is refused in Python before the call.
//   * `threads` is a parameter (1 or more): gemcut.kernels.cpu.library.threads() in Python. Work is split with
//     gemcut_parallel (pool.h), which is called from any thread, with the GIL released (ctypes.CDLL does that).
//   * A result must not depend on `threads`: split over outputs, never over a sum.
//   * bf16 is uint16_t. Rounding to bf16 is to nearest even.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define GEMCUT_VISIBLE __declspec(dllexport)
#else
#define GEMCUT_VISIBLE __attribute__((visibility("default")))
#endif
#define GEMCUT_EXPORT extern "C" GEMCUT_VISIBLE

#ifdef GEMCUT_VARIANT
#define GEMCUT_JOIN2(a, b, c) a##b##_##c
#define GEMCUT_JOIN(a, b, c) GEMCUT_JOIN2(a, b, c)
#define GEMCUT_ENTRY(type, name) GEMCUT_EXPORT type GEMCUT_JOIN(gemcut_, name, GEMCUT_VARIANT)
#endif
