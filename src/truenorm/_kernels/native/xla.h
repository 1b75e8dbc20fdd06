/* What jax.c uses of XLA's foreign function interface, version 0.1 to 0.3 (JAX 0.6 to 0.10). XLA
 * lays it down in xla/ffi/api/c_api.h; fields have the same names here.
 *
 * It is declared by hand, because that header comes inside JAX, and JAX is not there when the
 * library is built: pip builds a package in an environment of its own, and one wheel serves all
 * frameworks. Instead a test compares these declarations with the header of the JAX that is
 * installed, and jax.c checks at run time what XLA says of itself: its version, and the size of
 * each struct that it passes.
 */
#ifndef TRUENORM_XLA_H
#define TRUENORM_XLA_H

#include <stddef.h>
#include <stdint.h>

enum { XLA_MAJOR = 0, XLA_OLDEST_MINOR = 1, XLA_NEWEST_MINOR = 3 };
enum { XLA_METADATA = 1, XLA_EXECUTE = 3, XLA_BUFFER = 1 };
enum { XLA_F16 = 10, XLA_F32 = 11, XLA_F64 = 12, XLA_BF16 = 16 };
enum { XLA_INVALID_ARGUMENT = 3, XLA_RESOURCE_EXHAUSTED = 8 };

typedef struct xla_extension {
    size_t struct_size;
    int type;
    struct xla_extension *next;
} xla_extension;

typedef struct {
    size_t struct_size;
    xla_extension *extension_start;
    int major_version, minor_version;
} xla_version;

typedef struct {
    size_t struct_size;
    xla_version api_version;
} xla_metadata;

typedef struct {
    xla_extension extension_base;
    xla_metadata *metadata;
} xla_metadata_extension;

typedef struct {
    size_t struct_size;
    xla_extension *extension_start;
    const char *message;
    int errc;
} xla_error;

typedef struct {
    size_t struct_size;
    xla_extension *extension_start;
    xla_version api_version;
    const void *internal_api;
    void *(*XLA_FFI_Error_Create)(xla_error *);
} xla_api;

typedef struct {
    size_t struct_size;
    xla_extension *extension_start;
    int dtype;
    void *data;
    int64_t rank, *dims;
} xla_buffer;

typedef struct {
    size_t struct_size;
    xla_extension *extension_start;
    int64_t size;
    int *types;
    xla_buffer **args; /* called rets where they are results */
} xla_buffers;

typedef struct {
    size_t struct_size;
    xla_extension *extension_start;
    const xla_api *api;
    void *ctx;
    int stage;
    xla_buffers args, rets;
} xla_call_frame;

/* The size of a struct up to this field, which is the last one used here; XLA may have more. */
#define XLA_SIZE(type, last) (offsetof(type, last) + sizeof((type *)0)->last)

#endif
