/* The entry points: each calls the code for the best level that this processor has. */
#include "batchnorm.h"

tn_pass tn_forward_v1, tn_backward_v1, tn_infer_v1, tn_normalize_v1, tn_gradient_v1;
static tn_pass *forward = tn_forward_v1, *backward = tn_backward_v1, *infer = tn_infer_v1,
               *normalize = tn_normalize_v1, *gradient = tn_gradient_v1;

#ifdef __x86_64__
#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

tn_pass tn_forward_v3, tn_backward_v3, tn_infer_v3, tn_normalize_v3, tn_gradient_v3;

/* Whether the processor has level 3 of the x86-64 psABI (AVX2, FMA, F16C), and the operating system
 * saves the registers for it. (AVX-512 was no faster.) */
static int has_v3(void)
{
    unsigned a, b, c, d, saved, high;
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) && (saved & 6) == 6;
}

/* Once, when the library is loaded. TRUENORM_LEVEL=v1 asks for the code that every processor can
 * run; so it can be tested on one that has more. */
__attribute__((constructor)) static void choose(void)
{
    const char *wanted = getenv("TRUENORM_LEVEL");
    if (!has_v3() || (wanted && strcmp(wanted, "v1") == 0)) return;
    forward = tn_forward_v3, backward = tn_backward_v3, infer = tn_infer_v3;
    normalize = tn_normalize_v3, gradient = tn_gradient_v3;
}
#endif

TN_EXPORT const int tn_interface = TN_INTERFACE;
TN_EXPORT const int tn_call_size = sizeof(tn_call);
TN_EXPORT int tn_forward(const tn_call *call) { return forward(call); }
TN_EXPORT int tn_backward(const tn_call *call) { return backward(call); }
TN_EXPORT int tn_infer(const tn_call *call) { return infer(call); }
TN_EXPORT int tn_normalize(const tn_call *call) { return normalize(call); }
TN_EXPORT int tn_gradient(const tn_call *call) { return gradient(call); }
