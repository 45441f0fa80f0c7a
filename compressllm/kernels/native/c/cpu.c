/* Which instruction sets this processor has, and the operating system lets programs use. */
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static int has(const unsigned *registers, int which, int bit) { return registers[which] >> bit & 1; }

/* AMX state is large, so Linux gives it only to processes that ask: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA). */
static int may_use_amx(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

/* 1 if the processor has the set, 0 if not. Sources: Intel SDM volume 2, CPUID; volume 1, 13.3 (XCR0). */
int cpu_has(const char *isa) {
    enum { EAX, EBX, ECX, EDX };
    unsigned one[4] = {0}, seven[4] = {0}, more[4] = {0};
    if (!strcmp(isa, "scalar")) return 1;
    if (!__get_cpuid(1, one, one + 1, one + 2, one + 3)) return 0;
    if (!__get_cpuid_count(7, 0, seven, seven + 1, seven + 2, seven + 3)) return 0;
    __get_cpuid_count(7, 1, more, more + 1, more + 2, more + 3);
    if (!has(one, ECX, 27)) return 0; /* OSXSAVE: xgetbv may be used */
    uint32_t xcr0, unused;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(unused) : "c"(0));

    int avx2 = (xcr0 & 0x6) == 0x6 && has(one, ECX, 12) && has(one, ECX, 29) && has(seven, EBX, 5); /* FMA, F16C */
    int avx512 = avx2 && (xcr0 & 0xE6) == 0xE6 && has(seven, EBX, 16) && has(seven, EBX, 17) && has(seven, EBX, 30) &&
                 has(seven, EBX, 31); /* F, DQ, BW, VL */
    int vnni = avx512 && has(seven, ECX, 11);
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512")) return avx512;
    if (!strcmp(isa, "avx512vnni")) return vnni;
    if (!strcmp(isa, "amx")) /* BF16, TILE, INT8, and AVX512_BF16 and _VBMI2 beside them */
        return vnni && has(more, EAX, 5) && has(seven, ECX, 6) && has(seven, EDX, 22) && has(seven, EDX, 24) && has(seven, EDX, 25) &&
               (xcr0 & 0x60000) == 0x60000 && may_use_amx();
    return 0;
}
#else
int cpu_has(const char *isa) {
#if defined(__aarch64__)
    if (!strcmp(isa, "neon")) return 1; /* part of the architecture */
#endif
    return !strcmp(isa, "scalar");
}
#endif
