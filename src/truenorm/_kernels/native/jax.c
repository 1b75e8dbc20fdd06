/* The moments and the sums of the backward pass, as typed calls of XLA's foreign function interface:
 *
 *   x (outer, channels[, inner]) and, only without inner, perhaps a mask (outer)
 *   -> mean, low, variance (channels); of doubles, if all is to be computed in double
 *
 *   x (outer, channels[, inner]), dy (the same), mean, low, rstd (channels)
 *   -> dgamma, dbeta (channels)
 *
 * Of ghost batches x is (outer, groups, run, width), without a mask, and there are groups x width
 * channels: see batchnorm.h.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "batchnorm.h"
#include "xla.h"

/* How many processors this process may use; asked once. */
static int processors(void)
{
    static atomic_int found;
    if (found) return found;
    long count = sysconf(_SC_NPROCESSORS_ONLN); /* -1 if it is not known */
#ifdef __linux__
    cpu_set_t mine;
    if (sched_getaffinity(0, sizeof mine, &mine) == 0) count = CPU_COUNT(&mine);
#endif
    found = count < 1 ? 1 : (int)count;
    return found;
}

static int dtype_of(int xla)
{
    switch (xla) {
    case XLA_F32: return TN_FLOAT32;
    case XLA_F64: return TN_FLOAT64;
    case XLA_F16: return TN_FLOAT16;
    case XLA_BF16: return TN_BFLOAT16;
    default: return -1 - TN_WIDE;
    }
}

/* Whether XLA is of a version whose structs are those of xla.h. */
static int is_known(const xla_api *api)
{
    return api->struct_size >= XLA_SIZE(xla_api, XLA_FFI_Error_Create) &&
           api->api_version.struct_size >= XLA_SIZE(xla_version, minor_version) &&
           api->api_version.major_version == XLA_MAJOR &&
           api->api_version.minor_version >= XLA_OLDEST_MINOR;
}

/* For which version of the interface this function was made; asked when it is registered.
 *
 * The structs of xla.h are the same in several versions, so the answer is XLA's own version if it
 * is one of these, and to a newer XLA the newest one; XLA knows whether it still supports that. An
 * XLA that does not say its version is of the oldest. Version -1 is refused by every XLA: then JAX
 * raises an exception when it registers the function, and the kernel does without it. */
static void tell_version(const xla_call_frame *frame)
{
    const xla_metadata_extension *asked = (const void *)frame->extension_start;
    if (asked->extension_base.struct_size < XLA_SIZE(xla_metadata_extension, metadata)) return;
    if (asked->metadata->struct_size < XLA_SIZE(xla_metadata, api_version)) return;
    xla_version *answer = &asked->metadata->api_version;
    answer->major_version = answer->minor_version = -1;
    if (frame->struct_size < XLA_SIZE(xla_call_frame, rets)) return;
    if (frame->api && !is_known(frame->api)) return;
    const int theirs = frame->api ? frame->api->api_version.minor_version : XLA_OLDEST_MINOR;
    answer->major_version = XLA_MAJOR;
    answer->minor_version = theirs < XLA_NEWEST_MINOR ? theirs : XLA_NEWEST_MINOR;
}

static int are_buffers(const xla_buffers *given, int64_t least, int64_t most)
{
    if (given->struct_size < XLA_SIZE(xla_buffers, args)) return 0;
    if (given->size < least || given->size > most) return 0;
    for (int64_t i = 0; i < given->size; i++)
        if (given->types[i] != XLA_BUFFER ||
            given->args[i]->struct_size < XLA_SIZE(xla_buffer, dims))
            return 0;
    return 1;
}

/* Whether the arguments can be those of the calls that the head of this file describes. */
static int is_expected(const xla_call_frame *frame, int64_t least, int64_t most, int64_t results)
{
    if (!are_buffers(&frame->args, least, most)) return 0;
    if (!are_buffers(&frame->rets, results, results)) return 0;
    const xla_buffer *x = frame->args.args[0];
    if (x->rank == 4 && x->dims[2] == 0) return 0;
    return x->rank == 2 || ((x->rank == 3 || x->rank == 4) && frame->args.size != 2);
}

/* The call for x, its first argument, without results. */
static tn_call call_of(const xla_call_frame *frame)
{
    const xla_buffer *x = frame->args.args[0];
    const int grouped = x->rank == 4;
    const int wide = frame->rets.args[0]->dtype == XLA_F64 && x->dtype != XLA_F64 ? TN_WIDE : 0;
    return (tn_call){
        .outer = x->dims[0],
        .channels = grouped ? x->dims[1] * x->dims[3] : x->dims[1],
        .inner = x->rank == 3 ? x->dims[2] : 1,
        .groups = grouped ? x->dims[1] : 0,
        .run = grouped ? x->dims[2] : 0,
        .dtype = dtype_of(x->dtype) + wide,
        .threads = processors(),
        .parallel = tn_own_threads,
        .x = x->data,
    };
}

static void *failure(const xla_call_frame *frame, int code, const char *message)
{
    xla_error error = {.struct_size = XLA_SIZE(xla_error, errc), .message = message, .errc = code};
    return frame->api->XLA_FFI_Error_Create(&error);
}

/* Answers XLA when it registers a call or prepares it: whether that was all that it asked. */
static int is_answered(const xla_call_frame *frame)
{
    if (frame->extension_start && frame->extension_start->type == XLA_METADATA) {
        tell_version(frame);
        return 1;
    }
    if (frame->struct_size < XLA_SIZE(xla_call_frame, rets) || !frame->api || !is_known(frame->api))
        abort(); /* such an XLA was refused above and does not call; no error could reach it */
    return frame->stage != XLA_EXECUTE;
}

/* NULL, or an error that XLA raises in the program that made the call. */
static void *outcome(const xla_call_frame *frame, int status)
{
    switch (status) {
    case TN_DONE: return NULL;
    case TN_NO_MEMORY:
        return failure(frame, XLA_RESOURCE_EXHAUSTED, "BatchNormalization: no memory for its sums");
    default: return failure(frame, XLA_INVALID_ARGUMENT, "BatchNormalization: unexpected dtype");
    }
}

static void *refusal(const xla_call_frame *frame)
{ return failure(frame, XLA_INVALID_ARGUMENT, "BatchNormalization: unexpected arguments"); }

TN_EXPORT void *tn_xla_moments(xla_call_frame *frame)
{
    if (is_answered(frame)) return NULL;
    if (!is_expected(frame, 1, 2, 3)) return refusal(frame);
    xla_buffer **given = frame->args.args, **found = frame->rets.args;
    tn_call call = call_of(frame);
    call.mask = frame->args.size > 1 ? given[1]->data : NULL;
    call.mean = found[0]->data, call.low = found[1]->data, call.variance = found[2]->data;
    return outcome(frame, tn_forward(&call));
}

TN_EXPORT void *tn_xla_products(xla_call_frame *frame)
{
    if (is_answered(frame)) return NULL;
    if (!is_expected(frame, 5, 5, 2)) return refusal(frame);
    xla_buffer **given = frame->args.args, **found = frame->rets.args;
    tn_call call = call_of(frame);
    call.dy = given[1]->data, call.mean = given[2]->data;
    call.low = given[3]->data, call.rstd = given[4]->data;
    call.dgamma = found[0]->data, call.dbeta = found[1]->data;
    return outcome(frame, tn_backward(&call));
}
