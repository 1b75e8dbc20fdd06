/* Batch normalization on the processor: what the bindings of all frameworks call.
 *
 * An array is (outer, channels, inner), contiguous; inner is 1 where the channels are last. Numbers
 * per channel (mean, gamma and so on) are float, or double where the array is of doubles or of a
 * dtype named WIDE: its values are those of the narrow type, and all is computed in double.
 *
 * An array of ghost batches, of which each has statistics of its own, is (outer, groups, run,
 * width): a sample of each group in turn, which is `run` rows. Its channels are groups x width.
 */
#ifndef TRUENORM_BATCHNORM_H
#define TRUENORM_BATCHNORM_H

#include <stdint.h>

/* The version of the interface between this library and the Python code that calls it. Raise it
 * here and in library.py when a function or a field of tn_call is added, moved or means something
 * else: library.py does not use a library of another version. */
#define TN_INTERFACE 6

#define TN_EXPORT __attribute__((visibility("default")))

enum { TN_FLOAT32, TN_FLOAT64, TN_FLOAT16, TN_BFLOAT16 }; /* tn_call.dtype */
enum {
    TN_WIDE = 8, /* what is added to a dtype, other than that of doubles, for sums in double */
    TN_FLOAT32_WIDE = TN_FLOAT32 + TN_WIDE,
    TN_FLOAT16_WIDE = TN_FLOAT16 + TN_WIDE,
    TN_BFLOAT16_WIDE = TN_BFLOAT16 + TN_WIDE
};
enum { TN_DONE = 0, TN_NO_MEMORY = -1, TN_UNKNOWN_DTYPE = -2 }; /* what a call returns */

/* Runs work(context) on at most this many threads at once, and returns when all are done. The
 * arguments are those of OpenMP's GOMP_parallel, which can be given as it is; flags are 0. */
typedef void (*tn_parallel)(void (*work)(void *), void *context, unsigned threads, unsigned flags);

typedef struct {
    int64_t outer, channels, inner;
    int32_t dtype, relu, threads, unbiased;
    double epsilon, momentum;
    tn_parallel parallel; /* NULL: one thread */
    const void *x, *dy;
    const void *gamma, *beta; /* NULL: ones, zeros */
    void *mean, *variance;    /* written by tn_forward, read by the others */
    void *low, *rstd;         /* likewise; the mean before it is rounded is mean + low; rstd may be
                                 NULL in tn_forward where y is */
    void *dgamma, *dbeta;     /* written by tn_backward; tn_gradient reads them, as means */
    void *y;                  /* the output, or dx in tn_backward; NULL: not wanted */
    /* The moving statistics, and where tn_forward writes them as they are after one step. Both may
     * be the same memory. A step goes (1 - momentum) of the way to the batch's mean and variance,
     * the latter divided by n - 1 instead of n if `unbiased`. A channel whose batch statistics are
     * not finite keeps its old values. So do all channels if too few values count: the mean if none
     * does, the variance if fewer than two do. NULL: there are none. */
    const void *moving_mean, *moving_variance;
    void *moved_mean, *moved_variance;
    /* One byte per row, only where inner is 1: whether the row counts in the statistics. If no row
     * does, the moving statistics normalise. NULL: all rows count. */
    const uint8_t *mask;
    /* Shaped as x. `add` is added to the output before the ReLU; NULL: nothing is. Where it was, the
     * signs that ReLU's derivative needs are those of `out`, the output: tn_backward then writes to
     * `dadd` the gradient that goes through the ReLU, which is that of `add`. */
    const void *add, *out;
    void *dadd;
    int64_t groups, run; /* of ghost batches, with inner 1 and no mask; 0: it is one batch */
} tn_call;

/* tn_forward and tn_backward are a training step; tn_infer normalises with the mean and variance
 * that are given. tn_backward does not read the variance. They return TN_DONE or what went wrong.
 *
 * A batch that is divided: with y NULL the first two do the first half of their work, whose results
 * are of this part of the batch. tn_normalize is the second half of tn_forward, with the statistics
 * of the whole (variance and epsilon are not read), and tn_gradient that of tn_backward: there
 * dgamma and dbeta are those of the whole batch, divided by the number of its values. */
typedef int tn_pass(const tn_call *call);
tn_pass tn_forward, tn_backward, tn_infer, tn_normalize, tn_gradient;

/* The library's own threads, as a tn_parallel. */
void tn_own_threads(void (*work)(void *), void *context, unsigned threads, unsigned flags);

#endif
