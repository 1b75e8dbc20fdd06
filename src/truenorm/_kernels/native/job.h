/* What the threads that carry out one call share. */
#ifndef TRUENORM_JOB_H
#define TRUENORM_JOB_H

#include <stdatomic.h>
#include <stddef.h>

#include "batchnorm.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* The four passes over the data; the first two take sums, the others write an array. */
typedef enum { NO_PASS, MOMENTS, PRODUCTS, NORMALIZE, GRADIENT } pass_kind;

enum {
    BLOCK = 64,          /* rows that are summed in SUM before their sums are joined in double */
    LANES = 64,          /* columns that one channel's values are dealt to, channels first */
    GROUP = 16,          /* channels that are read side by side, channels first */
    SEVERAL = 1024,      /* values of a channel that are summed at once where samples are small */
    LANE_ARRAYS = 5,     /* per channel of a group: mean, scale, offset, and two sums */
    CONSTANT_ARRAYS = 5, /* per channel: scale, offset, slope, level, and a zero */
    MOST_CHUNKS = 64
};

typedef struct job job;

/* The code for one type of values. */
typedef struct {
    size_t value, sum; /* bytes of a value, and of a number per channel */
    void (*rows)(job *, pass_kind, int64_t chunk, void *scratch);   /* one chunk, channels last */
    void (*slices)(job *, pass_kind, int64_t chunk, void *scratch); /* one chunk, channels first */
    void (*constants)(job *), (*constants_given)(job *), (*gradient_given)(job *);
    void (*finish_moments)(job *, int64_t channel, int64_t end);
    void (*finish_products)(job *, int64_t channel, int64_t end);
} code;

struct job {
    const tn_call *call;
    const code *code;
    int64_t groups, width;            /* how many groups, and channels of one; see batchnorm.h */
    int64_t rows;                     /* channels last: rows of one group */
    int64_t chunks, threads;          /* chunks of one group; threads in all */
    int64_t counted[MOST_CHUNKS + 1]; /* how many rows count before each chunk, channels last */
    int64_t count;                    /* how many values of each channel count */
    double *sums;                     /* two per channel; channels last: for each chunk */
    void *constants;                  /* CONSTANT_ARRAYS, for each channel */
    char *scratch;                    /* memory for each thread */
    size_t scratch_size;              /* bytes of it for one thread */
    pass_kind passes[2];              /* the first is NO_PASS if there is only one */
    void (*before)(job *);
    void (*between)(job *, int64_t channel, int64_t end); /* for these channels */
    atomic_llong first, second;                           /* the next chunk of each pass */
    atomic_llong done;    /* chunks of the first pass that are done */
    atomic_llong entered; /* threads that have come */
    atomic_int ready;     /* whether the second pass may begin */
};

/* Channels first, what is summed at once: of some channels, in some samples, the same `size`
 * values, from number `at` of each sample and channel on. */
typedef struct {
    int64_t channel, channels, sample, samples, at, size;
} brick;

/* Whether the constants are needed: not by the first half of a pass where the channels are last and
 * no ReLU asks for signs. */
static inline int has_constants(const tn_call *call)
{ return call->y || call->relu || call->inner != 1; }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Where a part of a whole begins that is divided into equal parts. */
static inline int64_t share(int64_t all, int64_t part, int64_t parts) { return all * part / parts; }

/* Channels last: the number of the first value of a row of a group. */
static inline int64_t place(const job *j, int64_t group, int64_t row)
{
    const int64_t run = j->call->run;
    if (j->groups == 1) return row * j->width;
    return ((row / run * j->groups + group) * run + row % run) * j->width;
}

/* Channels last: from one row of a tile to the next. */
static inline int64_t step_of(const job *j)
{ return j->call->run == 1 ? j->groups * j->width : j->width; }

/* Channels last: how many of these rows, from this one on, are so far from each other. */
static inline int64_t together(const job *j, int64_t row, int64_t rows)
{
    const int64_t run = j->call->run;
    return j->groups == 1 || run == 1 ? rows : least(rows, run - row % run);
}

/* How many rows from this one on are masked as it is. */
static inline int64_t run_length(const uint8_t *mask, int64_t row, int64_t end)
{
    int64_t next = mask ? row + 1 : end;
    while (next < end && !mask[next] == !mask[row]) next++;
    return next - row;
}

#endif
