// Runs the CUDA kernels on the CPU over the cases of a file: `cuda_on_cpu CASES RESULTS`.
//
// A case is ten numbers (operator, element type, index type, misalignment in elements, and sizes), then its arrays. Each array
// has a memory block of exactly its length, so that the sanitizer finds every read past its end.
#include "cuda_on_cpu.h"

#include <cstring>

#include "kernels.h"

namespace {

using Bytes = std::vector<char>;

// An array that is aligned to the size of its elements, and to 16 bytes only if `misplaced` is 0.
template <class T>
struct Array {
  Array(size_t count, int64_t misplaced) : memory(static_cast<char*>(malloc((count + misplaced) * sizeof(T)))), count(count) {
    data = reinterpret_cast<T*>(memory) + misplaced;
    memset(static_cast<void*>(memory), 0xff, (count + misplaced) * sizeof(T));  // NaN, or -1
  }
  ~Array() { free(memory); }
  void read(FILE* file) {
    if (count > 0 && fread(static_cast<void*>(data), sizeof(T), count, file) != count) abort();
  }
  void append_to(Bytes& bytes) const {
    const char* begin = reinterpret_cast<const char*>(data);
    bytes.insert(bytes.end(), begin, begin + count * sizeof(T));
  }
  char* memory;
  T* data;
  size_t count;
};

void require(const char* error) {
  if (error != nullptr) fprintf(stderr, "%s\n", error), abort();
}

template <class T, class I>
void lookup_case(FILE* file, const int64_t* n, Bytes& results) {
  const int64_t slots = n[4], width = n[5], tokens = n[6], reads = n[7];
  Array<T> values(slots * width, n[3]), weights(tokens * reads, 0);
  Array<I> indices(tokens * reads, 0);
  values.read(file), indices.read(file), weights.read(file);
  Bytes found[2];
  for (int order = 0; order < 2; ++order) {
    cuda_on_cpu::upward = order == 0;
    Array<T> y(tokens * width, n[3]);
    const Floats w = floats(weights.data);
    require(lookup_cuda(CudaLookup<T, I>{values.data, indices.data, w, y.data, slots, width, tokens, reads}, nullptr));
    y.append_to(found[order]);
  }
  if (found[0] != found[1]) require("the order of threads changes the result");
  results.insert(results.end(), found[0].begin(), found[0].end());
}

template <class T>
void topk_case(FILE* file, const int64_t* n, Bytes& results) {
  const int64_t rows = n[4], n1 = n[5], n2 = n[6], k = n[7];
  Array<T> scores1(rows * n1, n[3]), scores2(rows * n2, n[3]);
  scores1.read(file), scores2.read(file);
  Bytes found[2];
  for (int order = 0; order < 2; ++order) {
    cuda_on_cpu::upward = order == 0;
    Array<float> scores(rows * k, 0);
    Array<int64_t> indices(rows * k, 0);
    require(topk_cuda(Topk<T>{scores1.data, scores2.data, scores.data, indices.data, rows, n1, n2, k, n[8] != 0}, nullptr));
    scores.append_to(found[order]), indices.append_to(found[order]);
  }
  if (found[0] != found[1]) require("the order of threads changes the result");
  results.insert(results.end(), found[0].begin(), found[0].end());
}

template <class T>
void one_case(FILE* file, const int64_t* n, Bytes& results) {
  if (n[0] == 1) return topk_case<T>(file, n, results);
  return n[2] == 8 ? lookup_case<T, int64_t>(file, n, results) : lookup_case<T, int32_t>(file, n, results);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  FILE* file = fopen(arguments[1], "rb");
  int64_t n[10];
  Bytes results;
  while (fread(n, sizeof n, 1, file) == 1) {
    (n[1] == 0 ? one_case<float> : n[1] == 1 ? one_case<Half> : one_case<BFloat16>)(file, n, results);
  }
  fclose(file);
  FILE* out = fopen(arguments[2], "wb");
  fwrite(results.data(), 1, results.size(), out);
  return fclose(out);
}
