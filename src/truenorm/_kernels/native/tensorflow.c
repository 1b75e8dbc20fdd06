/* The passes as operations of TensorFlow, by its C interface. Where TensorFlow is not in the
 * process, or lacks a function that is used here, no operation is registered when the library is
 * loaded, and the Python code does without them.
 *
 *   TruenormForward: x (outer, channels, inner), gamma, beta, moving mean and variance (or vectors
 *     of size 0), mask (outer or 0), epsilon and momentum -> y; mean, variance, low, rstd, and the
 *     moving ones after a step
 *   TruenormBackward: x, gamma, beta, these four, dy, mask, epsilon -> dx; dgamma, dbeta
 *
 * And the halves of the first, where something comes between them:
 *
 *   TruenormMoments: the same -> an array of no values; the same, of doubles if gamma is
 *   TruenormNormalize: x, gamma, beta, mean, variance, low, rstd -> y; a matrix of no numbers
 *
 * The backward operation does not use epsilon; its derivative does.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "batchnorm.h"
#include "tensorflow.h"

/* The inputs of each operation, by their places. */
enum { X, GAMMA, BETA, MEAN, VARIANCE, FORWARD_MASK, NUMBERS, FORWARD_INPUTS };
enum { STATISTICS = 3, NORMALIZE_INPUTS };
enum { DY = NORMALIZE_INPUTS, BACKWARD_MASK, EPSILON, BACKWARD_INPUTS };

/* ---- An operation in a graph ---- */

typedef struct {
    int64_t threads;
    unsigned char relu, unbiased, moves;
} options;

static int read_options(options *made, void *construction, void *status)
{
    const struct {
        const char *name;
        unsigned char *value;
    } flags[] = {{"relu", &made->relu}, {"unbiased", &made->unbiased}, {"moves", &made->moves}};
    tf.OpKernelConstruction_GetAttrInt64(construction, "threads", &made->threads, status);
    for (size_t i = 0; i < 3 && tf.GetCode(status) == TF_OK; i++)
        tf.OpKernelConstruction_GetAttrBool(construction, flags[i].name, flags[i].value, status);
    return tf.GetCode(status) == TF_OK;
}

/* NULL is a failure, after which TensorFlow does not run the operation. */
static void *create(void *construction)
{
    options *made = calloc(1, sizeof *made);
    void *status = tf.NewStatus();
    if (!made) tf.SetStatus(status, TF_RESOURCE_EXHAUSTED, "no memory for BatchNormalization");
    if (!made || !read_options(made, construction, status)) {
        tf.OpKernelConstruction_Failure(construction, status);
        free(made);
        made = NULL;
    }
    tf.DeleteStatus(status);
    return made;
}

/* ---- A run of it ---- */

typedef struct {
    void *context, *status, *inputs[FORWARD_INPUTS];
    void *output, *rows; /* shaped as x; and a matrix of numbers per channel */
    size_t width;        /* bytes of one of these numbers */
    tn_call call;
} execution;

_Static_assert((int)BACKWARD_INPUTS <= (int)FORWARD_INPUTS, "inputs[] holds those of all");

static int has_failed(const execution *e) { return tf.GetCode(e->status) != TF_OK; }

static int dtype_of(int tensorflow)
{
    switch (tensorflow) {
    case TF_FLOAT: return TN_FLOAT32;
    case TF_DOUBLE: return TN_FLOAT64;
    case TF_HALF: return TN_FLOAT16;
    case TF_BFLOAT16: return TN_BFLOAT16;
    default: return -1 - TN_WIDE;
    }
}

static void take_inputs(execution *e, const options *asked, int count)
{
    for (int i = 0; i < count; i++) {
        tf.GetInput(e->context, i, &e->inputs[i], e->status);
        if (has_failed(e)) return;
    }
    void **in = e->inputs;
    const int doubles = tf.TensorType(in[GAMMA]) == TF_DOUBLE;
    const int wide = doubles && tf.TensorType(in[X]) != TF_DOUBLE ? TN_WIDE : 0;
    e->call = (tn_call){
        .outer = tf.Dim(in[X], 0),
        .channels = tf.Dim(in[X], 1),
        .inner = tf.Dim(in[X], 2),
        .dtype = dtype_of(tf.TensorType(in[X])) + wide,
        .relu = asked->relu,
        .threads = (int32_t)asked->threads,
        .unbiased = asked->unbiased,
        .parallel = tn_own_threads,
        .x = tf.TensorData(in[X]),
        .gamma = tf.TensorData(in[GAMMA]),
        .beta = tf.TensorData(in[BETA]),
    };
    e->width = doubles ? 8 : 4;
}

static void allocate_outputs(execution *e, int writes, int64_t row_count)
{
    const tn_call *call = &e->call;
    const int64_t shape[] = {writes ? call->outer : 0, call->channels, call->inner};
    const int64_t matrix[] = {row_count, call->channels};
    const int type = tf.TensorType(e->inputs[X]), wide = e->width == 8 ? TF_DOUBLE : TF_FLOAT;
    const size_t size = type == TF_DOUBLE ? 8 : type == TF_FLOAT ? 4 : 2;
    const size_t bytes = (size_t)(shape[0] * shape[1] * shape[2]) * size;
    e->output = tf.AllocateOutput(e->context, 0, type, shape, 3, bytes, e->status);
    if (has_failed(e)) return;
    e->rows = tf.AllocateOutput(e->context, 1, wide, matrix, 2,
                                (size_t)(matrix[0] * matrix[1]) * e->width, e->status);
}

static execution begin(void *context, const options *asked, int inputs, int writes,
                       int64_t row_count)
{
    execution e = {.context = context, .status = tf.NewStatus()};
    take_inputs(&e, asked, inputs);
    if (!has_failed(&e)) allocate_outputs(&e, writes, row_count);
    if (!has_failed(&e) && writes) e.call.y = tf.TensorData(e.output);
    return e;
}

static void run(execution *e, tn_pass *pass)
{
    const int found = pass(&e->call);
    if (found == TN_NO_MEMORY)
        tf.SetStatus(e->status, TF_RESOURCE_EXHAUSTED, "no memory for BatchNormalization");
    else if (found != TN_DONE)
        tf.SetStatus(e->status, TF_INVALID_ARGUMENT, "not a dtype of BatchNormalization");
}

static void end(execution *e)
{
    if (has_failed(e)) tf.OpKernelContext_Failure(e->context, e->status);
    for (int i = 0; i < FORWARD_INPUTS; i++)
        if (e->inputs[i]) tf.DeleteTensor(e->inputs[i]);
    if (e->output) tf.DeleteTensor(e->output);
    if (e->rows) tf.DeleteTensor(e->rows);
    tf.DeleteStatus(e->status);
}

static void *row(const execution *e, const void *matrix, int64_t index)
{ return (char *)tf.TensorData(matrix) + (size_t)(index * e->call.channels) * e->width; }

static void set_statistics(execution *e, const void *matrix)
{
    e->call.mean = row(e, matrix, 0), e->call.variance = row(e, matrix, 1);
    e->call.low = row(e, matrix, 2), e->call.rstd = row(e, matrix, 3);
}

/* A mask of another size than the rows', which is 0, means none. */
static void set_mask(execution *e, const void *mask)
{
    if (e->call.outer && tf.Dim(mask, 0) == e->call.outer) e->call.mask = tf.TensorData(mask);
}

static void forward_pass(const options *asked, void *context, int writes)
{
    execution e = begin(context, asked, FORWARD_INPUTS, writes, asked->moves ? 6 : 4);
    if (!has_failed(&e)) {
        const double *numbers = tf.TensorData(e.inputs[NUMBERS]);
        e.call.epsilon = numbers[0], e.call.momentum = numbers[1];
        set_mask(&e, e.inputs[FORWARD_MASK]);
        set_statistics(&e, e.rows);
        if (asked->moves) {
            e.call.moving_mean = tf.TensorData(e.inputs[MEAN]);
            e.call.moving_variance = tf.TensorData(e.inputs[VARIANCE]);
            e.call.moved_mean = row(&e, e.rows, 4), e.call.moved_variance = row(&e, e.rows, 5);
        }
        run(&e, tn_forward);
    }
    end(&e);
}

static void forward(void *kernel, void *context) { forward_pass(kernel, context, 1); }
static void moments(void *kernel, void *context) { forward_pass(kernel, context, 0); }

static void normalize(void *kernel, void *context)
{
    execution e = begin(context, kernel, NORMALIZE_INPUTS, 1, 0);
    if (!has_failed(&e)) {
        set_statistics(&e, e.inputs[STATISTICS]);
        run(&e, tn_normalize);
    }
    end(&e);
}

static void backward(void *kernel, void *context)
{
    execution e = begin(context, kernel, BACKWARD_INPUTS, 1, 2);
    if (!has_failed(&e)) {
        e.call.dy = tf.TensorData(e.inputs[DY]);
        set_mask(&e, e.inputs[BACKWARD_MASK]);
        set_statistics(&e, e.inputs[STATISTICS]);
        e.call.dgamma = row(&e, e.rows, 0), e.call.dbeta = row(&e, e.rows, 1);
        run(&e, tn_backward);
    }
    end(&e);
}

/* ---- Registration ---- */

/* The first output is shaped as the first input (that of TruenormMoments, which is empty, nobody
 * reads); the binding sets the shape of the second. */
static void infer_shapes(void *context, void *status)
{
    void *shape = tf.NewShapeHandle();
    tf.ShapeInferenceContextGetInput(context, 0, shape, status);
    if (tf.GetCode(status) == TF_OK) tf.ShapeInferenceContextSetOutput(context, 0, shape, status);
    tf.DeleteShapeHandle(shape);
}

/* Without a kernel for each type an operation would fail when it runs, so kernels come first. */
static int add_kernels(const char *name, void (*compute)(void *, void *))
{
    static const struct {
        int type, wide;
    } types[] = {
        {TF_FLOAT, TF_FLOAT},     {TF_DOUBLE, TF_DOUBLE}, {TF_HALF, TF_FLOAT},
        {TF_BFLOAT16, TF_FLOAT},  {TF_FLOAT, TF_DOUBLE},  {TF_HALF, TF_DOUBLE},
        {TF_BFLOAT16, TF_DOUBLE},
    };
    void *status = tf.NewStatus();
    int done = 1;
    for (size_t i = 0; i < sizeof types / sizeof *types && done; i++) {
        void *kernel = tf.NewKernelBuilder(name, "CPU", create, compute, free);
        tf.KernelBuilder_TypeConstraint(kernel, "T", types[i].type, status);
        done = tf.GetCode(status) == TF_OK;
        if (done) tf.KernelBuilder_TypeConstraint(kernel, "S", types[i].wide, status);
        done = done && tf.GetCode(status) == TF_OK;
        if (done) tf.RegisterKernelBuilder(name, kernel, status);
        done = done && tf.GetCode(status) == TF_OK;
    }
    tf.DeleteStatus(status);
    return done;
}

static int add_operation(const char *name, const char *const *inputs, const char *output)
{
    static const char *const attributes[] = {
        "T: {float, double, half, bfloat16}",
        "S: {float, double}",
        "relu: bool",
        "unbiased: bool = false",
        "moves: bool = false",
        "threads: int",
        NULL,
    };
    void *status = tf.NewStatus(), *operation = tf.NewOpDefinitionBuilder(name);
    for (int i = 0; attributes[i]; i++) tf.OpDefinitionBuilderAddAttr(operation, attributes[i]);
    for (int i = 0; inputs[i]; i++) tf.OpDefinitionBuilderAddInput(operation, inputs[i]);
    tf.OpDefinitionBuilderAddOutput(operation, output);
    tf.OpDefinitionBuilderAddOutput(operation, "rows: S");
    tf.OpDefinitionBuilderSetShapeInferenceFunction(operation, infer_shapes);
    tf.RegisterOpDefinition(operation, status);
    const int done = tf.GetCode(status) == TF_OK;
    tf.DeleteStatus(status);
    return done;
}

__attribute__((constructor)) static void register_operations(void)
{
    static const char *const of_forward[] = {
        "x: T",       "gamma: S",        "beta: S", "moving_mean: S", "moving_variance: S",
        "mask: bool", "numbers: double", NULL,
    };
    static const char *const of_normalize[] = {"x: T", "gamma: S", "beta: S", "statistics: S",
                                               NULL};
    static const char *const of_backward[] = {
        "x: T",  "gamma: S",   "beta: S",         "statistics: S",
        "dy: T", "mask: bool", "epsilon: double", NULL,
    };
    /* The Python code looks for TruenormForward, so that is the last: if it is there, all is. */
    (void)(find_tensorflow() && add_kernels("TruenormForward", forward) &&
           add_kernels("TruenormMoments", moments) && add_kernels("TruenormNormalize", normalize) &&
           add_kernels("TruenormBackward", backward) &&
           add_operation("TruenormMoments", of_forward, "y: T") &&
           add_operation("TruenormNormalize", of_normalize, "y: T") &&
           add_operation("TruenormBackward", of_backward, "dx: T") &&
           add_operation("TruenormForward", of_forward, "y: T"));
}
