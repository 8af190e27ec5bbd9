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
