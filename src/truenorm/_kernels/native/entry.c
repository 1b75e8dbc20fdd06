/* The entry points: the code for the best level of this processor. */
#include "batchnorm.h"

#define EXPORT __attribute__((visibility("default")))

tn_pass tn_forward_v1, tn_backward_v1, tn_infer_v1;
static tn_pass *forward = tn_forward_v1, *backward = tn_backward_v1, *infer = tn_infer_v1;

#ifdef __x86_64__
#include <cpuid.h>

tn_pass tn_forward_v3, tn_backward_v3, tn_infer_v3;

/* Once, when the library is loaded: level 3 of the x86-64 psABI (AVX2, FMA, F16C), if the processor
 * has it and the operating system saves its registers. (AVX-512 was no faster.) */
__attribute__((constructor)) static void choose(void)
{
    unsigned a, b, c, d, saved, high;
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2) || (saved & 6) != 6) return;
    forward = tn_forward_v3, backward = tn_backward_v3, infer = tn_infer_v3;
}
#endif

EXPORT const int tn_call_size = sizeof(tn_call);
EXPORT int tn_forward(const tn_call *call) { return forward(call); }
EXPORT int tn_backward(const tn_call *call) { return backward(call); }
EXPORT int tn_infer(const tn_call *call) { return infer(call); }
