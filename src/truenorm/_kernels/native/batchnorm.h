/* Batch normalization on the processor: what the bindings of all frameworks call.
 *
 * An array is (outer, channels, inner), contiguous; inner is 1 where the channels are last. Values
 * per channel are float, or double where the array is of doubles.
 */
#ifndef TRUENORM_BATCHNORM_H
#define TRUENORM_BATCHNORM_H

#include <stdint.h>

enum { TN_FLOAT32, TN_FLOAT64, TN_FLOAT16, TN_BFLOAT16 };

/* Runs work(context) on several threads at once, and returns when all are done. */
typedef void (*tn_parallel)(void (*work)(void *), void *context, unsigned threads, unsigned flags);

typedef struct {
    int64_t outer, channels, inner;
    int32_t dtype, relu, threads, unbiased;
    double epsilon, momentum;
    tn_parallel parallel;
    const void *x, *dy;
    const void *gamma, *beta; /* NULL: ones, zeros */
    void *mean, *variance;    /* out of tn_forward; given to the others */
    void *low, *rstd;         /* out of tn_forward; low is what rounding takes from the mean */
    void *dgamma, *dbeta;     /* out of tn_backward */
    void *y;                  /* out: y, or dx (NULL: not wanted) */
    /* Moving statistics, and out of tn_forward, there or elsewhere, as one step has moved them: by
     * (1 - momentum) of the way to the batch's, whose variance is the unbiased one if asked for. What
     * the batch does not have, or not as a finite number, moves nothing. NULL: there are none. */
    const void *moving_mean, *moving_variance;
    void *moved_mean, *moved_variance;
    /* Bytes, where inner is 1: which rows count in the statistics. NULL: all. If none does, the moving
     * statistics normalise. */
    const uint8_t *mask;
} tn_call;

/* What tn_forward, tn_backward and tn_infer are: 0, or -1 where there is no memory. tn_infer
 * normalises with the mean and variance given; tn_backward does not read the variance. */
typedef int tn_pass(const tn_call *call);
tn_pass tn_forward, tn_backward, tn_infer;

void tn_own_threads(void (*work)(void *), void *context, unsigned threads, unsigned flags);

#endif
