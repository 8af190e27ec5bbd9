// What a kernel uses of the runtime: errors as OrtStatus, inputs, outputs, threads, and shape inference.
#pragma once

#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

using Dims = std::vector<int64_t>;

// An error to return to the runtime: a status that it returned, or the code and message of a new one.
struct Failure {
  OrtStatus* status;
  int code;
  std::string message;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status, 0, ""};
}

template <class Body>
OrtStatus* guarded(const OrtApi* api, const char* op, Body body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Failure& failure) {
      if (failure.status != nullptr) return failure.status;
      return api->CreateStatus(failure.code, (std::string(op) + ": " + failure.message).c_str());
    } catch (const std::bad_alloc&) {
      return api->CreateStatus(ORT_FAIL, (std::string(op) + ": out of memory").c_str());
    }
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, "memrewrite: out of memory");
  }
}

template <class Message>
void require(bool holds, Message message, int code = ORT_INVALID_ARGUMENT) {
  if (!holds) throw Failure{nullptr, code, message()};
}

inline std::string text(const Dims& dims) {
  std::string all;
  for (int64_t dim : dims) all += (all.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + all + "]";
}

template <class T>
struct Input {
  const T* data;
  Dims dims;
};

template <class T>
Input<T> tensor(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &rank);
  Dims dims(rank);
  if (status == nullptr) status = api->GetDimensions(info, dims.data(), rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // GetTensorData is too new; only read
  return {static_cast<const T*>(data), dims};
}

template <class T>
Input<T> input(const OrtApi* api, OrtKernelContext* context, size_t index, const char* name) {
  const OrtValue* value = nullptr;
  check(api->KernelContext_GetInput(context, index, &value));
  require(value != nullptr, [&] { return std::string("input ") + name + " is missing"; });
  return tensor<T>(api, value);
}

// An input that is constant over all runs, such as a weight of the model; nullptr if it is not constant.
inline const OrtValue* constant(const OrtApi* api, const OrtKernelInfo* info, size_t index) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  return is_constant ? value : nullptr;
}

template <class T>
T* output(const OrtApi* api, OrtKernelContext* context, size_t index, const Dims& dims) {
  OrtValue* value = nullptr;
  check(api->KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
  require(value != nullptr, [&] { return "output " + std::to_string(index) + " has no name, and all are required"; });
  void* data = nullptr;
  check(api->GetTensorMutableData(value, &data));
  return static_cast<T*>(data);
}

struct Lent {
  const OrtApi* api;
  const OrtKernelContext* context;
};

constexpr int64_t kPieceBytes = 1 << 15;  // the runtime's threads spin and wake fast

// The runtime's thread pool; `lent` must outlive the result.
inline Threads threads(const Lent& lent) {
  return {&lent, [](const void* context, void (*work)(void*, size_t), size_t total, void* user) {
            const Lent* of = static_cast<const Lent*>(context);
            check(of->api->KernelContext_ParallelFor(of->context, work, total, total, user));
          },
          kPieceBytes};
}

#ifdef MEMREWRITE_CUDA
inline void* stream(const Lent& lent) {
  void* found = nullptr;
  check(lent.api->KernelContext_GetGPUComputeStream(lent.context, &found));
  return found;
}

inline void launched(const char* error) {
  require(error == nullptr, [&] { return std::string("CUDA: ") + error; }, ORT_FAIL);
}
#endif

// An inferred shape: for each axis its length, or -1 and possibly a name.
struct Shape {
  int type;
  Dims dims;
  std::vector<const char*> names;

  void append(const Shape& other, size_t axis) {
    dims.push_back(other.dims[axis]);
    names.push_back(other.names[axis]);
  }
};

inline Shape known(const OrtApi* api, OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  check(api->GetDimensionsCount(info, &rank));  // also 0 if the shape is unknown
  Shape shape{0, Dims(rank), std::vector<const char*>(rank)};
  check(api->GetTensorElementType(info, &shape.type));
  check(api->GetDimensions(info, shape.dims.data(), rank));
  check(api->GetSymbolicDimensions(info, shape.names.data(), rank));
  return shape;
}

inline void infer(const OrtApi* api, OrtShapeInferContext* context, size_t index, int type, Shape shape) {
  for (size_t axis = 0; axis < shape.dims.size(); ++axis) {
    const bool named = shape.names[axis] != nullptr && *shape.names[axis] != 0;
    if (shape.dims[axis] < 0 && !named) return;  // the runtime would read -1 as a length
    if (shape.names[axis] == nullptr) shape.names[axis] = "";
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->CreateTensorTypeAndShapeInfo(&info));
  OrtStatus* status = api->SetTensorElementType(info, type);
  if (status == nullptr) status = api->SetDimensions(info, shape.dims.data(), shape.dims.size());
  if (status == nullptr) status = api->SetSymbolicDimensions(info, shape.names.data(), shape.names.size());
  if (status == nullptr) status = api->ShapeInferContext_SetOutputTypeShape(context, index, info);
  api->ReleaseTensorTypeAndShapeInfo(info);
  check(status);
}
