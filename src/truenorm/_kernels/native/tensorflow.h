/* What tensorflow.c uses of TensorFlow's C interface (tensorflow/c/{c_api,kernels,ops}.h), looked
 * up by name, so that the library is built without TensorFlow and loads where there is none.
 */
#ifndef TRUENORM_TENSORFLOW_H
#define TRUENORM_TENSORFLOW_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

enum { TF_FLOAT = 1, TF_DOUBLE = 2, TF_BFLOAT16 = 14, TF_HALF = 19 };
enum { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8 };

/* TensorFlow's functions: result, name without TF_, arguments. Its types are opaque. */
#define FUNCTIONS(F) \
    F(void *, NewStatus, (void)) \
    F(void, DeleteStatus, (void *)) \
    F(void, SetStatus, (void *, int, const char *)) \
    F(int, GetCode, (const void *)) \
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
    F(void, OpKernelConstruction_Failure, (void *, void *)) \
    F(void, OpKernelContext_Failure, (void *, void *)) \
    F(void, GetInput, (void *, int, void **, void *)) \
    F(void *, AllocateOutput, (void *, int, int, const int64_t *, int, size_t, void *)) \
    F(void, DeleteTensor, (void *)) \
    F(void *, TensorData, (const void *)) \
    F(int, TensorType, (const void *)) \
    F(int64_t, Dim, (const void *, int)) \
    F(void *, NewShapeHandle, (void)) \
    F(void, DeleteShapeHandle, (void *)) \
    F(void, ShapeInferenceContextGetInput, (void *, int, void *, void *)) \
    F(void, ShapeInferenceContextSetOutput, (void *, int, void *, void *))

static struct {
#define MEMBER(result, name, arguments) result(*name) arguments;
    FUNCTIONS(MEMBER)
} tf;

/* Whether TensorFlow is in the process, with all of these functions. */
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

#endif
