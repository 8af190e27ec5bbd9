// The interface of the operators to ONNX Runtime: their registration, and every check before a kernel reads its inputs.
//
// RegisterCustomOps registers one OrtCustomOp for each operator, type combination and provider. A session calls it to infer
// shapes, to create a kernel (attributes), and to run the kernel (inputs, checks, launch).
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "session.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr const char* kDomain = "memrewrite";
constexpr const char* kOps[] = {"SparseLookup", "ProductKeyTopk"};
constexpr const char* kProviders[] = {"CPUExecutionProvider", "CUDAExecutionProvider"};
enum OpNumber { LOOKUP, TOPK };
enum Provider { CPU, CUDA };

std::atomic<int64_t> calls[2][2];  // by operator and provider

struct Kernel;
using Compute = void (*)(const Kernel&, OrtKernelContext*);
using Infer = void (*)(const OrtApi*, OrtShapeInferContext*);

struct Op : OrtCustomOp {
  OpNumber number;
  Provider provider;
  std::vector<int> inputs, outputs;  // element types
  Compute compute;
  Infer infer;
  const OrtApi* api;
};

struct Kernel {
  const Op* op;
  const OrtApi* api;
  int64_t k, softmax;  // of ProductKeyTopk
};

// --------------------------------------------------------------------------------------------------------------- SparseLookup

template <class T>
constexpr int element = ORT_FLOAT;
template <>
constexpr int element<Half> = ORT_FLOAT16;
template <>
constexpr int element<BFloat16> = ORT_BFLOAT16;
template <>
constexpr int element<int32_t> = ORT_INT32;
template <>
constexpr int element<int64_t> = ORT_INT64;

// Only on the CPU: reading a GPU's indices would need a synchronization, so the CUDA kernel returns NaN instead.
void check_indices(const Indices& indices, int64_t tokens, int64_t reads, int64_t slots) {
  const int64_t i = first_outside(indices, tokens * reads, slots);
  require(i < 0, [&] {
    return "index " + std::to_string(indices.read(i)) + " at " + text({i / reads, i % reads}) +
           " of indices is out of range for a table of " + std::to_string(slots) + " rows";
  });
}

template <class T, class I, class W, Provider P>
void lookup(const Kernel& kernel, OrtKernelContext* context) {
  const auto values = input<T>(kernel.api, context, 0, "values");
  const auto indices = input<I>(kernel.api, context, 1, "indices");
  const auto weights = input<W>(kernel.api, context, 2, "weights");
  require(values.dims.size() == 2, [&] { return "values must be [N, D], not " + text(values.dims); });
  require(indices.dims.size() == 2, [&] { return "indices must be [T, K], not " + text(indices.dims); });
  require(weights.dims == indices.dims,
          [&] { return "weights must be [T, K] as indices " + text(indices.dims) + ", not " + text(weights.dims); });
  const int64_t slots = values.dims[0], width = values.dims[1], tokens = indices.dims[0], reads = indices.dims[1];
  const Indices numbers{indices.data, sizeof(I) == 8};
  if (P == CPU) check_indices(numbers, tokens, reads, slots);
  T* y = output<T>(kernel.api, context, 0, {tokens, width});
  const Lent lent{kernel.api, context};
  const Floats w = floats(weights.data);
  if constexpr (P == CPU) {
    lookup_cpu({floats(values.data), numbers, w, nullptr, floats(y), slots, width, tokens, reads}, threads(lent));
  }
#ifdef MEMREWRITE_CUDA
  if constexpr (P == CUDA) {
    const CudaLookup<T, I> job{values.data, indices.data, w, y, slots, width, tokens, reads};
    launched(lookup_cuda(job, stream(lent)));
  }
#endif
}

// ------------------------------------------------------------------------------------------------------------- ProductKeyTopk

template <class T, Provider P>
void topk(const Kernel& kernel, OrtKernelContext* context) {
  const auto scores1 = input<T>(kernel.api, context, 0, "scores1");
  const auto scores2 = input<T>(kernel.api, context, 1, "scores2");
  Dims rest1 = scores1.dims, rest2 = scores2.dims;
  require(!rest1.empty() && !rest2.empty(), [] { return "scores must be [..., n], not single numbers"; });
  const int64_t n1 = rest1.back(), n2 = rest2.back(), k = kernel.k;
  rest1.pop_back();
  rest2.pop_back();
  const auto shapes = [&] { return "scores1 is " + text(scores1.dims) + ", scores2 is " + text(scores2.dims); };
  require(rest1 == rest2, [&] { return shapes() + ": all axes but the last must agree"; });
  require(k <= n1 && k <= n2, [&] { return shapes() + ": k is " + std::to_string(k) + ", more than a half has"; });
  require(n1 <= kMostScores && n2 <= kMostScores, [&] { return shapes() + ": a half may have 2^31 - 1"; }, ORT_NOT_IMPLEMENTED);
  const auto limit = [&] { return "k is " + std::to_string(k) + ": at most " + std::to_string(kMostK); };
  require(k <= kMostK, limit, ORT_NOT_IMPLEMENTED);
  uint64_t rows = 1;  // unsigned: if one length is 0, the product of the others may overflow
  for (int64_t dim : rest1) rows *= uint64_t(dim);
  rest1.push_back(k);
  float* scores = output<float>(kernel.api, context, 0, rest1);
  int64_t* indices = output<int64_t>(kernel.api, context, 1, rest1);
  const Topk<T> job{scores1.data, scores2.data, scores, indices, int64_t(rows), n1, n2, k, kernel.softmax != 0};
  const Lent lent{kernel.api, context};
  if constexpr (P == CPU) topk_cpu(job, threads(lent));
#ifdef MEMREWRITE_CUDA
  if constexpr (P == CUDA) launched(topk_cuda(job, stream(lent)));
#endif
}

// --------------------------------------------------------------------------------------------------------------------- shapes

void infer_lookup(const OrtApi* api, OrtShapeInferContext* context) {
  const Shape values = known(api, context, 0), indices = known(api, context, 1);
  if (values.dims.size() != 2 || indices.dims.size() != 2) return;
  Shape y{};
  y.append(indices, 0);
  y.append(values, 1);
  infer(api, context, 0, values.type, y);
}

void infer_topk(const OrtApi* api, OrtShapeInferContext* context) {
  Shape shape = known(api, context, 0);
  const OrtOpAttr* attribute = nullptr;
  size_t written = 0;
  if (shape.dims.empty()) return;
  OrtStatus* status = api->ShapeInferContext_GetAttribute(context, "k", &attribute);
  if (status == nullptr) status = api->ReadOpAttr(attribute, ORT_ATTRIBUTE_INT, &shape.dims.back(), sizeof(int64_t), &written);
  if (status != nullptr) api->ReleaseStatus(status);
  if (status != nullptr || shape.dims.back() < 1) return;  // `create` reports the error
  shape.names.back() = "";
  infer(api, context, 0, ORT_FLOAT, shape);
  infer(api, context, 1, ORT_INT64, shape);
}

// --------------------------------------------------------------------------------------------------------------- registration

OrtStatus* create(const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  const Op* op = static_cast<const Op*>(self);
  return guarded(api, kOps[op->number], [&] {
    Kernel made{op, api, 0, 0};
    if (op->number == TOPK) {
      OrtStatus* missing = api->KernelInfoGetAttribute_int64(info, "k", &made.k);
      if (missing != nullptr) api->ReleaseStatus(missing);
      require(missing == nullptr, [] { return "attribute k, a number, is required"; });
      require(made.k >= 1, [&] { return "k must be 1 or more, not " + std::to_string(made.k); });
      OrtStatus* unset = api->KernelInfoGetAttribute_int64(info, "softmax", &made.softmax);
      if (unset != nullptr) api->ReleaseStatus(unset), made.softmax = 0;
    }
    if (op->number == LOOKUP && op->provider == CPU) {
      if (const OrtValue* table = constant(api, info, 0)) {
        const auto values = tensor<char>(api, table);
        size_t bytes = op->inputs[0] == ORT_FLOAT ? 4 : 2;
        for (int64_t dim : values.dims) bytes *= size_t(dim);
        prepare_cpu(values.data, bytes);
      }
    }
    *kernel = new Kernel(made);
  });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Kernel& known = *static_cast<Kernel*>(kernel);
  return guarded(known.api, kOps[known.op->number], [&] {
    known.op->compute(known, context);
    ++calls[known.op->number][known.op->provider];
  });
}

OrtStatus* infer_shapes(const OrtCustomOp* self, OrtShapeInferContext* context) {
  const Op* op = static_cast<const Op*>(self);
  return guarded(op->api, kOps[op->number], [&] { op->infer(op->api, context); });
}

Op operation(const OrtApi* api, OpNumber number, Provider provider, std::vector<int> inputs, std::vector<int> outputs,
             Compute compute_with, Infer infer_with) {
  Op op{};
  op.version = kOrtVersion;
  op.GetName = [](const OrtCustomOp* self) { return kOps[static_cast<const Op*>(self)->number]; };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) { return kProviders[static_cast<const Op*>(self)->provider]; };
  op.GetInputType = [](const OrtCustomOp* self, size_t i) { return static_cast<const Op*>(self)->inputs[i]; };
  op.GetInputTypeCount = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->inputs.size(); };
  op.GetOutputType = [](const OrtCustomOp* self, size_t i) { return static_cast<const Op*>(self)->outputs[i]; };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->outputs.size(); };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = op.GetOutputCharacteristic = op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer_shapes;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  op.number = number, op.provider = provider, op.inputs = inputs, op.outputs = outputs;
  op.compute = compute_with, op.infer = infer_with, op.api = api;
  return op;
}

template <class T, class I, class W, Provider P>
Op lookup_operation(const OrtApi* api) {
  return operation(api, LOOKUP, P, {element<T>, element<I>, element<W>}, {element<T>}, lookup<T, I, W, P>, infer_lookup);
}

// Weights have the type of the values, or are fp32.
template <class T, Provider P>
void append(std::vector<Op>& ops, const OrtApi* api) {
  ops.push_back(lookup_operation<T, int64_t, T, P>(api));
  ops.push_back(lookup_operation<T, int32_t, T, P>(api));
  if constexpr (element<T> != ORT_FLOAT) {
    ops.push_back(lookup_operation<T, int64_t, float, P>(api));
    ops.push_back(lookup_operation<T, int32_t, float, P>(api));
  }
  ops.push_back(operation(api, TOPK, P, {element<T>, element<T>}, {ORT_FLOAT, ORT_INT64}, topk<T, P>, infer_topk));
}

// The domain for one runtime; a process may load several. It is never freed: sessions keep a raw pointer to it.
struct Domain {
  std::vector<Op> ops;
  OrtCustomOpDomain* domain = nullptr;
};

OrtCustomOpDomain* domain_of(const OrtApi* api) {
  static std::mutex mutex;
  static auto* domains = new std::map<const OrtApi*, Domain>;
  const std::lock_guard<std::mutex> lock(mutex);
  Domain& found = (*domains)[api];
  if (found.domain != nullptr) return found.domain;
  found.ops.clear();
#define APPEND_CPU(T) append<T, CPU>(found.ops, api);
  MEMREWRITE_FOR_TYPES(APPEND_CPU)
#ifdef MEMREWRITE_CUDA
#define APPEND_CUDA(T) append<T, CUDA>(found.ops, api);
  MEMREWRITE_FOR_TYPES(APPEND_CUDA)
#endif
  OrtCustomOpDomain* domain = nullptr;
  check(api->CreateCustomOpDomain(kDomain, &domain));
  for (const Op& op : found.ops) check(api->CustomOpDomain_Add(domain, &op));
  return found.domain = domain;
}

}  // namespace

// The entry point that ONNX Runtime calls in a library of custom operators.
EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kOrtVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "memrewrite needs ONNX Runtime 1.17 or newer");
  return guarded(api, kDomain, [&] { check(api->AddCustomOpDomain(options, domain_of(api))); });
}

// The number of successful calls of an operator on a provider ("CPUExecutionProvider", ...) in this process; -1 if either is
// unknown.
EXPORT int64_t memrewrite_calls(const char* op, const char* provider) {
  for (int number = 0; number < 2; ++number) {
    for (int of = 0; of < 2; ++of) {
      if (kOps[number] == std::string(op) && kProviders[of] == std::string(provider)) return calls[number][of];
    }
  }
  return -1;
}

EXPORT int memrewrite_has_cuda() {
#ifdef MEMREWRITE_CUDA
  return 1;
#else
  return 0;
#endif
}
