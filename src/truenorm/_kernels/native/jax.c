/* The moments as a typed call of XLA's foreign function interface, x (outer, channels[, inner]) and,
 * where the channels are last, perhaps a mask (outer) -> mean, variance, low, rstd as rows. What its C interface lays down is declared here as far as it is
 * used, so that nothing of XLA is needed to build.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "batchnorm.h"

enum { METADATA = 1, EXECUTE = 3, F16 = 10, F32 = 11, F64 = 12, BF16 = 16 };

typedef struct { size_t size; int type; void *next; } extension;
typedef struct { size_t size; void *extensions; int major, minor; } version;
typedef struct { size_t size; version api; uint32_t traits; } metadata;
typedef struct { extension base; metadata *wanted; } metadata_extension;
typedef struct { size_t size; void *extensions; version api; } interface;
typedef struct { size_t size; void *extensions; int type; void *data; int64_t rank, *shape; } buffer;
typedef struct { size_t size; void *extensions; int64_t count; int *types; buffer **buffers; } buffers;
typedef struct {
    size_t size;
    extension *extensions;
    const interface *xla;
    void *context;
    int stage;
    buffers operands, results;
} frame;

/* How many processors this process may use; asked once. */
static int processors(void)
{
    static atomic_int found;
    if (!found) {
#ifdef __linux__
        cpu_set_t mine;
        found = sched_getaffinity(0, sizeof mine, &mine) ? 1 : CPU_COUNT(&mine);
#else
        found = (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
    }
    return found;
}

__attribute__((visibility("default"))) void *tn_xla_moments(frame *f)
{
    if (f->extensions && f->extensions->type == METADATA) { /* asked which version this is of */
        version *answer = &((metadata_extension *)f->extensions)->wanted->api;
        answer->major = 0;
        answer->minor = f->xla && f->xla->api.major == 0 ? f->xla->api.minor : 3;
        return NULL;
    }
    if (f->stage != EXECUTE) return NULL;
    const buffer *x = f->operands.buffers[0];
    char *rows = f->results.buffers[0]->data;
    const int64_t channels = x->shape[1], row = channels * (x->type == F64 ? 8 : 4);
    const tn_call call = {
        .outer = x->shape[0], .channels = channels, .inner = x->rank == 3 ? x->shape[2] : 1,
        .dtype = x->type == F32 ? TN_FLOAT32 : x->type == F64 ? TN_FLOAT64
                 : x->type == F16 ? TN_FLOAT16 : TN_BFLOAT16,
        .threads = processors(), .parallel = tn_own_threads,
        .x = x->data, .mean = rows, .variance = rows + row, .low = rows + 2 * row,
        .rstd = rows + 3 * row,
        .mask = f->operands.count > 1 ? f->operands.buffers[1]->data : NULL,
    };
    if (tn_forward(&call) < 0) memset(rows, 0xff, (size_t)(4 * row)); /* no memory: NaN */
    return NULL;
}
