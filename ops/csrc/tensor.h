// What the kernels' host code needs of tensors, on PyTorch's stable ABI alone: one build of the library runs under
// every later PyTorch and Python. Nothing may include ATen, c10 or Python here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// What the last call that failed said, where the running PyTorch can tell: later than the version that this is built
// for.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace grootvl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Makes a message of values, of which lists are written as [2, 3].
template <typename... Values>
std::string message(const Values&... values) {
  std::ostringstream stream;
  const auto write = [&stream](const auto& value) {
    using Value = std::decay_t<decltype(value)>;
    if constexpr (std::is_same_v<Value, Sizes>) {
      stream << '[';
      for (size_t i = 0; i < value.size(); ++i) stream << (i ? ", " : "") << value[i];
      stream << ']';
    } else if constexpr (std::is_same_v<Value, torch::stable::Device>) {
      stream << (value.is_cpu() ? "cpu" : value.is_cuda() ? "cuda:" : "device ");
      if (!value.is_cpu()) stream << value.index();
    } else {
      stream << value;
    }
  };
  (write(values), ...);
  return stream.str();
}

// Python gets a ValueError. The message is made only if the check fails.
#define GROOTVL_CHECK(condition, ...) \
  if (!(condition)) throw std::invalid_argument(::grootvl::message(__VA_ARGS__))

// After a call of PyTorch with checked arguments, on the device of `like`: what can fail then is the memory. Where
// PyTorch does not tell, the message begins with the words by which programs that search for the largest batch size
// know this.
[[noreturn]] inline void throw_failure(const std::string& call, const Tensor& like) {
  if (torch_exception_get_what_without_backtrace) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
  throw std::runtime_error(
      message(like.is_cuda() ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory.",
              " (Or another error: PyTorch has written the reason to the standard error.) ", call, " failed"));
}

// Calls an operation of PyTorch through its dispatcher. Every argument of its schema must be given.
template <size_t kResults = 1, typename... Arguments>
auto call(const char* operation, const char* overload, const Tensor& tensor, const Arguments&... arguments) {
  using torch::stable::detail::from;
  std::array<StableIValue, std::max(1 + sizeof...(Arguments), kResults)> stack{from(tensor), from(arguments)...};
  if (torch_call_dispatcher(operation, overload, stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    throw_failure(operation, tensor);
  }
  std::array<Tensor, kResults> results{torch::stable::detail::to<Tensor>(stack[0])};
  for (size_t i = 1; i < kResults; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  if constexpr (kResults == 1) {
    return std::move(results[0]);
  } else {
    return results;
  }
}

inline std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return strides;
}

// A contiguous tensor of undefined values, on the device of `like`. On a GPU without the dispatcher, which would take
// the host longer than launching a kernel.
inline Tensor empty(const Tensor& like, Sizes sizes, ScalarType type) {
  if (like.is_cpu()) {
    return call("aten::new_empty", "", like, sizes, std::optional(type), std::nullopt, std::nullopt, std::nullopt);
  }
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle result;
  if (aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type, like.get_device_index(),
                               &result) != TORCH_SUCCESS) {
    throw_failure(message("Allocating a tensor of ", sizes, " and type ", type), like);
  }
  return Tensor(result);
}
inline Tensor empty_like(const Tensor& like) { return empty(like, like.sizes(), like.scalar_type()); }

inline void fill(const Tensor& tensor, double value) {
  if (aoti_torch_aten_fill__Scalar(tensor.get(), value) != TORCH_SUCCESS) throw_failure("aten::fill_", tensor);
}

inline Tensor zeros(const Tensor& like, Sizes sizes, ScalarType type) {
  return call("aten::new_zeros", "", like, sizes, std::optional(type), std::nullopt, std::nullopt, std::nullopt);
}

inline Tensor clone(const Tensor& tensor) {
  return call("aten::clone", "", tensor, std::optional(torch::headeronly::MemoryFormat::Contiguous));
}

inline Tensor contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : clone(tensor); }

inline Tensor to(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  return call("aten::to", "dtype", tensor, type, false, false, std::optional<torch::headeronly::MemoryFormat>());
}

inline void copy(const Tensor& target, const Tensor& source) { call("aten::copy_", "", target, source, false); }

// A copy, contiguous and of another type.
inline Tensor copy_as(const Tensor& tensor, ScalarType type) {
  const Tensor result = empty(tensor, tensor.sizes(), type);
  copy(result, tensor);
  return result;
}

inline Tensor select(const Tensor& tensor, int64_t dim, int64_t index) {
  return call("aten::select", "int", tensor, dim, index);
}

// `count` of a dimension from `first` on.
inline Tensor slice(const Tensor& tensor, int64_t first, int64_t count, int64_t dim = 0) {
  return call("aten::slice", "Tensor", tensor, dim, std::optional(first), std::optional(first + count), int64_t{1});
}

// Another view of the same memory, which begins where `tensor` does, or so many values later.
inline Tensor strided(const Tensor& tensor, Sizes sizes, Sizes strides, int64_t first = 0) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), sizes.size(), sizes.data(), strides.data(), first, &result));
  return Tensor(result);
}

// A contiguous tensor in another shape, of the values from `first` on.
inline Tensor reshaped(const Tensor& tensor, Sizes sizes, int64_t first = 0) {
  return strided(tensor, sizes, contiguous_strides(sizes), first);
}

// Whether all neighbouring pixels of (B, L) or (B, L, C) have the same distance, and a pixel's channels are side by
// side.
inline bool has_rows(const Tensor& map) {
  return map.stride(0) == map.size(1) * map.stride(1) && (map.dim() == 2 || map.stride(2) == 1);
}

// The same values with such rows.
inline Tensor rows_of(const Tensor& map) { return has_rows(map) ? map : contiguous(map); }

// (B, L, C) as a matrix (B L, C), without a copy if all pixels have the same distance.
inline Tensor as_rows(const Tensor& map) {
  const bool rows = map.size(0) == 1 || map.stride(0) == map.size(1) * map.stride(1);
  const Tensor source = rows ? map : contiguous(map);
  return strided(source, {map.size(0) * map.size(1), map.size(2)}, {source.stride(1), source.stride(2)});
}

inline Tensor transpose(const Tensor& matrix) {
  return strided(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// The product of two matrices, as a contiguous tensor of `sizes`. Autocast does not know this overload, so it cannot
// change the precision.
inline Tensor matrix_product(const Tensor& a, const Tensor& b, Sizes sizes) {
  const Tensor result = empty(a, sizes, a.scalar_type());
  call("aten::mm", "out", a, b, strided(result, {a.size(0), b.size(1)}, {b.size(1), 1}));
  return result;
}

// (B, L, K, R) as K matrices (B L, R), without a copy if all pixels have the same distance.
inline Tensor as_matrices(const Tensor& maps) {
  const bool rows = maps.size(0) == 1 || maps.stride(0) == maps.size(1) * maps.stride(1);
  const Tensor source = rows ? maps : contiguous(maps);
  return strided(source, {maps.size(2), maps.size(0) * maps.size(1), maps.size(3)},
                 {source.stride(2), source.stride(1), source.stride(3)});
}

// (K, n, m) as (K, m, n).
inline Tensor transposed_matrices(const Tensor& matrices) {
  return strided(matrices, {matrices.size(0), matrices.size(2), matrices.size(1)},
                 {matrices.stride(0), matrices.stride(2), matrices.stride(1)});
}

// The products of K pairs of matrices, (K, n, r) and (K, r, m), as a contiguous tensor.
inline Tensor matrix_products(const Tensor& a, const Tensor& b) {
  const Tensor result = empty(a, {a.size(0), a.size(1), b.size(2)}, a.scalar_type());
  call("aten::bmm", "out", a, b, result);
  return result;
}

inline Tensor sum(const Tensor& tensor, int64_t dim, ScalarType type) {
  return call("aten::sum", "dim_IntList", tensor, std::optional(Sizes(dim)), false, std::optional(type));
}

inline Tensor cumsum(const Tensor& tensor, int64_t dim, ScalarType type) {
  return call("aten::cumsum", "", tensor, dim, std::optional(type));
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

// The type in which values of another are added up.
inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `f` with a value of the type in which the tensors of an operation are added up.
template <typename F>
auto for_accumulation_type(ScalarType type, F f) {
  return type == ScalarType::Double ? f(double()) : f(float());
}

// Calls `f(begin, end)` for parts of a range of at least `grain` numbers, by PyTorch's threads. What `f` throws is
// thrown again here: PyTorch would only tell that something failed.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  struct Call {
    const F& f;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error;
  } call{f};
  const auto run = [](int64_t first, int64_t last, void* context) {
    auto& call = *static_cast<Call*>(context);
    try {
      call.f(first, last);
    } catch (...) {
      if (!call.failed.test_and_set()) call.error = std::current_exception();
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, run, &call));
  if (call.error) std::rethrow_exception(call.error);
}

inline int64_t num_threads() {
  uint32_t result;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&result));
  return result;
}

}  // namespace grootvl
