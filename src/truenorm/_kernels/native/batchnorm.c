/* Batch normalization on the processor, compiled once for each level of it (TN_LEVEL).
 *
 * Forward: one pass for the moments, one for the output. Backward: one for the two sums, one for
 * dx. The data is divided into chunks, by its shape alone: results are the same bits for any number
 * of threads.
 */
#define _DEFAULT_SOURCE
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "batchnorm.h"

#define PASTE(a, b) a##b
#define JOIN(a, b) PASTE(a, b)
#define ALWAYS_INLINE inline __attribute__((always_inline))

enum { BLOCK = 64, LANES = 64, SEVERAL = 1024, GROUP = 16 };
enum { MOST_CHUNKS = 64, LEAST_CHUNK = 1 << 15, LARGE = 1 << 25 };
enum { FEW = 1 << 18 }; /* Values that are done before another thread has woken up. */
enum { NONE, MOMENTS, PRODUCTS, NORMALIZE, GRADIENT };

enum { SPINS = 1 << 12 }; /* Before a thread that waits lends its processor. */

static ALWAYS_INLINE void pause_briefly(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

typedef struct job job;
struct job {
    const tn_call *call;
    int64_t chunks, counted[MOST_CHUNKS + 1]; /* rows that count before each of them */
    int64_t count;   /* how many values of each channel do */
    double *sums;    /* two per channel; channels last: for each chunk */
    void *constants; /* scale, offset, slope, level, zero per channel */
    char *scratch;   /* of each thread */
    size_t scratch_size;
    void (*of_chunk)(job *, int, int64_t, void *);
    int passes[2]; /* the first is NONE if there is one only */
    void (*before)(job *), (*between)(job *);
    atomic_llong first, second, done, entered;
    atomic_int ready;
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t share(int64_t all, int64_t part, int64_t parts) { return all * part / parts; }

/* How many rows from this one on are masked as it is. */
static int64_t run_length(const uint8_t *mask, int64_t row, int64_t end)
{
    int64_t next = mask ? row + 1 : end;
    while (next < end && !mask[next] == !mask[row]) next++;
    return next - row;
}

/* float, 32 bits */
#define VALUE float
#define SUM float
#define NAME(f) f##_float32
#define LOAD(v) (v)
#define STORE(v) (v)
#ifdef __FMA__
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#include "passes.h"
#undef VALUE
#undef NAME
#undef LOAD
#undef STORE

/* bfloat16: the upper half of a float */
static ALWAYS_INLINE float from_bfloat16(uint16_t v)
{
    uint32_t bits = (uint32_t)v << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static ALWAYS_INLINE uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

#define VALUE uint16_t
#define NAME(f) f##_bfloat16
#define LOAD(v) from_bfloat16(v)
#define STORE(v) to_bfloat16(v)
#include "passes.h"
#undef VALUE
#undef NAME
#undef LOAD
#undef STORE

#define VALUE _Float16
#define NAME(f) f##_float16
#define LOAD(v) ((float)(v))
#define STORE(v) ((_Float16)(v))
#include "passes.h"
#undef VALUE
#undef SUM
#undef NAME
#undef LOAD
#undef STORE
#undef FMA

#define VALUE double
#define SUM double
#define NAME(f) f##_float64
#define LOAD(v) (v)
#define STORE(v) (v)
#ifdef __FMA__
#define FMA(a, b, c) __builtin_fma(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#include "passes.h"

/* Takes chunks of the pass until none is left. A later pass goes backwards: what the one before read
 * last is still cached. */
static void take(job *j, int pass, atomic_llong *next, char *scratch)
{
    for (int64_t i; (i = atomic_fetch_add(next, 1)) < j->chunks;) {
        j->of_chunk(j, pass, pass >= NORMALIZE ? j->chunks - 1 - i : i, scratch);
        if (pass < NORMALIZE && atomic_fetch_add(&j->done, 1) == j->chunks - 1) {
            j->between(j);
            atomic_store(&j->ready, 1);
        }
    }
}

/* What each thread does. Whoever ends the first pass does what comes between the two; the others
 * wait for chunks that are being worked on, so for no thread that has not come. */
static void work(void *context)
{
    job *j = context;
    char *scratch = j->scratch + (size_t)atomic_fetch_add(&j->entered, 1) * j->scratch_size;
    if (j->passes[0]) {
        take(j, j->passes[0], &j->first, scratch);
        if (!j->call->y) return; /* no second pass to wait for */
        for (int spins = 0; !atomic_load(&j->ready); spins++)
            if (spins < SPINS) pause_briefly();
            else sched_yield();
    }
    if (j->call->y) take(j, j->passes[1], &j->second, scratch);
}

/* Asks Linux for large pages where the output is so large that the C library maps new memory for it
 * each time: getting it by pages of 4 KiB takes longer than filling it. Smaller outputs lie in a heap
 * that grows and shrinks, where large pages would be broken up again. */
static void ask_for_large_pages(const tn_call *call, size_t size)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, bytes = (uintptr_t)(call->outer * call->channels * call->inner) * size;
    const uintptr_t start = ((uintptr_t)call->y + page - 1) / page * page;
    if (call->y && bytes >= LARGE)
        madvise((void *)start, ((uintptr_t)call->y + bytes) / page * page - start, MADV_HUGEPAGE);
#else
    (void)call, (void)size;
#endif
}

static int prepare(job *j)
{
    const tn_call *call = j->call;
    const int64_t channels = call->channels, values = call->outer * call->inner * channels;
    const int64_t threads = most(call->threads, 1), rows = call->inner == 1;
    const size_t size = call->dtype == TN_FLOAT64 ? sizeof(double) : sizeof(float);
    int64_t chunks = least(MOST_CHUNKS, values / LEAST_CHUNK);
    chunks = most(1, least(chunks, rows ? call->outer / BLOCK : channels));
    const size_t sums = (size_t)(2 * channels * (rows ? chunks : 1)) * sizeof(double);
    const size_t constants = 5 * (size_t)channels * size;
    j->scratch_size = (3 * (size_t)channels + GROUP * 5 * LANES) * size + 128;
    ask_for_large_pages(call, call->dtype == TN_FLOAT64 ? 8 : call->dtype == TN_FLOAT32 ? 4 : 2);
    j->chunks = chunks;
    j->sums = malloc(sums + constants + j->scratch_size * (size_t)threads);
    if (!j->sums) return 0;
    j->constants = (char *)j->sums + sums;
    j->scratch = (char *)j->constants + constants;
    memset(j->scratch - (size_t)channels * size, 0, (size_t)channels * size);
    for (int64_t i = 0; i < chunks; i++) {
        int64_t row = share(call->outer, i, chunks), end = share(call->outer, i + 1, chunks);
        j->counted[i + 1] = j->counted[i] + (call->mask ? 0 : end - row);
        for (; call->mask && row < end; row++) j->counted[i + 1] += call->mask[row] != 0;
    }
    j->count = j->counted[chunks] * call->inner;
#define OF_CHUNK(name) (rows ? rows_##name : slices_##name)
    switch (call->dtype) {
    case TN_FLOAT32: j->of_chunk = OF_CHUNK(float32); break;
    case TN_FLOAT64: j->of_chunk = OF_CHUNK(float64); break;
    case TN_FLOAT16: j->of_chunk = OF_CHUNK(float16); break;
    default: j->of_chunk = OF_CHUNK(bfloat16); break;
    }
    return 1;
}

/* The statistics are of one type for float, bfloat16 and float16. */
#define FINISH(step) (j->call->dtype == TN_FLOAT64 ? step##_float64(j) : step##_float32(j))

static void constants_given(job *j) { FINISH(given_constants); }
static void constants_known(job *j) { FINISH(constants); }
static void after_products(job *j) { FINISH(finish_products); }
static void after_moments(job *j)
{
    FINISH(finish_moments);
    FINISH(constants);
}

static int run(job *j)
{
    const tn_call *call = j->call;
    if (!prepare(j)) return -1;
    if (j->before) j->before(j);
    unsigned threads = (unsigned)least(call->threads, j->chunks);
    if (threads <= 1 || call->outer * call->channels * call->inner < FEW) work(j);
    else call->parallel(work, j, threads, 0);
    free(j->sums);
    return 0;
}

int JOIN(tn_forward, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call, .passes = {MOMENTS, NORMALIZE}, .between = after_moments};
    return run(&j);
}

int JOIN(tn_backward, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call, .before = constants_known, .passes = {PRODUCTS, GRADIENT},
             .between = after_products};
    return run(&j);
}

int JOIN(tn_infer, TN_LEVEL)(const tn_call *call)
{
    job j = {.call = call, .before = constants_given, .passes = {NONE, NORMALIZE}};
    return run(&j);
}
