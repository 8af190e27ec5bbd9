// The part of ONNX Runtime's C ABI that the operators use, declared by hand: no package contains its headers, and new functions
// are only added at its end. The slots were counted in the headers of 1.15 to 1.29; none has moved.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtCustomOp;

constexpr uint32_t kOrtVersion = 17;  // the oldest with shape inference (from slot 267) and parallel-for (274)

enum OrtErrorCode : int { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum OrtElementType : int { ORT_FLOAT = 1, ORT_INT32 = 6, ORT_INT64 = 7, ORT_FLOAT16 = 10, ORT_BFLOAT16 = 16 };
enum OrtAttributeType : int { ORT_ATTRIBUTE_INT = 1 };

using Unused = void (*)();

// Functions return nullptr, or a status that the caller returns or releases.
struct OrtApi {
  OrtStatus* (*CreateStatus)(int code, const char* message);
  Unused slots_1[26 - 1];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** domain);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
  Unused slots_29[51 - 29];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);
  Unused slots_52[57 - 52];
  OrtStatus* (*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo** info);
  OrtStatus* (*SetTensorElementType)(OrtTensorTypeAndShapeInfo* info, int type);
  OrtStatus* (*SetDimensions)(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t count);
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, int* type);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* count);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count);
  OrtStatus* (*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo* info, const char** names, size_t count);
  Unused slot_64;
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** info);
  Unused slots_66[86 - 66];
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* value);
  Unused slots_87[90 - 87];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** value);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dims, size_t count,
                                        OrtValue** value);
  Unused slot_92;
  void (*ReleaseStatus)(OrtStatus* status);
  Unused slots_94[99 - 94];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  Unused slots_100[193 - 100];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** stream);
  Unused slots_194[249 - 194];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index, int* is_constant,
                                                  const OrtValue** value);
  Unused slots_250[267 - 250];
  OrtStatus* (*ShapeInferContext_GetInputCount)(const OrtShapeInferContext* context, size_t* count);
  OrtStatus* (*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                    OrtTensorTypeAndShapeInfo** info);  // borrowed: must not be released
  OrtStatus* (*ShapeInferContext_GetAttribute)(const OrtShapeInferContext* context, const char* name, const OrtOpAttr** value);
  OrtStatus* (*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                     const OrtTensorTypeAndShapeInfo* info);
  OrtStatus* (*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo* info, const char** names, size_t count);
  OrtStatus* (*ReadOpAttr)(const OrtOpAttr* attribute, int type, void* data, size_t length, size_t* written);
  Unused slot_273;
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context, void (*work)(void* user, size_t index), size_t total,
                                          size_t batches, void* user);  // batches 0: one for each thread
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // nullptr if the runtime is older
  const char* (*GetVersionString)();
};

// The description of one operator. Fields after `GetEndVersion` were added in 1.18, which reads them: they are null.
struct OrtCustomOp {
  uint32_t version;
  Unused CreateKernel;
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  int (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  int (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  Unused KernelCompute;
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);   // 0: required
  int (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);  // 0: required
  int (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);       // 0: memory of the provider
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  Unused GetMayInplace;
  Unused ReleaseMayInplace;
  Unused GetAliasMap;
  Unused ReleaseAliasMap;
};

#define MEMREWRITE_SLOT(name, slot) static_assert(offsetof(OrtApi, name) == (slot) * sizeof(void*), #name)
MEMREWRITE_SLOT(CreateStatus, 0);
MEMREWRITE_SLOT(CreateCustomOpDomain, 26);
MEMREWRITE_SLOT(CustomOpDomain_Add, 27);
MEMREWRITE_SLOT(AddCustomOpDomain, 28);
MEMREWRITE_SLOT(GetTensorMutableData, 51);
MEMREWRITE_SLOT(CreateTensorTypeAndShapeInfo, 57);
MEMREWRITE_SLOT(SetTensorElementType, 58);
MEMREWRITE_SLOT(SetDimensions, 59);
MEMREWRITE_SLOT(GetTensorElementType, 60);
MEMREWRITE_SLOT(GetDimensionsCount, 61);
MEMREWRITE_SLOT(GetDimensions, 62);
MEMREWRITE_SLOT(GetSymbolicDimensions, 63);
MEMREWRITE_SLOT(GetTensorTypeAndShape, 65);
MEMREWRITE_SLOT(KernelInfoGetAttribute_int64, 86);
MEMREWRITE_SLOT(KernelContext_GetInput, 90);
MEMREWRITE_SLOT(KernelContext_GetOutput, 91);
MEMREWRITE_SLOT(ReleaseStatus, 93);
MEMREWRITE_SLOT(ReleaseTensorTypeAndShapeInfo, 99);
MEMREWRITE_SLOT(KernelContext_GetGPUComputeStream, 193);
MEMREWRITE_SLOT(KernelInfoGetConstantInput_tensor, 249);
MEMREWRITE_SLOT(ShapeInferContext_GetInputCount, 267);
MEMREWRITE_SLOT(ShapeInferContext_GetInputTypeShape, 268);
MEMREWRITE_SLOT(ShapeInferContext_GetAttribute, 269);
MEMREWRITE_SLOT(ShapeInferContext_SetOutputTypeShape, 270);
MEMREWRITE_SLOT(SetSymbolicDimensions, 271);
MEMREWRITE_SLOT(ReadOpAttr, 272);
MEMREWRITE_SLOT(KernelContext_ParallelFor, 274);
#undef MEMREWRITE_SLOT

#define MEMREWRITE_FIELD(name, bytes) static_assert(offsetof(OrtCustomOp, name) == (bytes), #name)
MEMREWRITE_FIELD(GetName, 16);
MEMREWRITE_FIELD(GetExecutionProviderType, 24);
MEMREWRITE_FIELD(GetInputType, 32);
MEMREWRITE_FIELD(GetInputTypeCount, 40);
MEMREWRITE_FIELD(GetOutputType, 48);
MEMREWRITE_FIELD(GetOutputTypeCount, 56);
MEMREWRITE_FIELD(KernelDestroy, 72);
MEMREWRITE_FIELD(GetInputCharacteristic, 80);
MEMREWRITE_FIELD(GetOutputCharacteristic, 88);
MEMREWRITE_FIELD(GetInputMemoryType, 96);
MEMREWRITE_FIELD(GetVariadicInputMinArity, 104);
MEMREWRITE_FIELD(GetVariadicOutputHomogeneity, 128);
MEMREWRITE_FIELD(CreateKernelV2, 136);
MEMREWRITE_FIELD(KernelComputeV2, 144);
MEMREWRITE_FIELD(InferOutputShapeFn, 152);
MEMREWRITE_FIELD(GetStartVersion, 160);
MEMREWRITE_FIELD(GetEndVersion, 168);
MEMREWRITE_FIELD(ReleaseAliasMap, 200);
static_assert(sizeof(OrtCustomOp) == 208, "OrtCustomOp");
#undef MEMREWRITE_FIELD
