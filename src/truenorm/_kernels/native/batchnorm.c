/* Batch normalization on the processor, compiled once for each level of it (TN_LEVEL), and for
 * values of 16 bits alone where the level has no use for others (TN_NARROW).
 *
 * Forward: one pass for the moments, one for the output. Backward: one for the two sums, one for
 * dx. The data is divided into chunks, by its shape alone: results are the same bits for any number
 * of threads.
 */
#define _DEFAULT_SOURCE
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "job.h"
#include "sixteen.h"

#define PASTE(a, b) a##b
#define JOIN(a, b) PASTE(a, b)

enum { LEAST_CHUNK = 1 << 15 }; /* values: a smaller chunk is not worth a turn */
enum { FEW = 1 << 18 };         /* values that are done before another thread has woken up */
enum { PANEL = 512 };           /* channels: a group of fewer is not worth a turn */
enum { LARGE = 1 << 25 };       /* bytes of an output from which on large pages are asked for */
enum { SPINS = 1 << 12 };       /* turns that a thread waits before it lends its processor */

/* Channels last: joins the moments of all chunks to those of the first (see join_moments). */
static void merge_moments(job *j)
{
    const int64_t channels = j->call->channels;
    double *mean = j->sums, *m2 = mean + channels;
    for (int64_t i = 1; i < j->chunks; i++) {
        const double before = (double)j->counted[i], size = (double)j->counted[i + 1] - before;
        if (size == 0) continue;
        const double *means = mean + 2 * channels * i, *m2s = means + channels;
        const double part = size / (before + size), weight = before * part;
        for (int64_t c = 0; c < channels; c++) {
            const double delta = means[c] - mean[c];
            m2[c] += m2s[c] + delta * weight * delta;
            mean[c] += delta * part;
        }
    }
}

/* Channels last: adds the sums of products of all chunks to those of the first. */
static void merge_products(job *j)
{
    const int64_t numbers = 2 * j->call->channels;
    for (int64_t i = 1; i < j->chunks; i++)
        for (int64_t c = 0; c < numbers; c++) j->sums[c] += j->sums[numbers * i + c];
}

/* a * b + c, rounded once where the processor can, in the type of a. */
#if defined __FMA__ || defined __ARM_FEATURE_FMA
#define FMA(a, b, c) _Generic(a, float: fmaf, double: fma)(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* Sums in float: of float, bfloat16 and float16. */
#define SUM float
#define OF_SUM(f) f##_float32
#include "statistics.h"

#ifndef TN_NARROW
#define VALUE float
#define NAME(f) f##_float32
#define LOAD(v) (v)
#define STORE(v) (v)
#include "values.h"
#endif

#define VALUE uint16_t
#define NAME(f) f##_bfloat16
#define LOAD(v) from_bfloat16(v)
#define STORE(v) to_bfloat16(v)
#include "values.h"

#define VALUE uint16_t
#define NAME(f) f##_float16
#define LOAD(v) from_float16(v)
#define STORE(v) to_float16(v)
#include "values.h"
#undef SUM
#undef OF_SUM

#ifndef TN_NARROW
/* Sums in double: of double, and of the others where that is asked for. */
#define SUM double
#define OF_SUM(f) f##_float64
#include "statistics.h"

#define VALUE double
#define NAME(f) f##_float64
#define LOAD(v) (v)
#define STORE(v) (v)
#include "values.h"

#define VALUE float
#define NAME(f) f##_float32_wide
#define LOAD(v) ((double)(v))
#define STORE(v) ((float)(v))
#include "values.h"

#define VALUE uint16_t
#define NAME(f) f##_bfloat16_wide
#define LOAD(v) ((double)from_bfloat16(v))
#define STORE(v) to_bfloat16((float)(v))
#include "values.h"

#define VALUE uint16_t
#define NAME(f) f##_float16_wide
#define LOAD(v) ((double)from_float16(v))
#define STORE(v) to_float16((float)(v))
#include "values.h"
#endif

#define CODE(bytes, type, bytes_of_sum, type_of_sum) \
    {.value = bytes, \
     .sum = bytes_of_sum, \
     .rows = rows_##type, \
     .slices = slices_##type, \
     .constants = constants_##type_of_sum, \
     .constants_given = constants_given_##type_of_sum, \
     .gradient_given = gradient_given_##type_of_sum, \
     .finish_moments = finish_moments_##type_of_sum, \
     .finish_products = finish_products_##type_of_sum}
static const code codes[] = {
#ifndef TN_NARROW
    [TN_FLOAT32] = CODE(4, float32, 4, float32),
    [TN_FLOAT64] = CODE(8, float64, 8, float64),
    [TN_FLOAT32_WIDE] = CODE(4, float32_wide, 8, float64),
    [TN_FLOAT16_WIDE] = CODE(2, float16_wide, 8, float64),
    [TN_BFLOAT16_WIDE] = CODE(2, bfloat16_wide, 8, float64),
#endif
    [TN_FLOAT16] = CODE(2, float16, 4, float32),
    [TN_BFLOAT16] = CODE(2, bfloat16, 4, float32),
};

static ALWAYS_INLINE void pause_briefly(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

/* Takes chunks of a pass until none is left. The second pass goes backwards: what the first read
 * last is still in the cache. */
static void take(job *j, pass_kind pass, atomic_llong *next, char *scratch)
{
    const int second = pass == NORMALIZE || pass == GRADIENT, rows = j->call->inner == 1;
    const int64_t all = j->groups * j->chunks;
    const int alone = j->groups > 1 && j->chunks == 1;
    for (int64_t i; (i = atomic_fetch_add(next, 1)) < all;) {
        const int64_t chunk = second ? all - 1 - i : i;
        (rows ? j->code->rows : j->code->slices)(j, pass, chunk, scratch);
        if (second) continue;
        /* A group that is one chunk is done by itself. */
        if (alone) j->between(j, chunk * j->width, (chunk + 1) * j->width);
        if (atomic_fetch_add(&j->done, 1) < all - 1) continue;
        if (!alone) j->between(j, 0, j->call->channels);
        atomic_store(&j->ready, 1);
    }
}

/* What each thread does. The thread that ends the first pass does what comes between the two, while
 * the others wait. They wait for chunks that some thread is at work on, never for a thread that has
 * not come. */
static void work(void *context)
{
    job *j = context;
    char *scratch = j->scratch + (size_t)atomic_fetch_add(&j->entered, 1) * j->scratch_size;
    if (j->passes[0] != NO_PASS) {
        take(j, j->passes[0], &j->first, scratch);
        if (!j->call->y) return; /* no second pass to wait for */
        for (int spins = 0; !atomic_load(&j->ready); spins++) {
            if (spins < SPINS) pause_briefly();
            else sched_yield();
        }
    }
    if (j->call->y) take(j, j->passes[1], &j->second, scratch);
}

/* How many values the array has. */
static int64_t values_of(const tn_call *call)
{ return call->outer * most(1, call->run) * call->channels * call->inner; }

/* Asks Linux for large pages where the output is so large that the C library maps new memory for it
 * each time: getting it by pages of 4 KiB takes longer than filling it. Smaller outputs lie in a
 * heap that grows and shrinks, where large pages would be broken up again. A refusal changes
 * nothing. */
static void ask_for_large_pages(const job *j)
{
#ifdef MADV_HUGEPAGE
    const tn_call *call = j->call;
    const uintptr_t page = 4096, start = ((uintptr_t)call->y + page - 1) / page * page;
    const uintptr_t bytes = (uintptr_t)values_of(call) * j->code->value;
    if (call->y && bytes >= LARGE)
        (void)madvise((void *)start, ((uintptr_t)call->y + bytes) / page * page - start,
                      MADV_HUGEPAGE);
#else
    (void)j;
#endif
}

/* How many rows count before each chunk of rows, and how many values of each channel in all. */
static void count(job *j)
{
    const tn_call *call = j->call;
    for (int64_t i = 0; i < j->chunks; i++) {
        int64_t row = share(j->rows, i, j->chunks);
        const int64_t end = share(j->rows, i + 1, j->chunks);
        j->counted[i + 1] = j->counted[i] + (call->mask ? 0 : end - row);
        for (; call->mask && row < end; row++) j->counted[i + 1] += call->mask[row] != 0;
    }
    j->count = j->counted[j->chunks] * call->inner;
}

/* One piece of memory: the sums, the constants, and the scratch of each thread. */
static int allocate(job *j)
{
    const size_t channels = (size_t)j->call->channels, wide = j->code->sum;
    const size_t sets = j->call->inner == 1 ? (size_t)j->chunks : 1;
    const size_t sums = 2 * channels * sets * sizeof *j->sums;
    const size_t constants = has_constants(j->call) ? CONSTANT_ARRAYS * channels * wide : 0;
    /* Three numbers per channel, or a shift for each and the lanes of a group; and a gap, so that
     * no two threads write to one line of the cache. */
    j->scratch_size = (3 * (size_t)j->width + GROUP * LANE_ARRAYS * LANES) * wide + 128;
    j->sums = malloc(sums + constants + j->scratch_size * (size_t)j->threads);
    if (!j->sums) return 0;
    j->constants = (char *)j->sums + sums;
    j->scratch = (char *)j->constants + constants;
    if (constants) memset(j->scratch - channels * wide, 0, channels * wide); /* the last: zeros */
    return 1;
}

/* How many groups the work is divided by. Where their runs are single rows, two of them are as one
 * of twice the channels. */
static int64_t groups_of(const tn_call *call)
{
    int64_t groups = most(1, call->groups);
    while (call->run == 1 && groups % 2 == 0 && call->channels / groups < PANEL) groups /= 2;
    return groups;
}

static int run(job *j)
{
    const tn_call *call = j->call;
    const int64_t values = values_of(call);
    const int64_t groups = groups_of(call), rows = call->outer * most(1, call->run);
    const int64_t most_chunks = call->inner == 1 ? rows / BLOCK : call->channels;
    if (call->dtype < 0 || call->dtype >= (int32_t)(sizeof codes / sizeof *codes))
        return TN_UNKNOWN_DTYPE;
    j->code = &codes[call->dtype];
    if (!j->code->rows) return TN_UNKNOWN_DTYPE;
    j->groups = groups, j->width = call->channels / groups, j->rows = rows;
    j->chunks = most(1, least(least(MOST_CHUNKS, values / groups / LEAST_CHUNK), most_chunks));
    const int64_t turns = least(call->threads, groups * j->chunks);
    j->threads = values < FEW || !call->parallel ? 1 : most(1, turns);
    if (!allocate(j)) return TN_NO_MEMORY;
    ask_for_large_pages(j);
    count(j);
    if (j->before) j->before(j);
    if (j->threads == 1) work(j);
    else call->parallel(work, j, (unsigned)j->threads, 0);
    free(j->sums);
    return TN_DONE;
}

static void after_moments(job *j, int64_t channel, int64_t end)
{ j->code->finish_moments(j, channel, end); }

static void with_statistics(job *j)
{
    if (has_constants(j->call)) j->code->constants(j);
}

static void after_products(job *j, int64_t channel, int64_t end)
{ j->code->finish_products(j, channel, end); }
static void before_inference(job *j) { j->code->constants_given(j); }
static void before_gradient(job *j) { j->code->gradient_given(j); }

int JOIN(tn_forward, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call, .passes = {MOMENTS, NORMALIZE}, .between = after_moments};
    return run(&j);
}

int JOIN(tn_backward, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call,
             .passes = {PRODUCTS, GRADIENT},
             .before = with_statistics,
             .between = after_products};
    return run(&j);
}

int JOIN(tn_infer, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call, .passes = {NO_PASS, NORMALIZE}, .before = before_inference};
    return run(&j);
}

int JOIN(tn_normalize, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call, .passes = {NO_PASS, NORMALIZE}, .before = with_statistics};
    return run(&j);
}

int JOIN(tn_gradient, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call, .passes = {NO_PASS, GRADIENT}, .before = before_gradient};
    return run(&j);
}
