/* The entry points: each calls the code for the best level that this processor has. */
#include "batchnorm.h"

typedef struct {
    tn_pass *forward, *backward, *infer, *normalize, *gradient;
} passes;

#define LEVEL(k) \
    tn_pass tn_forward_##k, tn_backward_##k, tn_infer_##k, tn_normalize_##k, tn_gradient_##k; \
    static const passes k = {tn_forward_##k, tn_backward_##k, tn_infer_##k, tn_normalize_##k, \
                             tn_gradient_##k};

LEVEL(v1)
static const passes *for_wide = &v1, *for_narrow = &v1; /* values of 4 or 8 bytes, and of 2 */

#ifdef __x86_64__
#include <cpuid.h>
#include <stdlib.h>

LEVEL(v3)
LEVEL(v4)

/* The highest level of the x86-64 psABI that this processor has and for which the operating system
 * saves the registers: 3 (AVX2, FMA, F16C), 4 (AVX-512), or less. Only processors that also have
 * VBMI2, from 2019 on, count as level 4: older ones lower their clock for registers so wide. */
static int processors_level(void)
{
    unsigned a, b, c, d, saved, high;
    const unsigned first = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return 1;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2) || (saved & 6) != 6) return 1;
    return (b & wide) == wide && (c & bit_AVX512VBMI2) && (saved & 0xe6) == 0xe6 ? 4 : 3;
}

/* Once, when the library is loaded. TRUENORM_LEVEL=v1 (or v3) asks for the code of processors that
 * have no more; so it can be tested on one that has. With AVX-512 narrow values are up to twice as
 * fast; for the others it is faster or slower, by the size of the input, so they do without it. */
__attribute__((constructor)) static void choose(void)
{
    const char *wanted = getenv("TRUENORM_LEVEL");
    const int most = wanted && wanted[0] == 'v' ? atoi(wanted + 1) : 4, own = processors_level();
    if (own >= 3 && most >= 3) for_wide = for_narrow = &v3;
    if (own >= 4 && most >= 4) for_narrow = &v4;
}
#endif

static const passes *passes_for(const tn_call *call)
{
    const int narrow = call->dtype == TN_FLOAT16 || call->dtype == TN_BFLOAT16;
    return narrow ? for_narrow : for_wide;
}

TN_EXPORT const int tn_interface = TN_INTERFACE;
TN_EXPORT const int tn_call_size = sizeof(tn_call);
TN_EXPORT int tn_forward(const tn_call *call) { return passes_for(call)->forward(call); }
TN_EXPORT int tn_backward(const tn_call *call) { return passes_for(call)->backward(call); }
TN_EXPORT int tn_infer(const tn_call *call) { return passes_for(call)->infer(call); }
TN_EXPORT int tn_normalize(const tn_call *call) { return passes_for(call)->normalize(call); }
TN_EXPORT int tn_gradient(const tn_call *call) { return passes_for(call)->gradient(call); }
