// Computes: what this processor and its operating system can do
// Shapes: a variant's name -> 1 or 0
// Runs: gemcut/kernels/cpu/library.py, once when the library is loaded
// Schedule: cpuid and xgetbv on x86-64, hwcaps on Arm; asks Linux for the AMX tile registers
// Invariants: 1 only if every instruction of the variant runs here
#include "gemcut.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

bool is(const char* name, const char* other) { return strcmp(name, other) == 0; }

#if defined(__x86_64__)

struct Features {
    bool avx2, avx512, avx512bf16, amx;
};

bool bit(uint32_t word, int n) { return word >> n & 1; }

// The kernel lends the tile registers only to processes that ask.
bool ask_for_tiles() {
#if defined(__linux__)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return false;
#endif
}

Features find_features() {
    uint32_t a, b, c, d;
    Features found{};
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const bool fma = bit(c, 12), f16c = bit(c, 29), osxsave = bit(c, 27), avx = bit(c, 28);
    if (!osxsave || !avx) return found;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x6) == 0x6, saves_zmm = (low & 0xe6) == 0xe6, saves_tiles = (low >> 17 & 3) == 3;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const uint32_t last = a;
    found.avx2 = saves_ymm && fma && f16c && bit(b, 5) && bit(b, 8);  // AVX2, BMI2
    // F, DQ, BW, VL; VNNI
    found.avx512 = found.avx2 && saves_zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);
    const bool vbmi = bit(c, 1), amx_bf16 = bit(d, 22), amx_tile = bit(d, 24), amx_int8 = bit(d, 25);
    if (last >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512bf16 = found.avx512 && vbmi && bit(a, 5);
    found.amx = found.avx512bf16 && saves_tiles && amx_tile && amx_bf16 && amx_int8 && ask_for_tiles();
    return found;
}

#endif

}  // namespace

// Whether code of this variant runs here: 1 or 0.
GEMCUT_EXPORT int gemcut_supports(const char* variant) {
#if defined(__x86_64__)
    const Features features = find_features();
    return is(variant, "amx")          ? features.amx
           : is(variant, "avx512bf16") ? features.avx512bf16
           : is(variant, "avx512")     ? features.avx512
           : is(variant, "avx2")       ? features.avx2
                                       : 0;
#elif defined(__aarch64__) && defined(__linux__)
    const unsigned long dotprod = getauxval(AT_HWCAP) >> 20 & 1, bf16 = getauxval(AT_HWCAP2) >> 14 & 1;
    return is(variant, "neon") || (is(variant, "dotprod") && dotprod) || (is(variant, "bf16") && dotprod && bf16);
#elif defined(__aarch64__) && defined(__APPLE__)
    auto has = [](const char* key) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value;
    };
    const bool dotprod = has("hw.optional.arm.FEAT_DotProd"), bf16 = has("hw.optional.arm.FEAT_BF16");
    return is(variant, "neon") || (is(variant, "dotprod") && dotprod) || (is(variant, "bf16") && dotprod && bf16);
#else
    (void)variant;
    return 0;
#endif
}
