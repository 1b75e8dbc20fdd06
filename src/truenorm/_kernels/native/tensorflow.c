/* The passes as two operations of TensorFlow, by its C interface, whose functions are looked up when
 * the library is loaded: where there is no TensorFlow in the process, nothing happens.
 *
 *   TruenormForward: x (outer, channels, inner), gamma, beta, moving mean and variance (or vectors of
 *     size 0), mask (outer or 0), epsilon and momentum -> y; mean, variance, low, rstd, and the moving
 *     ones after a step
 *   TruenormBackward: x, gamma, beta, these four, dy, mask, epsilon -> dx; dgamma, dbeta
 *
 * The backward operation needs no epsilon; its derivative does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>

#include "batchnorm.h"

enum { TF_FLOAT = 1, TF_DOUBLE = 2, TF_BFLOAT16 = 14, TF_HALF = 19, RESOURCE_EXHAUSTED = 8 };
enum { X, GAMMA, BETA, MEAN, VARIANCE, MASK, NUMBERS, FORWARD_INPUTS };
enum { STATISTICS = 3, DY, MASK_AGAIN, EPSILON, BACKWARD_INPUTS };

/* TensorFlow's functions: result, name without TF_, arguments. Its types are opaque. */
#define FUNCTIONS(F) \
    F(void *, NewStatus, (void)) \
    F(void, DeleteStatus, (void *)) \
    F(void, SetStatus, (void *, int, const char *)) \
    F(void *, NewOpDefinitionBuilder, (const char *)) \
    F(void, OpDefinitionBuilderAddAttr, (void *, const char *)) \
    F(void, OpDefinitionBuilderAddInput, (void *, const char *)) \
    F(void, OpDefinitionBuilderAddOutput, (void *, const char *)) \
    F(void, OpDefinitionBuilderSetShapeInferenceFunction, (void *, void (*)(void *, void *))) \
    F(void, RegisterOpDefinition, (void *, void *)) \
    F(void *, NewKernelBuilder, \
      (const char *, const char *, void *(*)(void *), void (*)(void *, void *), void (*)(void *))) \
    F(void, KernelBuilder_TypeConstraint, (void *, const char *, int, void *)) \
    F(void, RegisterKernelBuilder, (const char *, void *, void *)) \
    F(void, OpKernelConstruction_GetAttrInt64, (void *, const char *, int64_t *, void *)) \
    F(void, OpKernelConstruction_GetAttrBool, (void *, const char *, unsigned char *, void *)) \
    F(void, OpKernelContext_Failure, (void *, void *)) \
    F(void, GetInput, (void *, int, void **, void *)) \
    F(void *, AllocateOutput, (void *, int, int, const int64_t *, int, size_t, void *)) \
    F(void, DeleteTensor, (void *)) \
    F(void *, TensorData, (void *)) \
    F(int, TensorType, (void *)) \
    F(int64_t, Dim, (void *, int)) \
    F(void *, NewShapeHandle, (void)) \
    F(void, DeleteShapeHandle, (void *)) \
    F(void, ShapeInferenceContextGetInput, (void *, int, void *, void *)) \
    F(void, ShapeInferenceContextSetOutput, (void *, int, void *, void *))

static struct {
#define MEMBER(result, name, arguments) result (*name) arguments;
    FUNCTIONS(MEMBER)
} tf;

static int find_tensorflow(void)
{
    void *library = dlopen("libtensorflow_framework.so.2", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) library = dlopen("libtensorflow_framework.2.dylib", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return 0;
#define FIND(result, name, arguments) \
    *(void **)&tf.name = dlsym(library, "TF_" #name); \
    if (!tf.name) return 0;
    FUNCTIONS(FIND)
    return 1;
}

typedef struct {
    int64_t threads;
    unsigned char relu, unbiased, moves;
} options;

static void *create(void *construction)
{
    options *made = calloc(1, sizeof *made);
    void *status = tf.NewStatus();
    if (made) {
        tf.OpKernelConstruction_GetAttrInt64(construction, "threads", &made->threads, status);
        tf.OpKernelConstruction_GetAttrBool(construction, "relu", &made->relu, status);
        tf.OpKernelConstruction_GetAttrBool(construction, "unbiased", &made->unbiased, status);
        tf.OpKernelConstruction_GetAttrBool(construction, "moves", &made->moves, status);
    }
    tf.DeleteStatus(status);
    return made;
}

/* The inputs as tensors, and the call that they ask for; without outputs. */
static tn_call begin(const options *asked, void *context, void **inputs, int count, void *status)
{
    for (int i = 0; i < count; i++) tf.GetInput(context, i, &inputs[i], status);
    const int type = tf.TensorType(inputs[X]);
    return (tn_call){
        .outer = tf.Dim(inputs[X], 0), .channels = tf.Dim(inputs[X], 1),
        .inner = tf.Dim(inputs[X], 2),
        .dtype = type == TF_FLOAT ? TN_FLOAT32 : type == TF_DOUBLE ? TN_FLOAT64
                 : type == TF_HALF ? TN_FLOAT16 : TN_BFLOAT16,
        .relu = asked->relu, .threads = (int32_t)asked->threads, .unbiased = asked->unbiased,
        .parallel = tn_own_threads,
        .x = tf.TensorData(inputs[X]), .gamma = tf.TensorData(inputs[GAMMA]),
        .beta = tf.TensorData(inputs[BETA]),
    };
}

static const uint8_t *mask_in(void *tensor, const tn_call *call)
{
    return call->outer && tf.Dim(tensor, 0) == call->outer ? tf.TensorData(tensor) : NULL;
}

static size_t width(const tn_call *call) { return call->dtype == TN_FLOAT64 ? 8 : 4; }

static void *like_input(void *context, void *input, const tn_call *call, void *status)
{
    const int64_t shape[] = {call->outer, call->channels, call->inner};
    const size_t size = call->dtype >= TN_FLOAT16 ? 2 : width(call);
    return tf.AllocateOutput(context, 0, tf.TensorType(input), shape, 3,
                             (size_t)(shape[0] * shape[1] * shape[2]) * size, status);
}

static void *rows(void *context, int64_t count, const tn_call *call, void *status)
{
    const int64_t shape[] = {count, call->channels};
    const int type = call->dtype == TN_FLOAT64 ? TF_DOUBLE : TF_FLOAT;
    return tf.AllocateOutput(context, 1, type, shape, 2,
                             (size_t)(count * call->channels) * width(call), status);
}

static void *row(void *matrix, int64_t index, const tn_call *call)
{
    return (char *)tf.TensorData(matrix) + (size_t)(index * call->channels) * width(call);
}

static void finish(void *context, int failed, void **inputs, int count, void *first, void *second,
                   void *status)
{
    if (failed) {
        tf.SetStatus(status, RESOURCE_EXHAUSTED, "no memory for BatchNormalization");
        tf.OpKernelContext_Failure(context, status);
    }
    for (int i = 0; i < count; i++)
        if (inputs[i]) tf.DeleteTensor(inputs[i]);
    if (first) tf.DeleteTensor(first);
    if (second) tf.DeleteTensor(second);
    tf.DeleteStatus(status);
}

static void set_statistics(tn_call *call, void *matrix)
{
    call->mean = row(matrix, 0, call), call->variance = row(matrix, 1, call);
    call->low = row(matrix, 2, call), call->rstd = row(matrix, 3, call);
}

static void forward(void *asked, void *context)
{
    void *inputs[FORWARD_INPUTS] = {0}, *status = tf.NewStatus();
    tn_call call = begin(asked, context, inputs, FORWARD_INPUTS, status);
    const int moves = ((const options *)asked)->moves;
    void *y = like_input(context, inputs[X], &call, status);
    void *kept = rows(context, moves ? 6 : 4, &call, status);
    int failed = !y || !kept;
    if (!failed) {
        const double *numbers = tf.TensorData(inputs[NUMBERS]);
        call.epsilon = numbers[0], call.momentum = numbers[1];
        call.mask = mask_in(inputs[MASK], &call);
        call.y = tf.TensorData(y);
        set_statistics(&call, kept);
        if (moves) {
            call.moving_mean = tf.TensorData(inputs[MEAN]), call.moved_mean = row(kept, 4, &call);
            call.moving_variance = tf.TensorData(inputs[VARIANCE]);
            call.moved_variance = row(kept, 5, &call);
        }
        failed = tn_forward(&call) < 0;
    }
    finish(context, failed, inputs, FORWARD_INPUTS, y, kept, status);
}

static void backward(void *asked, void *context)
{
    void *inputs[BACKWARD_INPUTS] = {0}, *status = tf.NewStatus();
    tn_call call = begin(asked, context, inputs, BACKWARD_INPUTS, status);
    void *dx = like_input(context, inputs[X], &call, status), *sums = rows(context, 2, &call, status);
    int failed = !dx || !sums;
    if (!failed) {
        call.dy = tf.TensorData(inputs[DY]);
        call.mask = mask_in(inputs[MASK_AGAIN], &call);
        call.y = tf.TensorData(dx);
        call.dgamma = row(sums, 0, &call), call.dbeta = row(sums, 1, &call);
        set_statistics(&call, inputs[STATISTICS]);
        failed = tn_backward(&call) < 0;
    }
    finish(context, failed, inputs, BACKWARD_INPUTS, dx, sums, status);
}

/* The first output is shaped as the first input; the binding knows the second. */
static void infer_shapes(void *context, void *status)
{
    void *shape = tf.NewShapeHandle();
    tf.ShapeInferenceContextGetInput(context, 0, shape, status);
    tf.ShapeInferenceContextSetOutput(context, 0, shape, status);
    tf.DeleteShapeHandle(shape);
}

static void add(const char *name, void (*compute)(void *, void *), const char *const *inputs,
                const char *outputs)
{
    static const struct { int type, wide; } types[] = {
        {TF_FLOAT, TF_FLOAT}, {TF_DOUBLE, TF_DOUBLE}, {TF_HALF, TF_FLOAT}, {TF_BFLOAT16, TF_FLOAT}};
    void *status = tf.NewStatus(), *operation = tf.NewOpDefinitionBuilder(name);
    tf.OpDefinitionBuilderAddAttr(operation, "T: {float, double, half, bfloat16}");
    tf.OpDefinitionBuilderAddAttr(operation, "S: {float, double}");
    tf.OpDefinitionBuilderAddAttr(operation, "relu: bool");
    tf.OpDefinitionBuilderAddAttr(operation, "unbiased: bool = false");
    tf.OpDefinitionBuilderAddAttr(operation, "moves: bool = false");
    tf.OpDefinitionBuilderAddAttr(operation, "threads: int");
    for (; *inputs; inputs++) tf.OpDefinitionBuilderAddInput(operation, *inputs);
    tf.OpDefinitionBuilderAddOutput(operation, outputs);
    tf.OpDefinitionBuilderAddOutput(operation, "rows: S");
    tf.OpDefinitionBuilderSetShapeInferenceFunction(operation, infer_shapes);
    tf.RegisterOpDefinition(operation, status);
    for (int i = 0; i < 4; i++) {
        void *kernel = tf.NewKernelBuilder(name, "CPU", create, compute, free);
        tf.KernelBuilder_TypeConstraint(kernel, "T", types[i].type, status);
        tf.KernelBuilder_TypeConstraint(kernel, "S", types[i].wide, status);
        tf.RegisterKernelBuilder(name, kernel, status);
    }
    tf.DeleteStatus(status);
}

__attribute__((constructor)) static void register_operations(void)
{
    static const char *const of_forward[] = {"x: T", "gamma: S", "beta: S", "moving_mean: S",
                                             "moving_variance: S", "mask: bool", "numbers: double",
                                             NULL};
    static const char *const of_backward[] = {"x: T", "gamma: S", "beta: S", "statistics: S",
                                              "dy: T", "mask: bool", "epsilon: double", NULL};
    if (!find_tensorflow()) return;
    add("TruenormForward", forward, of_forward, "y: T");
    add("TruenormBackward", backward, of_backward, "dx: T");
}
