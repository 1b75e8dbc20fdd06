/* That native/xla.h says of XLA's structs and numbers what XLA's own header says. Only compiled. */
#include "xla.h"

#include "xla/ffi/api/c_api.h"

#define SIZE(type, field) sizeof(((type *)0)->field)
#define SAME(ours, field, theirs, its) \
    _Static_assert(offsetof(ours, field) == offsetof(theirs, its) && \
                       SIZE(ours, field) == SIZE(theirs, its), \
                   #theirs "." #its)
#define EQUAL(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #theirs)

SAME(xla_extension, struct_size, XLA_FFI_Extension_Base, struct_size);
SAME(xla_extension, type, XLA_FFI_Extension_Base, type);
SAME(xla_extension, next, XLA_FFI_Extension_Base, next);

SAME(xla_version, struct_size, XLA_FFI_Api_Version, struct_size);
SAME(xla_version, extension_start, XLA_FFI_Api_Version, extension_start);
SAME(xla_version, major_version, XLA_FFI_Api_Version, major_version);
SAME(xla_version, minor_version, XLA_FFI_Api_Version, minor_version);

SAME(xla_metadata, struct_size, XLA_FFI_Metadata, struct_size);
SAME(xla_metadata, api_version, XLA_FFI_Metadata, api_version);
SAME(xla_metadata_extension, extension_base, XLA_FFI_Metadata_Extension, extension_base);
SAME(xla_metadata_extension, metadata, XLA_FFI_Metadata_Extension, metadata);

SAME(xla_error, struct_size, XLA_FFI_Error_Create_Args, struct_size);
SAME(xla_error, extension_start, XLA_FFI_Error_Create_Args, extension_start);
SAME(xla_error, message, XLA_FFI_Error_Create_Args, message);
SAME(xla_error, errc, XLA_FFI_Error_Create_Args, errc);

SAME(xla_api, struct_size, XLA_FFI_Api, struct_size);
SAME(xla_api, extension_start, XLA_FFI_Api, extension_start);
SAME(xla_api, api_version, XLA_FFI_Api, api_version);
SAME(xla_api, XLA_FFI_Error_Create, XLA_FFI_Api, XLA_FFI_Error_Create);

SAME(xla_buffer, struct_size, XLA_FFI_Buffer, struct_size);
SAME(xla_buffer, extension_start, XLA_FFI_Buffer, extension_start);
SAME(xla_buffer, dtype, XLA_FFI_Buffer, dtype);
SAME(xla_buffer, data, XLA_FFI_Buffer, data);
SAME(xla_buffer, rank, XLA_FFI_Buffer, rank);
SAME(xla_buffer, dims, XLA_FFI_Buffer, dims);

SAME(xla_buffers, struct_size, XLA_FFI_Args, struct_size);
SAME(xla_buffers, extension_start, XLA_FFI_Args, extension_start);
SAME(xla_buffers, size, XLA_FFI_Args, size);
SAME(xla_buffers, types, XLA_FFI_Args, types);
SAME(xla_buffers, args, XLA_FFI_Args, args);
SAME(xla_buffers, size, XLA_FFI_Rets, size);
SAME(xla_buffers, types, XLA_FFI_Rets, types);
SAME(xla_buffers, args, XLA_FFI_Rets, rets);

SAME(xla_call_frame, struct_size, XLA_FFI_CallFrame, struct_size);
SAME(xla_call_frame, extension_start, XLA_FFI_CallFrame, extension_start);
SAME(xla_call_frame, api, XLA_FFI_CallFrame, api);
SAME(xla_call_frame, ctx, XLA_FFI_CallFrame, ctx);
SAME(xla_call_frame, stage, XLA_FFI_CallFrame, stage);
SAME(xla_call_frame, args, XLA_FFI_CallFrame, args);
SAME(xla_call_frame, rets, XLA_FFI_CallFrame, rets);

EQUAL(XLA_MAJOR, XLA_FFI_API_MAJOR);
EQUAL(XLA_METADATA, XLA_FFI_Extension_Metadata);
EQUAL(XLA_EXECUTE, XLA_FFI_ExecutionStage_EXECUTE);
EQUAL(XLA_BUFFER, XLA_FFI_ArgType_BUFFER);
EQUAL(XLA_BUFFER, XLA_FFI_RetType_BUFFER);
EQUAL(XLA_F16, XLA_FFI_DataType_F16);
EQUAL(XLA_F32, XLA_FFI_DataType_F32);
EQUAL(XLA_F64, XLA_FFI_DataType_F64);
EQUAL(XLA_BF16, XLA_FFI_DataType_BF16);
EQUAL(XLA_INVALID_ARGUMENT, XLA_FFI_Error_Code_INVALID_ARGUMENT);
EQUAL(XLA_RESOURCE_EXHAUSTED, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
